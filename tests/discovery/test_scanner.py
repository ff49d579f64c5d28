"""Scanning folders: which files are models, what is said of those that are none or not yet, and what a scan costs."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from magi_agent.discovery import scanner as scanner_module
from magi_agent.discovery.facts import ModelFacts, TierThresholds
from magi_agent.discovery.folders import MAX_DEPTH
from magi_agent.discovery.scanner import Scanner, ScanResult
from magi_agent.vocabulary import ModelStatus, ThinkingMode, Tier
from tests.conftest import MakeToyModel, SampleModels
from tests.discovery.model_files import CHATS, model_bytes, rest, write_file

OK, INCOMPLETE, INVALID = ModelStatus.OK, ModelStatus.INCOMPLETE, ModelStatus.INVALID
MODEL = model_bytes("llama", template=CHATS)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def scanned(*folders: Path) -> dict[str, ModelFacts]:
    """The models below some folders, by their paths from the first."""
    result = Scanner(folders).scan()
    return {os.path.relpath(facts.file_path, folders[0]): facts for facts in result.models}


def problems(*folders: Path) -> dict[str, str]:
    return {os.path.relpath(problem.path, folders[0]): problem.message for problem in Scanner(folders).scan().problems}


def test_folders_are_searched_at_any_depth(models):
    deep = models.joinpath(*(f"level{number}" for number in range(MAX_DEPTH)))
    for path in (models / "a.gguf", models / "x" / "y" / "b.gguf", deep / "c.gguf", deep / "more" / "d.gguf"):
        write_file(path, MODEL)
    result = Scanner([models]).scan()
    assert [facts.filename for facts in result.models] == ["a.gguf", "c.gguf", "b.gguf"]
    assert [(problem.path, "deeper than" in problem.message) for problem in result.problems] == [(str(deep), True)]


def test_only_files_named_as_models_are_looked_at(models):
    for name in ("a.gguf", "b.GGUF", "c.GgUf", "d.Q4_K_M.gguf"):
        write_file(models / name, MODEL)
    for name in (
        ".hidden.gguf",
        ".cache/x.gguf",
        "x.gguf.part",
        "x.gguf.partial",
        "x.gguf.incomplete",
        "x.gguf.tmp",
        "x.gguf.aria2",
        "x.gguf.crdownload",
        "y.part.gguf",
        "y.incomplete.gguf",
        "y.tmp.gguf",
        "model.safetensors",
        "gguf",
        "x.gguf2",
        "notes.txt",
    ):
        write_file(models / name, MODEL)
    os.mkfifo(models / "pipe.gguf")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(models / "s.gguf"))
        assert list(scanned(models)) == ["a.gguf", "b.GGUF", "c.GgUf", "d.Q4_K_M.gguf"]


def test_a_folder_named_as_a_model_is_a_folder(models):
    write_file(models / "x.gguf" / "y.gguf", MODEL)
    assert list(scanned(models)) == ["x.gguf/y.gguf"]


def test_a_hidden_folder_is_scanned_where_it_is_the_one_that_was_named(models):
    write_file(models / ".cache" / "hub" / "x.gguf", MODEL)
    assert list(scanned(models / ".cache")) == ["hub/x.gguf"]


def test_a_real_model_and_a_toy_are_found_with_their_facts(
    models, sample_models: SampleModels, toy_model: MakeToyModel
):
    toy_model(models / "toy-1b.gguf", name="Toy", chat_template=CHATS, context_length=2048)
    (smollm2,) = (facts for facts in scanned(sample_models.folder).values() if facts.family == "smollm")
    assert (smollm2.version, smollm2.size_params, smollm2.quantization) == ("2", 0.135, "q4_1")
    assert (smollm2.architecture, smollm2.context_length) == ("llama", 8192)
    assert (smollm2.assigned_tier, smollm2.thinking_mode, smollm2.is_instruct) == (Tier.FAST, ThinkingMode.NONE, True)
    assert smollm2.has_chat_template
    assert smollm2.parameter_count is not None
    assert 130e6 < smollm2.parameter_count < 140e6
    assert smollm2.size_bytes == sample_models.smollm2.stat().st_size
    toy = scanned(models)["toy-1b.gguf"]
    assert (toy.status, toy.problem, toy.context_length, toy.has_chat_template) == (OK, None, 2048, True)
    assert toy.size_params == 1.0
    assert toy.parts == (str(models / "toy-1b.gguf"),)
    assert toy.identity is not None
    assert toy.identity.size == (models / "toy-1b.gguf").stat().st_size


def test_what_is_wrong_with_a_file_is_said_and_stops_nothing(models):
    write_file(models / "whole.gguf", MODEL)
    write_file(models / "empty.gguf", b"")
    write_file(models / "cut.gguf", MODEL[:-1])
    write_file(models / "cut-in-header.gguf", MODEL[:40])
    write_file(models / "zeros.gguf", bytes(4096))
    write_file(models / "damaged.gguf", MODEL[:24] + b"\xff" * 100)
    write_file(models / "html.gguf", b"<!doctype html>" * 100)
    write_file(models / "version-9.gguf", b"GGUF\x09\0\0\0" + bytes(100))
    write_file(models / "no-architecture.gguf", model_bytes(None))
    write_file(models / "picture.gguf", model_bytes("flux"))
    found = scanned(models)
    assert {name: facts.status for name, facts in found.items()} == {
        "whole.gguf": OK,
        "empty.gguf": INCOMPLETE,
        "cut.gguf": INCOMPLETE,
        "cut-in-header.gguf": INCOMPLETE,
        "zeros.gguf": INCOMPLETE,
        "damaged.gguf": INVALID,
        "html.gguf": INVALID,
        "version-9.gguf": INVALID,
        "no-architecture.gguf": INVALID,
        "picture.gguf": INVALID,
    }
    assert all((facts.problem is None) == (facts.status is OK) for facts in found.values())
    assert found["cut.gguf"].problem == f"{len(MODEL) - 1:,} bytes of {len(MODEL):,} bytes are there"
    assert "flux" in str(found["picture.gguf"].problem)
    assert all(facts.size_bytes == (models / name).stat().st_size for name, facts in found.items())


def test_what_is_no_model_is_not_listed(models):
    write_file(models / "lora.gguf", model_bytes("llama", texts={"general.type": "adapter"}))
    write_file(models / "imatrix.gguf", model_bytes("imatrix", texts={"general.type": "imatrix"}))
    write_file(models / "control.gguf", model_bytes("controlvector"))
    write_file(models / "vocabulary.gguf", model_bytes("llama", tensors=0))
    write_file(models / "model.gguf", MODEL)
    assert list(scanned(models)) == ["model.gguf"]


def test_a_preallocated_download_is_incomplete_until_it_is_written(models):
    content = model_bytes("llama", elements=1024 * 1024)
    path = models / "download.gguf"
    scanner = Scanner([models])
    with path.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, len(content))

        def look() -> ModelFacts:
            rest(path)
            (facts,) = scanner.scan().models
            return facts

        assert (look().status, look().size_bytes) == (INCOMPLETE, len(content))
        assert str(path) in scanner.scan().unsettled
        half = len(content) // 2
        os.pwrite(file.fileno(), content[:half], 0)
        assert look().status is INCOMPLETE
        assert "not been written yet" in str(look().problem)
        os.pwrite(file.fileno(), content[half:], half)
        assert (look().status, look().problem) == (OK, None)
    assert scanner.scan().unsettled == ()


def test_a_preallocated_download_that_is_written_from_behind_is_incomplete(models):
    content = model_bytes("llama", elements=1024 * 1024)
    path = models / "download.gguf"
    with path.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, len(content))
        os.pwrite(file.fileno(), content[:8192], 0)
        os.pwrite(file.fileno(), content[-8192:], len(content) - 8192)
    rest(path)
    (facts,) = Scanner([models]).scan().models
    assert facts.status is INCOMPLETE


def test_small_holes_in_a_file_at_rest_are_zeros_that_a_copy_left_out(models):
    content = model_bytes("llama", elements=1024 * 1024)
    path = models / "sparse.gguf"

    def write(hole: int) -> None:
        with path.open("wb", buffering=0) as file:
            os.pwrite(file.fileno(), content[: 1 << 20], 0)
            os.pwrite(file.fileno(), content[(1 << 20) + hole :], (1 << 20) + hole)

    write(hole=8192)
    rest(path, age=3)
    scanner = Scanner([models])
    assert scanner.scan().models[0].status is INCOMPLETE
    rest(path, age=600)
    assert scanner.scan().models[0].status is OK
    write(hole=1 << 20)
    rest(path, age=600)
    assert scanner.scan().models[0].status is INCOMPLETE


def test_a_download_is_in_progress_while_its_control_file_is_there(models):
    write_file(models / "x.gguf", MODEL)
    control = write_file(models / "x.gguf.aria2", b"")
    scanner = Scanner([models])
    (facts,) = scanner.scan().models
    assert facts.status is INCOMPLETE
    assert "x.gguf.aria2" in str(facts.problem)
    control.unlink()
    (facts,) = scanner.refresh([str(control)]).models
    assert facts.status is OK


def test_a_copy_in_progress_gets_whole(models):
    path = models / "copy.gguf"
    scanner = Scanner([models])
    statuses = []
    for length in (0, 10, len(MODEL) // 2, len(MODEL) - 1, len(MODEL)):
        write_file(path, MODEL[:length])
        statuses.append(scanner.refresh([str(path)]).models[0].status)
    assert statuses == [INCOMPLETE] * 4 + [OK]


def test_a_file_that_is_overwritten_in_place_is_read_again(models):
    path = write_file(models / "x.gguf", model_bytes("llama", texts={"general.size_label": "1B"}))
    scanner = Scanner([models])
    assert scanner.scan().models[0].size_params == 1
    write_file(path, model_bytes("llama", texts={"general.size_label": "2B"}), age=300)
    assert scanner.scan().models[0].size_params == 2


def test_a_link_and_its_target_are_one_model_under_the_files_own_path(models):
    target = write_file(models / "z" / "target.gguf", MODEL)
    (models / "a.gguf").symlink_to(target)
    (models / "b.gguf").symlink_to("a.gguf")
    os.link(target, models / "z" / "other-name.gguf")
    assert list(scanned(models)) == ["z/other-name.gguf"]
    (models / "z" / "other-name.gguf").unlink()
    assert list(scanned(models)) == ["z/target.gguf"]


def test_a_cache_of_links_is_listed_by_its_links(models):
    blob = write_file(models / "models--x" / "blobs" / ("0" * 64), MODEL)
    snapshot = models / "models--x" / "snapshots" / ("a" * 40) / "Qwen3-8B-Q4_K_M.gguf"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(f"../../blobs/{'0' * 64}")
    scanner = Scanner([models])
    (facts,) = scanner.scan().models
    assert (facts.file_path, facts.status, facts.family) == (str(snapshot), OK, "qwen")
    write_file(blob, MODEL[:-1])
    (facts,) = scanner.refresh([str(blob)]).models
    assert facts.status is INCOMPLETE


def test_the_same_name_in_two_folders_and_two_quantizations_in_one_are_models_of_their_own(models):
    for name in ("a/x-Q4_K_M.gguf", "a/x-Q8_0.gguf", "b/x-Q4_K_M.gguf"):
        write_file(models / name, MODEL)
    assert len(scanned(models)) == 3


def test_a_link_out_of_the_folders_is_reported_and_used_once_its_target_is_configured(models, tmp_path):
    outside = write_file(tmp_path / "elsewhere" / "x.gguf", MODEL)
    (models / "x.gguf").symlink_to(outside)
    (models / "linked").symlink_to(outside.parent)
    facts = scanned(models)["x.gguf"]
    assert facts.status is INVALID
    assert "outside the configured folders" in str(facts.problem)
    assert f"add {outside.parent} to model_scan_path" in str(facts.problem)
    assert f"add {outside.parent} to model_scan_path" in problems(models)["linked"]
    assert list(scanned(models, outside.parent)) == ["../elsewhere/x.gguf"]
    assert not problems(models, outside.parent)


def test_links_that_lead_nowhere_or_in_a_circle_are_said_so(models):
    (models / "gone.gguf").symlink_to(models / "nothing.gguf")
    (models / "circle.gguf").symlink_to("circle.gguf")
    (models / "circle").symlink_to("circle")
    (models / "up").symlink_to(models)
    os.mkfifo(models / "pipe")
    (models / "pipe.gguf").symlink_to("pipe")
    found = scanned(models)
    assert {name: facts.status for name, facts in found.items()} == dict.fromkeys(found, INVALID)
    assert "which is not there" in str(found["gone.gguf"].problem)
    assert "in a circle" in str(found["circle.gguf"].problem)
    assert "not a regular file" in str(found["pipe.gguf"].problem)
    assert not problems(models)


def test_a_folder_by_several_names_is_scanned_once(models):
    write_file(models / "z" / "x.gguf", MODEL)
    (models / "a").symlink_to("z")
    (models.parent / "alias").symlink_to(models)
    scanner = Scanner([models, models / "z", models.parent / "alias", str(models) + "/./"])
    result = scanner.scan()
    assert [facts.file_path for facts in result.models] == [str(models / "z" / "x.gguf")]
    assert (result.files_seen, result.problems) == (1, ())


def test_a_folder_that_is_not_there_or_none_is_reported_and_stops_nothing(models, tmp_path):
    write_file(models / "x.gguf", MODEL)
    file = write_file(tmp_path / "file", b"")
    result = Scanner([tmp_path / "missing", file, models]).scan()
    assert len(result.models) == 1
    assert {problem.path: problem.message for problem in result.problems} == {
        str(tmp_path / "missing"): "the folder does not exist",
        str(file): "it is not a folder",
    }
    assert str(result.problems[0]) == f"{file}: it is not a folder"


def test_names_of_any_bytes_are_found_and_shown_harmlessly(models):
    names = [
        b"caf\xe9-7b.gguf",
        b"with spaces 7b.gguf",
        b"$HOME;rm -rf `x`.gguf",
        b"esc\x1b[31m.gguf",
        b"new\nline.gguf",
    ]
    names += ["日本語-7b.gguf".encode(), b"%s%d{}.gguf", b"-rf.gguf", b"a" * 250 + b".gguf"]
    for name in names:
        path = Path(os.fsdecode(os.fsencode(models) + b"/" + name))
        write_file(path, MODEL)
    found = Scanner([models]).scan().models
    assert sorted(os.fsencode(facts.filename) for facts in found) == sorted(names)
    assert all(Path(facts.file_path).is_file() and facts.status is OK for facts in found)
    assert all(facts.display_name.isprintable() for facts in found)
    assert {facts.size_params for facts in found if "7b" in facts.filename} == {7.0}


def test_what_is_said_of_a_file_with_a_wild_name_is_printable(models):
    path = Path(os.fsdecode(os.fsencode(models) + b"/caf\xe9\x1b[31m.gguf"))
    path.symlink_to(os.fsdecode(b"/nowhere\xff\x1b"))
    write_file(models / os.fsdecode(b"s\xe9-00001-of-00002.gguf"), model_bytes("llama", numbers={"split.count": 2}))
    write_file(models / os.fsdecode(b"mmproj\xe9.gguf"), b"")
    result = Scanner([models]).scan()
    assert len(result.models) == 2
    assert all(str(facts.problem).isprintable() for facts in result.models)
    assert all(str(problem).isprintable() for problem in result.problems)


def test_thresholds_of_tiers_can_be_chosen(models):
    write_file(models / "x-10b-Q4_0.gguf", model_bytes("llama", numbers={"general.file_type": 2}))
    tiers = [
        Scanner([models], TierThresholds(powerful_min, fast_max)).scan().models[0].assigned_tier
        for powerful_min, fast_max in ((14, 7), (10, 7), (20, 11))
    ]
    assert tiers == [Tier.BALANCED, Tier.POWERFUL, Tier.FAST]


def test_a_second_scan_reads_no_header_and_gives_the_very_same_models(models):
    for number in range(20):
        write_file(models / f"m{number % 3}" / f"x{number}.gguf", MODEL)
    scanner = Scanner([models])
    first = scanner.scan()
    second = scanner.scan()
    assert (first.headers_read, second.headers_read) == (20, 0)
    assert second.models is first.models


def test_a_file_written_this_very_moment_is_looked_at_again(models):
    # Within one tick of the file system's clock it may be written again and look the same.
    path = models / "x.gguf"
    scanner = Scanner([models])
    for _ in range(500):  # until a look comes soon enough after the write
        write_file(path, MODEL, age=0)
        result = scanner.scan()
        if result.unsettled:
            break
    assert str(path) in result.unsettled
    deadline = time.monotonic() + 10
    while result.unsettled and time.monotonic() < deadline:
        result = scanner.refresh(result.unsettled)
    assert result.unsettled == ()
    assert result.models[0].file_path == str(path)


@pytest.mark.parametrize("change", ["write", "remove", "rename", "create"])
def test_a_change_of_one_file_costs_that_file(models, change):
    for number in range(300):
        write_file(models / f"m{number % 10}" / f"x{number}.gguf", MODEL)
    scanner = Scanner([models])
    assert scanner.scan().files_seen == 300
    path = models / "m1" / "x1.gguf"
    actions: dict[str, Callable[[], list[Path]]] = {
        "write": lambda: [write_file(path, MODEL[:-1])],
        "remove": lambda: path.unlink() or [path],
        "rename": lambda: [path, path.rename(path.with_name("y.gguf"))],
        "create": lambda: [write_file(models / "m1" / "new.gguf", MODEL)],
    }
    paths = actions[change]()
    result = scanner.refresh([str(path) for path in paths])
    assert result.files_seen == len(paths)
    assert result.headers_read <= 1
    assert result.models == Scanner([models]).scan().models


def test_ten_thousand_files_in_one_scan_take_bounded_time(models):
    for number in range(100):
        (models / f"m{number}").mkdir()
    for number in range(10_000):
        path = models / f"m{number % 100}" / f"Qwen3-{number}-8B-Q4_K_M.gguf"
        path.write_bytes(MODEL)
        os.utime(path, (1, 1))
    scanner = Scanner([models])

    def timed(look: Callable[[], ScanResult]) -> tuple[ScanResult, float]:
        begin = time.process_time()
        result = look()
        return result, time.process_time() - begin

    first, cold = timed(scanner.scan)
    again, warm = timed(scanner.scan)
    one, single = timed(lambda: scanner.refresh([first.models[0].file_path]))
    assert len(first.models) == len(again.models) == len(one.models) == 10_000
    assert (first.headers_read, again.headers_read, one.headers_read) == (10_000, 0, 0)
    assert cold < 30
    assert warm < 3
    assert single < 0.5


def test_a_configured_folder_that_goes_during_a_scan_is_gone_and_not_emptied(models, tmp_path, monkeypatch):
    deep = write_file(models / "deep" / "one.gguf", MODEL).parent
    scanner = Scanner([models])
    assert len(scanner.scan().models) == 1

    def at(path: str | None) -> None:
        if path == str(deep) and models.exists():
            models.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(scanner.whereabouts, "at", at)
    result = scanner.scan()

    assert [(problem.path, problem.message) for problem in result.problems] == [
        (str(models), "the folder does not exist")
    ]
    (tmp_path / "elsewhere").rename(models)
    monkeypatch.undo()
    assert len(scanner.scan().models) == 1


def test_a_configured_folder_that_is_asked_for_is_what_is_looked_at(models, tmp_path, monkeypatch):
    write_file(models / "deep" / "one.gguf", MODEL)
    scanner = Scanner([models, tmp_path / "missing"])
    looked_at: list[tuple[str, list[str]]] = []

    def identity(path: str) -> tuple[int, int] | None:
        looked_at.append((path, [where for where, _ in scanner.whereabouts.waiting(0)]))
        return folder_identity(path)

    folder_identity = scanner_module._folder_identity
    monkeypatch.setattr(scanner_module, "_folder_identity", identity)
    scanner.scan()

    asked = [(path, where) for path, where in looked_at if path in scanner.folders]
    assert len(asked) == 4
    assert all(where == [path] for path, where in asked)
