"""`magictl show`: all about one model, on a sheet that fits a terminal and reads well in a pipe."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Magictl
from tests.cli.stand_in import StandIn, failure, model, server
from tests.cli.terminal import lines_left, shown, surroundings, without_control

BIG = "big-30b-a3b-instruct-q4_k_m"


@pytest.fixture
def busy(agent: StandIn) -> StandIn:
    """An agent with a model of which there is much to say."""
    parts = [f"/models/big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    agent.add(
        model(
            BIG,
            displayName="Big 30B A3B",
            family="qwen",
            version="3",
            sizeParams=30.5,
            parameterCount=30_532_122_624,
            activeParams=3.3,
            isCoder=True,
            hasVision=True,
            hasAudio=True,
            parts=parts,
            filePath=parts[0],
            projectorPath="/models/mmproj-f16.gguf",
            projectors=["/models/mmproj-f16.gguf", "/models/mmproj-f32.gguf"],
            thinkingMode="optional",
            thinkingOverride=False,
            tierOverride="fast",
            effectiveTier="fast",
            enabled=True,
            startPolicy="onDemand",
        )
    )
    agent.host = {"nGpuLayers": -1}
    agent.models[BIG]["runtimeSettings"] |= {"ctxSize": 32768}
    agent.servers[BIG] = server(
        BIG, url="http://127.0.0.1:8083", restarts=2, restartRequired=True, restartReasons=["--ctx-size was 8192"]
    )
    return agent


def test_everything_is_said_whole_in_a_pipe(busy: StandIn, magictl: Magictl) -> None:
    told = magictl("show", BIG)

    assert told.status == 0
    assert (
        told.out
        == f"""\
{BIG}  ready
Big 30B A3B

Model
  status         ok
  family         qwen 3
  size           30.5B  (30,532,122,624 parameters, 3.3B active)
  quantization   q4_k_m
  kind           instruct, coder, vision, audio
  thinks         if asked to: its chat template has a switch
  context        32k  (trained for)
  architecture   qwen2
  on disk        4.7 GB
  3 files        /models/big-00001-of-00003.gguf
                 /models/big-00002-of-00003.gguf
                 /models/big-00003-of-00003.gguf
  projector      /models/mmproj-f16.gguf
  also offered   /models/mmproj-f32.gguf

Choices
  in use         yes  (started by the first request for it)
  tier           fast  (set by hand; discovery says balanced)
  thinking       no  (set by hand)
  port           8080

