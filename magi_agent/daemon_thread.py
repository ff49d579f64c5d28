"""Calls that may not come back, such as those to a network file system whose server is away.

``asyncio.to_thread`` shares a few threads among all, and the process does not end before the last of them has: one call
that hangs would keep a stop waiting, and enough of them everything else.
"""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

_T = TypeVar("_T")


async def in_daemon_thread(call: Callable[[], _T], name: str) -> _T:
    """Make a call in a thread of its own, which does not keep the process from ending, and return what it returns.

    Raises what the call raises. When the waiting is cancelled the call goes on, and nobody hears how it ends.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[_T] = loop.create_future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            result = context.run(call)
        except BaseException as error:  # noqa: BLE001  # whatever it was, it is for who waits
            tell = partial(_fail, outcome, error)
        else:
            tell = partial(_give, outcome, result)
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await outcome


def _give(outcome: "asyncio.Future[_T]", result: _T) -> None:
    if not outcome.done():
        outcome.set_result(result)


def _fail(outcome: "asyncio.Future[_T]", error: BaseException) -> None:
    if not outcome.done():
        outcome.set_exception(error)
