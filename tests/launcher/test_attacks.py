"""What an agent that was taken over, or anybody else on the host, tries with the launcher; docs/launcher.md."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magi_agent.errors import SettingsNotUsable
from magi_agent.launcher.messages import MAX_REQUEST, Refused, Request, read_request
from magi_agent.servers.launch import unit_name
from tests.conftest import MakeToyModel
from tests.launcher.conftest import PREFIX, Running, unit_property

NOBODY = 65534


async def refused(running: Running, **fields: Any) -> str:
    """The sentence with which a start is refused; nothing was started."""
    with pytest.raises((Refused, SettingsNotUsable)) as error:
        await running.ask("start", **fields)
    model_id = fields["model_id"]
    if isinstance(model_id, str) and model_id.startswith(PREFIX) and "\0" not in model_id:
        assert unit_property(unit_name(model_id), "ActiveState")["ActiveState"] == "inactive"
    return str(error.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
async def test_another_user_is_refused_though_it_may_connect(running: Running, model: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)
    request = json.dumps({"verb": "stop", "model_id": model.stem}).encode() + b"\n"
    pid = os.fork()
    if pid == 0:  # the other user
        status = 1
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with socket.socket(socket.AF_UNIX) as channel:
                channel.settimeout(20)
                channel.connect(str(running.path))
                channel.sendall(request)
                answer = channel.makefile("rb").readline()
            status = 0 if b"user 65534 may not ask anything here" in answer else 2
        finally:
            os._exit(status)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{models}/../secret.gguf", "shortest form"),
        ("{models}/./lau-one.gguf", "shortest form"),
        ("/{models}/lau-one.gguf", "shortest form"),
        ("lau-one.gguf", "shortest form"),
        ("{models}/lau-one.gguf/", "shortest form"),
        ("/etc/passwd", "not called like a model"),
        ("{outside}/secret.gguf", "leads out"),
        ("{outside}/inward.gguf", "leads out"),
        ("{models}-beside/secret.gguf", "leads out"),
        ("{models}/link.gguf", "leads out"),
        ("{models}/folder/secret.gguf", "leads out"),
        ("{models}/device.gguf", "leads out"),
        ("{models}/folder.gguf", "is no file"),
        ("{models}", "not called like a model"),
        ("{models}/x\n.gguf", "_path"),
        ("{models}/x\0.gguf", "_path"),
    ],
)
async def test_paths_that_are_no_models(running: Running, model: Path, path: str, said: str) -> None:
    outside = running.models.parent / "outside"
    outside.mkdir()
    (running.models.parent / "models-beside").mkdir()
    for folder in (outside, running.models.parent / "models-beside", running.models.parent):
        shutil.copy(model, folder / "secret.gguf")
    (outside / "inward.gguf").symlink_to(model)
    (running.models / "link.gguf").symlink_to(outside / "secret.gguf")
    (running.models / "folder").symlink_to(outside)
    (running.models / "device.gguf").symlink_to("/dev/zero")
    (running.models / "folder.gguf").mkdir()
    meant = path.format(models=running.models, outside=outside)

    as_model = running.start_of(model, model_path=meant)
    assert said in await refused(running, **as_model)
    assert said in await refused(running, **running.start_of(model, projector_path=meant))


@pytest.mark.parametrize(
    "setting",
    ["draft_model", "chat_template_file", "projector", "lora"],
)
async def test_files_that_settings_name_lie_in_the_model_folders(
    running: Running, model: Path, toy_model: MakeToyModel, setting: str
) -> None:
    outside = toy_model(running.models.parent / "outside.gguf")
    (running.models / "inside.gguf").symlink_to(outside)
    for path in (outside, running.models / "inside.gguf", running.models / ".." / "outside.gguf", Path("/etc/passwd")):
        value: Any = [{"path": str(path)}] if setting == "lora" else str(path)
        said = await refused(running, **running.start_of(model, settings={setting: value}))
        assert ("without '..'" if ".." in path.parts else "outside the model folders") in said


@pytest.mark.parametrize(
    "chosen",
    [
        {"extra_flags": ["--temp=1"]},
        {"extra_flags": ["--tools=all"]},
        {"extra_flags": ["--host=0.0.0.0"]},
        {"extra_flags": ["--no-warmup --host 0.0.0.0"]},
        {"extra_flags": ["--no-warmup\n--host=0.0.0.0"]},
        {"extra_flags": ["-m", "/etc/passwd"]},
        {"extra_flags": ["--log-file=/var/lib/x"]},
        {"extra_flags": ["--slot-save-path=/"]},
        {"extra_flags": ["--rpc=evil:1"]},
        {"extra_flags": ["--mcp-servers-json={}"]},
        {"extra_flags": ["--model-url=http://evil/x.gguf"]},
        {"binary": "/bin/sh"},
        {"binary": "other"},
        {"aliases": ["a\nb"]},
        {"aliases": ["a,--host"]},
        {"cpu_affinity": "0; reboot"},
        {"numa_nodes": "$(id)"},
        {"user": "root"},
        {"environment": {"LD_PRELOAD": "/models/evil.so"}},
        {"ctx_size": "8192 --host 0.0.0.0"},
        {"ctx_size": 10**30},
        {"mode": "shell"},
    ],
    ids=str,
)
async def test_settings_that_are_none(running: Running, model: Path, chosen: dict[str, Any]) -> None:
    running.options["allowed_flags"] = "--no-warmup"
    assert await refused(running, **running.start_of(model, settings=chosen))


@pytest.mark.parametrize(
    "devices",
    [
        ["CUDA0\n--host=0.0.0.0"],
        ["CUDA0\n"],
        ["CUDA0 --host 0.0.0.0"],
        ["--host"],
        ["-1"],
        ["CUDA0,CUDA1"],
        ["CUDA0", ""],
        [""],
        [","],
        ["CUDA"],
        ["CUDA0000"],
        ["0"],
        ["CUDA0$IFS"],
        ["CUDA0;x"],
        ["CUDA٣"],
        ["CÜDA0"],
        ["A" * 32 + "0"],
        ["CUDA0", "CUDA0"],
        ["none", "CUDA0"],
        ["none", "none"],
        ["None"],
        [f"CUDA{number}" for number in range(65)],
        "CUDA0",
        [0],
        [["CUDA0"]],
        {"CUDA0": 1},
        None,
    ],
    ids=str,
)
async def test_devices_that_are_none(running: Running, model: Path, devices: object) -> None:
    assert "devices" in await refused(running, **running.start_of(model, devices=devices))


@pytest.mark.parametrize(
    "limits",
    [
        {"high": None, "max": 0},
        {"high": None, "max": -1},
        {"high": None, "max": (16 << 20) - 1},
        {"high": None, "max": (1 << 60) + 1},
        {"high": None, "max": 2**64 - 1},
        {"high": None, "max": 10**40},
        {"high": 1, "max": None},
        {"high": (32 << 20) + 1, "max": 32 << 20},
        {"high": None, "max": 1e9},
        {"high": None, "max": True},
        {"high": None, "max": "1073741824"},
        {"high": None, "max": "infinity"},
        {"high": None, "max": [1 << 30]},
        {"high": None},
        {"max": 1 << 30},
        {"high": None, "max": 1 << 30, "swap": 1 << 30},
        {"high": None, "max": 1 << 30, "MemoryLow": 1 << 30},
        [1 << 30, 1 << 30],
        1 << 30,
        "",
    ],
    ids=str,
)
async def test_limits_of_memory_that_are_none(running: Running, model: Path, limits: Any) -> None:
    assert "memory_limits" in await refused(running, **running.start_of(model, memory_limits=limits))


async def test_text_cannot_become_an_option_or_another_variable(running: Running, model: Path) -> None:
    template = "--host 0.0.0.0 LD_PRELOAD=/x ${HOME} $(id) ; %n \" ' \\"
    chosen = {"chat_template": template, "ctx_size": 256, "n_gpu_layers": 0}
    assert await running.ask("start", **running.start_of(model, settings=chosen)) == {"result": "done"}

    shown = unit_property(unit_name(model.stem), "MainPID")
    process = Path("/proc") / shown["MainPID"]
    words = process.joinpath("cmdline").read_bytes().split(b"\0")
    variables = dict(entry.partition(b"=")[::2] for entry in process.joinpath("environ").read_bytes().split(b"\0"))
    assert words[words.index(b"--host") + 1] == b"127.0.0.1"
    assert words.count(b"--host") == 1
    assert variables[b"LLAMA_ARG_CHAT_TEMPLATE"] == template.encode()
    assert b"LD_PRELOAD" not in variables


@pytest.mark.parametrize("port", [0, 22, 80, 1023, 65536, -1, 8080.5, "8080", True, None])
async def test_ports_beyond_the_limits(running: Running, model: Path, port: Any) -> None:
    assert await refused(running, **running.start_of(model, port=port))


async def test_the_agents_own_port(running: Running, model: Path) -> None:
    assert "the agent's own" in await refused(running, **running.start_of(model, port=running.ports[1]))


@pytest.mark.parametrize(
    "model_id",
    ["", ".", "..", "-x", "x-", "a/b", "../x", "a b", "A", "ä", "x\n", "x\n.service", "x@y", "x" * 201, "servers", None,
     "lau-one.service ssh", "lau-\0"],
)  # fmt: skip
async def test_ids_that_would_be_other_units(running: Running, model: Path, model_id: Any) -> None:
    assert await refused(running, **running.start_of(model, model_id=model_id))
    for verb in ("stop", "clear"):
        with pytest.raises(Refused):
            await running.ask(verb, model_id=model_id)


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", "x" * 513, None, "a\u2028b"])
async def test_names_that_are_no_line(running: Running, model: Path, name: Any) -> None:
    assert await refused(running, **running.start_of(model, display_name=name))


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"nonsense\n",
        b"{}\n",
        b"[]\n",
        b"null\n",
        b'{"verb": "exec", "argv": ["/bin/sh"]}\n',
        b'{"verb": "stop"}\n',
        b'{"verb": "stop", "model_id": "lau-one", "unit": "ssh.service"}\n',
        b'{"verb": ["stop"], "model_id": "lau-one"}\n',
        b'{"verb": "stop", "model_id": "lau-one"' + b" " * MAX_REQUEST + b"}\n",
        b"[" * 100_000 + b"\n",
        b'{"verb": "probe", "binary": "/bin/sh"}\n',
        b"\xff\xfe\n",
        bytes(1000) + b"\n",
    ],
    ids=lambda line: repr(line[:40]),
)
async def test_lines_that_are_no_request(running: Running, line: bytes) -> None:
    answer = json.loads(await running.send(line))
    assert answer["error"]["kind"] == "Refused"
    assert len(answer["error"]["message"]) < 300


async def test_what_never_becomes_a_line_is_cut_off(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magi_agent.launcher.service._PATIENCE", 0.3)
    assert b"one whole line" in await running.send(b'{"verb": ')
    assert b"one whole line" in await running.send(b'{"verb": "stop"', ends=True)
    assert b"one whole line" in await running.send(b"", ends=True)
    # One that sends more than any request has gets no more memory for it.
    answer = await running.send(b"x" * (8 * MAX_REQUEST))
    assert answer == b"" or b"at most" in answer


async def test_a_flood_holds_up_nobody_for_long(running: Running, model: Path) -> None:
    silent = [await asyncio.open_unix_connection(running.path) for _ in range(200)]
    answers = [asyncio.create_task(reader.read()) for reader, _ in silent]
    done = [json.loads(answer)["error"]["message"] for answer in await asyncio.gather(*answers)]
    for _, writer in silent:
        writer.close()
    assert sum("questions at once" in message for message in done) >= 100
    assert await running.ask("clear", model_id=model.stem) == {"result": "done"}


@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(list(Request.__args__[0].model_fields)), inner),
    )
)
def test_anything_is_a_request_or_refused(document: Any) -> None:
    try:
        request = read_request(json.dumps(document).encode())
    except Refused:
        return
    assert isinstance(request, Request)
