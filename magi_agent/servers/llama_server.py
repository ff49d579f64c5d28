"""llama-server's command line and environment, beside what the runtime settings are passed on as.

Whatever a person or a file name can put characters into travels in the environment, the rest in argv: systemd up to
253 garbles ``$`` and ``;`` in a transient unit's argv after a ``daemon-reload``, and never in its environment. What
stays in argv is what ``ps`` and ``systemctl status`` should show.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

from magi_agent.runtime_settings.passing import passed
from magi_agent.runtime_settings.settings import NO_PROJECTOR
from magi_agent.servers.launch import NO_DEVICE, LaunchSpecification, unit_name
from magi_agent.servers.memory_limits import MemoryLimits, read_limits, written_limits
from magi_agent.servers.reach import AtPort, AtSocket, Reach, socket_path
from magi_agent.servers.server_keys import credential_path
from magi_agent.servers.unit_limits import limits_in, limits_text
from magi_agent.vocabulary import ServerAccess

_MODEL: Final = "LLAMA_ARG_MODEL"
_PROJECTOR: Final = "LLAMA_ARG_MMPROJ"
_ORIGINS: Final = "--cors-origins"
_ORIGINS_VARIABLE: Final = "LLAMA_ARG_CORS_ORIGINS"
_FIT: Final = "--fit"
_FIT_VARIABLE: Final = "LLAMA_ARG_FIT"
_LIMITS: Final = "MAGI_LIMITS"
_MEMORY: Final = "MAGI_UNIT_MEMORY"
_BINARY: Final = "MAGI_BINARY"
_USER: Final = "MAGI_USER"
_KEY_FILE: Final = "LLAMA_ARG_API_KEY_FILE"
KEY_SOURCE: Final = "MAGI_KEY_FILE"
"""Where the agent finds the key that systemd hands to the server; the path of a file, not the key."""
_PINS: Final = "MAGI_GPUS"
_PLACED: Final = "MAGI_PLACED"
"""The options by which the agent says which GPUs it chose. Another time it chooses others: that is no difference."""
_PROJECTOR_DEVICE: Final = "MTMD_BACKEND_DEVICE"
_DEVICE: Final = "--device"
_DRAFT_DEVICE: Final = ("--spec-draft-device", "--device-draft")
_PROJECTOR_ON_HOST: Final = "--no-mmproj-offload"
_LAYERS: Final = ("--n-gpu-layers", "--gpu-layers")
_OURS: Final = "LLAMA_ARG_"
_LOOPBACK: Final = "127.0.0.1"
_UNIX: Final = ".sock"
_REACHES_KEPT: Final = 256
"""What the end of ``--host`` tells a unix socket by."""
_ACCESS: Final = "server access"
_REACHED_BY: Final = {"0.0.0.0": _LOOPBACK, "::": "::1"}  # noqa: S104  # nothing is bound here
_WORDS: Final = {
    _MODEL: "model file",
    _PROJECTOR: "projector",
    "LLAMA_ARG_SPEC_DRAFT_MODEL": "draft model",
    "LLAMA_ARG_MODEL_DRAFT": "draft model",
    "LLAMA_ARG_CHAT_TEMPLATE": "chat template",
    "LLAMA_ARG_CHAT_TEMPLATE_FILE": "chat template file",
}


def argv_of(launch: LaunchSpecification) -> tuple[str, ...]:
    """The command line."""
    where: tuple[str, ...] = ("--host", launch.host, "--port", str(launch.port))
    if launch.access is ServerAccess.SOCKET:
        # No port: llama-server opens none then, and nobody is to think that it does.
        where = ("--host", str(socket_path(launch.runtime_root, launch.model_id)))
    return (
        str(launch.binary),
        *where,
        "--alias",
        ",".join((launch.model_id, *_aliases(launch))),
        "--metrics",
        *passed(launch.runtime_settings, launch.known_options).argv,
        *_placement(launch),
    )


def environment_of(launch: LaunchSpecification) -> dict[str, str]:
    """The environment, beside what systemd gives every unit."""
    environment = {_MODEL: launch.model_path}
    chosen = launch.runtime_settings.projector
    projector = launch.projector_path if chosen is None else chosen
    if projector and projector != NO_PROJECTOR:
        environment[_PROJECTOR] = projector
    environment |= passed(launch.runtime_settings, launch.known_options).environment
    origins = launch.known_options[_ORIGINS] if launch.known_options else None
    if origins and origins.variable == _ORIGINS_VARIABLE:
        # By itself it lets every page in a browser on this host read its answers.
        environment[_ORIGINS_VARIABLE] = "localhost"
    fit = launch.known_options[_FIT] if launch.known_options else None
    if launch.is_fitted and fit and fit.variable == _FIT_VARIABLE:
        environment[_FIT_VARIABLE] = "off"
    if limits := limits_text(launch.runtime_settings):
        environment[_LIMITS] = limits
    if launch.runtime_settings.gpus:
        environment[_PINS] = ",".join(launch.runtime_settings.gpus)
    if placement := _placement(launch):
        environment[_PLACED] = " ".join(placement)
        if _PROJECTOR in environment and launch.devices != NO_DEVICE:
            # By itself it takes the first GPU there is.
            environment[_PROJECTOR_DEVICE] = launch.devices[0]
    if launch.memory_limits is not None:
        environment[_MEMORY] = written_limits(launch.memory_limits)
    if launch.user:
        environment[_USER] = launch.user
    if launch.binary_identity:
        environment[_BINARY] = launch.binary_identity
    if launch.access is ServerAccess.KEY:
        environment[_KEY_FILE] = str(credential_path(launch.runtime_root, unit_name(launch.model_id)))
    return environment


def differences(launch: LaunchSpecification, argv: Iterable[str], environment: Iterable[str]) -> tuple[str, ...]:
    """How a server that runs with ``argv`` and ``environment`` differs from one started by ``launch``; for a person."""
    wanted = _facts(argv_of(launch), environment_of(launch))
    runs = _facts(argv, _variables(environment))
    if wanted[_ACCESS] != runs[_ACCESS]:
        # That says it; address and port cannot be the same then.
        for facts in (wanted, runs):
            facts.pop("host", None)
            facts.pop("port", None)
    return tuple(
        f"{name}: runs with {_shown(runs.get(name))}, should be {_shown(wanted.get(name))}"
        for name in dict.fromkeys((*wanted, *runs))
        if wanted.get(name) != runs.get(name)
    )


def port_of(argv: Iterable[str]) -> int | None:
    """The port a server was told to listen on."""
    port = _options(argv).get("port", "")
    return int(port) if port and port.isdecimal() else None


def reach_of(argv: Iterable[str], environment: Iterable[str]) -> Reach | None:
    """How a server is reached from this host; ``None`` if it was told neither socket nor port."""
    return _reach(tuple(argv), tuple(environment))


# Each request to a model asks it of the same few units.
@lru_cache(maxsize=_REACHES_KEPT)
def _reach(argv: tuple[str, ...], environment: tuple[str, ...]) -> Reach | None:
    host = _options(argv).get("host") or _LOOPBACK
    if host.endswith(_UNIX):
        return AtSocket(Path(host))
    port = port_of(argv)
    if port is None:
        return None
    key_file = _variables(environment).get(KEY_SOURCE)
    return AtPort(_REACHED_BY.get(host, host), port, Path(key_file) if key_file else None)


def model_path_of(environment: Iterable[str]) -> str | None:
    """The model file a server was told to load."""
    return _variables(environment).get(_MODEL)


def binary_identity_of(environment: Iterable[str]) -> str | None:
    """Which file the binary was when the server's unit was made."""
    return _variables(environment).get(_BINARY)


