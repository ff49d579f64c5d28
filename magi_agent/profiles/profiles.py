"""The profiles: owner of the folders they lie in.

The last folder is the agent's, and written to; those before it are the operator's. Where two folders have a profile of
the same name, the one in the later folder counts. The files are the truth: they are read when they are asked for, so a
profile that an operator edits needs no reload.
"""

import asyncio
import contextlib
import logging
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from magi_agent.atomic_file import remove_leftovers_of, sync_folder, write_atomically
from magi_agent.discovery.access import shown
from magi_agent.errors import (
    ProfileActive,
    ProfileCreationFailed,
    ProfileExists,
    ProfileInvalid,
    ProfileNotFound,
    ProfileReadOnly,
    ProfileSaveFailed,
    ValidationFailed,
)
from magi_agent.events import EventStream, ProfilesChanged
from magi_agent.profiles.profile import Profile
from magi_agent.profiles.stored import MAX_PROFILE_BYTES, InvalidProfile, read_profile, write_profile
from magi_agent.registry.registry import Registry
from magi_agent.serial_changes import SerialChanges

_LOG: Final = logging.getLogger(__name__)
_SUFFIXES: Final = (".yaml", ".yml")
_MAX_SLUG: Final = 100
_MAX_SLUG_BYTES: Final = 200
_RESERVED: Final = frozenset({"active"})
_SLUG: Final = re.compile(r"[^\W_]([^\W_]|[.-])*")


@dataclass(frozen=True, slots=True)
class ProfileProblem:
    """A profile file that cannot be read as one."""

    name: str
    path: str
    message: str


def slug_of(name: str) -> str:
    """The file stem for a profile's name: lower case, spaces and underscores as ``-``.

    Raises ``ValidationFailed`` for a name that is empty, would leave the folder, hide the file, or is reserved.
    """
    if not name.isprintable():
        raise _bad_name("must not have control characters")
    slug = re.sub(r"[\s_]+", "-", name.strip().lower())
    if not slug:
        raise _bad_name("must not be empty")
    if len(slug) > _MAX_SLUG or len(slug.encode()) > _MAX_SLUG_BYTES:
        raise _bad_name(f"must be at most {_MAX_SLUG} characters long")
    if slug in _RESERVED:
        raise _bad_name(f"{slug!r} is reserved")
    if not _may_be_slug(slug):
        raise _bad_name("may have letters, digits, spaces, '-', '_' and '.', and begins with a letter or digit")
    return slug


def kept_slug(text: str) -> str:
    """The slug that a profile had elsewhere, or that ``text`` comes to. Raises ``ValidationFailed``."""
    return text if _may_be_slug(text) else slug_of(text)


def _may_be_slug(text: str) -> bool:
    return (
        _SLUG.fullmatch(text) is not None
        and not text.endswith(".")
        and text not in _RESERVED
        and len(text.encode()) <= _MAX_SLUG_BYTES
    )


def _bad_name(message: str) -> ValidationFailed:
    return ValidationFailed([{"field": "name", "message": message}])


