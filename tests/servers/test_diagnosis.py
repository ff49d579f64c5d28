"""Known causes are told from what the real llama-server, and the real loader, say of them."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from magi_agent.cli.setting_words import assigned, setting_of
from magi_agent.errors import StartFailed
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.diagnosis import MemoryEnd, diagnosed
from magi_agent.servers.evidence import UnitEvidence
from magi_agent.servers.failure import Failure
from magi_agent.systemd.errors import BusError
from magi_agent.systemd.journal import Selection
from magi_agent.systemd.journal_entries import JournalEntry
from magi_agent.systemd.status import unit_status
from tests.conftest import MakeToyModel
from tests.servers.conftest import MakeAgent
from tests.servers.serving_agent import PATIENCE_OF_TESTS
from tests.servers.system import systemctl

FAILED = Failure(datetime(2026, 1, 1, tzinfo=UTC), "exit-code", "it exited with status 1", exit_status=1)


@pytest.fixture
def model(toy_model: MakeToyModel, tmp_path: Path) -> Path:
    return toy_model(tmp_path / "toy.gguf")


def explained(binary: Path, *arguments: str | Path, **environment: str) -> Failure:
    """What is made of what a llama-server prints that ends by itself."""
    for _ in range(3):
        ran = subprocess.run(
            [binary, *map(str, arguments)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            check=False,
        )
        assert ran.returncode != 0
        failure = diagnosed(FAILED, ran.stdout.decode(errors="replace").splitlines(), "toy")
        if failure is not FAILED:
            break
        # Its log has a thread of its own, which on a busy machine does not always get to the end.
    return failure


def test_a_file_that_is_gone(llama_server: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.gguf"

    failure = explained(llama_server, "--model", gone)

    assert failure.message == f"it exited with status 1: the file {gone} is not there"
    assert failure.advice == "bring it back, or disable the model: magictl disable toy"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, as root")
def test_a_file_that_the_servers_user_may_not_read(llama_server: Path, model: Path) -> None:
    model.chmod(0o600)
    os.chown(model, 12345, 12345)

    # A root without the right to read everybody's files is what the servers' user is: anybody.
    failure = explained(
        Path("/usr/bin/setpriv"), "--bounding-set=-all", "--inh-caps=-all", llama_server, "--model", model
    )

    assert f"the user that servers run as may not read {model}" in failure.message
    assert "magictl doctor" in (failure.advice or "")


@pytest.mark.parametrize("kept", [-3000, 400])
def test_a_file_that_is_cut(llama_server: Path, model: Path, kept: int) -> None:
    model.write_bytes(model.read_bytes()[:kept])

    failure = explained(llama_server, "--model", model)

    assert failure.message.endswith("the model's file is damaged, or has not arrived whole")
    assert failure.advice == "fetch it again"


def test_a_file_that_is_no_model(llama_server: Path, model: Path) -> None:
    model.write_bytes(b"<!doctype html>" * 1000)

    assert explained(llama_server, "--model", model).message.endswith("the model's file is no GGUF file")


def test_an_architecture_that_is_not_known(llama_server: Path, model: Path) -> None:
    content = model.read_bytes()
    model.write_bytes(content.replace(b"llama", b"xlama"))

    failure = explained(llama_server, "--model", model)

    assert failure.message.endswith("this llama-server knows no models of the architecture xlama")
    assert failure.advice == "upgrade llama-server"


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--nonsense"], "llama-server does not know the argument --nonsense"),
        (["--ctx-size", "many"], "llama-server does not take what is given for --ctx-size: stoi"),
        (["-ctk", "q4_0", "-ctv", "q4_0", "-fa", "off"], "a quantized cache of values needs flash attention"),
        (["--lora", "MODEL"], "the LoRA adapter does not fit this model"),
        (["--mmproj", "MODEL"], "the projector does not fit this model or this llama-server"),
        (["--device", "CUDA7"], "llama-server does not find the GPU CUDA7 that it was told to use"),
    ],
)
def test_settings_that_do_not_do(llama_server: Path, model: Path, arguments: list[str], cause: str) -> None:
    given = [str(model) if argument == "MODEL" else argument for argument in arguments]

    failure = explained(llama_server, "--model", model, "--port", "1", *given)

    assert failure.message == f"it exited with status 1: {cause}"
    assert failure.advice


@pytest.mark.parametrize(
    "line",
    [
        "llama_init_from_model: quantized V cache requires flash_attn to be enabled",
        "srv load_model: failed to load multimodal model, '/m/mmproj.gguf'",
        "common_init_from_params: failed to apply lora adapter '/m/lora.gguf'",
        "init: failed to initialize chat template",
    ],
)
def test_the_settings_that_are_advised_are_such_that_magictl_takes(line: str) -> None:
    advice = diagnosed(FAILED, [line], "toy").advice or ""

    command = re.search(r"magictl settings toy((?: --unset \w+| \w+=\w+)+)", advice)
    assert command, advice
    words = command[1].replace("--unset", "").split()
    assert all(assigned(word) if "=" in word else setting_of(word) for word in words)


def test_more_than_there_is_memory_for(llama_server: Path, model: Path) -> None:
    failure = explained(
        Path("/usr/bin/prlimit"), "--as=4000000000", llama_server, "--model", model, "--ctx-size", "50000000"
    )

    assert failure.message.endswith("there was no memory for what it is set to hold")
    assert "magictl settings toy ctx_size=" in (failure.advice or "")


def test_a_template_that_is_none(llama_server: Path, model: Path, tmp_path: Path) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text("{% if %}")

    failure = explained(llama_server, "--model", model, "--chat-template-file", template)

    assert failure.message.endswith("llama-server cannot use the chat template")


def test_a_port_that_is_held(llama_server: Path, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        failure = explained(llama_server, "--model", model, "--host", "127.0.0.1", "--port", str(port))

    assert f"nothing can listen at 127.0.0.1, port {port}" in failure.message
    assert "magictl port toy auto" in (failure.advice or "")


def test_a_library_that_is_missing(llama_server: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(llama_server.resolve(), tmp_path / "llama-server"))

    failure = explained(copy, "--version", LD_LIBRARY_PATH="")

    assert "llama-server needs the library lib" in failure.message
    assert "magictl doctor" in (failure.advice or "")


@pytest.mark.parametrize(
    "line",
    [
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9 MiB on device 0: cudaMalloc failed: out of memory",
        "alloc_tensor_range: failed to allocate CUDA0 buffer of size 9663676416",
        "ggml_gallocr_reserve_n_impl: failed to allocate Vulkan0 buffer of size 1073741824",
        "ggml_vulkan: Device memory allocation of size 1073741824 failed: ErrorOutOfDeviceMemory",
    ],
)
def test_the_memory_of_a_gpu(line: str) -> None:
    failure = diagnosed(FAILED, ["something", f"0.00.1 E {line}", "llama_server: exiting"], "toy")

    assert failure.message.endswith("the memory of the GPU is too small for it as it is set")
    assert "magictl settings toy n_gpu_layers=" in (failure.advice or "")


def test_what_is_not_known_stays_as_it_is() -> None:
    assert diagnosed(FAILED, ["hello", "{0} {model} MODEL %s"], "toy") is FAILED
    assert diagnosed(FAILED, [], "toy") is FAILED


def test_what_a_line_claims_is_quoted_short_and_as_text() -> None:
    line = "unknown model architecture: '{0}{1}\x1b[31m" + "x" * 5000 + "'"

    failure = diagnosed(FAILED, [line[:1900] + "'"], "toy")

    assert failure.message.isprintable()
    assert "{0}{1}?[31mxxx" in failure.message
    assert len(failure.message) < 300


async def test_a_server_whose_file_was_cut_says_so_in_its_failure(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, quick_retries: None
) -> None:
    path = toy_model(models / "srv-cut.gguf")
    async with make_agent() as agent:
        await agent.ready("srv-cut")
        await agent.servers.stop("srv-cut", by="test", wait=PATIENCE_OF_TESTS)
        launch = agent.preparation.launch_for

        async def cut_meanwhile(model_id: str) -> object:
            made = await launch(model_id)
            os.truncate(path, path.stat().st_size - 3000)
            return made

        agent.preparation.launch_for = cut_meanwhile  # type: ignore[method-assign,assignment]
        with pytest.raises(StartFailed) as failed:
            await agent.servers.start("srv-cut", by="test", wait=PATIENCE_OF_TESTS)
        assert "the model's file is damaged, or has not arrived whole" in failed.value.message
        assert failed.value.details["advice"] == "fetch it again"
        lines = failed.value.details["logLines"]
        assert isinstance(lines, list)
        assert len(lines) <= 20


def for_riscv(llama_server: Path, folder: Path) -> Path:
    """A llama-server that says it is a program for another machine."""
    copy = Path(shutil.copy(llama_server.resolve(), folder / "llama-server"))
    with copy.open("r+b") as file:
        file.seek(18)  # e_machine of elf(5)
        file.write((243).to_bytes(2, "little"))
    return copy


async def test_a_binary_of_another_machine_is_named_as_that(
    make_agent: MakeAgent,
    models: Path,
    toy_model: MakeToyModel,
    tmp_path: Path,
    llama_server: Path,
    quick_retries: None,
) -> None:
    toy_model(models / "srv-foreign.gguf")
    foreign = for_riscv(llama_server, tmp_path)
    async with make_agent(llama_server_path=str(foreign)) as agent:
        with pytest.raises(StartFailed) as failed:
            await agent.servers.start("srv-foreign", by="test", wait=PATIENCE_OF_TESTS)
        assert "llama-server is a program for riscv64, which this host is not" in failed.value.message


TOY = "magi-llama-toy.service"
OOM = Failure(datetime(2026, 1, 1, tzinfo=UTC), "oom-kill", "it was killed because memory ran out", signal="SIGKILL")


@pytest.mark.parametrize(
    ("end", "message", "advice"),
    [
        (MemoryEnd(3 << 30, "magi-llama-toy.service"), ", at its limit of 3 GiB (MemoryMax)", "toy memory_max="),
        (MemoryEnd(700 << 20, "magi-llama-toy.service"), ", at its limit of 700 MiB (MemoryMax)", "toy ctx_size="),
        (MemoryEnd(5000, None), ", its own of 5000 bytes (MemoryMax) or the host's", "toy memory_max="),
        (MemoryEnd(3 << 30, TOY, "set"), ", at its limit of 3 GiB (MemoryMax)", "raise memory_max (magictl set"),
        (MemoryEnd(3 << 30, None, "set"), ", its own of 3 GiB (MemoryMax) or the host's", "raise memory_max ("),
        (MemoryEnd(3 << 30, TOY, "derived"), ", at its limit of 3 GiB (MemoryMax)", "follows from its need (magictl"),
        (MemoryEnd(3 << 30, TOY, "operator"), ", at its limit of 3 GiB (MemoryMax)", f"set-property {TOY} MemoryMax="),
        (MemoryEnd(3 << 30, "magi-llama.slice", "set"), ", that of magi-llama.slice", "stop another model"),
        (MemoryEnd(3 << 30, "magi-llama.slice"), ", that of magi-llama.slice", "stop another model"),
        (MemoryEnd(None, "a\x1bb.slice"), ", that of a?b.slice", "stop another model"),
        (MemoryEnd(3 << 30, ""), ", the host's", "stop another model"),
        (MemoryEnd(None, ""), ", the host's", "stop another model"),
        (MemoryEnd(), "", "stop another model"),
        (None, "", "stop another model"),
    ],
)
def test_at_which_limit_it_was_killed(end: MemoryEnd | None, message: str, advice: str) -> None:
    # What it said last is no cause: it was the kernel that ended it.
    told = diagnosed(OOM, ["error: invalid argument: --x"], "toy", None, end)

    assert told.message == OOM.message + message
    assert told.advice is not None
    assert advice in told.advice


@pytest.mark.parametrize(
    ("line", "group"),
    [
        (f"oom_memcg=/magi.slice/{TOY},task_memcg=/magi.slice/{TOY},task=llama-server,pid=748,uid=0", TOY),
        (f"oom_memcg=/magi.slice,task_memcg=/magi.slice/{TOY},task=llama-server,pid=748,uid=0", "magi.slice"),
        (f"global_oom,task_memcg=/magi.slice/{TOY},task=llama-server,pid=748,uid=0", ""),
        (f"oom_memcg=/,task_memcg=/magi.slice/{TOY},task=llama-server,pid=748,uid=0", ""),
        ("oom_memcg=/magi.slice/a.service,task_memcg=/magi.slice/a.service,task=x,pid=748,uid=0", None),
        (f"task_memcg=/magi.slice/{TOY},task=x,pid=748,uid=0", None),
    ],
)
async def test_whose_limit_it_was_is_read_from_the_kernels_log(line: str, group: str | None) -> None:
    """A stand-in for the kernel's log, in the words of Linux 6.1; `make test-vm` has the kernel say them."""
    said = f"oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,{line}"
    evidence = UnitEvidence(_NoManager(), _KernelLog(["something else", said]))  # type: ignore[arg-type]

    assert await evidence.memory_end(unit_status(TOY, {}, {})) == MemoryEnd(None, group)


