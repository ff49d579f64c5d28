"""Hypothesis strategies for runtime settings: anything a person may validly say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args, get_type_hints

from annotated_types import Ge, Le
from hypothesis import strategies as st

from magi_agent.runtime_settings.settings import LoraAdapter, RuntimeSettings, faults_of, setting_names
from magi_agent.vocabulary import StartPolicy

_PRINTABLE = st.characters(exclude_categories=["Cs", "Cc", "Cf", "Co", "Cn", "Zl", "Zp", "Zs"])
"""Characters that show; the one space that counts as printable is left to the strategies that allow it."""

_LINE = st.text(_PRINTABLE | st.just(" "), min_size=1, max_size=30).filter(str.isprintable)
_NAME = st.text(_PRINTABLE, min_size=1, max_size=20).filter(
    lambda name: name.isprintable() and "/" not in name and name != ".."
)
_PLAIN_NAME = st.from_regex(r"[A-Za-z0-9 _.-]{1,20}", fullmatch=True).filter(lambda name: name != "..")
_WORD = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)


def _path(names: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(names, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))


def _ranges(most: int) -> st.SearchStrategy[str]:
    """Lists of numbers and ranges, such as ``0-3,8``."""
    pairs = st.tuples(st.integers(0, most), st.integers(0, most)).map(sorted)
    parts = pairs.map(lambda pair: str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}-{pair[1]}")
    return st.lists(parts, min_size=1, max_size=4).map(",".join)


def _typed(hint: object) -> st.SearchStrategy[Any]:
    """Values of a field's own type, within its bounds."""
    [annotation] = [part for part in get_args(hint) if part is not type(None)] or [hint]
    base, *bounds = get_args(annotation) if hasattr(annotation, "__metadata__") else (annotation,)
    if base is int:
        low = next(bound.ge for bound in bounds if isinstance(bound, Ge))
        high = next(bound.le for bound in bounds if isinstance(bound, Le))
        return st.integers(low, high)  # type: ignore[arg-type]  # the bounds of integers are integers
    if base is bool:
        return st.booleans()
    return st.sampled_from(get_args(annotation))


_ODD: dict[str, st.SearchStrategy[Any]] = {
    "parallel_slots": st.integers(-1, 1024).filter(bool),
    "tensor_split": st.lists(st.floats(0, 1e6), min_size=1, max_size=5).filter(any).map(tuple),
    "gpus": st.lists(
        st.from_regex(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]|GPU-[0-9a-f]{8}-[0-9a-f]{4}", fullmatch=True),
        min_size=1,
        max_size=4,
        unique=True,
    ).map(tuple),
    "lora": st.lists(
        st.builds(LoraAdapter, _path(_PLAIN_NAME), st.floats(-1000, 1000, allow_nan=False)), max_size=3
    ).map(tuple),
    "draft_model": _path(_NAME),
    "projector": st.just("none") | _path(_NAME),
    "chat_template": _LINE,
    "chat_template_file": _path(_NAME),
    "aliases": st.lists(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,20}", fullmatch=True), max_size=4, unique=True
    ).map(tuple),
    "extra_flags": st.lists(
        _WORD.map("--{}".format)
        | st.builds("--{}={}".format, _WORD, _LINE.filter(lambda text: not set("$;") & set(text))),
        max_size=3,
    ).map(tuple),
    "binary": st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True),
    "start_policy": st.sampled_from(StartPolicy),
    "rope_scale": st.floats(1e-9, 1e9),
    "rope_freq_base": st.floats(1e-9, 1e9),
    "rope_freq_scale": st.floats(1e-9, 1e9),
    "cpu_quota": st.floats(0.01, 8192),
    "cpu_affinity": _ranges(8191),
    "numa_nodes": _ranges(1023),
}
_HINTS = get_type_hints(RuntimeSettings, include_extras=True)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    name: _ODD[name] if name in _ODD else _typed(_HINTS[name]) for name in setting_names()
}
"""For each setting, values that are valid by themselves."""


def _go_together(settings: RuntimeSettings) -> RuntimeSettings:
    """The same settings, but for those that go with no other."""
    unwelcome = {fault.name: None for fault in faults_of(settings)}
    if "numa_nodes" in unwelcome:
        unwelcome["numa_policy"] = None
    return replace(settings, **unwelcome)


RUNTIME_SETTINGS: st.SearchStrategy[RuntimeSettings] = st.fixed_dictionaries({}, optional=FIELDS).map(
    lambda values: _go_together(RuntimeSettings(**values))
)
"""Any settings that are valid."""
