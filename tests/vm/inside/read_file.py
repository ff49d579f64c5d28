"""Reads a file through a mapping, as llama-server does that fills a GPU with it; prints the seconds that it took.

    python3 read_file.py PATH

Standard library only: it runs in the virtual machine.
"""

import mmap
import sys
import time
from pathlib import Path

with Path(sys.argv[1]).open("rb") as file:
    began = time.monotonic()
    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for start in range(0, len(mapped), 1 << 20):
            mapped[start : start + (1 << 20)]
print(time.monotonic() - began)
