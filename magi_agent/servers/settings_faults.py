"""Why a server could not be run with some runtime settings: asked by the agent, and again by the launcher."""

from collections.abc import Sequence

from magi_agent.errors import SettingsNotUsable
from magi_agent.runtime_settings.known_options import KnownOptions
from magi_agent.runtime_settings.passing import disallowed, passed
from magi_agent.runtime_settings.settings import Fault, RuntimeSettings
from magi_agent.runtime_settings.settings import faults_of as discord_in
from magi_agent.servers.settings_files import file_faults
from magi_agent.settings.settings import Settings


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


def settings_not_usable(model_id: str, faults: Sequence[Fault]) -> SettingsNotUsable:
    """Why the settings that hold for a model cannot be carried out."""
    return SettingsNotUsable(
        f"model {model_id} cannot be started with its settings: {faults[0].name}: {faults[0].message}",
        {"modelId": model_id, "errors": [{"field": fault.name, "message": fault.message} for fault in faults]},
    )
