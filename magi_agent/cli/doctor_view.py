"""What a server sees of the host's folders, for ``magictl doctor``."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from magi_agent.servers.hidden_folders import hidden_folders
from magi_agent.settings.settings import Settings
from magi_agent.vocabulary import Scope

OF_EACH_UNIT: Final = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108  # nothing is put there
"""What every unit with ``PrivateTmp=`` has for itself."""
_HOMES: Final = (Path("/home"), Path("/root"), Path("/run/user"))
"""What ``ProtectHome=`` empties."""


@dataclass(frozen=True, slots=True)
class View:
    """Folders that are hidden from servers, and those that they are shown all the same."""

    hidden: tuple[Path, ...]
    shown: tuple[Path, ...]

    @property
    def mounted(self) -> tuple[Path, ...]:
        """Folders that a server sees whatever the modes of those above say."""
        return tuple(folder for folder in self.shown if self._is_hidden(folder))

    def has(self, path: Path) -> bool:
        """Whether a server sees ``path`` at all."""
        return not self._is_hidden(path) or any(path.is_relative_to(folder) for folder in self.shown)

    def _is_hidden(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self.hidden)


def view_of_servers(settings: Settings) -> View:
    """What servers see that are started with ``settings``; looks at the disk."""
    if settings.systemd_scope is Scope.USER:
        return View((), ())
    programs = {folder for binary in settings.binaries for folder in (binary.parent, binary.resolve().parent)}
    shown = tuple(sorted({*settings.model_scan_path, *programs}))
    hidden = hidden_folders(tuple(PurePosixPath(folder) for folder in shown))
    return View((*OF_EACH_UNIT, *_HOMES, *map(Path, hidden)), shown)
