"""The registry: what was answered is on disk, a save that fails changes nothing, a damaged file is never lost."""

import asyncio
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from magi_agent.api.representations import model_answer
from magi_agent.discovery.facts import ModelFacts
from magi_agent.discovery.scanner import Scanner
from magi_agent.errors import ConfigurationError, ModelNotFound, RegistrySaveFailed, ServiceUnavailable
from magi_agent.events import ChoicesChanged, EventStream, ModelsChanged
from magi_agent.registry.model import Choices
from magi_agent.registry.registry import Registry
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.vocabulary import ModelStatus, StartPolicy, Tier
from tests.conftest import MakeToyModel, SystemdUser
from tests.faulty_disk import filled, read_only, small_disk
from tests.registry.model_facts import facts_at

A, B = facts_at("/m/a.gguf"), facts_at("/m/b.gguf")
FORMER = {"models": {"old id": {"file_path": "/m/a.gguf", "enabled": True, "port": 8085, "tier_override": "fast"}}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "model_registry.json"


async def opened(path: Path) -> Registry:
    registry = Registry(path, EventStream())
    await registry.load()
    return registry


async def with_models(path: Path, *found: ModelFacts) -> Registry:
    registry = await opened(path)
    await registry.merge(found or (A, B), ())
    return registry


def on_port(port: int | None):
    return lambda choices: replace(choices, port=port)


def beside(path: Path) -> list[str]:
    return sorted(other.name for other in path.parent.iterdir() if other != path)


async def test_nothing_is_answered_before_it_is_loaded(path):
    registry = Registry(path, EventStream())
    with pytest.raises(ServiceUnavailable) as unavailable:
        _ = registry.models
    assert unavailable.value.details == {"service": "registry"}
    report = await registry.load()
    assert (report.existed, report.problems, dict(registry.models)) == (False, (), {})


async def test_the_first_scan_makes_the_file_even_if_it_finds_nothing(path):
    registry = await opened(path)
    await registry.merge([], ())
    assert json.loads(path.read_bytes())["models"] == {}
    assert registry.last_scan is not None


async def test_choices_survive_a_restart(path):
    registry = await with_models(path)
    settings = RuntimeSettings(n_gpu_layers=3, ctx_size=1024, start_policy=StartPolicy.ON_DEMAND)
    choices = Choices(Tier.POWERFUL, False, True, 8090, settings)
    await registry.choose("a", lambda _: choices)
    await registry.choose_for_all(
        lambda model: replace(model.choices, enabled=True),
        active_profile="night",
        applied_profile_setting="development",
    )
    again = await opened(path)
    assert again.model("a").choices == choices
    assert again.model("b").choices == Choices(enabled=True)
    assert (again.active_profile, again.applied_profile_setting) == ("night", "development")
    assert again.models == registry.models
    assert again.given_ports() == {8090}
    assert again.last_scan == registry.last_scan


async def test_a_choice_is_on_disk_when_it_is_answered_and_is_one_event(path):
    registry = await with_models(path)
    with registry._events.subscribe() as heard:
        await registry.choose("a", on_port(8081))
        assert json.loads(path.read_bytes())["models"]["a"]["choices"]["port"] == 8081
        event = await heard.next()
        assert isinstance(event, ChoicesChanged)
        assert event.model_id == "a"
        before = path.stat().st_ino
        revision = registry.revision
        await registry.choose("a", on_port(8081))
        await registry.choose_for_all(lambda model: model.choices)
        assert (path.stat().st_ino, registry.revision) == (before, revision)  # nothing new, nothing written
        assert not heard.waiting


async def test_a_choice_for_all_is_one_for_those_that_went_too(path):
    registry = await with_models(path)
    await registry.choose("b", lambda choices: replace(choices, enabled=True))
    await registry.merge([A], ())
    with registry._events.subscribe() as heard:
        changed = await registry.choose_for_all(lambda model: replace(model.choices, enabled=model.model_id == "a"))
        assert sorted(changed) == ["a", "b"]
        told = [await heard.next() for _ in changed]
        assert {event.model_id for event in told if isinstance(event, ChoicesChanged)} == {"a", "b"}
    again = await opened(path)
    assert {model_id: model.choices.enabled for model_id, model in again.remembered.items()} == {"a": True, "b": False}
    await again.merge([A, B], ())
    assert not again.model("b").choices.enabled


async def test_a_scan_is_one_event_that_names_what_is_new(path):
    registry = await opened(path)
    with registry._events.subscribe() as heard:
        await registry.merge([A, B], ())
        await registry.merge([B, A], ())
        await registry.merge([replace(A, size_params=70.0)], ())
        first, second = await heard.next(), await heard.next()
        assert isinstance(first, ModelsChanged)
        assert isinstance(second, ModelsChanged)
        assert (first.added, second.changed, second.removed) == (("a", "b"), ("a",), ("b",))
        assert not heard.waiting


async def test_an_unknown_model_is_refused_and_so_is_one_that_went(path):
    registry = await with_models(path)
    with pytest.raises(ModelNotFound):
        await registry.choose("nobody", on_port(1))
    await registry.merge([A], ())
    with pytest.raises(ModelNotFound):
        await registry.choose("b", on_port(1))


async def test_what_a_change_raises_changes_nothing(path):
    registry = await with_models(path)

    def refuse(choices: Choices) -> Choices:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await registry.choose("a", refuse)
    assert registry.model("a").choices == Choices()
    await registry.choose("a", on_port(8081))


async def test_changes_at_once_are_made_one_after_another(path):
    registry = await with_models(path)

    def one_more(choices: Choices) -> Choices:
        return replace(choices, port=(choices.port or 0) + 1)

    await asyncio.gather(
        *(registry.choose("a", one_more) for _ in range(25)),
        *(registry.choose("b", one_more) for _ in range(25)),
        *(registry.merge([A, B, facts_at(f"/m/x{number}.gguf")], ()) for number in range(5)),
    )
    for registry_ in (registry, await opened(path)):
        assert (registry_.model("a").choices.port, registry_.model("b").choices.port) == (25, 25)
    assert beside(path) == []


async def test_a_caller_that_goes_away_leaves_file_and_memory_the_same(path):
    registry = await with_models(path, *(facts_at(f"/m/m{number}.gguf") for number in range(2000)))
    for number in range(10):
        asked = asyncio.create_task(registry.choose("m1", on_port(8000 + number)))
        for _ in range(number):
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        merging = asyncio.create_task(registry.merge([facts_at(f"/m/m{n}.gguf") for n in range(1990 + number)], ()))
        await asyncio.sleep(0.001)
        merging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await merging
    await registry.choose("m2", on_port(9000))  # when its turn comes, all before it are through
    again = await opened(path)
    assert again.models == registry.models
    assert registry.model("m1").choices.port == 8009


async def test_a_full_disk_changes_nothing_and_says_so(tmp_path, systemd_user: SystemdUser):
    with small_disk(tmp_path / "disk") as disk:
        path = disk / "model_registry.json"
        registry = await with_models(path)
        await registry.choose("a", on_port(8081))
        models, revision, content = dict(registry.models), registry.revision, path.read_bytes()
        with filled(disk), registry._events.subscribe() as heard:
            with pytest.raises(RegistrySaveFailed) as failed:
                await registry.choose("a", on_port(8082))
            with pytest.raises(RegistrySaveFailed):
                await registry.choose_for_all(lambda model: replace(model.choices, enabled=True), active_profile="p")
            assert failed.value.details == {"path": str(path), "reason": "No space left on device"}
            assert "nothing was changed" in failed.value.message
            assert (dict(registry.models), registry.revision, registry.active_profile) == (models, revision, None)
            assert path.read_bytes() == content
            assert not heard.waiting
            assert beside(path) == ["filler"]
        await registry.choose("a", on_port(8083))
        assert (await opened(path)).model("a").choices.port == 8083


async def test_a_read_only_disk_changes_nothing(tmp_path, systemd_user: SystemdUser):
    with small_disk(tmp_path / "disk") as disk:
        registry = await with_models(disk / "registry.json")
        with read_only(disk):
            with pytest.raises(RegistrySaveFailed, match="Read-only file system"):
                await registry.choose("a", on_port(8082))
            assert registry.model("a").choices.port is None
            assert (await opened(disk / "registry.json")).models == registry.models


async def test_facts_count_even_where_they_cannot_be_saved_and_are_saved_later(tmp_path, systemd_user: SystemdUser):
    with small_disk(tmp_path / "disk") as disk:
        path = disk / "registry.json"
        registry = await with_models(path, A)
        with filled(disk), registry._events.subscribe() as heard:
            many = [A, *(facts_at(f"/m/x{number}.gguf") for number in range(30))]
            with pytest.raises(RegistrySaveFailed):
                await registry.merge(many, ())
            assert len(registry.models) == 31
            event = await heard.next()
            assert isinstance(event, ModelsChanged)
            assert len(event.added) == 30
        assert len((await opened(path)).models) == 1
        assert not (await registry.merge(many, ())).is_news
        assert len((await opened(path)).models) == 31


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 4096, b'{"models": []}', b"\xff"])
async def test_a_damaged_file_is_kept_aside_and_said_so(path, damage, caplog):
    registry = await with_models(path)
    path.write_bytes(damage)
    registry = Registry(path, EventStream())
    report = await registry.load()
    (problem,) = report.problems
    assert not report.existed
    assert dict(registry.models) == {}
    assert registry.problems == report.problems
    assert "was damaged" in caplog.text
    (aside,) = beside(path)
    assert aside.startswith("model_registry.json.damaged-")
    assert str(path.with_name(aside)) in problem
    # It is replaced only by the next save, and stays beside it.
    assert path.read_bytes() == damage
    await registry.merge([A], ())
    assert path.with_name(aside).read_bytes() == damage
    assert "a" in (await opened(path)).models


