"""The size of what a server keeps for its tokens: KV cache and recurrent states.

By llama.cpp's rules: ``llama_context`` pads the context to 256 tokens, and each slot's share of it where slots have
caches of their own; ``llama_kv_cache_iswa`` gives layers with a sliding window room for the window of each slot that
shares the cache, plus one physical batch, padded to 256; ``llama_memory_recurrent`` keeps float32 states, one for
each slot.
"""

from dataclasses import dataclass
from typing import Final

from magi_agent.gguf.ggml import TENSOR_TYPES
from magi_agent.memory.layers import Layer, Layers, Reach

_PADDING: Final = 256
_FLOAT: Final = 4
_TYPES: Final = {kind.name: kind for kind in TENSOR_TYPES.values()}
_CELL: Final = 56
"""Bytes of bookkeeping for each cell: position, shift, and 256 bits for the sequences (``llama_kv_cells``)."""


@dataclass(frozen=True, slots=True)
class Context:
    """The context as llama-server makes it of the settings."""

    tokens: int
    """Of all slots together."""
    slots: int
    unified: bool
    """One cache for all slots; else each has its own."""
    ubatch: int
    """Tokens of a physical batch."""
    batch: int

    @property
    def streams(self) -> int:
        """Caches beside each other."""
        return 1 if self.unified else self.slots

    @property
    def cells(self) -> int:
        """Tokens that one cache has room for."""
        return self.tokens // self.streams

    def window_cells(self, window: int) -> int:
        """Tokens that one cache has room for, in a layer with a sliding window."""
        return padded(min(self.cells, window * (self.slots if self.unified else 1) + self.ubatch))


def context_of(tokens: int, slots: int, batch: int, ubatch: int, *, unified: bool, causal: bool = True) -> Context:
    """The context for so many tokens."""
    if causal:
        batch = min(tokens, batch)
    ubatch = min(batch, ubatch)
    whole = padded(tokens)
    if not unified:
        whole = padded(max(1, whole // slots)) * slots
    return Context(whole, slots, unified, ubatch, batch)


def padded(tokens: int) -> int:
    """Tokens, rounded up as llama.cpp rounds them."""
    return -(-tokens // _PADDING) * _PADDING


def cache_bytes(layers: Layers, context: Context, type_k: str, type_v: str, *, transposed: bool) -> list[int]:
    """Bytes of each layer's keys and values; ``transposed`` values are those of a server without flash attention."""
    widest = max((layer.values for layer in layers.layers), default=0)
    return [
        _layer_bytes(layer, layers, context, type_k, type_v, widest if transposed else None) for layer in layers.layers
    ]


def state_bytes(layers: Layers, context: Context) -> list[int]:
    """Bytes of each layer's recurrent states."""
    return [layer.state * _FLOAT * context.slots for layer in layers.layers]


def bookkeeping_bytes(layers: Layers, context: Context) -> int:
    """Bytes on the host that say what the cells hold."""
    reaches = {layer.reach for layer in layers.layers}
    cells = context.cells if Reach.ALL in reaches else 0
    cells += context.window_cells(layers.window) if Reach.WINDOW in reaches else 0
    return cells * context.streams * _CELL


def row_bytes(elements: int, cache_type: str) -> int:
    """Bytes of so many elements of a cache type."""
    kind = _TYPES[cache_type]
    return -(-elements // kind.block_size) * kind.block_bytes


def _layer_bytes(
    layer: Layer, layers: Layers, context: Context, type_k: str, type_v: str, widest_values: int | None
) -> int:
    if layer.reach is Reach.NONE:
        return 0
    cells = context.window_cells(layers.window) if layer.reach is Reach.WINDOW else context.cells
    values = layer.values if widest_values is None else widest_values
    keys = row_bytes(layer.keys, type_k) + row_bytes(layer.indexer, type_k)
    return (keys + row_bytes(values, type_v) + row_bytes(layer.indexer_values, type_v)) * cells * context.streams
