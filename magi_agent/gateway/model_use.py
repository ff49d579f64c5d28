"""One request's use of a model: what is held and counted for it, for as long as anything comes of it."""

from magi_agent.gateway.lanes import Entry
from magi_agent.gateway.tallies import Tally
from magi_agent.servers.reach import Reach


class ModelUse:
    """Begins as it is made, and is to be ended, whatever comes of it."""

    __slots__ = ("_entry", "_tally")

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._entry: Entry | None = None
        tally.begin()

    async def let_in(self, entry: Entry) -> Reach:
        """Wait in a model's lane, and tell where its server is. Raises as entering a lane does."""
        reach = await entry.enter()
        self._entry = entry
        return reach

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes of it, for ``error`` where the server's answer has not even begun."""
        try:
            if self._entry is not None:
                self._entry.leave()
        finally:
            self._tally.end(error)
