"""The real parts that tests share: a systemd manager, a llama-server, sample models, toy models, free ports."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import random
import shutil
import signal
import socket
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import hypothesis
import locations
import pytest
from surroundings import inside_private_systemd
from toy_model import MetadataValue, write_toy_model

# Begun in a script's background, everything here would have Ctrl-C ignored for good, and what it starts as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long one example takes says more of the machine than of the code. What is new is sought by `make fuzz`, which has
# seeds of its own: whoever changes something is to see what that did.
hypothesis.settings.register_profile("magi", deadline=None, derandomize="FUZZ_SEED" not in os.environ)
hypothesis.settings.load_profile("magi")

_FIRST_TEST_PORT = 21000
_LAST_TEST_PORT = 29999
_PORT_BLOCK = 100
_MOST_BLOCKS = 25
"""Of one run, so that several on one machine have enough."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, begin with files of which one test takes longer than any other may.

    Begun last, it would keep all others waiting.
    """
    if hasattr(config, "workerinput"):
        long = {item.path for item in items if item.get_closest_marker("timeout")}
        items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, object, object]:
    """Let reports pass between processes that quote a path which is no UTF-8."""
    return _as_utf8((yield))


def _as_utf8(value: object) -> object:
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case dict():
            return {_as_utf8(name): _as_utf8(entry) for name, entry in value.items()}
        case list() | tuple():
            return type(value)(_as_utf8(entry) for entry in value)
        case _:
            return value


@dataclass(frozen=True, slots=True)
class SampleModels:
    """Two real models, as `make setup` brought them."""

    folder: Path
    smollm2: Path
    gemma: Path


@dataclass(frozen=True, slots=True)
class SystemdUser:
    """The user manager that the tests run beside."""

    runtime: Path
    bus_address: str
    journal: Path


class MakeToyModel(Protocol):
    """Writes a toy model to a path and returns it; see toy_model.write_toy_model for the arguments."""

    def __call__(
        self,
        path: Path,
        *,
        name: str = "toy",
        architecture: str = "llama",
        chat_template: str | None = None,
        metadata: dict[str, MetadataValue] | None = None,
        context_length: int = 512,
        seed: int = 1,
    ) -> Path: ...


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.fail(f"{path} is missing: run `make setup`")
    return path


@pytest.fixture(scope="session")
def llama_server() -> Path:
    """A real llama-server, by its own path (not the link in the cache)."""
    return _existing(locations.LLAMA_SERVER).resolve()


_ON_SOFTWARE_GPU = """\
#!/bin/sh
# llama-server with a GPU in software, which it lists as Vulkan0 only where the variable says so.
here=$(dirname "$0")
export LD_LIBRARY_PATH="$here" VK_ICD_FILENAMES="$here/lvp_icd.json" GGML_VK_VISIBLE_DEVICES=0
exec "$here/llama-server-itself" "$@"
"""


@pytest.fixture(scope="session")
def software_gpu(llama_server: Path) -> Iterator[Path]:
    """A llama-server that lists one GPU, ``Vulkan0``, which the CPU computes; all it needs is in its own folder."""
    if not (locations.SOFTWARE_GPU / "complete").exists():
        pytest.skip("Mesa's Vulkan driver could not be unpacked")
    # Links of this kind need the same file system, and take no room on it.
    with tempfile.TemporaryDirectory(prefix="software-gpu-", dir=locations.CACHE) as name:
        folder = Path(name)
        for path in (*locations.SOFTWARE_GPU.iterdir(), *llama_server.parent.iterdir()):
            if path.is_file():
                itself = f"{path.name}-itself" if path.name == llama_server.name else path.name
                # Builds may bring a loader for Vulkan of their own.
                if not (folder / itself).exists():
                    (folder / itself).hardlink_to(path.resolve())
        program = folder / llama_server.name
        program.write_text(_ON_SOFTWARE_GPU)
        program.chmod(0o755)
        yield program


@pytest.fixture(scope="session")
def sample_models() -> SampleModels:
    return SampleModels(locations.SAMPLE_MODELS, _existing(locations.SMOLLM2), _existing(locations.GEMMA))


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> MakeToyModel:
    """Makes toy models; each is a file of its own (no links: a link and its target are one model)."""
    plain = write_toy_model(tmp_path_factory.mktemp("toy") / "plain.gguf")

    def make(
        path: Path,
        *,
        name: str = "toy",
        architecture: str = "llama",
        chat_template: str | None = None,
        metadata: dict[str, MetadataValue] | None = None,
        context_length: int = 512,
        seed: int = 1,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (name, architecture, chat_template, metadata, context_length, seed) == ("toy", "llama", None, None, 512, 1):
            shutil.copyfile(plain, path)
            return path
        return write_toy_model(
            path,
            name=name,
            architecture=architecture,
            chat_template=chat_template,
            metadata=metadata,
            context_length=context_length,
            seed=seed,
        )

    return make


@pytest.fixture(scope="session")
def systemd_user() -> SystemdUser:
    """The private manager; a failure, not a skip, where the tests were started without one."""
    if not inside_private_systemd():
        pytest.fail("this test needs the private systemd manager: run it by `make test ARGS='...'`")
    return SystemdUser(
        Path(os.environ["XDG_RUNTIME_DIR"]),
        os.environ["DBUS_SESSION_BUS_ADDRESS"],
        Path(os.environ["MAGI_JOURNAL_DIRECTORY"]),
    )


class PortRanges(Protocol):
    """Gives out ranges of consecutive ports that nothing listens on: `(first, last)`, both usable."""

    def __call__(self, count: int = 1) -> tuple[int, int]: ...


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@pytest.fixture
def memory_to_itself() -> Iterator[None]:
    """For a test that counts on what memory is free: no other such test of this machine goes on beside it."""
    with Path(tempfile.gettempdir(), "magi-test-memory").open("w") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def _ports() -> Iterator[Iterator[int]]:
    """Ports of blocks that this run has claimed for itself, among all runs on this machine."""
    blocks = list(range(_FIRST_TEST_PORT, _LAST_TEST_PORT, _PORT_BLOCK))
    random.shuffle(blocks)
    with contextlib.ExitStack() as claims:

        def ports() -> Iterator[int]:
            ours: list[int] = []
            for block in blocks:
                if len(ours) == _MOST_BLOCKS:
                    break
                # Process ids would not do: each private manager has its own namespace of them. A lock ends with us.
                path = Path(tempfile.gettempdir(), f"magi-test-ports-{block}")
                claim = claims.enter_context(path.open("w"))
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    claims.callback(path.unlink, missing_ok=True)
                    ours.append(block)
                    yield from range(block, block + _PORT_BLOCK)
            # Whoever had the first of them has long ended, or is seen to listen.
            while ours:
                for block in ours:
                    yield from range(block, block + _PORT_BLOCK)

        yield ports()


@pytest.fixture(scope="session")
def unused_ports(_ports: Iterator[int]) -> PortRanges:
    """Ranges of ports for the servers of one test; none is given out again before some thousand others were."""

    def take(count: int = 1) -> tuple[int, int]:
        run: list[int] = []
        for port in itertools.islice(_ports, 5000):
            run = [*run, port] if _is_free(port) and (not run or port == run[-1] + 1) else []
            if len(run) == count:
                return run[0], run[-1]
        raise AssertionError(f"no {count} free ports in a row")

    return take
