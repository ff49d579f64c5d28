"""What ``magictl doctor`` looks at of the model folders: whether service and servers may read what is in them."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from magi_agent.cli.doctor_agent import AS_ROOT
from magi_agent.cli.doctor_findings import Finding, failed, ok, unknown, warning
from magi_agent.cli.doctor_patient import Patient
from magi_agent.cli.doctor_view import OF_EACH_UNIT, view_of_servers
from magi_agent.cli.phrasing import counted
from magi_agent.discovery.access import Obstacle, find_obstacle, granting, reason, shared_group, shown
from magi_agent.discovery.names import is_model_filename
from magi_agent.host.accounts import Account
from magi_agent.vocabulary import Scope

_MOST_ENTRIES: Final = 2000
_MOST_DEPTH: Final = 10
_MOST_TOLD: Final = 5


@dataclass(frozen=True, slots=True)
class _Reader:
    """One of those who read models."""

    account: Account
    shown_folders: tuple[Path, ...]
    """What it sees whatever stands above."""


@dataclass(slots=True)
class _Looked:
    """What was found in one folder."""

    models: int = 0
    obstacles: dict[str, tuple[Obstacle, list[Account]]] = field(default_factory=dict)
    """What keeps whom from reading something, by component."""
    unseen: str | None = None
    """A folder that we may not look into ourselves."""

    def keep(self, obstacle: Obstacle, account: Account) -> None:
        """Note an obstacle of one account."""
        accounts = self.obstacles.setdefault(obstacle.component, (obstacle, []))[1]
        if account not in accounts:
            accounts.append(account)


def folders(patient: Patient) -> Iterator[Finding]:
    """Whether service and servers may read the model folders and what is in them."""
    settings = patient.settings
    if settings is None:
        yield unknown("the model folders are not known without the configuration")
        return
    readers = []
    if patient.agents_account is not None:
        readers.append(_Reader(patient.agents_account, ()))
    if patient.servers_account is not None and patient.servers_account != patient.agents_account:
        readers.append(_Reader(patient.servers_account, view_of_servers(settings).mounted))
    is_packaged = bool(patient.unit_or_none) and settings.systemd_scope is Scope.SYSTEM
    other = patient.changing("discovery.model_scan_path")
    for folder in settings.model_scan_path:
        if not readers:
            yield unknown(f"{folder}: whom agent and servers run as is not known")
        elif is_packaged and any(folder.is_relative_to(own) for own in OF_EACH_UNIT):
            yield failed(
                f"{folder}: the service has folders /tmp and /var/tmp of its own, and sees nothing of these", other
            )
        else:
            yield from _folder(folder, readers, other)


def _folder(folder: Path, readers: Sequence[_Reader], other: str) -> Iterator[Finding]:
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            yield failed(f"{folder} is no folder", other)
            return
        looked = _look(folder, readers)
    except FileNotFoundError:
        yield failed(f"{folder} does not exist", f"sudo mkdir -p {folder}; or {other}")
        return
    except OSError as error:
        yield unknown(f"{folder}: {error.strerror}", AS_ROOT)
        return
    accounts = [reader.account for reader in readers]
    yield from _obstacles(folder, looked, shared_group(*accounts))
    if looked.unseen and looked.unseen not in looked.obstacles:
        yield unknown(f"{folder}: {shown(looked.unseen)} and what is in it could not be looked at", AS_ROOT)
    if looked.obstacles or looked.unseen:
        return
    if looked.models:
        names = " and ".join(account.name for account in accounts)
        yield ok(f"{folder}: {counted(looked.models, 'model file')}, readable by {names}")
    else:
        yield warning(f"{folder}: there is no model file in it", "put a GGUF file there, then: magictl rescan")


def _obstacles(folder: Path, looked: _Looked, group: str | None) -> Iterator[Finding]:
    for component, (obstacle, denied) in list(looked.obstacles.items())[:_MOST_TOLD]:
        whom = replace(denied[0], name=" and ".join(account.name for account in denied))
        where = shown(component) if obstacle.is_last else str(folder)
        yield failed(f"{where}: {reason(obstacle, whom)}", granting(obstacle, denied[0], group))
    if len(looked.obstacles) > _MOST_TOLD:
        yield failed(f"{folder}: {len(looked.obstacles) - _MOST_TOLD} more of the kind")


def _look(folder: Path, readers: Sequence[_Reader]) -> _Looked:
    """Look at the folder and what is in it. Raises ``OSError`` where the folder itself cannot be looked at."""
    looked = _Looked()
    for path, is_folder in _entries(str(folder)):
        looked.models += not is_folder
        for reader in readers:
            try:
                obstacle = find_obstacle(path, reader.account, shown_folders=reader.shown_folders)
            except OSError:
                if path == str(folder):
                    raise
                looked.unseen = looked.unseen or path
                continue
            if obstacle:
                looked.keep(obstacle, reader.account)
        if is_folder and not os.access(path, os.R_OK | os.X_OK):
            looked.unseen = looked.unseen or path
    return looked


def _entries(folder: str) -> Iterator[tuple[str, bool]]:
    """The folder, the folders in it, and the model files; so many at the most."""
    waiting = [(folder, 0)]
    left = _MOST_ENTRIES
    while waiting and left > 0:
        path, depth = waiting.pop()
        yield path, True
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    left -= 1
                    if entry.name.startswith(".") or left < 0:
                        continue
                    if entry.is_dir(follow_symlinks=False) and depth < _MOST_DEPTH:
                        waiting.append((entry.path, depth + 1))
                    elif is_model_filename(entry.name) and entry.is_file():
                        yield entry.path, False
        except OSError:
            continue
