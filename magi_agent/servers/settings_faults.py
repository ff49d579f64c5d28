"""Why a server could not be run with some runtime settings: asked by the agent, and again by the launcher."""

from magi_agent.runtime_settings.known_options import KnownOptions
from magi_agent.runtime_settings.passing import disallowed, passed
from magi_agent.runtime_settings.settings import Fault, RuntimeSettings
from magi_agent.runtime_settings.settings import faults_of as discord_in
from magi_agent.servers.settings_files import file_faults
from magi_agent.settings import Settings


def binary_fault(runtime: RuntimeSettings, settings: Settings) -> Fault | None:
    """Why the binary that ``runtime`` names is none."""
    if settings.binary(runtime.binary) is not None:
        return None
    names = ", ".join(name for name, _ in settings.llama_server_alternatives) or "none"
    return Fault("binary", f"{runtime.binary!r} is not among servers.llama_server_alternatives ({names})")


def settings_faults(
    runtime: RuntimeSettings, settings: Settings, known: KnownOptions | None, *, as_reader: bool = True
) -> tuple[Fault, ...]:
    """What the configuration, the binary (which knows ``known``) or the files forbid; looks at the disk.

    Who asks must be able to read the files too, unless ``as_reader`` is false: then only where they are counts.
    """
    return (
        *discord_in(runtime),
        *disallowed(runtime, settings.allowed_flags, known),
        *passed(runtime, known).faults,
        *file_faults(runtime, settings.model_scan_path, as_reader=as_reader),
    )
