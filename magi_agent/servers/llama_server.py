"""llama-server's command line and environment, beside what the runtime settings are passed on as.

Whatever a person or a file name can put characters into travels in the environment, the rest in argv: systemd up to
253 garbles ``$`` and ``;`` in a transient unit's argv after a ``daemon-reload``, and never in its environment. What
stays in argv is what ``ps`` and ``systemctl status`` should show.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from magi_agent.runtime_settings.passing import passed
from magi_agent.runtime_settings.settings import NO_PROJECTOR
from magi_agent.servers.launch import LaunchSpecification
from magi_agent.servers.unit_limits import limits_in, limits_text

_MODEL: Final = "LLAMA_ARG_MODEL"
_PROJECTOR: Final = "LLAMA_ARG_MMPROJ"
_LIMITS: Final = "MAGI_LIMITS"
_BINARY: Final = "MAGI_BINARY"
_USER: Final = "MAGI_USER"
_OURS: Final = "LLAMA_ARG_"
_LOOPBACK: Final = "127.0.0.1"
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
    return (
        str(launch.binary),
        "--host",
        launch.host,
        "--port",
        str(launch.port),
        "--alias",
        ",".join((launch.model_id, *_aliases(launch))),
        "--metrics",
        *passed(launch.runtime_settings, launch.known_options).argv,
    )


def environment_of(launch: LaunchSpecification) -> dict[str, str]:
    """The environment, beside what systemd gives every unit."""
    environment = {_MODEL: launch.model_path}
    chosen = launch.runtime_settings.projector
    projector = launch.projector_path if chosen is None else chosen
    if projector and projector != NO_PROJECTOR:
        environment[_PROJECTOR] = projector
    environment |= passed(launch.runtime_settings, launch.known_options).environment
    if limits := limits_text(launch.runtime_settings):
        environment[_LIMITS] = limits
    if launch.user:
        environment[_USER] = launch.user
    if launch.binary_identity:
        environment[_BINARY] = launch.binary_identity
    return environment


def differences(launch: LaunchSpecification, argv: Iterable[str], environment: Iterable[str]) -> tuple[str, ...]:
    """How a server that runs with ``argv`` and ``environment`` differs from one started by ``launch``; for a person."""
    wanted = _facts(argv_of(launch), environment_of(launch))
    runs = _facts(argv, _variables(environment))
    return tuple(
        f"{name}: runs with {_shown(runs.get(name))}, should be {_shown(wanted.get(name))}"
        for name in dict.fromkeys((*wanted, *runs))
        if wanted.get(name) != runs.get(name)
    )


def port_of(argv: Iterable[str]) -> int | None:
    """The port a server was told to listen on."""
    port = _options(argv).get("port", "")
    return int(port) if port and port.isdecimal() else None


def address_of(argv: Iterable[str]) -> str:
    """The address at which a server is reached from this host."""
    host = _options(argv).get("host") or _LOOPBACK
    return _REACHED_BY.get(host, host)


def url_of(argv: Iterable[str]) -> str | None:
    """Where a server is reached from this host; ``None`` if it was told no port."""
    argv = tuple(argv)
    port = port_of(argv)
    if port is None:
        return None
    host = address_of(argv)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def model_path_of(environment: Iterable[str]) -> str | None:
    """The model file a server was told to load."""
    return _variables(environment).get(_MODEL)


def binary_identity_of(environment: Iterable[str]) -> str | None:
    """Which file the binary was when the server's unit was made."""
    return _variables(environment).get(_BINARY)


def _aliases(launch: LaunchSpecification) -> tuple[str, ...]:
    """The names beside the id, for builds that take more than one."""
    option = launch.known_options["--alias"] if launch.known_options else None
    takes_several = option is None or "comma-separated" in option.text
    return launch.runtime_settings.aliases or () if takes_several else ()


def _variables(environment: Iterable[str]) -> dict[str, str]:
    return dict(entry.partition("=")[::2] for entry in environment)


def _facts(argv: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    facts = _options(argv)
    facts |= {_WORDS.get(name, name): value for name, value in environment.items() if name.startswith(_OURS)}
    facts |= {name: f"{value}" for name, value in limits_in(environment.get(_LIMITS, "")).items()}
    if _USER in environment:
        facts["user"] = environment[_USER]
    return facts


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
