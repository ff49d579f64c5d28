"""llama-server's router presets: sections become models, as llama-server itself reads them."""

from typing import Any

import pytest

from magi_agent.imports.imported import Imported, ImportedModel, InvalidImport, Origin
from magi_agent.imports.router_preset import read_router_preset
from magi_agent.vocabulary import StartPolicy


def said(model: ImportedModel) -> dict[str, Any]:
    return dict(model.settings.said())


def left_out(part: Imported | ImportedModel) -> dict[str, str]:
    return {entry.source: entry.reason for entry in part.left_out}


ON_DEMAND = {"start_policy": StartPolicy.ON_DEMAND}

SMALLEST = "[qwen]\nmodel = /m/qwen.gguf\n"

USUAL = """\
version = 1

; holds for all
[*]
c = 8192
n-gpu-layers = 99
flash-attn = on
jinja = true
temp = 0.6

[Qwen3-8B-Q4_K_M]
model = /m/Qwen3-8B-Q4_K_M.gguf
ctx-size = 32768   ; more
cache-type-k = q8_0 # less
load-on-startup = true
stop-timeout = 10

[unsloth/Qwen3.5-4B-GGUF:Q4_K_M]
n-gpu-layers = auto
mmap = 0
"""

VARIABLES = """\
[*]
LLAMA_ARG_HOST = 127.0.0.1
LLAMA_ARG_PORT = 8080
LLAMA_ARG_N_GPU_LAYERS = 20
__PRESET_LOAD_ON_STARTUP = 1

[a]
LLAMA_ARG_MODEL = /m/a.gguf
ngl = 30
__PRESET_STOP_TIMEOUT = 5

[b]
LLAMA_ARG_MODEL = /m/b.gguf
load-on-startup = off
LLAMA_ARG_NO_MMAP = 1
LLAMA_API_KEY = geheim
"""

HUGGING_FACE = """\
[*]
kv-unified = 1
spec-default = 1
mmproj-auto = false
[gpt-oss]
hf = ggml-org/gpt-oss-120b-GGUF
chat-template-kwargs = {"reasoning_effort": "high"}
top-k = 0
"""

SWITCHES = """\
[a]
no-mmap = true
mlock = enabled
embedding = on
warmup = false
swa-full = off
cpu-moe = 1
repack = maybe
"""

INDENTED = "\r\n".join(
    [
        "  version = 2",
        "  top = 1",
        "  [ a ]  ",
        "    model=/m/a.gguf",
        "\tc=1;2",
        "    --ctx-size = 3",
        "[a]",
        "c = 4",
        "c = 5",
    ]
)


def test_the_smallest_file() -> None:
    read = read_router_preset(SMALLEST)
    [model] = read.models
    assert read.origin is Origin.ROUTER_PRESET
    assert (model.name, model.model_path) == ("qwen", "/m/qwen.gguf")
    assert said(model) == {"aliases": ("qwen",)} | ON_DEMAND
    assert not model.left_out
    assert not read.left_out


def test_what_holds_for_all_holds_unless_a_model_says_otherwise() -> None:
    first, second = read_router_preset(USUAL, {"--temp"}).models
    assert said(first) == {
        "n_gpu_layers": 99,
        "ctx_size": 32768,
        "flash_attention": "on",
        "cache_type_k": "q8_0",
        "aliases": ("Qwen3-8B-Q4_K_M",),
        "extra_flags": ("--temp=0.6",),
        "start_policy": StartPolicy.ALWAYS_ON,
    }
    assert set(left_out(first)) == {"stop-timeout = 10"}
    assert (
        said(second)
        == {
            "ctx_size": 8192,
            "flash_attention": "on",
            "mmap": False,
            "aliases": ("unsloth/Qwen3.5-4B-GGUF:Q4_K_M",),
            "extra_flags": ("--temp=0.6",),
        }
        | ON_DEMAND
    )
    assert not second.left_out
    assert second.reference == "unsloth/Qwen3.5-4B-GGUF:Q4_K_M"


def test_keys_may_be_variables() -> None:
    first, second = read_router_preset(VARIABLES).models
    assert said(first) == {"n_gpu_layers": 30, "aliases": ("a",), "start_policy": StartPolicy.ALWAYS_ON}
    assert first.model_path == "/m/a.gguf"
    assert set(left_out(first)) == {"__PRESET_STOP_TIMEOUT = 5"}
    assert said(second) == {"n_gpu_layers": 20, "mmap": False, "aliases": ("b",)} | ON_DEMAND
    assert set(left_out(second)) == {"LLAMA_API_KEY (hidden)"}


def test_models_on_hugging_face() -> None:
    [model] = read_router_preset(HUGGING_FACE).models
    assert said(model) == {"projector": "none", "aliases": ("gpt-oss",)} | ON_DEMAND
    assert model.hf_repo == "ggml-org/gpt-oss-120b-GGUF"
    assert model.suggested_flags == (
        "--kv-unified",
        "--spec-default",
        '--chat-template-kwargs={"reasoning_effort": "high"}',
        "--top-k=0",
    )
    assert "hf = ggml-org/gpt-oss-120b-GGUF" in left_out(model)


def test_switches() -> None:
    [model] = read_router_preset(SWITCHES).models
    assert (
        said(model)
        == {
            "mmap": False,
            "mlock": True,
            "mode": "embedding",
            "n_cpu_moe": 999,
            "aliases": ("a",),
        }
        | ON_DEMAND
    )
    assert model.suggested_flags == ("--no-warmup",)
    assert set(left_out(model)) == {"warmup = false", "repack = maybe"}


def test_lines_are_read_as_llama_server_reads_them() -> None:
    read = read_router_preset(INDENTED)
    [model] = read.models
    assert said(model) == {"ctx_size": 5, "aliases": ("a",)} | ON_DEMAND
    assert model.model_path is None
    assert set(left_out(read)) == {"version = 2", "top", "[a]"}
    [model] = read_router_preset("[a]\n  c = 1\n    ngl = 2 ; x\n").models
    assert said(model) == {"ctx_size": 1, "n_gpu_layers": 2, "aliases": ("a",)} | ON_DEMAND


def test_secrets_are_never_shown() -> None:
    read = read_router_preset("top_secret = HUSH\n[*]\napi-key = HUSH\n[a]\nhf-token = HUSH\nmy-token = HUSH\n")
    assert "HUSH" not in repr(read)
    assert len(read.models[0].left_out) == 3


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[a]\nc = 1\nwhat is this\n", 3),
        ("[a\nc = 1", 1),
        ("[]\nc = 1", 1),
        ("[a]\n= 1", 2),
        ("[a]\n1c = 1", 2),
        ("version = 1\n[*]\nc = 1", None),
        ("version = 1\nc = 1", None),
        ("", None),
    ],
)
def test_what_is_no_preset_is_refused(text: str, line: int | None) -> None:
    with pytest.raises(InvalidImport) as refusal:
        read_router_preset(text)
    assert refusal.value.line == line
