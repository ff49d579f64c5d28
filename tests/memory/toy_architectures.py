"""Writes small models of other architectures than `toy_model.py` does, whose memory a real llama-server reports.

Random weights in float32, a byte vocabulary, few layers: enough for llama-server to load them and reserve what it
would for a model of that kind. What they say means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy
from toy_model import add_vocabulary

WIDTH = 256
HEADS = 2
HEAD = WIDTH // HEADS
FEED_FORWARD = 384
BLOCKS = 6
CONTEXT = 2048
WINDOW = 200
_INNER = 512
_STATE = 128
_LATENT = 512
_ROTATED = 64

Shapes = dict[str, tuple[int, ...]]
Value = int | float | list[int]

_ATTENTION: Shapes = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
}
_FEED_FORWARD: Shapes = {
    "ffn_gate": (FEED_FORWARD, WIDTH),
    "ffn_up": (FEED_FORWARD, WIDTH),
    "ffn_down": (WIDTH, FEED_FORWARD),
}
_EXPERTS: Shapes = {
    "ffn_gate_inp": (2, WIDTH),
    "ffn_gate_exps": (2, FEED_FORWARD, WIDTH),
    "ffn_up_exps": (2, FEED_FORWARD, WIDTH),
    "ffn_down_exps": (2, WIDTH, FEED_FORWARD),
}
_NORMS: Shapes = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
_NORMS_BEHIND: Shapes = {"post_attention_norm": (WIDTH,), "post_ffw_norm": (WIDTH,)}


def _llama(_: int) -> Shapes:
    return _NORMS | _ATTENTION | _FEED_FORWARD


def _deci(block: int) -> Shapes:
    """A llama whose odd layers have one head for keys and values, and not two."""
    fewer: Shapes = {"attn_k": (HEAD, WIDTH), "attn_v": (HEAD, WIDTH)}
    return _llama(block) | (fewer if block % 2 else {})


def _gemma2(_: int) -> Shapes:
    return _llama(0) | _NORMS_BEHIND


def _olmo2(_: int) -> Shapes:
    return _ATTENTION | _FEED_FORWARD | _NORMS_BEHIND | {"attn_q_norm": (WIDTH,), "attn_k_norm": (WIDTH,)}


def _cohere2(_: int) -> Shapes:
    return {"attn_norm": (WIDTH,)} | _ATTENTION | _FEED_FORWARD


def _gpt_oss(_: int) -> Shapes:
    biases: Shapes = {f"{name}.bias": (shape[0],) for name, shape in _ATTENTION.items()}
    biases |= {f"{name}.bias": shape[:-1] for name, shape in _EXPERTS.items()}
    norms: Shapes = {"attn_norm": (WIDTH,), "post_attention_norm": (WIDTH,), "attn_sinks": (HEADS,)}
    return norms | _ATTENTION | _EXPERTS | biases


def _mamba(_: int) -> Shapes:
    return {
        "attn_norm": (WIDTH,),
        "ssm_in": (2 * _INNER, WIDTH),
        "ssm_conv1d": (_INNER, 4),
        "ssm_conv1d.bias": (_INNER,),
        "ssm_x": (HEADS + 2 * _STATE, _INNER),
        "ssm_dt": (_INNER, HEADS),
        "ssm_dt.bias": (_INNER,),
        "ssm_a.": (_INNER, _STATE),
        "ssm_d.": (_INNER,),
        "ssm_out": (WIDTH, _INNER),
    }


def _lfm2(block: int) -> Shapes:
    if block % 2:
        shapes: Shapes = {
            "shortconv.in_proj": (3 * WIDTH, WIDTH),
            "shortconv.conv": (WIDTH, 3),
            "shortconv.out_proj": (WIDTH, WIDTH),
        }
    else:
        shapes = _ATTENTION | {"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)}
    return _NORMS | _FEED_FORWARD | shapes


def _qwen35(block: int) -> Shapes:
    shapes: Shapes = {"attn_norm": (WIDTH,), "post_attention_norm": (WIDTH,)} | _FEED_FORWARD
    if (block + 1) % 3 == 0:
        attention: Shapes = {"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)} | _ATTENTION
        return shapes | attention | {"attn_q": (2 * WIDTH, WIDTH)}
    return shapes | {
        "attn_qkv": (3 * WIDTH, WIDTH),
        "attn_gate": (WIDTH, WIDTH),
        "ssm_norm": (_STATE,),
        "ssm_dt.bias": (HEADS,),
        "ssm_out": (WIDTH, WIDTH),
        "ssm_conv1d": (3 * WIDTH, 4),
        "ssm_a.": (HEADS,),
        "ssm_alpha": (HEADS, WIDTH),
        "ssm_beta": (HEADS, WIDTH),
    }


def _deepseek2(block: int) -> Shapes:
    key, value = 192, 128
    shapes: Shapes = _NORMS | {
        "attn_q_a_norm": (_LATENT,),
        "attn_kv_a_norm": (_LATENT,),
        "attn_q_a": (_LATENT, WIDTH),
        "attn_q_b": (key, _LATENT),
        "attn_kv_a_mqa": (_LATENT + _ROTATED, WIDTH),
        "attn_k_b": (1, _LATENT, key - _ROTATED),
        "attn_v_b": (1, value, _LATENT),
        "attn_output": (WIDTH, value),
    }
    if block == 0:
        return shapes | _FEED_FORWARD
    shared: Shapes = {f"{name}_shexp": shape for name, shape in _FEED_FORWARD.items()}
    return shapes | _EXPERTS | shared | {"exp_probs_b.bias": (2,)}


_EVERY_SECOND = [HEADS, 0] * (BLOCKS // 2)
_MIXTURE: dict[str, Value] = {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": FEED_FORWARD}
_SSM: dict[str, Value] = {"ssm.conv_kernel": 4, "ssm.state_size": _STATE, "ssm.time_step_rank": HEADS}

ARCHITECTURES: dict[str, tuple[Callable[[int], Shapes], dict[str, Value]]] = {
    "llama": (_llama, {}),
    "deci": (_deci, {"attention.head_count": [HEADS] * BLOCKS, "attention.head_count_kv": [HEADS, 1] * (BLOCKS // 2)}),
    "gemma2": (_gemma2, {"attention.sliding_window": WINDOW}),
    "olmo2": (_olmo2, {"attention.sliding_window": WINDOW}),
    "cohere2": (_cohere2, {"attention.sliding_window": WINDOW, "logit_scale": 1.0}),
    "gpt-oss": (_gpt_oss, {"attention.sliding_window": WINDOW, **_MIXTURE}),
    "mamba": (_mamba, {**_SSM, "ssm.inner_size": _INNER}),
    "lfm2": (
        _lfm2,
        {
            "attention.sliding_window": WINDOW,
            "attention.head_count": _EVERY_SECOND,
            "attention.head_count_kv": _EVERY_SECOND,
            "shortconv.l_cache": 3,
        },
    ),
    "qwen35": (
        _qwen35,
        {
            **_SSM,
            "ssm.inner_size": WIDTH,
            "ssm.group_count": HEADS,
            "full_attention_interval": 3,
            "rope.dimension_sections": [HEAD // 4] * 4,
        },
    ),
    "deepseek2": (
        _deepseek2,
        {
            **_MIXTURE,
            "attention.head_count": 1,
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": _LATENT,
            "attention.kv_lora_rank": _LATENT,
            "attention.key_length": _LATENT + _ROTATED,
            "attention.value_length": _LATENT,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
            "rope.dimension_count": _ROTATED,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.0,
            "leading_dense_block_count": 1,
        },
    ),
}
"""By name: the tensors of each block, and what the header says beside what all say."""

_OUTPUT_NORM = {"lfm2": "token_embd_norm.weight"}
_TIED = frozenset({"gemma2", "cohere2"})


def write_architecture(path: Path, architecture: str) -> Path:
    """Write a small model of that architecture, and return its path."""
    shapes_of, keys = ARCHITECTURES[architecture]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name(architecture)
    said: dict[str, Value] = {
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "block_count": BLOCKS,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.dimension_count": HEAD,
    }
    for name, value in (said | keys).items():
        _add(writer, f"{architecture}.{name}", value)
    tokens = add_vocabulary(writer)
    shapes: Shapes = {
        "token_embd.weight": (tokens, WIDTH),
        _OUTPUT_NORM.get(architecture, "output_norm.weight"): (WIDTH,),
    }
    if architecture not in _TIED:
        shapes["output.weight"] = (tokens, WIDTH)
    for block in range(BLOCKS):
        shapes |= {f"blk.{block}.{_tensor(name)}": shape for name, shape in shapes_of(block).items()}
    _add_tensors(writer, shapes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensor(name: str) -> str:
    """A tensor's name: of a weight, unless it says something else itself; a dot at its end says that it has no word."""
    if name.endswith("."):
        return name[:-1]
    return name if name.endswith(".bias") else f"{name}.weight"


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    match value:
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case list():
            writer.add_array(key, value)


def _add_tensors(writer: gguf.GGUFWriter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    random = numpy.random.default_rng(1)
    for name, shape in shapes.items():
        writer.add_tensor(name, random.normal(0.0, 0.02, shape).astype(numpy.float32))
