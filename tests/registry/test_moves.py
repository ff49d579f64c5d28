"""Sequences of copies, moves, removals, restarts and choices: ids stay with contents, and choices with ids."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from magi_agent.discovery.facts import FileIdentity, ModelFacts
from magi_agent.registry.merging import merge
from magi_agent.registry.model import Choices, Model
from magi_agent.registry.stored import RegistryContent, RegistryWriter, read_registry
from magi_agent.vocabulary import ModelStatus
from tests.registry.model_facts import facts_at

DISKS = ("one", "two", "three")
NAMES = ("x.gguf", "y.gguf", "s-00001-of-00002.gguf")
PATHS = tuple(f"/{disk}/{folder}/{name}" for disk in DISKS for folder in ("p", "one") for name in NAMES)
CONTENTS = ("1", "2", "3")  # all of one size, with one header
SIZE = 1000


@dataclass(slots=True)
class File:
    """A model's file, or the parts of its split set that are there."""

    inode: int
    content: str
    whole: bool = True
    seen: int | None = None
    """In which look it was whole first."""


class Moves(RuleBasedStateMachine):
    """Disks with files, and what a registry makes of them from look to look."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, File] = {}
        self.lain: dict[str, str] = {}
        """What content ever lay at a path: what is replaced in place keeps the id of the path, so nothing is here."""
        self.away: set[str] = set()
        self.known: dict[str, Model] = {}
        self.named: dict[str, str] = {}
        self.chosen: dict[str, Choices] = {}
        self.inodes = self.looks = self.ports = 0

    def put(self, path: str, file: File) -> None:
        self.files[path] = file
        self.lain[path] = file.content

    def new_file(self, content: str, *, whole: bool = True) -> File:
        self.inodes += 1
        return File(self.inodes, content, whole)

    def is_free_for(self, path: str, content: str) -> bool:
        return path not in self.files and self.lain.get(path, content) == content and disk_of(path) not in self.away

    def on_line(self) -> list[str]:
        return sorted(path for path in self.files if disk_of(path) not in self.away)

    @initialize(path=st.sampled_from(PATHS), content=st.sampled_from(CONTENTS))
    def begin(self, path: str, content: str) -> None:
        self.put(path, self.new_file(content))
        self.look()

    @rule(path=st.sampled_from(PATHS), content=st.sampled_from(CONTENTS), whole=st.booleans())
    def download(self, path: str, content: str, whole: bool) -> None:
        if self.is_free_for(path, content):
            self.put(path, self.new_file(content, whole=whole))

    @precondition(lambda self: self.on_line())
    @rule(data=st.data(), to=st.sampled_from(PATHS), whole=st.booleans())
    def copy(self, data: st.DataObject, to: str, whole: bool) -> None:
        source = self.files[data.draw(st.sampled_from(self.on_line()))]
        if self.is_free_for(to, source.content):
            self.put(to, self.new_file(source.content, whole=whole and source.whole))

    @rule()
    def finish(self) -> None:
        for path in self.on_line():
            self.files[path].whole = True

    @precondition(lambda self: self.on_line())
    @rule(data=st.data(), to=st.sampled_from(PATHS))
    def rename(self, data: st.DataObject, to: str) -> None:
        source = data.draw(st.sampled_from(self.on_line()))
        if self.is_free_for(to, self.files[source].content) and disk_of(source) == disk_of(to):
            self.put(to, self.files.pop(source))

    @precondition(lambda self: self.on_line())
    @rule(data=st.data(), by_parts=st.booleans())
    def remove(self, data: st.DataObject, by_parts: bool) -> None:
        path = data.draw(st.sampled_from(self.on_line()))
        if by_parts:
            self.files[path].whole = False
            self.look()
        del self.files[path]

    @precondition(lambda self: self.on_line())
    @rule(
        data=st.data(),
        to=st.sampled_from(PATHS),
        pauses=st.integers(0, 3),
        by_parts=st.booleans(),
        restarts=st.booleans(),
    )
    def move(self, data: st.DataObject, to: str, pauses: int, by_parts: bool, restarts: bool) -> None:
        """To another disk, with looks and restarts at any time between; whole files of known models keep their ids."""
        source = data.draw(st.sampled_from(self.on_line()))
        file = self.files[source]
        if not self.is_free_for(to, file.content) or not file.whole:
            return
        self.look()
        (model_id,) = [model_id for model_id, model in self.listed() if model.facts.file_path == source]
        for number in range(pauses):
            self.put(to, replace(self.files.get(to) or self.new_file(file.content), whole=number > 0))
            self.look()
            if restarts:
                self.restart()
        self.put(to, replace(self.files.get(to) or self.new_file(file.content), whole=True))
        for _ in range(by_parts):
            self.files[source].whole = False
            self.look()
            if restarts:
                self.restart()
        del self.files[source]
        self.look()
        (there,) = [model for _, model in self.listed() if model.facts.file_path == to]
        # Another one of this content may have lain there, and somebody have chosen something for it.
        assert there.model_id in {model_id, *self.chosen}, "the file is there, and its id is not"

    @rule(disk=st.sampled_from(DISKS))
    def unmount(self, disk: str) -> None:
        self.away ^= {disk}

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def choose(self, data: st.DataObject) -> None:
        listed = sorted(model_id for model_id, _ in self.listed())
        if listed:
            model_id = data.draw(st.sampled_from(listed))
            self.ports += 1
            self.chosen[model_id] = Choices(port=8000 + self.ports % 1000)
            self.known[model_id] = self.known[model_id].choosing(self.chosen[model_id])

    @rule()
    def restart(self) -> None:
        reading = read_registry(RegistryWriter().written(RegistryContent(self.known)))
        assert not reading.problems
        self.known = dict(reading.content.models)

    @rule()
    def look(self) -> None:
        self.looks += 1
        found = [self.facts(path, file) for path, file in self.files.items() if disk_of(path) not in self.away]
        devices = {1 + number for number, disk in enumerate(DISKS) if disk not in self.away}
        before, self.known = self.known, dict(merge(self.known, found, (), devices).models)
        at_path = {model.facts.file_path: model for _, model in self.listed()}
        assert sorted(at_path) == sorted(facts.file_path for facts in found)
        assert len(at_path) == len(self.listed()), "each file is one model"
        for path, model in at_path.items():
            file = self.files[path]
            if file.whole and file.seen is None:
                file.seen = self.looks
            if file.whole:
                assert self.named.setdefault(model.model_id, file.content) == file.content, "an id names one content"
        went = [model for model_id, model in before.items() if model.present and not self.known[model_id].present]
        contents = {self.named.get(model.model_id) for model in went if model.model_id in self.chosen}
        for path, model in at_path.items():
            known = before.get(model.model_id)
            was_there = known is not None and known.present and known.content is not None
            if self.files[path].seen == self.looks and model.choices == Choices() and not was_there:
                assert self.files[path].content not in contents, "what has choices goes on in a file that came"

    def facts(self, path: str, file: File) -> ModelFacts:
        identity = FileIdentity(1 + DISKS.index(disk_of(path)), file.inode, SIZE, file.inode)
        facts = facts_at(path, fingerprint="f", sample=file.content, identity=identity, size_bytes=SIZE)
        if file.whole:
            return facts
        if "-of-" in path and file.seen:
            facts = replace(facts, identity=None, fingerprint=None)  # its first part is gone
        return replace(facts, status=ModelStatus.INCOMPLETE, size_bytes=SIZE // 2, sample=None)

    def listed(self) -> list[tuple[str, Model]]:
        return [(model_id, model) for model_id, model in self.known.items() if model.present]

    @invariant()
    def no_choice_is_lost(self) -> None:
        assert {model_id: self.known[model_id].choices for model_id in self.chosen} == self.chosen
        others = [model_id for model_id in self.known if model_id not in self.chosen]
        assert all(self.known[model_id].choices == Choices() for model_id in others)


def disk_of(path: str) -> str:
    return path.split("/")[1]


TestMoves = Moves.TestCase
TestMoves.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
