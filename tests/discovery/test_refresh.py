"""Events are hints, scans are truth: whatever happens in a folder, a refresh of what changed ends where a scan does."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from magi_agent.discovery.scanner import Scanner, ScanResult
from magi_agent.vocabulary import ModelStatus
from tests.discovery.model_files import model_bytes, write_file

MODELS = (
    "a.gguf",
    "b.GGUF",
    "Qwen3-8B-Q4_K_M.gguf",
    "s-00001-of-00002.gguf",
    "s-00002-of-00002.gguf",
    "mmproj-F16.gguf",
)
OTHERS = ("a.gguf.aria2", "a.gguf.part", ".hidden.gguf", "blob", "notes.txt", "d.gguf", "e.aria2")
FOLDERS = ("", "x", "x/y", "x/y/z", "w", "d.gguf", "e.aria2")
CONTENTS = {
    "model": model_bytes("llama"),
    "other": model_bytes("qwen3", texts={"general.name": "Another"}),
    "projector": model_bytes("clip", texts={"general.type": "mmproj"}),
    "first": model_bytes("llama", numbers={"split.no": 0, "split.count": 2, "split.tensors.count": 2}),
    "second": model_bytes(None, numbers={"split.no": 1, "split.count": 2, "split.tensors.count": 2}),
    "cut": model_bytes("llama")[:-100],
    "damaged": b"GGUF" + b"\xff" * 60,
    "empty": b"",
}


class Tree:
    """A folder that random things happen to, and the paths that a watch would have told of."""

    def __init__(self, top: Path, random_: random.Random) -> None:
        self.top = top
        self.random = random_
        self.told: set[str] = set()
        self.what = ""

    def step(self) -> None:
        action: Callable[[], None] = self.random.choice(
            [self.write, self.write, self.write, self.remove, self.move, self.link, self.make_folder, self.hard_link]
        )
        self.what = action.__name__
        action()

    def write(self) -> None:
        path = self._place()
        if path.is_dir() or not self._reachable(path):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = self.random.choice(list(CONTENTS))
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(self.top) or ".kept" in target.parts or target.is_dir() or target.is_symlink():
            return
        if not target.parent.is_dir():
            return
        write_file(target, CONTENTS[kind], age=self.random.randrange(100, 1000))
        # Of the other names of a hard link nothing is told; here it is, so that the paths name all that changed.
        names = [other for other in self.top.rglob("*") if other.is_file() and other.samefile(target)]
        self._tell(path, *names, *self._new_folders(path))

    def make_folder(self) -> None:
        path = self.top / self.random.choice(FOLDERS[1:])
        if not os.path.lexists(path) and self._reachable(path):
            path.mkdir(parents=True)
            self._tell(path, *self._new_folders(path))

    def remove(self) -> None:
        path = self._something()
        if path is None:
            return
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        self._tell(path)

    def move(self) -> None:
        path, to = self._something(), self._place()
        if path is None or os.path.lexists(to) or not to.parent.is_dir() or to.is_relative_to(path):
            return
        if Path(os.path.realpath(to.parent)).is_relative_to(os.path.realpath(path)):
            return
        path.rename(to)
        self._tell(path, to)

    def link(self) -> None:
        path, target = self._place(), self._something() or self.top / "nowhere.gguf"
        if os.path.lexists(path) or not path.parent.is_dir():
            return
        outside = self.top.parent / "outside"
        elsewhere = [path, self.top, self.top / ".kept", self.top / ".kept" / "k.gguf", outside, outside / "out.gguf"]
        path.symlink_to(self.random.choice([target] * 3 + elsewhere))
        self._tell(path)

    def hard_link(self) -> None:
        path, target = self._place(), self._something()
        if os.path.lexists(path) or not path.parent.is_dir() or target is None or not target.is_file():
            return
        if target.is_symlink():
            return
        os.link(target, path)
        self._tell(path)

    def _place(self) -> Path:
        return self.top / self.random.choice(FOLDERS) / self.random.choice(MODELS * 3 + OTHERS)

    def _something(self) -> Path | None:
        # Nothing is told of what is hidden, so nothing happens there.
        there = sorted(path for path in self.top.rglob("*") if "/." not in str(path.relative_to(self.top.parent)))
        return self.random.choice(there) if there else None

    def _reachable(self, path: Path) -> bool:
        return all(not os.path.lexists(parent) or parent.is_dir() for parent in path.parents)

    def _new_folders(self, path: Path) -> list[Path]:
        return [parent for parent in path.parents if parent != self.top and parent.is_relative_to(self.top)][-1:]

    def _tell(self, *paths: Path) -> None:
        note(f"{self.what} {[str(path.relative_to(self.top)) for path in paths]}")
        self.told.update(str(path) for path in paths)


def told(result: ScanResult) -> dict[str, object]:
    return {facts.file_path: facts for facts in result.models} | {problem.path: problem for problem in result.problems}


def differing(one: ScanResult, other: ScanResult) -> dict[str, tuple[object, object]]:
    mine, theirs = told(one), told(other)
    paths = sorted(mine.keys() | theirs.keys())
    return {path: (mine.get(path), theirs.get(path)) for path in paths if mine.get(path) != theirs.get(path)}


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # what happened is short, and shrinking it takes minutes
)
@given(
    seed=st.integers(0, 2**32),
    batches=st.integers(1, 4),
    roots=st.sampled_from(["one", "nested", "alias", "hidden"]),
)
def test_a_refresh_of_what_changed_ends_where_a_fresh_scan_does(tmp_path: Path, seed: int, batches: int, roots: str):
    top = tmp_path / "models"
    shutil.rmtree(tmp_path, ignore_errors=True)
    top.mkdir(parents=True)
    write_file(tmp_path / "outside" / "out.gguf", CONTENTS["model"])
    (tmp_path / "alias").symlink_to(top / "x")
    folders = {
        "one": [top],
        "nested": [top / "x", top],
        "alias": [tmp_path / "alias", top],
        "hidden": [top, top / ".kept"],
    }[roots]
    write_file(top / ".kept" / "k.gguf", CONTENTS["model"])
    tree = Tree(top, random.Random(seed))
    for _ in range(tree.random.randrange(12)):
        tree.step()
    scanner = Scanner(folders)
    assert not differing(scanner.scan(), Scanner(folders).scan())
    for _ in range(batches):
        tree.told.clear()
        for _ in range(tree.random.randrange(1, 6)):
            tree.step()
        paths = list(tree.told)
        tree.random.shuffle(paths)
        note(f"refresh {paths}")
        assert not differing(scanner.refresh(paths), Scanner(folders).scan())


class Watched:
    """A folder of models and a scanner that knows it as it was."""

    def __init__(self, top: Path) -> None:
        self.top = top

    def model(self, name: str, kind: str = "model") -> Path:
        return write_file(self.top / name, CONTENTS[kind])

    def link(self, name: str, target: str) -> Path:
        (self.top / name).parent.mkdir(parents=True, exist_ok=True)
        (self.top / name).symlink_to(self.top / target)
        return self.top / name


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    (tmp_path / "models").mkdir()
    return Watched(tmp_path / "models")


def same_as_scan(scanner: Scanner, *told_paths: Path) -> ScanResult:
    result = scanner.refresh([str(path) for path in told_paths])
    assert not differing(result, Scanner(scanner.folders).scan())
    return result


def test_a_folder_in_the_place_of_a_file_and_a_file_in_the_place_of_a_folder(watched):
    path = watched.model("x.gguf")
    scanner = Scanner([watched.top])
    scanner.scan()
    path.unlink()
    inner = watched.model("x.gguf/inner.gguf")
    assert [facts.file_path for facts in same_as_scan(scanner, path).models] == [str(inner)]
    shutil.rmtree(path)
    watched.model("x.gguf")
    assert [facts.file_path for facts in same_as_scan(scanner, path).models] == [str(path)]


def test_a_link_by_way_of_a_link_to_a_folder_that_goes(watched):
    watched.model("x/m.gguf")
    way = watched.link("a.gguf", "x")
    watched.link("b.gguf", "a.gguf")
    scanner = Scanner([watched.top])
    assert len(scanner.scan().models) == 1
    way.unlink()
    assert len(same_as_scan(scanner, way).models) == 2  # what is left of b.gguf leads nowhere, and says so


def test_a_folder_that_was_come_by_through_a_link_which_goes(watched):
    watched.model(".kept/k.gguf")
    one, other = watched.link("d/l", ".kept"), watched.link("e/l", ".kept")
    scanner = Scanner([watched.top])
    assert [facts.file_path for facts in scanner.scan().models] == [str(one / "k.gguf")]
    shutil.rmtree(one.parent)
    assert [facts.file_path for facts in same_as_scan(scanner, one.parent).models] == [str(other / "k.gguf")]
    other.unlink()
    assert same_as_scan(scanner, other).models == ()


def test_a_folder_that_is_moved_is_found_under_its_new_name_whichever_is_told_first(watched):
    for number in range(3):
        watched.model(f"m/x{number}.gguf")
    scanner = Scanner([watched.top])
    scanner.scan()
    for before, after in (("m", "z"), ("z", "a"), ("a", "m")):
        (watched.top / before).rename(watched.top / after)
        result = same_as_scan(scanner, watched.top / before, watched.top / after)
        assert (len(result.models), result.headers_read) == (3, 0)


def test_a_change_told_by_another_name_of_its_folder_costs_that_file(watched):
    for number in range(5):
        watched.model(f"x/m{number}.gguf")
    (watched.top.parent / "alias").symlink_to(watched.top / "x")
    scanner = Scanner([watched.top.parent / "alias", watched.top])
    scanner.scan()
    result = same_as_scan(scanner, watched.model("x/m1.gguf", "cut"))
    assert result.files_seen == 1


def test_links_are_looked_at_again_when_what_they_lead_to_changes(watched):
    blob = watched.model("blobs/0123")
    watched.link("a/m.gguf", "blobs/0123")
    watched.link("b/n.gguf", "a/m.gguf")
    scanner = Scanner([watched.top])
    scanner.scan()
    watched.model("blobs/0123", "cut")
    assert {facts.status for facts in same_as_scan(scanner, blob).models} == {ModelStatus.INCOMPLETE}
    blob.rename(watched.top / "blobs" / "4567")
    assert {facts.status for facts in same_as_scan(scanner, blob).models} == {ModelStatus.INVALID}
    blob.parent.rename(watched.top / "gone")
    watched.model("blobs/0123")
    assert {facts.status for facts in same_as_scan(scanner, blob.parent).models} == {ModelStatus.OK}


def test_a_configured_folder_comes_and_goes(watched):
    late = watched.top.parent / "late"
    scanner = Scanner([watched.top, late])
    assert [problem.path for problem in scanner.scan().problems] == [str(late)]
    write_file(late / "m.gguf", CONTENTS["model"])
    assert len(same_as_scan(scanner).models) == 1
    shutil.rmtree(late)
    assert [problem.path for problem in same_as_scan(scanner).problems] == [str(late)]


def test_hidden_paths_and_paths_elsewhere_are_left_alone(watched):
    watched.model("m.gguf")
    scanner = Scanner([watched.top])
    first = scanner.scan()
    elsewhere = [watched.top.parent / "x.gguf", watched.top / ".h" / "x.gguf", watched.top / ".x.gguf", Path("/")]
    result = same_as_scan(scanner, *elsewhere)
    assert (result.files_seen, result.models is first.models) == (0, True)
    result = same_as_scan(scanner, *elsewhere, watched.model("m.gguf", "cut"))
    assert result.files_seen == 1


def test_what_is_no_model_and_no_link_costs_no_scan_when_it_goes(watched):
    for number in range(5):
        watched.model(f"m{number}.gguf")
    watched.model(".kept/k.gguf")
    way = watched.link("way", ".kept")
    notes = write_file(watched.top / "notes.txt", b"notes")
    scanner = Scanner([watched.top])
    assert len(scanner.scan().models) == 6
    notes.unlink()
    assert same_as_scan(scanner, notes).files_seen == 0
    way.unlink()
    assert len(same_as_scan(scanner, way).models) == 5


@pytest.mark.parametrize("known", ["by a scan", "by a refresh"])
@pytest.mark.parametrize("then", ["gone", "a file"])
def test_a_link_by_way_of_a_link_that_is_no_model_and_goes(watched, known, then):
    watched.model("m.gguf")
    scanner = Scanner([watched.top])
    scanner.scan()
    way, link = watched.link("way", "m.gguf"), watched.link("l/l.gguf", "way")
    if known == "by a scan":
        scanner.scan()
    else:
        same_as_scan(scanner, way, link.parent)
    way.unlink()
    if then == "a file":
        write_file(way, CONTENTS["other"])
    assert len(same_as_scan(scanner, way).models) == 2


def going(watched, *paths: Path, to: Path):
    """The paths, of which the configured folder is renamed as soon as somebody asks for the first."""
    watched.top.rename(to)
    yield from paths


def test_a_configured_folder_that_goes_as_its_files_are_looked_at_is_gone_and_not_emptied(watched, tmp_path):
    one = watched.model("one.gguf", "model")
    scanner = Scanner([watched.top])
    assert len(scanner.scan().models) == 1

    result = scanner.refresh(going(watched, one, to=tmp_path / "elsewhere"))

    assert [(problem.path, problem.message) for problem in result.problems] == [
        (str(watched.top), "the folder does not exist")
    ]
    (tmp_path / "elsewhere").rename(watched.top)
    assert len(scanner.refresh([one]).models) == 1
