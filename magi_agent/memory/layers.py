"""Which layers of a model keep what: keys and values of all tokens, of a window of them, or a state.

The rules are llama.cpp's (``llama_model::create_memory``, ``load_arch_hparams`` of each architecture,
``llama_hparams``), read at release b10435. What is not named here keeps keys and values of all tokens in every layer,
as llama.cpp's default is. ``tests/memory`` holds one of each kind against a real llama-server; toy models of most
others were compared once, by hand. Not run at all, and resting on the reading alone: afmoe, cohere2moe, exaone-moe,
gemma3n, gemma4, laguna, mellum, mimo2, muse-glimmer, plamo3, step35, rwkv6qwen2, rwkv7, arwkv7 and the encoders; and
deepseek4, whose compressed cache is reckoned as a full one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from magi_agent.gguf.facts import HeaderFacts
from magi_agent.memory.need import NeedUnknown

MOST_LAYERS: Final = 1024
"""llama.cpp itself takes 512 (LLAMA_MAX_LAYERS)."""


class Reach(StrEnum):
    """Of which tokens a layer keeps keys and values."""

    ALL = "all"
    WINDOW = "window"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer keeps."""

    reach: Reach
    keys: int = 0
    """Elements for each token."""
    values: int = 0
    state: int = 0
    """Elements of recurrent state, in float32, for each sequence."""
    indexer: int = 0
    """Elements that a sparse attention's indexer keeps for each token, beside the keys; as keys are kept."""
    indexer_values: int = 0


@dataclass(frozen=True, slots=True)
class Layers:
    """All layers of a model."""

    layers: tuple[Layer, ...]
    window: int
    """Tokens that a sliding window reaches; 0 where there is none."""
    is_latent: bool = False
    """Keys hold a compressed form of both keys and values (MLA)."""

    @property
    def is_recurrent(self) -> bool:
        """Whether it keeps states that cannot be rolled back token by token."""
        return any(layer.state for layer in self.layers)

    @property
    def has_cache(self) -> bool:
        """Whether anything is kept for tokens."""
        return any(layer.reach is not Reach.NONE for layer in self.layers)


@dataclass(frozen=True, slots=True)
class _Window:
    """How an architecture's layers with a sliding window are told."""

    period: int | None
    """Every so many layers one is a full one; ``None`` where the header lists the layers."""
    default: int = 0
    """Tokens, where the header does not say."""
    fixed: int | None = None
    """Tokens, whatever the header says, unless it says 0."""
    full_first: bool = False
    """The full one comes first of its period, not last."""
    takes_list: bool = False
    """The header may list the layers instead."""
    layers: int | None = None
    """Only models with so many layers have windows."""


_WINDOWS: Final[Mapping[str, _Window]] = MappingProxyType(
    {
        "afmoe": _Window(4),
        "cohere2": _Window(4),
        "cohere2moe": _Window(4, full_first=True, takes_list=True),
        "exaone-moe": _Window(4, default=128),
        "exaone4": _Window(4, default=4096, layers=64),
        "gemma2": _Window(2, default=4096),
        "gemma3": _Window(6),
        "gemma3n": _Window(5),
        "gemma4": _Window(None, takes_list=True),
        "gpt-oss": _Window(2),
        "laguna": _Window(4, full_first=True),
        "llama4": _Window(4, default=8192, fixed=8192),
        "mellum": _Window(4, takes_list=True),
        "mimo2": _Window(None, takes_list=True),
        "muse-glimmer": _Window(4, takes_list=True),
        "olmo2": _Window(4),
        "plamo3": _Window(8),
        "smallthinker": _Window(4, fixed=4096, full_first=True),
        "step35": _Window(None, takes_list=True),
    }
)
_WINDOW_WHERE_ATTENTION: Final = frozenset({"lfm2", "lfm2moe"})
"""All their layers with attention have the window, if the header names one."""
_WITHOUT_CACHE: Final = frozenset(
    {
        *("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert", "jina-bert-v2"),
        *("jina-bert-v3", "gemma-embedding", "dream", "llada", "llada-moe", "rnd1", "wavtokenizer-dec"),
    }
)
_RECURRENT: Final = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
_BOTH_IN_EACH_LAYER: Final = frozenset({"falcon-h1"})
_BY_KV_HEADS: Final = frozenset({"jamba", "granitehybrid", "plamo2", "kimi-linear", "lfm2", "lfm2moe"})
"""A layer without heads for keys and values is a recurrent one."""
_BY_KV_HEADS_AND_WIDTH: Final = frozenset({"nemotron_h", "nemotron_h_moe"})
"""The same, and a layer with a feed-forward network is neither."""
_BY_INTERVAL: Final = frozenset({"qwen3next", "qwen35", "qwen35moe"})
_INTERVAL: Final = 4
_CACHE_WITHOUT_NEXTN: Final = frozenset({"step35", "hy_v3", "glm-dsa", "mimo2", "deepseek32"})
"""Their layers that predict further tokens keep nothing, unless they draft."""
_INDEXED: Final = frozenset({"deepseek32", "glm-dsa"})
_INDEXED_WITH_VALUES: Final = frozenset({"minimax-m3"})
_LAYERS_WITH_CACHE_IN_GEMMA3N: Final = 20
_TOKEN_SHIFTS: Final = 2