def takes_devices(launch: LaunchSpecification) -> bool:
    """Whether its binary is known to take the names of GPUs."""
    return launch.known_options is not None and launch.known_options[_DEVICE] is not None


def devices_of(argv: Iterable[str]) -> tuple[str, ...] | None:
    """The GPUs a server was told to use, ``NO_DEVICE`` for none; ``None`` where it was left to llama-server."""
    named = _options(argv).get(_DEVICE[2:])
    return tuple(named.split(",")) if named else None


def offload_asked(argv: Iterable[str], environment: Iterable[str]) -> str | None:
    """What asked for layers on GPUs when a server was started, in words; ``None`` where nothing did."""
    options = _options(argv)
    if options.get(_DEVICE[2:]) == NO_DEVICE[0]:
        return None
    layers = next((value for name in _LAYERS if (value := options.get(name[2:]))), None)
    if layers is not None:
        return None if layers == "0" else f"n_gpu_layers={layers}"
    pins = _variables(environment).get(_PINS)
    return f"gpus={pins}" if pins else None


def _placement(launch: LaunchSpecification) -> tuple[str, ...]:
    """The options that say which GPUs were chosen."""
    known = launch.known_options
    if not launch.devices or known is None or not takes_devices(launch):
        return ()
    devices = ",".join(launch.devices)
    settings = launch.runtime_settings
    argv = [_DEVICE, devices]
    said = {flag.partition("=")[0] for flag in settings.extra_flags or ()}
    if settings.draft_model and (name := known.first_of(_DRAFT_DEVICE)) and said.isdisjoint(_DRAFT_DEVICE):
        # By itself it takes all GPUs.
        argv += [name, devices]
    projector = launch.projector_path if settings.projector is None else settings.projector
    has_projector = projector is not None and projector != NO_PROJECTOR
    if launch.devices == NO_DEVICE and has_projector and known[_PROJECTOR_ON_HOST] and _PROJECTOR_ON_HOST not in said:
        argv.append(_PROJECTOR_ON_HOST)
    return tuple(argv)


