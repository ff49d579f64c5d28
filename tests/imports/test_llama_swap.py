"""llama-swap's files: each model's command becomes settings, and what stands around it too, as far as it can."""

from typing import Any

import pytest

from magi_agent.imports.imported import Imported, ImportedModel, InvalidImport, Origin
from magi_agent.imports.llama_swap import read_llama_swap
from magi_agent.vocabulary import StartPolicy


def said(model: ImportedModel) -> dict[str, Any]:
    return dict(model.settings.said())


def left_out(part: Imported | ImportedModel) -> dict[str, str]:
    return {entry.source: entry.reason for entry in part.left_out}


ON_DEMAND = {"start_policy": StartPolicy.ON_DEMAND}

SMALLEST = """
models:
  qwen:
    cmd: llama-server --port ${PORT} -m /models/Qwen3-8B-Q4_K_M.gguf -ngl 99
    ttl: 300
"""

WHOLE = """
healthCheckTimeout: 500
logLevel: info
startPort: 10001
globalTTL: 600
macros:
  "latest-llama": >
    /path/to/llama-server-ec9e0301
    --port ${PORT}
  "default_ctx": 4096
  "default_args": "--ctx-size ${default_ctx} --no-warmup"
  "models_dir": "${env.HOME}/models"
apiKeys:
  - sk-hunter2
models:
  "gpt-oss-120b":
    macros:
      "default_ctx": 16384
      "temp": 0.7
    cmd: |
      # the latest build
      ${latest-llama}
      --model /m/gpt-oss-120B.gguf
      ${default_args}
      --temperature ${temp} --mlock
    name: "gpt-oss 120B"
    env:
      - "CUDA_VISIBLE_DEVICES=0,1,2"
      - "LLAMA_ARG_CTX_SIZE=1"
      - "LLAMA_API_KEY=sk-hunter2"
    proxy: http://127.0.0.1:${PORT}
    checkEndpoint: /custom
    ttl: 60
    useModelName: "openai/gpt-oss-120B"
    filters:
      stripParams: "temperature, top_p"
    aliases:
      - id: gpt-4o-mini
        name: small
      - "gpt 4"
    concurrencyLimit: 0
  "qwen-unlisted":
    unlisted: true
    checkEndpoint: /health
    cmd: llama-server --port ${PORT} -m ${models_dir}/Llama-3.2-1B-Instruct-Q4_K_M.gguf -ngl 0 --lora ${nowhere}/x.gguf
  "docker-llama":
    proxy: "http://127.0.0.1:${PORT}"
    cmd: |
      docker run --name ${MODEL_ID}
      --init --rm -p ${PORT}:8080 -v /mnt/nvme/models:/models
      ghcr.io/ggml-org/llama.cpp:server
      --model '/models/Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf' -a ${MODEL_ID}-x
    cmdStop: docker stop ${MODEL_ID}
    ttl: 0
  vllm:
    cmd: vllm serve x
  unclosed:
    cmd: llama-server -m 'x
  nothing:
    name: x
"""

GROUPED = r"""
models:
  "coder":
    cmd: |
      /usr/local/bin/llama-server \
        --port ${PORT} \
        -m /m/coder.gguf \
        -fa on
    aliases: [" padded", code]
  "embed":
    cmd: bash -c 'LLAMA_ARG_EMBEDDINGS=1 exec llama-server -m /m/nomic.gguf --port ${PORT} > /dev/null'
  "chat":
    cmd: llama-server --port ${PORT} -hf bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
    ttl: 120
groups:
  forever:
    swap: false
    exclusive: false
    persistent: true
    members: [embed]
  others:
    members: [coder, chat]
hooks:
  on_startup:
    preload: [" code ", embed, chat, gone, ""]
"""

JSON = """{"models": {"a": {"cmd": "llama-server -m /m/a.gguf -c 1"}}, "logLevel": "debug"}"""

WITHOUT_TTL = """
globalTTL: 0
models:
  a: {cmd: llama-server -m /m/a.gguf, ttl: -1}
  1.5: {cmd: llama-server -m /m/b.gguf, ttl: soon}
  c: {cmd: llama-server -m /m/c.gguf, ttl: 7.5, env: [BROKEN, A=b]}
"""


def test_the_smallest_file() -> None:
    read = read_llama_swap(SMALLEST)
    [model] = read.models
    assert read.origin is Origin.LLAMA_SWAP
    assert (model.name, model.model_path) == ("qwen", "/models/Qwen3-8B-Q4_K_M.gguf")
    assert said(model) == {"n_gpu_layers": 99, "idle_timeout_seconds": 300, "aliases": ("qwen",)} | ON_DEMAND
    assert not model.left_out
    assert not read.left_out
    assert ("ttl: 300", "idle_timeout_seconds = 300") in [(entry.source, entry.became) for entry in model.carried]


