"""llama-server's command line and environment: the one module that knows them.

Whatever a person or a file name can put characters into travels in the environment, the rest in argv: systemd up to
253 garbles ``$`` and ``;`` in a transient unit's argv after a ``daemon-reload``, and never in its environment. What
stays in argv is what ``ps`` and ``systemctl status`` should show.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from magi_agent.servers.launch import LaunchSpecification

_MODEL: Final = "LLAMA_ARG_MODEL"
_PROJECTOR: Final = "LLAMA_ARG_MMPROJ"
_OURS: Final = "LLAMA_ARG_"
_LOOPBACK: Final = "127.0.0.1"
_REACHED_BY: Final = {"0.0.0.0": _LOOPBACK, "::": "::1"}  # noqa: S104  # nothing is bound here


def argv_of(launch: LaunchSpecification) -> tuple[str, ...]:
    """The command line."""
    runtime = launch.runtime_settings
    arguments = [
        str(launch.binary),
        "--host",
        launch.host,
        "--port",
        str(launch.port),
        "--alias",
        launch.model_id,
        "--metrics",
    ]
    for option, value in (
        ("--n-gpu-layers", runtime.n_gpu_layers),
        ("--ctx-size", runtime.ctx_size),
        ("--threads", runtime.n_threads),
        ("--batch-size", runtime.batch_size),
    ):
        if value is not None:
            arguments += [option, str(value)]
    return tuple(arguments)


def environment_of(launch: LaunchSpecification) -> dict[str, str]:
    """The environment, beside what systemd gives every unit."""
    environment = {_MODEL: launch.model_path}
    if launch.projector_path:
        environment[_PROJECTOR] = launch.projector_path
    return environment


def differences(launch: LaunchSpecification, argv: Iterable[str], environment: Iterable[str]) -> tuple[str, ...]:
    """How a server that runs with ``argv`` and ``environment`` differs from one started by ``launch``; for a person."""
    wanted = _facts(argv_of(launch), environment_of(launch))
    runs = _facts(argv, dict(entry.partition("=")[::2] for entry in environment))
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
    return dict(entry.partition("=")[::2] for entry in environment).get(_MODEL)


def _facts(argv: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    facts = _options(argv)
    facts |= {name: value for name, value in environment.items() if name.startswith(_OURS)}
    for name, shown in ((_MODEL, "model file"), (_PROJECTOR, "projector")):
        if name in facts:
            facts[shown] = facts.pop(name)
    return facts


def _options(argv: Iterable[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    name = "binary"
    for argument in argv:
        if argument.startswith("--"):
            name = argument[2:]
            options[name] = ""
        else:
            options[name] = argument
    return options


def _shown(value: str | None) -> str:
    if value is None:
        return "the default"
    return value.encode(errors="surrogateescape").decode(errors="replace") or "set"
