"""Single keys, as they are pressed, while a command draws on the terminal."""

import os
import select
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Keyboard:
    """Keys of a terminal; none ever, where there is no terminal."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def pressed(self, seconds: float) -> str:
        """Return the key that is pressed within ``seconds``; empty where none is."""
        if self._descriptor is None:
            time.sleep(seconds)
            return ""
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return ""
        key = os.read(self._descriptor, 1)
        if not key:
            # The terminal is gone: nothing is ever pressed any more.
            self._descriptor = None
        return key.decode(errors="replace")


@contextmanager
def keyboard(stream: TextIO | None) -> Iterator[Keyboard]:
    """Have each key come at once and unseen until the block is left; Ctrl-C and the like stay signals."""
    if stream is None or not stream.isatty():
        yield Keyboard(None)
        return
    descriptor = stream.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield Keyboard(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
