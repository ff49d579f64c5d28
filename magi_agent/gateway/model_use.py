"""Who uses which model by the gateway, and which one is about to leave."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class ModelUse:
    """Counts requests by model, from the moment that they wait for it until their answer has ended."""

    def __init__(self) -> None:
        self._under_way: Counter[str] = Counter()
        self._last: dict[str, float] = {}
        self._leaving: dict[str, asyncio.Event] = {}

    @contextmanager
    def using(self, model_id: str) -> Iterator[None]:
        """Count a request."""
        self._under_way[model_id] += 1
        try:
            yield
        finally:
            self._under_way[model_id] -= 1
            if not self._under_way[model_id]:
                del self._under_way[model_id]
            self.note(model_id)

    def note(self, model_id: str) -> None:
        """Take note that a model was used just now."""
        self._last[model_id] = asyncio.get_running_loop().time()

    def is_used(self, model_id: str) -> bool:
        """Whether a request is under way."""
        return model_id in self._under_way

    def last(self, model_id: str) -> float | None:
        """When it was used last, on the event loop's clock."""
        return self._last.get(model_id)

    def forget(self, model_id: str) -> None:
        """Forget when it was used."""
        self._last.pop(model_id, None)

    @contextmanager
    def leaving(self, model_id: str) -> Iterator[None]:
        """Have nobody begin to use it while it is being stopped."""
        self._leaving[model_id] = left = asyncio.Event()
        try:
            yield
        finally:
            left.set()
            del self._leaving[model_id]

    async def wait_until_left(self, model_id: str) -> None:
        """Wait until it is stopped, where that has begun."""
        while (left := self._leaving.get(model_id)) is not None:
            await left.wait()
