"""The least that hears of changes below a folder: watchfiles alone, with nothing done for what it tells.

    python -m tests.bench.bare_watch FOLDER

Each path it hears of is printed, once a batch. The floor of the agent's delay and processor time while files arrive.
"""

from __future__ import annotations

import sys

import watchfiles

_STEP_MS = 50  # watchfiles' own default


def main() -> None:
    """Watch until killed."""
    (folder,) = sys.argv[1:]
    print("watching", flush=True)
    for batch in watchfiles.watch(folder, step=_STEP_MS, watch_filter=None, raise_interrupt=False):
        print("\n".join({path for _, path in batch}), flush=True)


if __name__ == "__main__":
    main()
