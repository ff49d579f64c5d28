"""Whatever name a file system takes goes through a whole scan: found, shown harmlessly, with an id of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magi_agent.discovery.names import is_model_filename, name_facts, split_of
from magi_agent.discovery.scanner import Scanner
from magi_agent.registry.merging import merge
from magi_agent.registry.stored import RegistryContent, RegistryWriter, read_registry
from magi_agent.vocabulary import ModelStatus
from tests.discovery.model_files import CHATS, model_bytes, write_file

MODEL = model_bytes("llama", template=CHATS)
# 255 bytes are the most that file systems take; what stands here too is what names are read for.
_PIECES = st.sampled_from(
    [
        b"Qwen3",
        b"-8B",
        b"-Q4_K_M",
        b"mmproj",
        b"-00001-of-00002",
        b"-00002-of-00002",
        b"\n",
        b"\xff",
        b"-",
        b".",
        b" ",
        b"%s",
    ]
)
_STEMS = st.one_of(
    st.binary(max_size=100),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(str.encode),
    st.lists(_PIECES, max_size=8).map(b"".join),
).map(lambda stem: stem.translate(None, b"/\0"))
_ENDS = st.sampled_from([b".gguf", b".GGUF", b".gGuF", b".gguf.part", b".part.gguf", b".gguf ", b""])
NAMES = st.builds(bytes.__add__, _STEMS, _ENDS).filter(lambda name: name not in (b"", b".", b".."))
FOLDERS = _STEMS.filter(lambda name: name not in (b"", b".", b".."))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.none() | FOLDERS, NAMES), min_size=1, max_size=8))
def test_files_of_any_names_are_found_as_often_as_they_are_there(names: list[tuple[bytes | None, bytes]]):
    top = Path(tempfile.mkdtemp(prefix="magi-wild-names-"))
    try:
        _write(top, names)
        result = Scanner([top]).scan()
        expected = {
            f"{folder}/{name}"
            for folder, _, files in os.walk(top)
            if not any(part.startswith(".") for part in folder[len(str(top)) :].split("/"))
            for name in files
            if is_model_filename(name)
        }
        found = {part for facts in result.models for part in facts.parts}
        # Of two names for one part of a set (".gguf" and ".GGUF") one counts.
        assert {path for path in expected if not is_part(path)} <= found <= expected
        models = merge({}, result.models, ()).models
        assert len(models) == len(result.models)
        for facts in result.models:
            assert facts.display_name.isprintable()
            assert facts.problem is None or facts.problem.isprintable()
            # What is named as a part, and is none, is said to be so.
            assert (facts.status is ModelStatus.OK) != is_part(facts.filename)
        assert read_registry(RegistryWriter().written(RegistryContent(models))).content.models == models
        # What is found by an event for one file is what a scan finds.
        scanner = Scanner([top])
        scanner.scan()
        for path in sorted(expected)[:2]:
            Path(path).unlink()
        assert scanner.refresh(sorted(expected)[:2]).models == Scanner([top]).scan().models
    finally:
        shutil.rmtree(os.fsencode(top))


def is_part(path: str) -> bool:
    split = split_of(path)
    return split is not None and split.count > 1


def _write(top: Path, names: list[tuple[bytes | None, bytes]]) -> None:
    for folder, name in names:
        path = os.fsencode(top) + b"/" + (folder + b"/" if folder else b"") + name
        try:
            write_file(Path(os.fsdecode(path)), MODEL)
        except (FileExistsError, IsADirectoryError, NotADirectoryError):
            continue  # one is a folder's name, too


@given(st.text(max_size=300), st.lists(st.text(max_size=60), max_size=4))
def test_a_name_of_any_kind_is_read(filename: str, folders: list[str]):
    facts = name_facts(filename, folders)
    assert facts.size_params is None or 0 < facts.size_params < 1e9
    assert facts.version is None or facts.version.isprintable()
    assert facts.is_embedding or not facts.is_reranker