def test_a_file_with_everything() -> None:
    read = read_llama_swap(WHOLE, {"--no-warmup"})
    oss, unlisted, docker = read.models
    assert (oss.name, oss.model_path) == ("gpt-oss-120b", "/m/gpt-oss-120B.gguf")
    assert (
        said(oss)
        == {
            "ctx_size": 16384,
            "mlock": True,
            "idle_timeout_seconds": 60,
            "aliases": ("gpt-oss-120b", "gpt-4o-mini"),
            "extra_flags": ("--no-warmup",),
        }
        | ON_DEMAND
    )
    assert oss.suggested_flags == ("--temperature=0.7",)
    assert set(left_out(oss)) == {
        "LLAMA_ARG_CTX_SIZE=1",
        "LLAMA_API_KEY (hidden)",
        "CUDA_VISIBLE_DEVICES=0,1,2",
        "--temperature 0.7",
        "name",
        "checkEndpoint",
        "useModelName",
        "filters",
        "aliases: gpt 4",
    }
    assert (unlisted.name, unlisted.model_path) == ("qwen-unlisted", "Llama-3.2-1B-Instruct-Q4_K_M.gguf")
    assert (
        said(unlisted)
        == {
            "n_gpu_layers": 0,
            "idle_timeout_seconds": 600,
            "aliases": ("qwen-unlisted",),
        }
        | ON_DEMAND
    )
    assert set(left_out(unlisted)) == {"unlisted", "--lora ${nowhere}/x.gguf"}
    assert docker.model_path == "Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf"
    assert said(docker) == {"aliases": ("docker-llama-x", "docker-llama")} | ON_DEMAND
    assert set(left_out(docker)) == {"docker run … ghcr.io/ggml-org/llama.cpp:server", "cmdStop"}
    assert set(left_out(read)) == {
        "healthCheckTimeout",
        "logLevel",
        "startPort",
        "apiKeys",
        "models.vllm.cmd",
        "models.unclosed.cmd",
        "models.nothing",
    }
    assert "sk-hunter2" not in repr(read)


def test_groups_and_what_is_loaded_at_the_start() -> None:
    read = read_llama_swap(GROUPED)
    coder, embed, chat = read.models
    assert said(coder) == {
        "flash_attention": "on",
        "aliases": ("coder", "code"),
        "start_policy": StartPolicy.ALWAYS_ON,
    }
    assert set(left_out(coder)) == {"aliases:  padded"}
    assert said(embed) == {
        "mode": "embedding",
        "aliases": ("embed",),
        "pinned": True,
        "start_policy": StartPolicy.ALWAYS_ON,
    }
    assert said(chat) == {"idle_timeout_seconds": 120, "aliases": ("chat",)} | ON_DEMAND
    assert chat.reference == "bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M"
    assert "hooks.on_startup.preload: chat" in left_out(chat)
    assert set(left_out(read)) == {"groups.others", "hooks.on_startup.preload: gone"}


def test_json_is_yaml_too() -> None:
    [model] = read_llama_swap(JSON).models
    assert said(model) == {"ctx_size": 1, "aliases": ("a",)} | ON_DEMAND


def test_idle_times_that_are_none() -> None:
    first, second, third = read_llama_swap(WITHOUT_TTL).models
    assert said(first) == {"aliases": ("a",)} | ON_DEMAND
    assert said(second) == {"aliases": ("1.5",)} | ON_DEMAND
    assert said(third) == {"aliases": ("c",)} | ON_DEMAND
    assert not first.left_out
    assert set(left_out(second)) == {"ttl: soon"}
    assert set(left_out(third)) == {"ttl: 7.5", "A=(hidden)"}


def test_a_model_may_leave_its_idle_time_to_all() -> None:
    first, second = read_llama_swap(
        "globalTTL: 9\nmodels: {a: {cmd: llama-server, ttl: -1}, b: {cmd: llama-server, ttl: 0}}"
    ).models
    assert said(first) == {"aliases": ("a",), "idle_timeout_seconds": 9} | ON_DEMAND
    assert said(second) == {"aliases": ("b",)} | ON_DEMAND


def test_no_shell_sees_a_command() -> None:
    [model] = read_llama_swap("models: {a: {cmd: 'llama-server -m /m/$x.gguf --chat-template $y|z -c 1'}}").models
    assert model.model_path == "/m/$x.gguf"
    assert said(model)["chat_template"] == "$y|z"


@pytest.mark.parametrize(
    ("macros", "reason"),
    [
        ("{a: '${b}', b: '${a}'}", "stand for each other"),
        ("{a: 'x${a}'}", "stand for each other"),
        (f"{{a: '{'${b}' * 999}', b: {'x' * 999}}}", "more than 65536 characters"),
        ("{a: '${b}${b}', b: '${c}${c}', c: '${d}${d}', d: '${a}${a}'}", "stand for each other|65536"),
    ],
)
def test_macros_without_end_are_refused(macros: str, reason: str) -> None:
    read = read_llama_swap(f"macros: {macros}\nmodels: {{x: {{cmd: 'llama-server ${{a}}'}}, y: {{cmd: llama-server}}}}")
    [model] = read.models
    assert model.name == "y"
    [entry] = read.left_out
    assert entry.source == "models.x.cmd"
    assert any(part in entry.reason for part in reason.split("|"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("models:\n  a: {cmd: x\nb: {", 3),
        ("models: {a: &x {cmd: llama-server}, b: *x}", 1),
        ("a: &a [x, x]\nb: &b [*a, *a]\nmodels: [*b, *b]", 2),
        ("models:\n  a: {cmd: x}\n  a: {cmd: y}", 3),
        ("models: []", None),
        ("models: {}", None),
        ("models:", None),
        ("models: !!timestamp x", None),
        ("models: !!python/object/apply:os.system [ls]", 1),
        ("models: " + "[" * 60 + "]" * 60, 1),
        ("models: " + "[" * 5000, None),
        ("models: {a: {cmd: x}}\n---\nmodels: {}", 2),
        ("models: {a: 2020-99-99}", None),
        (f"models: {{a: 1{'0' * 9000}}}", None),
        ("models: {? [a] : b}", None),
        ("", None),
        ("- models", None),
    ],
)
def test_what_is_no_such_file_is_refused(text: str, line: int | None) -> None:
    with pytest.raises(InvalidImport) as refusal:
        read_llama_swap(text)
    if line is not None:
        assert refusal.value.line == line
