"""The size of compute buffers and of the output buffer.

llama.cpp reserves room for the graph of one physical batch, in which ggml's allocator lays tensors over each other as
they come and go. How many live at once follows from the graph; the counts here are those that fit the buffers which
release b10434 reported for some hundred toy models of all its families and for two real ones: the feed-forward network
holds three tensors of its width, one of the queries' and three of the model's; attention without flash attention holds
the scores of all heads. Other graphs than those of the real two are met less exactly, within about a quarter; the
inputs for each layer that Gemma 3n and 4 have are left out.
"""

from typing import Final

from magi_agent.gguf.facts import HeaderFacts
from magi_agent.memory.cache import Context
from magi_agent.memory.layers import Layers, Reach, heads, key_length

_FLOAT: Final = 4
_HALF: Final = 2
_INPUTS: Final = 24
"""Bytes of inputs a token: its id, its position, and where its keys and values go."""
_INDEXER: Final = 6
"""Bytes for each pair of a token and a cell, in which a sparse attention's scores are made."""
_RWKV: Final = 17
"""Tensors of the model's width that live at once in an RWKV layer."""


def compute_bytes(facts: HeaderFacts, layers: Layers, context: Context, *, flash_attention: bool, outputs: int) -> int:
    """Bytes of the buffer in which one physical batch is computed, with so many outputs."""
    tokens = context.ubatch
    live = max(
        tokens * _FLOAT * max(_feed_forward(facts), _recurrent(facts)) + _state(layers, context),
        tokens * _FLOAT * _attention(facts, layers)
        + (0 if flash_attention else _scores(facts, layers, context) * _FLOAT),
    )
    live += mask_bytes(layers, context, flash_attention=flash_attention) + _indexer(layers, context)
    width = facts.embedding_length or 0
    at_the_end = outputs * _FLOAT * ((facts.vocabulary_size or 0) + width) + tokens * _FLOAT * width
    return max(live, at_the_end) + tokens * _INPUTS


def input_bytes(facts: HeaderFacts, layers: Layers, context: Context, *, flash_attention: bool) -> int:
    """Bytes on the host of what goes to GPUs and comes back for one physical batch; with GPUs, there is no more."""
    embeddings = context.ubatch * (facts.embedding_length or 0) * _FLOAT * (2 if flash_attention else 3)
    return embeddings + mask_bytes(layers, context, flash_attention=flash_attention) + context.ubatch * _INPUTS


def output_bytes(facts: HeaderFacts, outputs: int, *, embeddings: bool) -> int:
    """Bytes of the buffer for so many outputs: logits, and embeddings where the server makes them."""
    width = (facts.vocabulary_size or 0) + ((facts.embedding_length or 0) if embeddings else 0)
    return outputs * width * _FLOAT


def mask_bytes(layers: Layers, context: Context, *, flash_attention: bool) -> int:
    """Bytes of the masks that say which token attends to which cell."""
    element = _HALF if flash_attention else _FLOAT
    if not layers.has_cache:
        return 0 if layers.is_recurrent else context.ubatch * context.ubatch * element
    reaches = {layer.reach for layer in layers.layers}
    cells = context.cells if Reach.ALL in reaches else 0
    cells += context.window_cells(layers.window) if Reach.WINDOW in reaches else 0
    return cells * context.ubatch * element


def _feed_forward(facts: HeaderFacts) -> int:
    """Elements a token that live at once around a feed-forward network."""
    width = facts.embedding_length or 0
    queries = heads(facts) * key_length(facts)
    inner = 3 * max(facts.feed_forward_length, default=0)
    if facts.expert_count and (used := facts.expert_used_count):
        narrow = facts.expert_feed_forward_length or max(facts.feed_forward_length, default=0)
        inner = max(inner, used * (3 * narrow + 2 * width))
    return inner + 3 * width + min(queries, 2 * width)


def _attention(facts: HeaderFacts, layers: Layers) -> int:
    """Elements a token that live at once around attention, without its scores."""
    if not layers.has_cache:
        return 0
    queries = max(heads(facts, number) for number in range(len(layers.layers))) * key_length(facts)
    keys = max(layer.keys for layer in layers.layers)
    return 3 * queries + 2 * (facts.embedding_length or 0) + 2 * keys


def _scores(facts: HeaderFacts, layers: Layers, context: Context) -> int:
    """Elements of attention's scores, of the layer with most."""
    most = 0
    for number, layer in enumerate(layers.layers):
        if layer.reach is not Reach.NONE:
            cells = context.cells if layer.reach is Reach.ALL else context.window_cells(layers.window)
            most = max(most, cells * heads(facts, number))
    return most * context.ubatch


def _recurrent(facts: HeaderFacts) -> int:
    """Elements a token that live at once in a recurrent layer."""
    width = facts.embedding_length or 0
    if facts.wkv_head_size:
        return _RWKV * width
    inner = heads(facts) * facts.kda_head_dim if facts.kda_head_dim else facts.ssm_inner_size or 0
    if not inner:
        return 0
    convolved = inner + 2 * (facts.ssm_group_count or 0) * (facts.ssm_state_size or 0)
    return 3 * convolved + 3 * inner + width


def _state(layers: Layers, context: Context) -> int:
    """Bytes of one layer's states, which a recurrent layer copies."""
    return max(layer.state for layer in layers.layers) * _FLOAT * context.slots


def _indexer(layers: Layers, context: Context) -> int:
    if not any(layer.indexer and layers.is_latent for layer in layers.layers):
        return 0
    return context.cells * context.ubatch * _INDEXER
