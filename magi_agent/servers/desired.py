"""What is desired of each model: run or stop, for this boot, and who said so; and whether the host is being drained.

Desired is less than a choice: it begins anew with each boot, as what ``enabled`` and ``startPolicy`` ask for. It
outlives the agent in a file that names the boot it belongs to. For the agent, a boot is the life of the systemd manager
whose units the servers are: with it they all end.

Beside the wishes it keeps which of them were met: of a server that ran as wished and is gone when an agent comes back,
somebody else has made an end.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from magi_agent.atomic_file import remove_leftovers, write_atomically
from magi_agent.errors import RegistrySaveFailed, ServiceUnavailable
from magi_agent.serial_changes import SerialChanges

_LOG: Final = logging.getLogger(__name__)
_MAX_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody wants of one model's server."""

    run: bool
    by: str
    """Who said so: a person, a profile, ``systemctl``, the agent's own reasons."""
    at: datetime
    is_forced: bool = False
    """Whether it is to run even where it does not fit into memory; until it is stopped."""
    is_named: bool = False
    """Whether somebody asked for this very model, and not for all or for a profile's."""


@dataclass(frozen=True, slots=True)
class Drain:
    """That nothing new is to be started, since when, and who said so."""

    since: datetime
    by: str


class _StoredDrain(BaseModel):
    model_config = ConfigDict(extra="ignore")

    since: datetime
    by: str


class _StoredWish(BaseModel):
    model_config = ConfigDict(extra="ignore")

    run: bool
    by: str
    at: datetime
    forced: bool = False
    named: bool = False


class _StoredDesired(BaseModel):
    model_config = ConfigDict(extra="ignore")

    boot: str
    models: dict[str, _StoredWish]
    met: tuple[str, ...] = ()
    drain: _StoredDrain | None = None


class Desired:
    """The wishes for all models, persisted for one boot."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._boot = ""
        self._wishes: dict[str, Wish] = {}
        self._met: frozenset[str] = frozenset()
        self._drain: Drain | None = None
        self._changes = SerialChanges("desired")
        self.on_change: Callable[[], None] = lambda: None
        """Called after each change."""

    async def load(self, boot: str) -> bool:
        """Take up the wishes of this boot; whether there were any. Those of another boot are void."""
        return await self._changes.make(partial(self._load, boot))

    async def _load(self, boot: str) -> bool:
        stored = await asyncio.to_thread(self._read)
        known = stored is not None and stored.boot == boot
        self._wishes = (
            {
                model_id: Wish(wish.run, wish.by, wish.at, wish.forced, wish.named)
                for model_id, wish in stored.models.items()
            }
            if stored is not None and known
            else {}
        )
        self._met = frozenset(stored.met if stored is not None and known else ())
        drain = stored.drain if stored is not None and known else None
        self._drain = Drain(drain.since, drain.by) if drain else None
        self._boot = boot
        return known

    def __getitem__(self, model_id: str) -> Wish | None:
        return self._wishes.get(model_id)

    def wants(self, model_id: str) -> bool:
        """Whether this model's server should run."""
        wish = self._wishes.get(model_id)
        return wish is not None and wish.run

    @property
    def wishes(self) -> Mapping[str, Wish]:
        """All wishes, by model id."""
        return self._wishes

    @property
    def drain(self) -> Drain | None:
        """Who drains the host, if somebody does: then nothing is started."""
        return self._drain

    def is_met(self, model_id: str) -> bool:
        """Whether the model's server ran since it was wished for, and the agent has not ended it itself."""
        return model_id in self._met

    async def settled(self) -> None:
        """Wait until what was said so far is on disk, or could not be written."""
        await self._changes.settled()

    async def set_drain(self, draining: bool, *, by: str) -> None:
        """Begin or end the drain; on disk when this returns. Raises as ``wish_each`` does."""
        self._require_boot()
        await self._changes.make(partial(self._set_drain, draining, by))

    async def _set_drain(self, draining: bool, by: str) -> None:
        if draining == (self._drain is not None):
            return
        drain = Drain(datetime.now(UTC), by) if draining else None
        await asyncio.to_thread(self._write, self._wishes, self._met, drain)
        self._drain = drain
        self.on_change()

    async def note_met(self, model_id: str, met: bool) -> None:
        """Keep whether a wish is met; on disk when this returns. Raises ``RegistrySaveFailed``."""
        await self._changes.make(partial(self._note_met, model_id, met))

    async def _note_met(self, model_id: str, met: bool) -> None:
        after = self._met | {model_id} if met else self._met - {model_id}
        if after != self._met:
            await asyncio.to_thread(self._write, self._wishes, after, self._drain)
            self._met = after

    async def wish(
        self, model_ids: Iterable[str], *, run: bool, by: str, forced: bool = False, named: bool = False
    ) -> None:
        """Say what is wanted of some models; on disk when this returns. As ``wish_each`` otherwise."""
        await self.wish_each(dict.fromkeys(model_ids, run), by=by, forced=forced, named=named)

    async def wish_each(self, runs: Mapping[str, bool], *, by: str, forced: bool = False, named: bool = False) -> None:
        """Say for each model whether it should run; on disk when this returns.

        That one is forced or named holds until it is wished to stop, whatever is wished for in between.

        Raises ``RegistrySaveFailed``, and ``ServiceUnavailable`` while it is not known which boot this is.
        """
        self._require_boot()
        await self._changes.make(partial(self._change, dict(runs), by, forced=forced, named=named))

    def _require_boot(self) -> None:
        if not self._boot:
            raise ServiceUnavailable("systemd", "systemd has not been reached yet; try again in a moment")

    async def _change(self, runs: Mapping[str, bool], by: str, *, forced: bool, named: bool) -> None:
        now = datetime.now(UTC)
        wishes = dict(self._wishes)
        for model_id, run in runs.items():
            before = wishes.get(model_id)
            goes_on = run and before is not None and before.run
            wishes[model_id] = Wish(
                run,
                by,
                now,
                is_forced=run and (forced or (goes_on and before is not None and before.is_forced)),
                is_named=run and (named or (goes_on and before is not None and before.is_named)),
            )
        # One that is wished for anew has yet to run, unless it does already: then it is soon noted.
        met = self._met - runs.keys()
        await asyncio.to_thread(self._write, wishes, met, self._drain)
        self._wishes = wishes
        self._met = met
        self.on_change()

    def _write(self, wishes: Mapping[str, Wish], met: frozenset[str], drain: Drain | None) -> None:
        document = {
            "boot": self._boot,
            "models": {
                model_id: {
                    "run": wish.run,
                    "by": wish.by,
                    "at": wish.at.isoformat(),
                    "forced": wish.is_forced,
                    "named": wish.is_named,
                }
                for model_id, wish in wishes.items()
            },
            "met": sorted(met),
            "drain": {"since": drain.since.isoformat(), "by": drain.by} if drain else None,
        }
        try:
            write_atomically(self._path, json.dumps(document, indent=1).encode())
        except OSError as error:
            raise RegistrySaveFailed(
                f"what should run could not be saved to {self._path}: {error.strerror}; nothing was changed",
                {"path": str(self._path), "reason": error.strerror or str(error)},
            ) from None

    def _read(self) -> _StoredDesired | None:
        remove_leftovers(self._path)
        try:
            with self._path.open("rb") as file:
                return _StoredDesired.model_validate_json(file.read(_MAX_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            # No choice is lost with it: it is made anew from the choices and from what runs.
            _LOG.warning("%s cannot be read and is made anew: %s", self._path, str(error).partition("\n")[0])
            return None
