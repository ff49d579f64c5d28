"""`magictl export` and `import`: our own documents, and other programs' settings with a report."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Magictl
from tests.cli.stand_in import Answer, StandIn, error, model, server
from tests.cli.terminal import MAGICTL, surroundings

COMMAND = "llama-server -m /models/tiny-chat.gguf -c 8192 -ngl 99 --host 0.0.0.0 --api-key secret"
SWAP = """\
models:
  small:
    cmd: llama-server --port ${PORT} -m /models/tiny-chat.gguf -c 8192
    ttl: 300
  lost:
    cmd: llama-server --port ${PORT} -m /elsewhere/lost.gguf
logLevel: info
"""
PRESET = """\
version = 1
[qwen2.5-7b]
model = /models/qwen2.5-7b.gguf
ctx-size = 4096
"""


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives a text to `magictl` as its standard input."""

    def give(text: str | bytes) -> None:
        content = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


def chosen(agent: StandIn, model_id: str) -> dict[str, object]:
    return {key: value for key, value in agent.models[model_id]["runtimeSettings"].items() if value is not None}


def changes(agent: StandIn) -> list[tuple[str, str]]:
    return [(method, path) for method, path in agent.seen if method != "GET"]


def test_an_export_is_the_agents_document(agent: StandIn, magictl: Magictl, tmp_path: Path) -> None:
    file = tmp_path / "backup.json"

    printed, written = magictl("export"), magictl("export", str(file))

    assert printed.json["models"].keys() == agent.models.keys()
    assert json.loads(file.read_text()) == printed.json
    assert written.out == f"✓ the choices for 3 models and 3 profiles are in {file}\n"
    assert magictl("export", "--json").json == magictl("export", "-").json == printed.json


def test_an_export_that_cannot_be_written_leaves_nothing(agent: StandIn, magictl: Magictl, tmp_path: Path) -> None:
    there = tmp_path / "folder"
    there.mkdir()

    told = magictl("export", str(there))

    assert told.status == 1
    assert told.err.startswith(f"magictl: cannot write {there}: ")
    assert list(tmp_path.iterdir()) == [there]


def test_an_export_is_taken_back(agent: StandIn, magictl: Magictl, tmp_path: Path) -> None:
    file = tmp_path / "backup.json"
    magictl("export", str(file))
    del agent.models["old-14b"]

    planned = magictl("import", str(file), "--dry-run")
    assert planned.status == 0
    assert planned.out.endswith("2 models would change, 0 as before, 3 profiles would be written\n")
    assert planned.err == "! no such model here: old-14b\n"
    assert agent.imported == []

    done = magictl("import", str(file))
    assert done.out.startswith("✓ tiny-chat\n✓ qwen2.5-7b\n2 models changed")
    assert agent.imported == [json.loads(file.read_text())]
    assert magictl("import", str(file), "--json").json["changed"] == ["tiny-chat", "qwen2.5-7b"]


def test_an_export_that_an_editor_gave_a_mark_is_taken_back(agent: StandIn, magictl: Magictl, given: Any) -> None:
    given(b"\xef\xbb\xbf" + json.dumps(magictl("export").json).encode())

    assert magictl("import", "-").status == 0
    assert len(agent.imported) == 1


def test_what_could_not_be_taken_back_is_a_failure(agent: StandIn, magictl: Magictl, given: Any) -> None:
    def troubled(method: str, path: str, right: Answer) -> Answer:
        return 200, {**right[1], "problems": ["profile 'x' cannot be written"]}

    agent.fault = troubled
    given('{"version": 1, "models": {}}')

    told = magictl("import", "-")

    assert told.status == 1
    assert told.err == "✗ profile 'x' cannot be written\n"


def test_an_export_takes_no_model_of_ones_choice(agent: StandIn, magictl: Magictl, given: Any) -> None:
    given('{"version": 1, "models": {}}')

    told = magictl("import", "-", "--for", "tiny-chat")

    assert (told.status, agent.seen) == (2, [])
    assert "leave --for out" in told.err


def test_a_command_line_becomes_settings_and_the_rest_is_said(agent: StandIn, magictl: Magictl, given: Any) -> None:
    agent.models["tiny-chat"]["runtimeSettings"] |= {"ctxSize": 1, "memoryMax": 1 << 30}
    agent.servers["tiny-chat"] = server("tiny-chat")
    given(COMMAND)

    told = magictl("import", "-")

    assert told.status == 0
    lines = told.out.splitlines()
    assert lines[:3] == ["1 model in a llama-server command line", "", "tiny-chat"]
    assert "  ✓ -c 8192  becomes  ctx_size = 8192" in lines
    assert "  ✓ -ngl 99  becomes  n_gpu_layers = 99" in lines
    assert any(line.startswith("  ! --host 0.0.0.0: ") for line in lines)
    assert lines[-1] == "✓ tiny-chat has 2 settings of this"
    assert "secret" not in told.out + told.err
    assert told.err == "! it runs with others; to apply: magictl restart tiny-chat\n"
    assert chosen(agent, "tiny-chat") == {"nGpuLayers": 99, "ctxSize": 8192, "memoryMax": 1 << 30}