async def test_a_damaged_file_is_kept_once_however_often_the_agent_starts(path):
    await with_models(path)
    path.write_bytes(b"{")
    for _ in range(3):
        await opened(path)
    assert len(beside(path)) == 1
    await (await opened(path)).merge([A], ())
    path.write_bytes(b"[")
    await opened(path)
    assert sorted(path.with_name(name).read_bytes() for name in beside(path)) == [b"[", b"{"]


async def test_one_damaged_model_is_named_and_the_whole_file_kept(path):
    registry = await with_models(path)
    await registry.choose("b", on_port(8082))
    document = json.loads(path.read_bytes())
    document["models"]["a"]["facts"]["status"] = "curious"
    path.write_text(json.dumps(document))
    registry = Registry(path, EventStream())
    report = await registry.load()
    assert report.existed
    assert list(registry.models) == ["b"]
    assert registry.model("b").choices.port == 8082
    assert "model 'a': facts.status" in report.problems[0]
    (aside,) = beside(path)
    assert aside in report.problems[1]


async def test_a_newer_registry_refuses_the_start_and_is_left_alone(path):
    path.parent.mkdir()
    path.write_text('{"version": 3, "models": {}}')
    with pytest.raises(ConfigurationError, match="newer agent"):
        await opened(path)
    assert path.read_text() == '{"version": 3, "models": {}}'
    assert beside(path) == []