Settings
  n_gpu_layers   all  (the host's default)
  ctx_size       32k  (set for the model)

Server
  state          ready  (for 2h 03m)
  restart due    --ctx-size was 8192
  address        http://127.0.0.1:8083
  unit           magi-llama-{BIG}.service
  process        4711
  memory         5.1 GB
  CPU time       12s
  restarts       2
"""
    )


def test_a_plain_model_that_does_not_run_takes_few_lines(agent: StandIn, magictl: Magictl) -> None:
    agent.models["tiny-chat"] |= {"port": None, "enabled": False, "isInstruct": False, "chatTemplate": False}
    agent.servers["tiny-chat"] = server(
        "tiny-chat", state="stopped", isRunning=False, isReady=False, pid=None, port=None, url=None, memoryBytes=None
    )

    told = magictl("show", "tiny-chat")

    assert told.out.splitlines()[:3] == ["tiny-chat  stopped", "", "Model"]
    assert "  kind           base, no chat template\n" in told.out
    assert "  file           /models/tiny-chat.gguf\n" in told.out
    assert "  in use         no\n" in told.out
    assert "  port           given when it is started\n" in told.out
    assert "  none           llama-server's own defaults hold\n" in told.out
    assert told.out.endswith("  state          stopped\n  unit           magi-llama-tiny-chat.service\n")


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        ({"isEmbedding": True}, "embedding"),
        ({"isEmbedding": True, "isReranker": True}, "reranker"),
        ({}, "instruct"),
    ],
)
def test_what_a_model_is_for_is_said(agent: StandIn, magictl: Magictl, facts: dict[str, bool], kind: str) -> None:
    agent.models["tiny-chat"] |= facts

    assert f"  kind           {kind}\n" in magictl("show", "tiny-chat").out


def test_what_is_wrong_is_said_with_the_last_of_the_log(agent: StandIn, magictl: Magictl) -> None:
    agent.models["tiny-chat"] |= {"status": "incomplete", "problem": "part 2 of 3 is missing"}
    agent.servers["tiny-chat"] = server(
        "tiny-chat", state="cooldown", isRunning=False, failure=failure(), retryInSeconds=42.0
    )

    told = magictl("show", "tiny-chat")

    assert told.status == 0
    assert "  problem        part 2 of 3 is missing\n" in told.out
    assert told.out.endswith(
        "  failed         llama-server ended with exit status 1\n"
        "  tried again    in 42s\n"
        "  │ loading the model\n"
        "  │ error: out of memory\n"
    )


def test_on_a_terminal_of_80_columns_nothing_but_a_path_is_longer(busy: StandIn) -> None:
    long_path = "/models/" + "folder-with-a-long-name/" * 4 + "model.gguf"
    busy.models[BIG] |= {"parts": [long_path], "filePath": long_path, "problem": "word " * 40}

    status, output = shown("show", BIG, columns=80, environment=surroundings(MAGI_URL=busy.url))

    assert status == 0
    lines = lines_left(without_control(output).replace("\r", ""))
    assert [line for line in lines if len(line) > 80] == [f"  file           {long_path}"]
    problem = [line for line in lines if line.rstrip().endswith("word")]
    assert len(problem) == 4
    assert all(line.startswith(" " * 17) for line in problem[1:])
    assert "\x1b[32mready" in output


def test_names_of_files_cannot_take_over_the_terminal(busy: StandIn) -> None:
    busy.models[BIG] |= {"displayName": "x\x1b]0;owned\x07", "problem": "\x1b[2J", "filePath": "/\x1b[2J", "parts": []}

    _, output = shown("show", BIG, environment=surroundings(MAGI_URL=busy.url))

    assert "\x1b]0;" not in output
    assert "\x1b[2J" not in output


def test_json_has_both_answers(busy: StandIn, magictl: Magictl) -> None:
    document = magictl("show", BIG, "--json").json

    assert document.keys() == {"model", "settings", "memory"}
    assert document["memory"] is None
    assert document["model"]["server"]["state"] == "ready"
    assert document["settings"]["effective"]["ctxSize"] == 32768


@pytest.mark.parametrize(
    ("memory", "line"),
    [
        ({"need": {"hostBytes": 402_000_000, "gpuBytes": 0, "basis": "estimated", "contextTokens": 4096, "slots": 4,
                   "contextIsCut": False}},
         "402 MB of RAM  (estimated, with a context of 4k for 4 slots)"),
        ({"need": {"hostBytes": 1.5e9, "gpuBytes": 22e9, "basis": "measured", "contextTokens": 30720, "slots": 1,
                   "contextIsCut": True}},
         "1.5 GB of RAM and 22.0 GB on GPUs  (as measured, with a context of 30k, cut to fit)"),
        ({"need": {"hostBytes": 1.5e9, "gpuBytes": 22e9, "basis": "measured", "gpuBasis": "estimated",
                   "contextTokens": 30720, "slots": 1, "contextIsCut": False}},
         "1.5 GB of RAM and 22.0 GB on GPUs  (as measured, on GPUs estimated, with a context of 30k)"),
        ({"need": None, "problem": "the header names no blocks, so what they keep cannot be told"},
         "the header names no blocks, so what they keep cannot be told"),
    ],
)  # fmt: skip
def test_what_a_model_needs_is_a_line(agent: StandIn, magictl: Magictl, memory: dict[str, object], line: str) -> None:
    agent.memory["tiny-chat"] = memory

    assert f"  needs          {line}\n" in magictl("show", "tiny-chat").out
    assert magictl("show", "tiny-chat", "--json").json["memory"] == memory


@pytest.mark.parametrize(
    ("used", "line"),
    [
        ({"hostBytes": 1.5e9, "gpuBytes": 22e9}, "1.5 GB of RAM and 22.0 GB on GPUs"),
        ({"hostBytes": 1.5e9, "gpuBytes": 0}, "1.5 GB of RAM"),
        ({"hostBytes": 1.5e9, "gpuBytes": None}, "1.5 GB of RAM"),
        ({"hostBytes": 1.5e9, "gpuBytes": None, "gpuUnavailable": "CUDA0: Not Supported"},
         "1.5 GB of RAM  (of GPUs nobody knows: CUDA0: Not Supported)"),
        (None, None),
    ],
)  # fmt: skip
def test_what_it_uses_is_a_line(
    agent: StandIn, magictl: Magictl, used: dict[str, object] | None, line: str | None
) -> None:
    agent.memory["tiny-chat"] = {"need": None, "problem": "nobody knows", "used": used}

    shown = magictl("show", "tiny-chat").out

    assert [words for words in shown.splitlines() if words.startswith("  uses ")] == (
        [] if line is None else [f"  uses           {line}"]
    )


def test_an_unknown_model_gets_a_suggestion(busy: StandIn, magictl: Magictl) -> None:
    told = magictl("show", "big")

    assert (told.status, told.err) == (4, f"magictl: no model has the id 'big'; did you mean {BIG}?\n")


@pytest.mark.parametrize(
    ("limits", "running", "line"),
    [
        ({"max": {"limitBytes": 9.5e9, "source": "derived"}}, None,
         "9.5 GB  (derived from the need; memory_max sets another, once it is started)"),
        ({"max": {"limitBytes": 9.5e9, "source": "derived"}}, {"max": {"limitBytes": 3e9, "source": "set"}},
         "3.0 GB  (its memory_max)"),
        ({"max": None}, {"max": {"limitBytes": 3e9, "source": "operator"}}, "3.0 GB  (by the operator, at the unit)"),
        ({"max": {"limitBytes": 9.5e9, "source": "derived"}}, {"max": None, "high": None}, None),
        ({"max": None, "high": None}, None, None),
    ],
)  # fmt: skip
def test_the_limit_of_its_memory_is_a_line(
    agent: StandIn, magictl: Magictl, limits: dict[str, object], running: dict[str, object] | None, line: str | None
) -> None:
    need = {"hostBytes": 1.5e9, "gpuBytes": 0, "basis": "estimated", "contextTokens": 512, "slots": 1}
    agent.memory["tiny-chat"] = {"need": need, "limits": limits, "runningLimits": running}

    shown = magictl("show", "tiny-chat").out

    assert [words for words in shown.splitlines() if words.startswith("  limit ")] == (
        [] if line is None else [f"  limit          {line}"]
    )


def test_a_limit_that_is_too_narrow_is_a_line_once(agent: StandIn, magictl: Magictl) -> None:
    agent.warnings = {"tiny-chat": ["memory_max is 5 MiB, and that is little"]}
    agent.memory["tiny-chat"] = {
        "problem": "nobody knows",
        "warnings": ["memory_max is 5 MiB, and that is little", "MemoryMax of its unit too"],
    }

    [needs, one, other] = magictl("show", "tiny-chat").out.partition("  needs ")[2].splitlines()[:3]

    assert needs.strip() == "nobody knows"
    assert one == "  warning        memory_max is 5 MiB, and that is little"
    assert other == "  warning        MemoryMax of its unit too"