def test_a_dry_run_reports_and_changes_nothing(agent: StandIn, magictl: Magictl, given: Any) -> None:
    given(COMMAND)

    told = magictl("import", "-", "--dry-run")

    assert told.status == 0
    assert told.out.endswith("  would give 2 settings to tiny-chat\n")
    assert changes(agent) == []


def test_the_model_may_be_named(agent: StandIn, magictl: Magictl, given: Any) -> None:
    given(COMMAND)
    assert magictl("import", "-", "--for", "old-14b").status == 0
    assert chosen(agent, "old-14b") == {"nGpuLayers": 99, "ctxSize": 8192}

    given(COMMAND)
    told = magictl("import", "-", "--for", "old")
    assert (told.status, told.err) == (4, "magictl: no model has the id 'old'; did you mean old-14b?\n")

    given(SWAP)
    several = magictl("import", "-", "--for", "old-14b")
    assert several.status == 2
    assert "there are 2 models in it; --for goes with one" in several.err


def test_each_model_of_a_llama_swap_file_gets_its_own(agent: StandIn, magictl: Magictl, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(SWAP)

    told = magictl("import", str(file))

    assert told.status == 1
    assert told.out.startswith("2 models in a llama-swap configuration\n\nsmall\n")
    assert "\nbeside the models\n  ! logLevel: " in told.out
    assert told.err == "magictl: no model here is /elsewhere/lost.gguf; import its command alone, with --for ID\n"
    assert chosen(agent, "tiny-chat") == {
        "ctxSize": 8192, "aliases": ["small"], "startPolicy": "onDemand", "idleTimeoutSeconds": 300
    }  # fmt: skip


TWICE = """\
models:
  short: {cmd: llama-server -m /models/tiny-chat.gguf -c 4096}
  other: {cmd: llama-server -m /models/qwen2.5-7b.gguf -c 1}
  long: {cmd: llama-server -m /models/tiny-chat.gguf -c 32768}
"""


def test_of_entries_that_mean_one_model_and_differ_none_is_taken_over(
    agent: StandIn, magictl: Magictl, given: Any
) -> None:
    given(TWICE)

    told = magictl("import", "-")

    rest = (
        "2 entries (short, long) mean tiny-chat and differ in ctx_size, so none is taken over; import the command of"
        " the one that is meant alone, with --for tiny-chat\n"
    )
    assert (told.status, told.err) == (1, f"magictl: short: {rest}magictl: long: {rest}")
    assert changes(agent) == [("PUT", "/api/models/qwen2.5-7b/settings")]
    given(TWICE)
    planned = magictl("import", "-", "--dry-run", "--json")
    assert planned.status == 1
    assert [one["error"] and one["error"]["error"] for one in planned.json["models"]] == [
        "ImportContradictory", None, "ImportContradictory"
    ]  # fmt: skip


def test_names_are_added_to_those_that_a_model_has(agent: StandIn, magictl: Magictl, given: Any) -> None:
    agent.models["tiny-chat"]["runtimeSettings"] |= {"aliases": ["gpt", "small"]}
    given(TWICE.replace("32768", "4096"))

    assert magictl("import", "-").status == 0
    assert chosen(agent, "tiny-chat") == {
        "ctxSize": 4096, "startPolicy": "onDemand", "aliases": ["gpt", "small", "short", "long"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--temp 0.5 --seed 7", ["--temp=0.5", "--seed=7"]),
        ('--grammar "it\'s; touch x" --seed 1', ["--seed=1"]),
        ("--samplers top_k,min_p", ["--samplers=top_k,min_p"]),
        ('--chat-template-kwargs \'{"a": "it is $(id) `id`", "b": 2}\'', None),
        ('--reverse-prompt "it\'s"', ["--reverse-prompt=it's"]),
    ],
)
def test_the_command_for_flags_is_one_that_a_shell_and_magictl_read_as_meant(
    agent: StandIn, magictl: Magictl, given: Any, flags: str, expected: list[str] | None
) -> None:
    given(f"llama-server -m tiny-chat.gguf -c 1 {flags}")

    told = magictl("import", "-")

    commands = [line.partition("the flags: ")[2] for line in told.err.splitlines() if "the flags: " in line]
    if expected is None:
        assert commands == []
        return
    [command] = commands
    read = subprocess.run(
        ["/bin/sh", "-c", f"magictl() {{ printf '%s\\n' \"$@\"; }}; {command}"],
        capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert read.stderr == ""
    assert magictl(*read.stdout.splitlines()).status == 0
    assert chosen(agent, "tiny-chat")["extraFlags"] == expected


def test_where_no_model_is_known_the_status_says_so(agent: StandIn, magictl: Magictl, given: Any) -> None:
    given("llama-server -m /elsewhere/lost.gguf -c 1")

    told = magictl("import", "-")

    assert told.status == 4
    assert told.err == "magictl: no model here is /elsewhere/lost.gguf; name the one that is meant: --for ID\n"


def test_another_programs_json_is_not_taken_for_ours(agent: StandIn, magictl: Magictl, given: Any) -> None:
    given('{"models": {"small": {"cmd": "llama-server -m /models/tiny-chat.gguf -c 8192"}}}')

    assert magictl("import", "-", "--dry-run").out.startswith("1 model in a llama-swap configuration\n")


def test_a_model_that_may_be_each_of_several_is_not_guessed(agent: StandIn, magictl: Magictl, given: Any) -> None:
    agent.add(model("twin-a", filePath="/models/a/twin.gguf"), model("twin-b", filePath="/models/b/twin.gguf"))
    given("llama-server -m twin.gguf -c 1")

    told = magictl("import", "-")

    assert told.status == 1
    assert told.err == "magictl: it may be each of twin-a, twin-b; name the one that is meant: --for ID\n"
    assert changes(agent) == []


def test_json_has_all_of_the_report(agent: StandIn, magictl: Magictl, given: Any) -> None:
    given(PRESET)

    document = magictl("import", "-", "--json").json

    [one] = document["models"]
    assert (document["origin"], document["dryRun"]) == ("llama-server router preset", False)
    assert (one["modelId"], one["error"]) == ("qwen2.5-7b", None)
    assert one["settings"]["ctxSize"] == 4096
    assert one["answer"]["modelId"] == "qwen2.5-7b"
    assert {"source", "became"} == one["carried"][0].keys()


def test_what_the_agent_refuses_is_said_and_the_others_go_on(agent: StandIn, magictl: Magictl, given: Any) -> None:
    def refusing(method: str, path: str, right: Answer) -> Answer:
        if method == "PUT" and "tiny-chat" in path:
            faults = [{"field": "ctxSize", "message": "this llama-server knows no --ctx-size"}]
            return error(422, "ValidationError", "1 setting is not valid", errors=faults)
        return right

    agent.fault = refusing
    given("llama-server -m tiny-chat.gguf -c 1\nllama-server -m qwen2.5-7b.gguf -c 2")

    told = magictl("import", "-")

    assert told.status == 1
    assert told.err == "magictl: 1 setting is not valid\n  ctx_size: this llama-server knows no --ctx-size\n"
    assert chosen(agent, "qwen2.5-7b") == {"ctxSize": 2}
    given("llama-server -m tiny-chat.gguf -c 1")
    assert magictl("import", "-", "--json").json["models"][0]["error"]["error"] == "ValidationError"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("ls -la", "cannot import standard input: "),
        ("", "cannot import standard input: "),
        (b"\xff\xfe", "- is no text"),
        ("models: [", "cannot import standard input: line 2: "),
        ("x" * (17 << 20), "is larger than 16 MiB"),
    ],
)
def test_what_cannot_be_read_is_said(
    agent: StandIn, magictl: Magictl, given: Any, content: str | bytes, said: str
) -> None:
    given(content)

    told = magictl("import", "-")

    assert told.status == 1
    assert said in told.err
    assert told.err.count("\n") == 1
    assert {method for method, _ in agent.seen} <= {"GET"}


def test_a_file_that_is_not_there_is_said(agent: StandIn, magictl: Magictl, tmp_path: Path) -> None:
    told = magictl("import", str(tmp_path / "none"))

    assert (told.status, told.err) == (1, f"magictl: cannot read {tmp_path}/none: No such file or directory\n")


def test_what_one_writes_in_a_pipe_is_taken(agent: StandIn) -> None:
    ended = subprocess.run(
        ["bash", "-c", f"echo '{COMMAND}' | {MAGICTL} import - && {MAGICTL} export | {MAGICTL} import - --dry-run"],
        capture_output=True, text=True, env=surroundings(MAGI_URL=agent.url), timeout=60, check=False,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stderr
    assert "3 models would change" in ended.stdout