async def test_a_registry_that_cannot_be_read_refuses_the_start(path):
    path.mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        await opened(path)


async def test_a_damaged_registry_that_cannot_be_kept_aside_refuses_the_start(tmp_path, systemd_user: SystemdUser):
    with small_disk(tmp_path / "disk") as disk:
        (disk / "registry.json").write_bytes(b"{")
        with read_only(disk), pytest.raises(ConfigurationError, match="cannot be kept aside"):
            await opened(disk / "registry.json")
        assert (disk / "registry.json").read_bytes() == b"{"


async def test_an_earlier_registry_is_carried_over_by_path_and_kept(path):
    path.parent.mkdir()
    path.write_text(json.dumps(FORMER))
    registry = Registry(path, EventStream())
    report = await registry.load()
    assert (report.existed, report.carried_over, report.problems) == (True, True, ())
    assert dict(registry.models) == {}  # no scan has found the file yet
    assert registry.given_ports() == {8085}
    await registry.merge([A, B], ())
    model = registry.model("a")
    assert model.choices == Choices(tier_override=Tier.FAST, enabled=True, port=8085)
    assert model.facts.status is ModelStatus.OK
    assert registry.model("old id") is model
    again = await opened(path)
    assert again.model("old id").choices == model.choices
    (aside,) = beside(path)
    assert json.loads(path.with_name(aside).read_text()) == FORMER


async def test_choices_of_an_earlier_registry_wait_over_restarts_until_the_file_is_there(path):
    path.parent.mkdir()
    path.write_text(json.dumps(FORMER))
    await (await opened(path)).merge([B], ())
    registry = await opened(path)
    await registry.merge([A, B], ())
    assert registry.model("a").choices.port == 8085


