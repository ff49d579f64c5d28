"""Whole folders as programs lay them out: what is found in them, under which path, and what is left alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from magi_agent.discovery.scanner import Scanner
from magi_agent.vocabulary import ModelStatus
from tests.discovery.model_files import CHATS, model_bytes, rest, write_file, write_split

SHA = {letter: letter * 64 for letter in "abcdef"}
REVISION = "0123456789abcdef0123456789abcdef01234567"
QWEN = model_bytes("qwen3", template=CHATS, numbers={"general.file_type": 15})
LLAMA = model_bytes("llama", numbers={"general.file_type": 15})
GEMMA = model_bytes("gemma3", numbers={"general.file_type": 2})
PROJECTOR = model_bytes("clip", texts={"general.type": "mmproj"}, numbers={"general.file_type": 1})
HUB_QWEN = "models--unsloth--Qwen3-8B-GGUF"
HUB_SPLIT = "models--ggml-org--Llama-3.3-70B-Instruct-GGUF"


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link, by what stands in it."""

    target: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A tree, and the models in it: path → (family, version, size, quantization), and the projector by its path."""

    name: str
    files: Mapping[str, bytes | Link]
    models: Mapping[str, tuple[str, str | None, float, str]]
    projectors: Mapping[str, str]


LAYOUTS = [
    Layout(
        "Hugging Face cache",
        {
            f"{HUB_QWEN}/blobs/{SHA['a']}": QWEN,
            f"{HUB_QWEN}/blobs/{SHA['b']}.incomplete": QWEN[:50],
            f"{HUB_QWEN}/refs/main": REVISION.encode(),
            f"{HUB_QWEN}/.no_exist/{REVISION}/config.json": b"",
            f"{HUB_QWEN}/snapshots/{REVISION}/Qwen3-8B-Q4_K_M.gguf": Link(f"../../blobs/{SHA['a']}"),
            f"{HUB_QWEN}/snapshots/{REVISION[::-1]}/Qwen3-8B-Q4_K_M.gguf": Link(f"../../blobs/{SHA['a']}"),
            f".locks/{HUB_QWEN}/{SHA['a']}.lock": b"",
            "version.txt": b"1",
        },
        # Of two snapshots with one blob, the one whose path sorts first.
        {f"{HUB_QWEN}/snapshots/{REVISION}/Qwen3-8B-Q4_K_M.gguf": ("qwen", "3", 8.0, "q4_k_m")},
        {},
    ),
    Layout(
        "Hugging Face cache, quantizations in folders and a name that says nothing",
        {
            f"{HUB_QWEN}/blobs/{SHA['a']}": QWEN,
            f"{HUB_QWEN}/blobs/{SHA['c']}": LLAMA,
            f"{HUB_QWEN}/snapshots/{REVISION}/UD-Q4_K_XL/Qwen3-30B-A3B.gguf": Link(f"../../../blobs/{SHA['a']}"),
            f"models--o--Llama-3.2-3B-GGUF/snapshots/{REVISION}/model.gguf": Link(
                f"../../../{HUB_QWEN}/blobs/{SHA['c']}"
            ),
        },
        {
            f"{HUB_QWEN}/snapshots/{REVISION}/UD-Q4_K_XL/Qwen3-30B-A3B.gguf": ("qwen", "3", 30.0, "q4_k_xl"),
            f"models--o--Llama-3.2-3B-GGUF/snapshots/{REVISION}/model.gguf": ("llama", "3.2", 3.0, "q4_k_m"),
        },
        {},
    ),
    Layout(
        "LM Studio",
        {
            "lmstudio-community/gemma-3-4b-it-GGUF/gemma-3-4b-it-Q4_0.gguf": GEMMA,
            "lmstudio-community/gemma-3-4b-it-GGUF/mmproj-model-f16.gguf": PROJECTOR,
            "lmstudio-community/Qwen3-8B-GGUF/Qwen3-8B-Q4_K_M.gguf": QWEN,
            "unsloth/Qwen3-8B-GGUF/Qwen3-8B-Q4_K_M.gguf": QWEN,
            "unsloth/Qwen3-8B-GGUF/downloading_Qwen3-8B-Q8_0.gguf.part": QWEN[:60],
        },
        {
            "lmstudio-community/gemma-3-4b-it-GGUF/gemma-3-4b-it-Q4_0.gguf": ("gemma", "3", 4.0, "q4_0"),
            "lmstudio-community/Qwen3-8B-GGUF/Qwen3-8B-Q4_K_M.gguf": ("qwen", "3", 8.0, "q4_k_m"),
            "unsloth/Qwen3-8B-GGUF/Qwen3-8B-Q4_K_M.gguf": ("qwen", "3", 8.0, "q4_k_m"),
        },
        {
            "lmstudio-community/gemma-3-4b-it-GGUF/gemma-3-4b-it-Q4_0.gguf": (
                "lmstudio-community/gemma-3-4b-it-GGUF/mmproj-model-f16.gguf"
            )
        },
    ),
    Layout(
        "llama.cpp's own cache",
        {
            "ggml-org_gemma-3-4b-it-GGUF_gemma-3-4b-it-Q4_0.gguf": GEMMA,
            "ggml-org_gemma-3-4b-it-GGUF_gemma-3-4b-it-Q4_0.gguf.etag": b'"x"',
            "ggml-org_gemma-3-4b-it-GGUF_mmproj-model-f16.gguf": PROJECTOR,
            "unsloth_Qwen3-8B-GGUF_Qwen3-8B-Q4_K_M.gguf": QWEN,
            "unsloth_Qwen3-8B-GGUF_Qwen3-8B-Q8_0.gguf.downloadInProgress": QWEN[:60],
            "manifest=ggml-org=gemma-3-4b-it-GGUF=latest.json": b"{}",
        },
        {
            "ggml-org_gemma-3-4b-it-GGUF_gemma-3-4b-it-Q4_0.gguf": ("gemma", "3", 4.0, "q4_0"),
            "unsloth_Qwen3-8B-GGUF_Qwen3-8B-Q4_K_M.gguf": ("qwen", "3", 8.0, "q4_k_m"),
        },
        {
            "ggml-org_gemma-3-4b-it-GGUF_gemma-3-4b-it-Q4_0.gguf": "ggml-org_gemma-3-4b-it-GGUF_mmproj-model-f16.gguf",
        },
    ),
    Layout(
        "Ollama: its blobs are no models by their names",
        {
            f"blobs/sha256-{SHA['d']}": LLAMA,
            f"blobs/sha256-{SHA['e']}-partial": LLAMA[:60],
            "manifests/registry.ollama.ai/library/llama3.2/latest": b"{}",
        },
        {},
        {},
    ),
    Layout(
        "flat, in every letter case",
        {"Qwen3-8B-Q4_K_M.gguf": QWEN, "QWEN2.5-7B-INSTRUCT-Q4_K_M.GGUF": QWEN, "llama-2-7b.Q4_K_M.Gguf": LLAMA},
        {
            "Qwen3-8B-Q4_K_M.gguf": ("qwen", "3", 8.0, "q4_k_m"),
            "QWEN2.5-7B-INSTRUCT-Q4_K_M.GGUF": ("qwen", "2.5", 7.0, "q4_k_m"),
            "llama-2-7b.Q4_K_M.Gguf": ("llama", "2", 7.0, "q4_k_m"),
        },
        {},
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_folder_as_a_program_lays_it_out(tmp_path: Path, layout: Layout):
    for name, content in layout.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Link):
            path.symlink_to(content.target)
        else:
            write_file(path, content)
    result = Scanner([tmp_path]).scan()
    assert result.problems == ()
    assert {facts.status for facts in result.models} <= {ModelStatus.OK}
    found = {os.path.relpath(facts.file_path, tmp_path): facts for facts in result.models}
    assert {
        path: (facts.family, facts.version, facts.size_params, facts.quantization) for path, facts in found.items()
    } == layout.models
    assert {
        path: os.path.relpath(facts.projector_path, tmp_path)
        for path, facts in found.items()
        if facts.projector_path is not None
    } == layout.projectors


def test_a_split_set_in_a_cache_of_links_is_one_model(tmp_path: Path):
    blobs, snapshot = tmp_path / HUB_SPLIT / "blobs", tmp_path / HUB_SPLIT / "snapshots" / REVISION / "Q4_K_M"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(write_split(blobs, "Llama-3.3-70B-Instruct-Q4_K_M", 3)):
        blob = path.rename(blobs / str(number))
        rest(blob)
        (snapshot / path.name).symlink_to(f"../../../blobs/{number}")
    (facts,) = Scanner([tmp_path]).scan().models
    assert (facts.status, len(facts.parts), facts.size_params) == (ModelStatus.OK, 3, 70.0)
    assert facts.file_path == str(snapshot / "Llama-3.3-70B-Instruct-Q4_K_M-00001-of-00003.gguf")
