"""How each runtime setting is passed on to llama-server: the one table of options that settings stand for.

Builds call some options by other names; the table lists them newest first, and what the installed build knows decides.
Whatever a person can put any character into travels in the environment where the build has a variable for it, the rest
in argv: systemd up to 253 garbles ``$`` and ``;`` in a transient unit's argv after a ``daemon-reload``, and never in
its environment.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from magi_agent.runtime_settings.known_options import KnownOption, KnownOptions
from magi_agent.runtime_settings.settings import Fault, LoraAdapter, RuntimeSettings

_ALL_LAYERS: Final = "all"
_MORE_THAN_ANY: Final = "999"
"""Layers, for builds without a word for all of them."""


class Form(StrEnum):
    """What an option looks like."""

    VALUE = "value"
    """The name, then the value."""
    SWITCH = "switch"
    """The name for yes, ``--no-`` and the name for no."""
    TEXT = "text"
    """A value with any character: in the environment where that can be."""


@dataclass(frozen=True, slots=True)
class Passing:
    """What one setting is on the command line."""

    setting: str
    names: tuple[str, ...]
    """Newest first."""
    form: Form = Form.VALUE
    variable: str | None = None
    """The environment variable to assume where the build was not asked; for ``TEXT`` only."""
    written: Callable[[Any], str] = field(default=str)


def _listed(values: Collection[object]) -> str:
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _number(value: float) -> str:
    return f"{value:.10g}"


PASSINGS: Final = (
    Passing("n_gpu_layers", ("--n-gpu-layers", "--gpu-layers")),
    Passing("ctx_size", ("--ctx-size",)),
    Passing("n_threads", ("--threads",)),
    Passing("n_threads_batch", ("--threads-batch",)),
    Passing("batch_size", ("--batch-size",)),
    Passing("ubatch_size", ("--ubatch-size",)),
    Passing("parallel_slots", ("--parallel",)),
    Passing("flash_attention", ("--flash-attn",)),
    Passing("cache_type_k", ("--cache-type-k",)),
    Passing("cache_type_v", ("--cache-type-v",)),
    Passing("mmap", ("--mmap",), Form.SWITCH),
    Passing("mlock", ("--mlock",), Form.SWITCH),
    Passing("split_mode", ("--split-mode",)),
    Passing("tensor_split", ("--tensor-split",), written=_listed),
    Passing("main_gpu", ("--main-gpu",)),
    Passing("n_cpu_moe", ("--n-cpu-moe",)),
    Passing("draft_model", ("--spec-draft-model", "--model-draft"), Form.TEXT, "LLAMA_ARG_SPEC_DRAFT_MODEL"),
    Passing("draft_n_gpu_layers", ("--spec-draft-ngl", "--gpu-layers-draft", "--n-gpu-layers-draft")),
    Passing("draft_max", ("--spec-draft-n-max", "--draft-max")),
    Passing("draft_min", ("--spec-draft-n-min", "--draft-min")),
    Passing("rope_scaling", ("--rope-scaling",)),
    Passing("rope_scale", ("--rope-scale",), written=_number),
    Passing("rope_freq_base", ("--rope-freq-base",), written=_number),
    Passing("rope_freq_scale", ("--rope-freq-scale",), written=_number),
    Passing("yarn_orig_ctx", ("--yarn-orig-ctx",)),
    Passing("pooling", ("--pooling",)),
    Passing("chat_template", ("--chat-template",), Form.TEXT, "LLAMA_ARG_CHAT_TEMPLATE"),
    Passing("chat_template_file", ("--chat-template-file",), Form.TEXT, "LLAMA_ARG_CHAT_TEMPLATE_FILE"),
    Passing("reasoning", ("--reasoning",)),
    Passing("reasoning_format", ("--reasoning-format",)),
    Passing("reasoning_budget", ("--reasoning-budget",)),
    Passing("numa", ("--numa",)),
)
"""The settings that are one option each. Modes, LoRA adapters and extra flags are more than that."""

LOAD_MODE: Final = "--load-mode"
"""What newer builds have in place of options for mmap and mlock, which they call deprecated."""
LOAD_MODES: Final = {
    "none": {"mmap": False},
    "mmap": {"mmap": True},
    "mlock": {"mmap": False, "mlock": True},
    "mmap+mlock": {"mmap": True, "mlock": True},
}
"""What its values mean; without it, a build maps the file where it can."""
MODES: Final = {"embedding": ("--embeddings", "--embedding"), "rerank": ("--reranking", "--rerank")}
LORA: Final = ("--lora-scaled",)
_IN_LOAD_MODE: Final = frozenset({"mmap", "mlock"})
_LORA_IN_ONE_WORD: Final = "FNAME:SCALE"
_SPECULATION: Final = "--spec-type"
_BY_DRAFT_MODEL: Final = "draft-simple"
_LIKE_A_FLAG: Final = re.compile(r"-[^0-9.]")
_DOWNLOADS: Final = "download weights from the internet"
_RUNS_TOOLS: Final = "do not enable in untrusted environments"
"""What the help says of options by which requests reach what is outside of llama-server."""

RESERVED: Final = frozenset(
    {
        *(name for passing in PASSINGS for name in passing.names),
        *(f"--no-{passing.names[0][2:]}" for passing in PASSINGS if passing.form is Form.SWITCH),
        *(name for names in MODES.values() for name in names),
        LOAD_MODE,
        *("--host", "--port", "--reuse-port", "--model", "--alias", "--metrics", "--mmproj", "--lora", "--lora-scaled"),
        # What opens the server's door, fetches or writes files, or runs tools is nobody's extra flag.
        *("--api-key", "--api-key-file", "--api-prefix", "--path", "--media-path", "--slot-save-path", "--tools"),
        *("--tools-runtime", "--mcp-servers-config", "--mcp-servers-json", "--ui-mcp-proxy", "--webui-mcp-proxy"),
        *("--agent", "--log-file", "--models-dir", "--models-preset"),
        *("--model-url", "--docker-repo", "--hf-repo", "--hf-file", "--hf-token", "--mmproj-url", "--rpc"),
        *("--ssl-key-file", "--ssl-cert-file", "--help", "--version", "--list-devices", "--completion-bash"),
        *("--control-vector", "--control-vector-scaled", "--grammar-file", "--json-schema-file"),
        *("--lookup-cache-static", "--lookup-cache-dynamic", "--hf-repo-v", "--hf-file-v", "--hf-repo-draft"),
        *("--spec-draft-hf", "--ui-config-file", "--webui-config-file", "--model-vocoder", "--props"),
        *("--log-prompts-dir", "--cache-list", "--usage"),
    }
)
"""Options that are a setting's, or the agent's own, or too dangerous to be anybody's."""