async def test_a_model_whose_server_runs_is_missing_and_keeps_its_choices(path):
    registry = await with_models(path)
    await registry.choose("a", on_port(8081))
    await registry.merge([B], ("a",))
    assert registry.model("a").facts.status is ModelStatus.MISSING
    await registry.choose("a", lambda choices: replace(choices, enabled=True))
    await registry.merge([A, B], ("a",))
    assert registry.model("a").facts.status is ModelStatus.OK
    assert registry.model("a").choices == Choices(enabled=True, port=8081)


async def test_real_files_with_wild_names_come_through_a_restart(path, tmp_path, toy_model: MakeToyModel):
    toy = toy_model(tmp_path / "models" / "toy.gguf")
    wild = os.fsdecode(os.fsencode(tmp_path) + b"/models/caf\xe9 $x;\ny.gguf")
    os.link(toy, wild)
    toy.unlink()
    registry = await opened(path)
    await registry.merge(Scanner([tmp_path / "models"]).scan().models, ())
    (model_id,) = registry.models
    await registry.choose(model_id, on_port(8081))
    again = await opened(path)
    assert again.model(model_id).facts.file_path == wild
    merged = await again.merge(Scanner([tmp_path / "models"]).scan().models, ())
    assert not merged.is_news
    # JSON is UTF-8, and has no way to write the byte that is none.
    told = model_answer(again.model(model_id), StartPolicy.ALWAYS_ON)
    answer = json.loads(told.model_dump_json(by_alias=True).encode())
    assert answer["filename"] == "caf\ufffd $x;\ny.gguf"
    assert answer["filePath"] == answer["parts"][0] == f"{tmp_path}/models/{answer['filename']}"


async def test_a_renamed_file_keeps_id_and_choices_over_a_restart(path, tmp_path, toy_model: MakeToyModel):
    folder = tmp_path / "models"
    toy = toy_model(folder / "toy.gguf")
    registry = await opened(path)
    await registry.merge(Scanner([folder]).scan().models, ())
    await registry.choose("toy", on_port(8081))
    (folder / "deep").mkdir()
    toy.rename(folder / "deep" / "Better Name.gguf")
    again = await opened(path)
    await again.merge(Scanner([folder]).scan().models, ())
    assert again.model("toy").facts.filename == "Better Name.gguf"
    assert again.model("toy").choices.port == 8081


async def test_a_move_to_another_disk_keeps_id_and_choices_whenever_it_ends(path, tmp_path, toy_model: MakeToyModel):
    folders = [tmp_path / "one", tmp_path / "two"]
    toy = toy_model(tmp_path / "one" / "toy.gguf")
    registry = await opened(path)
    await registry.merge(Scanner(folders).scan().models, ())
    await registry.choose("toy", on_port(8081))
    (tmp_path / "two").mkdir()
    copy = shutil.copy2(toy, tmp_path / "two")
    await registry.merge(Scanner(folders).scan().models, ())
    assert sorted(registry.models) == ["toy", "toy-two"]
    again = await opened(path)
    toy.unlink()
    await again.merge(Scanner(folders).scan().models, ())
    assert sorted(again.models) == ["toy"]
    assert again.model("toy").facts.file_path == str(copy)
    assert again.model("toy").choices.port == 8081


@pytest.mark.parametrize(
    "chosen",
    [
        lambda registry: registry.choose("a-two", on_port(8082)),
        lambda registry: registry.choose_each(lambda _: {"a-two": Choices(port=8082)}),
        lambda registry: registry.choose_for_all(
            lambda model: Choices(port=8082) if model.model_id == "a-two" else model.choices
        ),
    ],
    ids=["for it", "by an import", "by a profile"],
)
async def test_what_is_chosen_for_a_copy_makes_it_a_model_of_its_own_for_ever(path, chosen):
    here, there = (facts_at(f"/{disk}/a.gguf", fingerprint="f") for disk in ("one", "two"))
    registry = await with_models(path, here)
    await registry.merge([here, there], ())
    await chosen(registry)
    await registry.choose("a-two", on_port(None))
    again = await opened(path)
    await again.merge([there], ())
    assert list(again.models) == ["a-two"]


async def test_leftovers_of_a_killed_agent_are_removed(path):
    await with_models(path)
    path.with_name(f".{path.name}.x1y2.tmp").write_bytes(b"half")
    await opened(path)
    assert beside(path) == []