def set_memory_limits_of(environment: Iterable[str]) -> MemoryLimits:
    """The limits of memory that a person had set when the server's unit was made."""
    return read_limits(limits_in(_variables(environment).get(_LIMITS, "")))


def memory_limits_of(environment: Iterable[str]) -> MemoryLimits | None:
    """The limits of memory, set ones among them, that the server's unit was made with, where some were derived."""
    text = _variables(environment).get(_MEMORY)
    return None if text is None else read_limits(limits_in(text))


def _aliases(launch: LaunchSpecification) -> tuple[str, ...]:
    """The names beside the id, for builds that take more than one."""
    option = launch.known_options["--alias"] if launch.known_options else None
    takes_several = option is None or "comma-separated" in option.text
    return launch.runtime_settings.aliases or () if takes_several else ()


def _variables(environment: Iterable[str]) -> dict[str, str]:
    return dict(entry.partition("=")[::2] for entry in environment)


def _facts(argv: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    facts = _options(argv)
    placed = _options(environment.get(_PLACED, "").split())
    facts = {name: value for name, value in facts.items() if placed.get(name) != value}
    facts[_ACCESS] = _access(facts, environment)
    facts |= {
        _WORDS.get(name, name): value
        for name, value in environment.items()
        # Nobody chooses these, and a build that was not asked yet is not told of origins or of fitting.
        if name.startswith(_OURS) and name not in (_KEY_FILE, _ORIGINS_VARIABLE, _FIT_VARIABLE)
    }
    facts |= {name: f"{value}" for name, value in limits_in(environment.get(_LIMITS, "")).items()}
    if _PINS in environment:
        facts["gpus"] = environment[_PINS]
    if _USER in environment:
        facts["user"] = environment[_USER]
    return facts


def _access(options: Mapping[str, str], environment: Mapping[str, str]) -> ServerAccess:
    if options.get("host", "").endswith(_UNIX):
        return ServerAccess.SOCKET
    return ServerAccess.KEY if _KEY_FILE in environment else ServerAccess.PORT


def _options(argv: Iterable[str]) -> dict[str, str]:
    """Each option with its value, or with all its values where it is given more than once."""
    options: dict[str, str] = {}
    name = "binary"
    for argument in argv:
        if argument.startswith("--"):
            name = argument[2:]
            options.setdefault(name, "")
        else:
            options[name] = f"{options[name]} {argument}" if options.get(name) else argument
    return options


def _shown(value: str | None) -> str:
    if value is None:
        return "the default"
    return value.encode(errors="surrogateescape").decode(errors="replace") or "set"
