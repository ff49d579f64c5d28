"""Where the workbench keeps its real parts: the llama-server and the sample models that `make setup` brings.

Standard library only: the set-up and the private systemd use it before anything is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder with `pyproject.toml` in it."""

PYTHON = Path(sys.executable).resolve()
"""The interpreter itself: a sandboxed unit does not see the virtual environment of a checkout below `/tmp`."""

VENV = CHECKOUT / ".venv"
"""The virtual environment with both commands and everything the tests need."""

CACHE = CHECKOUT / ".cache"
"""What `make setup` fetched and made; `make clean` leaves it alone."""

BUILD = CHECKOUT / "build"
"""What runs leave on purpose: figures of the benchmarks, the demonstration's shell."""

LLAMA_SERVER = CACHE / "bin" / "llama-server"
"""A symbolic link to the real binary, which finds its libraries beside itself."""

SOFTWARE_GPU = CACHE / "vulkan"
"""Mesa's Vulkan driver for the CPU with its libraries and `lvp_icd.json`, as `make test` unpacks them."""

SAMPLE_MODELS = CACHE / "models"
"""The folder with both sample models and nothing else."""

SMOLLM2 = SAMPLE_MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"
"""A small instruct model with a chat template: answers questions."""

GEMMA = SAMPLE_MODELS / "gemma-3-270m-Q4_K_M.gguf"
"""A base model with a very large vocabulary: what header readers are measured with."""