@dataclass(slots=True)
class Passed:
    """Settings as llama-server gets them."""

    argv: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    """What this llama-server does not know."""


def passed(settings: RuntimeSettings, known: KnownOptions | None) -> Passed:
    """``settings`` for a build that knows ``known``; for the newest build there is where nobody asked."""
    out = Passed()
    has_load_mode = known is not None and known[LOAD_MODE] is not None
    if has_load_mode and (load_mode := _load_mode(settings)):
        out.argv += [LOAD_MODE, load_mode]
    for passing in PASSINGS:
        value = getattr(settings, passing.setting)
        if value is not None and not (has_load_mode and passing.setting in _IN_LOAD_MODE):
            _pass_on(passing, value, known, out)
    if settings.mode in MODES and (name := _named(settings.mode, MODES[settings.mode], known, out, "mode")):
        out.argv.append(name)
    if settings.lora and (name := _named("a LoRA adapter", LORA, known, out, "lora")):
        _pass_adapters(name, settings.lora, known[name] if known else None, out)
    if settings.draft_model:
        _pass_speculation(settings, known, out)
    for flag in settings.extra_flags or ():
        _pass_flag(flag, known, out)
    return out


def disallowed(settings: RuntimeSettings, allowed: Collection[str], known: KnownOptions | None) -> Iterator[Fault]:
    """The extra flags that nobody may give, or that the configuration does not name."""
    for flag in settings.extra_flags or ():
        name, _, value = flag.partition("=")
        option = known[name] if known else None
        if not RESERVED.isdisjoint(option.names if option else (name,)):
            yield Fault("extra_flags", f"{name} is no extra flag: a setting stands for it, or the agent alone sets it")
        elif option is not None and _DOWNLOADS in option.text:
            yield Fault("extra_flags", f"{name} is no extra flag: it may fetch models")
        elif option is not None and _RUNS_TOOLS in option.text:
            yield Fault("extra_flags", f"{name} is no extra flag: llama-server itself calls it dangerous")
        elif name not in allowed:
            yield Fault(
                "extra_flags", f"{name} is not allowed; servers.allowed_flags in agent.toml names those that are"
            )
        elif known is None:
            # Nobody can tell whether it takes a value: what stands there as one might be a flag of its own.
            yield Fault("extra_flags", f"{name} cannot be checked, since the llama-server does not say what it can do")
        elif _LIKE_A_FLAG.match(value):
            yield Fault("extra_flags", f"the value of {name} looks like a flag")