def layers_of(facts: HeaderFacts) -> Layers:
    """What the layers of a model keep. Raises ``NeedUnknown`` where its header does not say enough."""
    arch = facts.architecture or ""
    count = facts.block_count or 0
    if not 0 < count <= MOST_LAYERS:
        raise NeedUnknown(f"the header names {facts.block_count or 'no'} blocks, so what they keep cannot be told")
    windowed, window = _windowed(facts, arch, count)
    proper = count - min(facts.nextn_predict_layers or 0, count - 1)
    with_cache = proper if arch in _CACHE_WITHOUT_NEXTN else count
    if arch == "gemma3n":
        with_cache = min(count, _LAYERS_WITH_CACHE_IN_GEMMA3N)
    elif arch == "gemma4":
        with_cache = max(0, count - (facts.shared_kv_layers or 0))
    state = _state(facts)
    layers = tuple(
        _layer(facts, arch, number, windowed[number], state, proper) if number < with_cache else Layer(Reach.NONE)
        for number in range(count)
    )
    return Layers(layers, window if any(windowed) else 0, bool(facts.key_length_mla and facts.value_length_mla))


def heads(facts: HeaderFacts, number: int = 0) -> int:
    """Heads of attention in a layer."""
    return _of_layer(facts.head_count, number, 0)


def key_length(facts: HeaderFacts) -> int:
    """Elements of one head's key."""
    return facts.key_length if facts.key_length is not None else _head_size(facts)


def value_length(facts: HeaderFacts) -> int:
    """Elements of one head's value."""
    return facts.value_length if facts.value_length is not None else _head_size(facts)


def _layer(facts: HeaderFacts, arch: str, number: int, windowed: bool, state: int, proper: int) -> Layer:
    attends, recurs = _attends_and_recurs(facts, arch, number, proper)
    if not attends:
        return Layer(Reach.NONE, state=state if recurs else 0)
    kv_heads = _of_layer(facts.head_count_kv or facts.head_count, number, heads(facts, number))
    key, value = key_length(facts), value_length(facts)
    if windowed:
        key = facts.key_length_swa if facts.key_length_swa is not None else key
        value = facts.value_length_swa if facts.value_length_swa is not None else value
    latent = bool(facts.key_length_mla and facts.value_length_mla)
    indexer = indexer_values = 0
    if arch in _INDEXED and number < proper:
        indexer = facts.indexer_key_length or 0
    elif arch in _INDEXED_WITH_VALUES and number >= (facts.leading_dense_block_count or 0):
        indexer, indexer_values = facts.indexer_key_length or 0, value
    return Layer(
        Reach.WINDOW if windowed else Reach.ALL,
        keys=key * kv_heads,
        values=0 if latent else value * kv_heads,
        state=state if recurs else 0,
        indexer=indexer,
        indexer_values=indexer_values,
    )


def _attends_and_recurs(facts: HeaderFacts, arch: str, number: int, proper: int) -> tuple[bool, bool]:
    if arch in _WITHOUT_CACHE:
        return False, False
    if arch in _RECURRENT:
        return False, True
    if arch in _BOTH_IN_EACH_LAYER:
        return True, True
    no_kv_heads = _of_layer(facts.head_count_kv or facts.head_count, number, 1) == 0
    if arch in _BY_KV_HEADS:
        return not no_kv_heads, no_kv_heads and number < proper
    if arch in _BY_KV_HEADS_AND_WIDTH:
        if _of_layer(facts.feed_forward_length, number, 0):
            return False, False
        return not no_kv_heads, no_kv_heads and number < proper
    if arch in _BY_INTERVAL:
        if number >= proper:
            return False, False
        if len(facts.recurrent_layers) > 1:
            recurs = bool(_of_layer(facts.recurrent_layers, number, 0))
        else:
            recurs = (number + 1) % (facts.full_attention_interval or _INTERVAL) != 0
        return not recurs, recurs
    return True, False


def _windowed(facts: HeaderFacts, arch: str, count: int) -> tuple[list[bool], int]:
    """For each layer, whether it has a sliding window; and the window, in tokens."""
    none = [False] * count
    if arch in _WINDOW_WHERE_ATTENTION:
        window = facts.sliding_window or 0
        return ([True] * count if window else none), window
    rule = _WINDOWS.get(arch)
    if rule is None or (rule.layers is not None and rule.layers != count):
        return none, 0
    window = rule.default if facts.sliding_window is None else facts.sliding_window
    if not window:
        return none, 0
    window = rule.fixed or window
    pattern = facts.sliding_window_pattern
    if rule.takes_list and len(pattern) > 1:
        return [bool(_of_layer(pattern, number, 0)) for number in range(count)], window
    period = pattern[0] if len(pattern) == 1 and rule.period is not None else rule.period
    if period is None:
        return none, window
    if period == 0:
        return [True] * count, window
    full = 0 if rule.full_first else period - 1
    return [number % period != full for number in range(count)], window


def _state(facts: HeaderFacts) -> int:
    """Elements of one recurrent layer's state (``llama_hparams::n_embd_r`` and ``n_embd_s``)."""
    width = facts.embedding_length or 0
    if facts.wkv_head_size:
        shifts = _TOKEN_SHIFTS if facts.token_shift_count is None else facts.token_shift_count
        return width * (shifts + facts.wkv_head_size)
    if facts.shortconv_cache:
        return width * (facts.shortconv_cache - 1)
    kernel, inner, state = facts.ssm_conv_kernel or 0, facts.ssm_inner_size or 0, facts.ssm_state_size or 0
    if facts.kda_head_dim:
        all_heads = heads(facts) * facts.kda_head_dim
        return 3 * (kernel - 1 if kernel else 3) * all_heads + facts.kda_head_dim * all_heads
    return max(kernel - 1, 0) * (inner + 2 * (facts.ssm_group_count or 0) * state) + state * inner


def _head_size(facts: HeaderFacts) -> int:
    count = heads(facts)
    return (facts.embedding_length or 0) // count if count else 0


def _of_layer(values: tuple[int, ...], number: int, default: int) -> int:
    """One value for all layers, or one a layer."""
    if not values:
        return default
    if len(values) == 1:
        return values[0]
    return values[number] if number < len(values) else default
