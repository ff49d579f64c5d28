"""Where GPU drivers keep what they have compiled for a server, so that its next start need not wait for it again.

Each model has a folder of its own, ``magi-llama/<model id>`` below the manager's cache folder, which systemd makes for
the server (``CacheDirectory=`` in systemd.exec(5)). What is in it is code that will be executed: servers share none,
so that one that was taken over leaves nothing for another. It may be removed while the server is stopped.

Found by ``XDG_CACHE_HOME`` alone, each with a folder below and a bound of its own:

* Mesa (RADV, ANV, llvmpipe): ``mesa_shader_cache*``, 1 GB (https://docs.mesa3d.org/envvars.html);
* Intel's compute runtime: ``neo_compiler_cache``, 1 GB (its programmers-guide/COMPILER_CACHE.md);
* ROCm's comgr: ``comgr``, 30 GB, pruned at the end of a program (amd/comgr/README.md of ROCm/llvm-project);
* SYCL: ``libsycl_cache``, 8 GB, and only with ``SYCL_CACHE_PERSISTENT`` (sycl/doc/EnvironmentVariables.md of
  intel/llvm). ``SYCL_CACHE_DIR`` itself would not do: it may have 164 characters.

NVIDIA's driver otherwise writes below the home, which servers do not have:

* ``CUDA_CACHE_PATH`` takes what CUDA compiles from PTX; ``CUDA_CACHE_MAXSIZE`` bounds it, 1 GiB here, at most 4 GiB
  (CUDA programming guide, environment variables);
* ``__GL_SHADER_DISK_CACHE_PATH`` takes what Vulkan and OpenGL compile, in ``GLCache`` below it, 1 GB by itself (README
  of NVIDIA's driver, environment variables). It must be a folder that is there: the driver makes none, and goes on
  without a cache (DRIVE OS SDK, automatic shader cache).

llama-server has a cache as well, for models that it downloads: the first of ``LLAMA_CACHE``, ``HF_HUB_CACHE``,
``HUGGINGFACE_HUB_CACHE``, ``HF_HOME`` and ``XDG_CACHE_HOME`` that is set (common/hf-cache.cpp of llama.cpp). A server
of ours has its model and is told no other, and nothing of the kind shall find a place here.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from magi_agent.vocabulary import Scope

_SERVERS: Final = "magi-llama"
_CUDA: Final = "cuda"
_CUDA_BYTES: Final = 1 << 30
"""Older drivers keep 256 MiB by themselves, less than they make of llama.cpp."""
_NOWHERE: Final = "/nonexistent"
"""What Debian's users without a home have as theirs: it is never there."""


def cache_root(scope: Scope, *, dynamic_user: bool = False, environment: Mapping[str, str] | None = None) -> Path:
    """Where a manager of this scope makes its units' ``CacheDirectory=``; ``environment`` is this process's own.

    Those of a unit with a dynamic user are below ``private``, which nobody else may enter.
    """
    if scope is Scope.SYSTEM:
        return Path("/var/cache/private" if dynamic_user else "/var/cache")
    environment = os.environ if environment is None else environment
    return Path(environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())


def cache_directories(model_id: str) -> tuple[str, ...]:
    """The folders that systemd makes for a model's server, below the cache root."""
    return (f"{_SERVERS}/{model_id}", f"{_SERVERS}/{model_id}/{_CUDA}")


def cache_environment(root: Path, model_id: str) -> dict[str, str]:
    """The environment by which drivers find these folders."""
    folder, cuda = (str(root / name) for name in cache_directories(model_id))
    return {
        "XDG_CACHE_HOME": folder,
        "CUDA_CACHE_PATH": cuda,
        "CUDA_CACHE_MAXSIZE": str(_CUDA_BYTES),
        "__GL_SHADER_DISK_CACHE_PATH": folder,
        "SYCL_CACHE_PERSISTENT": "1",
        "LLAMA_CACHE": _NOWHERE,
    }