def _pass_on(passing: Passing, value: Any, known: KnownOptions | None, out: Passed) -> None:
    if passing.form is Form.SWITCH:
        _pass_switch(passing, value, known, out)
        return
    name = _named(f"{passing.setting} = {value}", passing.names, known, out, passing.setting)
    if name is None:
        return
    option = known[name] if known else None
    if passing.setting == "flash_attention" and option is not None and not option.takes_value:
        # Until it took a value, the flag alone switched it on.
        out.argv += [name] if value == "on" else []
        return
    written = _layers(option) if "gpu_layers" in passing.setting and value == -1 else passing.written(value)
    variable = (option.variable if option else passing.variable) if passing.form is Form.TEXT else None
    if variable:
        out.environment[variable] = written
    else:
        out.argv += [name, written]


def _pass_switch(passing: Passing, value: bool, known: KnownOptions | None, out: Passed) -> None:
    name = passing.names[0]
    negated = f"--no-{name[2:]}"
    if value:
        # Builds that only have the negated form do it unless told otherwise.
        if known is None or known[name]:
            out.argv.append(name)
        elif not known[negated]:
            _named(passing.setting, (name,), known, out, passing.setting)
    elif known is None or known[negated]:
        # Where only the plain form is known, not giving it is the negation.
        if known is not None or passing.setting == "mmap":
            out.argv.append(negated)
    elif not known[name]:
        _named(passing.setting, (negated,), known, out, passing.setting)


def _load_mode(settings: RuntimeSettings) -> str | None:
    if settings.mmap is None and not settings.mlock:
        return None
    # Where nobody said it, the file is mapped, as it is by builds without this option.
    said = {"mmap": settings.mmap is not False, **({"mlock": True} if settings.mlock else {})}
    return next(name for name, meaning in LOAD_MODES.items() if meaning == said)


def _pass_adapters(name: str, adapters: Collection[LoraAdapter], option: KnownOption | None, out: Passed) -> None:
    if option is None or _LORA_IN_ONE_WORD in option.text:
        out.argv += [name, ",".join(f"{adapter.path}:{adapter.scale:g}" for adapter in adapters)]
    else:
        for adapter in adapters:
            out.argv += [name, adapter.path, f"{adapter.scale:g}"]


def _pass_speculation(settings: RuntimeSettings, known: KnownOptions | None, out: Passed) -> None:
    """Have the draft model used, in builds that load it and leave it idle unless they are told the type."""
    option = known[_SPECULATION] if known else None
    is_needed = known is None or (option is not None and _BY_DRAFT_MODEL in option.text)
    if is_needed and not any(flag.startswith(f"{_SPECULATION}=") for flag in settings.extra_flags or ()):
        out.argv += [_SPECULATION, _BY_DRAFT_MODEL]


def _pass_flag(flag: str, known: KnownOptions | None, out: Passed) -> None:
    name, has_value, value = flag.partition("=")
    option = known[name] if known else None
    if known is not None and option is None:
        out.faults.append(Fault("extra_flags", f"the installed llama-server knows no {name}"))
    elif option is not None and option.takes_value != bool(has_value):
        what = "takes a value: write" if option.takes_value else "takes no value: write"
        out.faults.append(Fault("extra_flags", f"{name} {what} {name}{'=VALUE' if option.takes_value else ''}"))
    else:
        out.argv += [name, value] if has_value else [name]


def _named(what: str, names: tuple[str, ...], known: KnownOptions | None, out: Passed, setting: str) -> str | None:
    """The name the build has for an option; ``None`` and a fault if it has none."""
    name = names[0] if known is None else known.first_of(names)
    if name is None:
        out.faults.append(Fault(setting, f"the installed llama-server knows no {names[0]}, which {what} needs"))
    return name


def _layers(option: KnownOption | None) -> str:
    return _ALL_LAYERS if option is None or f"'{_ALL_LAYERS}'" in option.text else _MORE_THAN_ANY
