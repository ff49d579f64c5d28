"""Samples of a model file's data, by which files with equal headers are told apart without being read."""

import os
from hashlib import blake2b
from typing import Final

PLACES: Final = 8
"""How many there are, spread evenly; the last one ends with the data."""
PLACE_BYTES: Final = 1024


def read_sample(fd: int, size: int) -> str:
    """Return the digest of a few kibibytes of an open file, of whose first ``size`` bytes the last are the data's.

    Equal files have equal samples, wherever they lie. Different ones may have equal samples too, where they differ in
    few places only. Raises ``OSError``.
    """
    # Short: it is kept for each model, and only tells apart what has one size and header already.
    digest = blake2b(digest_size=8)
    room = max(0, size - PLACE_BYTES)
    for number in range(1, PLACES + 1):
        digest.update(_read(fd, room * number // PLACES, min(size, PLACE_BYTES)))
    return digest.hexdigest()


def _read(fd: int, position: int, length: int) -> bytes:
    data = os.pread(fd, length, position)
    while 0 < len(data) < length:
        # Some file systems answer with less than there is.
        more = os.pread(fd, length - len(data), position + len(data))
        if not more:
            break
        data += more
    return data