class Profiles:
    """All profiles there are."""

    def __init__(self, folders: Sequence[Path], registry: Registry, events: EventStream) -> None:
        self._folders = tuple(folders)
        self._registry = registry
        self._events = events
        self._changes = SerialChanges("profiles")
        self._said: frozenset[ProfileProblem] = frozenset()

    def reconfigure(self, folders: Sequence[Path]) -> None:
        """Take other folders."""
        self._folders = tuple(folders)

    async def load(self) -> None:
        """Clear away what an agent that was killed left half written. Profiles are read when they are asked for."""
        for suffix in _SUFFIXES:
            await asyncio.to_thread(remove_leftovers_of, self._folders[-1], f"*{suffix}")

    async def names(self) -> list[str]:
        """The slugs of all profiles that can be read, sorted."""
        return (await self.survey())[0]

    async def own(self) -> dict[str, Profile]:
        """The profiles that lie in the folder written to, and can be read, by slug; sorted."""
        return await asyncio.to_thread(self._own)

    def _own(self) -> dict[str, Profile]:
        profiles = {}
        for slug, path in sorted(self._paths([]).items()):
            if path.parent == self._folders[-1]:
                with contextlib.suppress(InvalidProfile, OSError):
                    profiles[slug] = self._load(path)
        return profiles

    async def survey(self) -> tuple[list[str], list[ProfileProblem]]:
        """The slugs of all profiles that can be read, and what is wrong with the others."""
        names, problems = await asyncio.to_thread(self._survey)
        for problem in set(problems) - self._said:
            _LOG.error("profile %s: %s: %s", problem.name, problem.path, problem.message)
        self._said = frozenset(problems)
        return names, problems

    async def profile(self, name: str) -> Profile:
        """One profile. Raises ``ProfileNotFound``, ``ProfileInvalid``."""
        path = await asyncio.to_thread(self._path_of, name)
        if path is None:
            raise ProfileNotFound(name, await self.names())
        try:
            return await asyncio.to_thread(self._load, path)
        except (InvalidProfile, OSError) as error:
            if isinstance(error, FileNotFoundError) and await asyncio.to_thread(self._path_of, name) != path:
                raise ProfileNotFound(name, await self.names()) from None
            line = error.line if isinstance(error, InvalidProfile) else None
            raise ProfileInvalid(
                f"the profile {name!r} cannot be read: {path}: {_reason(error)}",
                {"path": str(path), "line": line, "reason": _reason(error)},
            ) from None

    async def create(self, profile: Profile, slug: str | None = None) -> tuple[str, Path]:
        """Write a new profile; its slug, which is its name's if none is given, and file.

        Raises ``ValidationFailed``, ``ProfileExists``, ``ProfileCreationFailed``.
        """
        return await self._changes.make(partial(self._create, slug or slug_of(profile.name), profile))

    async def _create(self, slug: str, profile: Profile) -> tuple[str, Path]:
        there = await asyncio.to_thread(self._path_of, slug)
        if there is not None:
            replaces = "PUT replaces it" if there.parent == self._folders[-1] else "it belongs to the operator"
            raise ProfileExists(
                f"a profile called {slug!r} is there already, in {there}; {replaces}", {"profileName": slug}
            )
        path = self._folders[-1] / f"{slug}.yaml"
        try:
            await asyncio.to_thread(_write, path, profile)
        except OSError as error:
            raise ProfileCreationFailed(
                f"the profile could not be written to {path}: {error.strerror}",
                {"path": str(path), "reason": error.strerror or str(error)},
            ) from None
        self._events.publish(ProfilesChanged(name=slug))
        return slug, path

    async def replace(self, name: str, profile: Profile) -> Path:
        """Put ``profile`` in the place of the one called ``name``.

        Raises ``ProfileNotFound``, ``ProfileReadOnly``, ``ProfileSaveFailed``.
        """
        return await self._changes.make(partial(self._replace, name, profile))

    async def _replace(self, name: str, profile: Profile) -> Path:
        path = await self._own_path(name)
        try:
            await asyncio.to_thread(_write, path, profile)
        except OSError as error:
            raise _save_failed(path, error) from None
        self._events.publish(ProfilesChanged(name=name))
        return path

    async def delete(self, name: str) -> None:
        """Remove a profile's file.

        Raises ``ProfileNotFound``, ``ProfileReadOnly``, ``ProfileActive``, ``ProfileSaveFailed``.
        """
        await self._changes.make(partial(self._delete, name))

    async def _delete(self, name: str) -> None:
        path = await self._own_path(name)
        if name == self._registry.active_profile:
            raise ProfileActive(
                f"the profile {name!r} is active; activate another one before deleting it", {"profileName": name}
            )
        try:
            await asyncio.to_thread(_remove, path)
        except OSError as error:
            raise _save_failed(path, error) from None
        self._events.publish(ProfilesChanged(name=name))

    async def _own_path(self, name: str) -> Path:
        path = await asyncio.to_thread(self._path_of, name)
        if path is None:
            raise ProfileNotFound(name, await self.names())
        if path.parent != self._folders[-1]:
            raise ProfileReadOnly(
                f"the profile {name!r} belongs to the operator: change {path} by hand, or make one of another name",
                {"profileName": name, "path": str(path)},
            )
        return path

    def _path_of(self, slug: str) -> Path | None:
        """The file that counts for a profile, whether or not it can be read."""
        if not _may_be_slug(slug):
            return None
        paths = [folder / f"{slug}{suffix}" for folder in reversed(self._folders) for suffix in _SUFFIXES]
        return next((path for path in paths if os.path.lexists(path)), None)

    def _survey(self) -> tuple[list[str], list[ProfileProblem]]:
        problems: list[ProfileProblem] = []
        names = []
        for slug, path in sorted(self._paths(problems).items()):
            try:
                self._load(path)
            except (InvalidProfile, OSError) as error:
                if not isinstance(error, FileNotFoundError) or os.path.lexists(path):
                    problems.append(_problem(slug, path, _reason(error)))
            else:
                names.append(slug)
        return names, problems

    def _paths(self, problems: list[ProfileProblem]) -> dict[str, Path]:
        """The file that counts for each profile, by slug; what else is found goes to ``problems``."""
        paths: dict[str, Path] = {}
        for folder in self._folders:
            try:
                entries = sorted(folder.iterdir(), reverse=True)
            except FileNotFoundError:
                continue
            except OSError as error:
                problems.append(_problem(folder.name, folder, f"cannot be listed: {error.strerror}"))
                continue
            for path in entries:
                if path.suffix in _SUFFIXES and not path.name.startswith("."):
                    if not _may_be_slug(path.stem):
                        problems.append(_problem(path.stem, path, "no profile can have this name"))
                    else:
                        paths[path.stem] = path
        return paths

    def _load(self, path: Path) -> Profile:
        # A pipe must not be waited for, and a device not be read.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidProfile("it is not a regular file", None)
            return read_profile(file.read(MAX_PROFILE_BYTES + 1), path.stem)


def _problem(name: str, path: Path, message: str) -> ProfileProblem:
    return ProfileProblem(shown(name), shown(str(path)), message)


def _reason(error: InvalidProfile | OSError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _save_failed(path: Path, error: OSError) -> ProfileSaveFailed:
    return ProfileSaveFailed(
        f"{path} could not be changed: {error.strerror}", {"path": str(path), "reason": error.strerror or str(error)}
    )


def _write(path: Path, profile: Profile) -> None:
    data = write_profile(profile)
    try:
        read_profile(data, path.stem)
    except InvalidProfile as error:
        message = f"it could not be read again from its file: {error}"
        raise ValidationFailed([{"field": "", "message": message}]) from None
    write_atomically(path, data)


def _remove(path: Path) -> None:
    path.unlink()
    sync_folder(path.parent)