@pytest.mark.parametrize(
    ("held", "source"), [(96 << 20, "set"), (900 << 20, "derived"), (5 << 30, "operator"), (None, None)]
)
async def test_where_the_limit_comes_from_is_told_with_it(held: int | None, source: str | None) -> None:
    made = [f'MAGI_UNIT_MEMORY={{"memory_high":null,"memory_max":{held if source == "set" else 900 << 20}}}']
    chosen = [f'MAGI_LIMITS={{"memory_max":{held}}}'] if held and source == "set" else []
    evidence = UnitEvidence(_Limits(held), _KernelLog([]))  # type: ignore[arg-type]

    end = await evidence.memory_end(replace(unit_status(TOY, {}, {}), environment=tuple(made + chosen)))

    assert end == MemoryEnd(held, None, source)  # type: ignore[arg-type]


async def test_of_a_unit_of_a_server_the_origin_is_read(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-limited.gguf")
    async with make_agent() as agent:
        await agent.choose("srv-limited", RuntimeSettings(memory_max=3 << 30))
        await agent.ready("srv-limited")
        unit = agent.unit("srv-limited")
        evidence = UnitEvidence(agent.manager, agent.journal)
        assert await evidence.memory_end(unit) == MemoryEnd(3 << 30, None, "set")
        await systemctl("set-property", "--runtime", unit.name, f"MemoryMax={4 << 30}")
        assert await evidence.memory_end(unit) == MemoryEnd(4 << 30, None, "operator")
        await agent.servers.stop("srv-limited", by="test", wait=PATIENCE_OF_TESTS)


class _Limits:
    def __init__(self, most: int | None) -> None:
        self._most = most

    async def memory_limits_of_service(self, _: str) -> tuple[int | None, int | None]:
        return None, self._most


class _KernelLog:
    def __init__(self, messages: list[str]) -> None:
        self._messages = messages

    async def newest(self, selection: Selection) -> AsyncIterator[JournalEntry]:
        assert selection.any_of == [["_TRANSPORT=kernel"]]
        for message in self._messages:
            yield JournalEntry(message, 0.0, 4, None, "")


class _NoManager:
    async def memory_limits_of_service(self, name: str) -> tuple[int | None, int | None]:
        raise BusError(f"there is no {name}")
