"""What a llama-server does where nothing is set, as far as memory depends on it.

The defaults stand in the build's own ``--help`` ("default: 2048"); where a build was not asked, or is silent, those of
release b10434 are taken. How a CPU keeps weights is llama.cpp's ``ggml_repack_get_optimal_repack_type``, and before it
that of AMX: ``ggml_backend_amx_get_alloc_size``.
"""

import platform
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from magi_agent.runtime_settings.known_options import KnownOptions

_DEFAULT: Final = re.compile(r"default: '?(-?[\w.]+)")
_MIB: Final = 1 << 20
_Q4_0, _Q4_1, _Q8_0, _Q2_K, _Q4_K, _Q5_K, _Q6_K, _IQ4_NL, _IQ4_XS, _MXFP4 = 2, 3, 8, 10, 12, 13, 14, 20, 23, 39
_ONLY_WITH_AMX: Final = _IQ4_XS
_AMX_BLOCKS: Final = {_Q8_0: (34, 4), _Q4_K: (144, 4), _Q5_K: (176, 4), _IQ4_XS: (136, 2)}
"""Bytes of a block, and how many more AMX keeps of each: sums, and scales that are unpacked."""
_AMX: Final = frozenset({"amx_tile", "amx_int8", "avx512_vnni"})


@dataclass(frozen=True, slots=True)
class Build:
    """One llama-server on one kind of CPU."""

    context: int = 0
    """Tokens; 0 for what the model was trained with."""
    slots: int = -1
    """-1 for ``automatic_slots``, which share one cache."""
    automatic_slots: int = 4
    batch: int = 2048
    ubatch: int = 512
    flash_attention: bool = True
    """What ``auto`` comes to."""
    gpu_layers: int = -1
    """-1 for all that fit."""
    fits: bool = True
    """It makes context and GPU layers smaller where memory is short."""
    fit_margin: int = 1024 * _MIB
    """Bytes that it leaves free of each GPU, or of the host where there is none."""
    fit_least_context: int = 4096
    """Tokens below which it does not go."""
    prompt_cache: int = 8192 * _MIB
    """Bytes of host memory for prompts of earlier requests; -1 for as many as there are."""
    checkpoints: int = 32
    """Most copies a slot keeps of what cannot be rolled back: sliding windows, recurrent states."""
    repacked: frozenset[int] = frozenset()
    """ggml types whose matrices the CPU keeps in another order, as copies."""

    def copy_bytes(self, kind: int, size: int) -> int:
        """Bytes of the copy that the CPU keeps of ``size`` bytes of matrices of a ggml type."""
        if kind not in self.repacked:
            return 0
        block, more = _AMX_BLOCKS.get(kind, (1, 0)) if _ONLY_WITH_AMX in self.repacked else (1, 0)
        return size // block * (block + more)


def build_of(known: KnownOptions | None, repacked: Collection[int] = ()) -> Build:
    """What a build with these options does; ``None`` for one that was not asked."""
    plain = Build(repacked=frozenset(repacked))
    if known is None:
        return plain
    flash = known["--flash-attn"]
    layers = _word(known, "--gpu-layers") or _word(known, "--n-gpu-layers")
    slots = _number(known, "--parallel", 1)
    has_repack = known["--no-repack"] is not None or known["--repack"] is not None
    return Build(
        context=_number(known, "--ctx-size", plain.context),
        slots=slots,
        batch=_number(known, "--batch-size", plain.batch),
        ubatch=_number(known, "--ubatch-size", plain.ubatch),
        flash_attention=flash is not None and flash.takes_value,
        gpu_layers=-1 if layers in (None, "auto", "all", "-1") else _number(known, "--gpu-layers", 0),
        fits=known["--fit"] is not None,
        fit_margin=_number(known, "--fit-target", plain.fit_margin // _MIB) * _MIB,
        fit_least_context=_number(known, "--fit-ctx", plain.fit_least_context),
        prompt_cache=_prompt_cache(_number(known, "--cache-ram", 0)),
        checkpoints=_number(known, "--ctx-checkpoints", 0),
        repacked=plain.repacked if has_repack else frozenset(),
    )


def repacked_types(flags: Collection[str], machine: str | None = None) -> frozenset[int]:
    """The ggml types that a CPU with these flags of ``/proc/cpuinfo`` keeps in another order.

    That the kernel has AMX is among the flags; that the build has it is taken for granted, as the copies are what a
    server would be ended for that is given no memory for them.
    """
    machine = platform.machine() if machine is None else machine
    if machine in ("x86_64", "AMD64") and "avx2" in flags:
        types = {_Q4_0, _Q4_K, _IQ4_NL, _MXFP4}
        if "avx512f" in flags:
            types.add(_Q2_K)
        if _AMX.issubset(flags):
            types |= {_Q4_0, _Q4_1, _Q8_0, _Q4_K, _Q5_K, _Q6_K, _IQ4_XS}
        return frozenset(types)
    if machine == "aarch64" and "asimddp" in flags:
        return frozenset({_Q4_0, _Q4_K, _Q5_K, _Q6_K, _Q8_0, _IQ4_NL, _MXFP4})
    return frozenset()


def _prompt_cache(mebibytes: int) -> int:
    return -1 if mebibytes < 0 else mebibytes * _MIB


def _word(known: KnownOptions, name: str) -> str | None:
    """The default that the help names for an option."""
    option = known[name]
    found = _DEFAULT.search(option.text) if option else None
    return found[1] if found else None


def _number(known: KnownOptions, name: str, otherwise: int) -> int:
    word = _word(known, name)
    try:
        return otherwise if word is None else int(word)
    except ValueError:
        return otherwise
