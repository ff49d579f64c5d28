"""Joining a scan with the registry: nothing anybody chose is lost, no id is given twice, files keep their ids."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_agent.discovery.facts import FileIdentity, ModelFacts
from magi_agent.discovery.scanner import Scanner
from magi_agent.registry import merging
from magi_agent.registry.merging import merge
from magi_agent.registry.model import Choices, Model
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.vocabulary import ModelStatus, Tier
from tests.discovery.model_files import model_bytes, write_file, write_split
from tests.registry.model_facts import facts_at

CHOSEN = Choices(tier_override=Tier.FAST, enabled=True, port=8081, runtime_settings=RuntimeSettings(ctx_size=2048))


def after(*scans: list[ModelFacts], running: tuple[str, ...] = ()) -> dict[str, Model]:
    known: dict[str, Model] = {}
    for found in scans:
        known = merge(known, found, running).models
    return known


def chosen_for(known: dict[str, Model], model_id: str, choices: Choices = CHOSEN) -> dict[str, Model]:
    return {**known, model_id: known[model_id].choosing(choices)}


def listed(known: dict[str, Model]) -> dict[str, str]:
    return {model_id: model.facts.file_path for model_id, model in known.items() if model.present}


def test_a_new_model_is_listed_and_not_enabled():
    merged = merge({}, [facts_at("/m/a.gguf"), facts_at("/m/b.gguf")], ())
    assert listed(merged.models) == {"a": "/m/a.gguf", "b": "/m/b.gguf"}
    assert (merged.added, merged.changed, merged.removed) == (("a", "b"), (), ())
    assert all(model.choices == Choices() for model in merged.models.values())
    assert not merge(merged.models, [facts_at("/m/b.gguf"), facts_at("/m/a.gguf")], ()).is_news


def test_ids_do_not_depend_on_the_order_in_which_files_are_found():
    found = [facts_at(f"/m/{folder}/x.gguf") for folder in "dacb"]
    assert listed(after(found)) == listed(after(found[::-1]))


def test_changed_facts_keep_the_choices():
    known = chosen_for(after([facts_at("/m/a.gguf")]), "a")
    merged = merge(known, [facts_at("/m/a.gguf", inode=99, size=5, fingerprint="new", size_params=70.0)], ())
    assert (merged.added, merged.changed, merged.removed) == ((), ("a",), ())
    assert merged.models["a"].choices == CHOSEN
    assert merged.models["a"].facts.size_params == 70.0


def test_a_header_that_is_known_only_now_is_taken_and_no_news(tmp_path):
    write_file(tmp_path / "a.gguf", model_bytes())
    (facts,) = Scanner([tmp_path]).scan().models
    assert facts.header is not None
    merged = merge(after([replace(facts, header=None)]), [facts], ())
    assert not merged.is_news
    assert merged.models["a"].facts.header == facts.header
    again = merge(merged.models, [facts], ())
    assert again.models["a"] is merged.models["a"]


def test_choices_come_back_with_the_file():
    known = chosen_for(after([facts_at("/m/a.gguf")]), "a")
    gone = merge(known, [], ())
    assert (gone.removed, listed(gone.models)) == (("a",), {})
    back = merge(gone.models, [facts_at("/m/a.gguf", inode=7)], ())
    assert (back.added, back.models["a"].choices, back.models["a"].present) == (("a",), CHOSEN, True)


@pytest.mark.parametrize("how", ["renamed", "copied to another disk"])
def test_a_moved_file_keeps_its_id_and_choices(how):
    known = chosen_for(after([facts_at("/m/a.gguf", inode=5, fingerprint="f")]), "a")
    moved = facts_at("/other/b.gguf", inode=5 if how == "renamed" else 77, fingerprint="f")
    merged = merge(known, [moved], ())
    assert listed(merged.models) == {"a": "/other/b.gguf"}
    assert merged.models["a"].choices == CHOSEN
    assert (merged.added, merged.changed, merged.removed) == ((), ("a",), ())


def test_a_copy_is_a_model_of_its_own():
    known = chosen_for(after([facts_at("/m/a.gguf", inode=5, fingerprint="f")]), "a")
    merged = merge(known, [facts_at("/m/a.gguf", inode=5, fingerprint="f"), facts_at("/m/c.gguf", fingerprint="f")], ())
    assert listed(merged.models) == {"a": "/m/a.gguf", "c": "/m/c.gguf"}
    assert merged.models["c"].choices == Choices()


def on_disk(disk: str, name: str = "a", *, device: int | None = None, sample: str | None = "s", **other) -> ModelFacts:
    """A model's facts on a disk; each disk has a device number of its own."""
    facts = facts_at(f"/{disk}/{name}.gguf", fingerprint="f", sample=sample)
    assert facts.identity is not None
    number = {"one": 1, "two": 2, "three": 3}[disk] if device is None else device
    return replace(facts, identity=replace(facts.identity, device=number), **other)


def grown_half(facts: ModelFacts) -> ModelFacts:
    return replace(facts, status=ModelStatus.INCOMPLETE, size_bytes=10, fingerprint=None, sample=None)


ALL_DISKS = (1, 2, 3)


@pytest.mark.parametrize("choices", [CHOSEN, Choices()], ids=["chosen for", "nothing chosen"])
@pytest.mark.parametrize("was_seen", ["as it grew", "whole", "as it grew, and whole"])
def test_a_file_that_is_moved_to_another_disk_keeps_its_id_and_choices(was_seen, choices):
    here, there = on_disk("one"), on_disk("two")
    known = chosen_for(after([here]), "a", choices)
    if "as it grew" in was_seen:
        known = merge(known, [here, grown_half(there)], (), ALL_DISKS).models
    if "whole" in was_seen:
        for _ in range(3):
            known = merge(known, [here, there], (), ALL_DISKS).models
    assert listed(known) == {"a": "/one/a.gguf", "a-two": "/two/a.gguf"}

    merged = merge(known, [there], (), ALL_DISKS)

    assert listed(merged.models) == {"a": "/two/a.gguf"}
    assert merged.models["a"].choices == choices
    assert (merged.added, merged.changed, merged.removed) == ((), ("a",), ("a-two",))
    assert not merge(merged.models, [there], (), ALL_DISKS).is_news

    elsewhere = replace(there, file_path="/three/two/a.gguf", sample="other")
    assert "a-two" not in listed(merge(merged.models, [there, elsewhere], (), ALL_DISKS).models), "it was another's"


def test_a_file_that_goes_before_its_copy_is_whole_is_the_copy_then():
    here, there = on_disk("one"), on_disk("two")
    known = chosen_for(after([here]), "a")
    known = merge(known, [here, grown_half(there)], (), ALL_DISKS).models
    known = merge(known, [grown_half(there)], (), ALL_DISKS).models
    assert listed(known) == {"a-two": "/two/a.gguf"}
    merged = merge(known, [there], (), ALL_DISKS)
    assert listed(merged.models) == {"a": "/two/a.gguf"}
    assert merged.models["a"].choices == CHOSEN
    assert (merged.added, merged.changed, merged.removed) == (("a",), (), ("a-two",))


def test_a_file_that_moves_to_and_fro_keeps_its_id():
    here, there = on_disk("one"), on_disk("two")
    known = chosen_for(after([here]), "a")
    for source, target in ((here, there), (there, here), (here, there), (there, here)):
        known = merge(known, [source, target], (), ALL_DISKS).models
        assert len(listed(known)) == 2
        known = merge(known, [target], (), ALL_DISKS).models
        assert listed(known) == {"a": target.file_path}
    assert known["a"].choices == CHOSEN


@pytest.mark.parametrize(
    "why",
    [
        "it has choices",
        "it had choices",
        "its server runs",
        "it came first",
        "both came at once",
        "the disk went",
        "its data is other data",
    ],
)
def test_a_copy_stays_the_model_that_it_is_when_the_original_goes(why):
    here, there = on_disk("one"), on_disk("two")
    if why == "its data is other data":
        there = replace(there, sample="other")
    known = after([there] if why == "it came first" else [here])
    known = merge(known, [here, there], (), ALL_DISKS).models
    if why == "both came at once":
        known = after([here, there])
    one, two = ("a-one", "a") if why == "it came first" else ("a", "a-two")
    known = chosen_for(known, one)
    if why.endswith("choices"):
        known = chosen_for(known, two, Choices(tier_override=Tier.FAST))
    if why == "it had choices":
        known = chosen_for(known, two, Choices())
    running = (two,) if why == "its server runs" else ()

    merged = merge(known, [there], running, (2,) if why == "the disk went" else ALL_DISKS)

    assert listed(merged.models) == {two: "/two/a.gguf"}
    assert merged.removed == (one,)
    assert merged.models[one].choices == CHOSEN
    assert merged.models[two].choices == known[two].choices
    assert listed(merge(merged.models, [here, there], running, ALL_DISKS).models) == listed(known), "it comes back"


def test_disks_that_come_late_or_go_for_a_while_change_no_id():
    here, there = on_disk("one"), on_disk("two")
    known = after([here], [here, there])
    assert listed(known) == {"a": "/one/a.gguf", "a-two": "/two/a.gguf"}
    for found, devices in (
        ([there], (2,)), ([here, there], (1, 2)), ([here], (1,)), ([here, there], (1, 2)), ([], ()), ([there], (2,)),
        ([here, there], (1, 2)),
    ):  # fmt: skip
        known = merge(known, found, (), devices).models
        assert set(listed(known).values()) == {facts.file_path for facts in found}
    assert listed(known) == {"a": "/one/a.gguf", "a-two": "/two/a.gguf"}
    assert listed(merge(known, [there], (), ALL_DISKS).models) == {"a": "/two/a.gguf"}, "the numbers hold"


def test_of_several_copies_the_last_goes_on():
    first, second, third = (on_disk(disk) for disk in ("one", "two", "three"))
    for order in ((first, second, third), (third, second, first)):
        known = after(list(order[:1]), list(order[:2]), list(order))
        known = chosen_for(known, "a")
        merged = merge(known, list(order[1:]), (), ALL_DISKS)
        assert listed(merged.models)["a"] == order[2].file_path
        assert len(listed(merged.models)) == 2


def test_a_copy_that_goes_does_not_go_on_at_an_earlier_one():
    first, second, third = (on_disk(disk) for disk in ("one", "two", "three"))
    known = after([first], [first, second], [first, second, third])
    merged = merge(known, [first, second], (), ALL_DISKS)
    assert listed(merged.models) == {"a": "/one/a.gguf", "a-two": "/two/a.gguf"}
    assert merged.removed == ("a-three",)


def test_of_what_went_at_once_the_one_with_choices_goes_on():
    here, there, new = on_disk("one"), on_disk("two"), on_disk("three")
    known = chosen_for(after([here], [here, there]), "a-two")
    known = merge(known, [here, there, new], (), ALL_DISKS).models
    merged = merge(known, [new], (), ALL_DISKS)
    assert listed(merged.models) == {"a-two": "/three/a.gguf"}
    assert merged.models["a-two"].choices == CHOSEN


def test_a_copy_that_overwrites_another_model_is_that_one_until_the_original_goes():
    here, other = on_disk("one"), on_disk("two", "b", sample="other")
    known = chosen_for(after([here, other]), "a")
    overwritten = on_disk("two", "b")
    known = merge(known, [here, overwritten], (), ALL_DISKS).models
    assert listed(known) == {"a": "/one/a.gguf", "b": "/two/b.gguf"}, "the path is b's"
    known = merge(known, [overwritten], (), ALL_DISKS).models
    assert listed(known) == {"a": "/two/b.gguf"}
    assert known["a"].choices == CHOSEN


@pytest.mark.parametrize("choices", [Choices(), Choices(tier_override=Tier.FAST)], ids=["nothing chosen", "chosen for"])
def test_a_model_that_is_overwritten_by_a_move_gives_way_if_nobody_chose_anything_for_it(choices):
    here, other = on_disk("one"), on_disk("two", "b", sample="other")
    known = chosen_for(chosen_for(after([here, other]), "a"), "b", choices)
    merged = merge(known, [on_disk("two", "b")], (), ALL_DISKS)
    assert listed(merged.models) == {"b" if choices != Choices() else "a": "/two/b.gguf"}
    assert (merged.models["a"].choices, merged.models["b"].choices) == (CHOSEN, choices)
    if choices == Choices():
        back = merge(merged.models, [on_disk("two", "b"), on_disk("three", sample="other")], (), ALL_DISKS)
        assert listed(back.models) == {"a": "/two/b.gguf", "b": "/three/a.gguf"}, "its own content is remembered"


def test_a_copy_for_which_something_is_chosen_as_it_grows_is_a_model_of_its_own():
    here, there = on_disk("one"), on_disk("two")
    known = after([here], [here, grown_half(there)])
    known = chosen_for(chosen_for(known, "a"), "a-two", Choices(tier_override=Tier.FAST))
    merged = merge(known, [there], (), ALL_DISKS)
    assert listed(merged.models) == {"a-two": "/two/a.gguf"}
    assert merged.models["a"].choices == CHOSEN


@pytest.mark.parametrize("seen", ["half way", "at its end"])
def test_a_file_that_is_moved_to_where_a_copy_of_it_lay_keeps_its_id(seen):
    here, there = on_disk("one"), on_disk("two")
    known = chosen_for(after([there], [here, there]), "a-one")
    known = merge(known, [here], (), ALL_DISKS).models
    new = replace(there, identity=FileIdentity(2, 99, 1000, 1))
    if seen == "half way":
        known = merge(known, [here, new], (), ALL_DISKS).models
        assert listed(known) == {"a-one": "/one/a.gguf", "a": "/two/a.gguf"}
    merged = merge(known, [new], (), ALL_DISKS)
    assert listed(merged.models) == {"a-one": "/two/a.gguf"}


def test_a_model_that_earlier_profiles_call_by_another_id_keeps_its_file():
    here, there = on_disk("one"), on_disk("two")
    known = after([here], [here, there])
    known["a-two"] = replace(known["a-two"], former_id="old id")
    assert listed(merge(known, [there], (), ALL_DISKS).models) == {"a-two": "/two/a.gguf"}


def test_a_model_that_lost_parts_and_the_rest_as_its_server_ran_comes_back_with_its_content():
    known = chosen_for(after([set_of("one", (1, 2, 3))]), "s")
    known = merge(known, [set_of("one", (1, 2))], ("s",), ALL_DISKS).models
    known = merge(known, [], ("s",), ALL_DISKS).models
    assert known["s"].facts.status is ModelStatus.MISSING
    known = merge(known, [set_of("two", (1, 2, 3))], ("s",), ALL_DISKS).models
    assert listed(known) == {"s": "/two/s-00001-of-00003.gguf"}


def test_a_model_whose_server_runs_goes_on_where_its_file_went():
    here, there = on_disk("one"), on_disk("two")
    known = chosen_for(after([here], [here, there]), "a")
    merged = merge(known, [there], ("a",), ALL_DISKS)
    assert listed(merged.models) == {"a": "/two/a.gguf"}
    assert (merged.models["a"].facts.status, merged.changed) == (ModelStatus.OK, ("a",))


def set_of(disk: str, numbers: tuple[int, ...], count: int = 3) -> ModelFacts:
    """A split set, as far as its parts are there: its first one gives identity and header."""
    facts = on_disk(disk, f"s-00001-of-{count:05d}", size_bytes=1000 * len(numbers))
    if len(numbers) < count:
        facts = replace(facts, status=ModelStatus.INCOMPLETE, sample=None)
    return facts if 1 in numbers else replace(facts, identity=None, fingerprint=None)


MOVES_OF_SETS = {
    "copied, then removed": [((1, 2, 3), (1,)), ((1, 2, 3), (1, 2)), ((1, 2, 3), (1, 2, 3)), ((2, 3), (1, 2, 3)),
                             ((3,), (1, 2, 3))],
    "part by part": [((2, 3), (1,)), ((3,), (1, 2)), ((3,), (1, 2, 3))],
    "backwards": [((1, 2, 3), (3,)), ((1, 2), (3,)), ((1,), (2, 3)), ((1,), (1, 2, 3))],
    "the last part in one look": [((2, 3), (1,)), ((3,), (1, 2))],
}  # fmt: skip


@pytest.mark.parametrize("how", MOVES_OF_SETS)
def test_a_split_set_that_is_moved_to_another_disk_keeps_its_id_and_choices(how):
    known = chosen_for(after([set_of("one", (1, 2, 3))]), "s")
    for here, there in MOVES_OF_SETS[how]:
        known = merge(known, [set_of("one", here), set_of("two", there)], (), ALL_DISKS).models
        assert known["s"].facts.file_path.startswith("/one/")
    known = merge(known, [set_of("two", (1, 2, 3))], (), ALL_DISKS).models
    assert listed(known) == {"s": "/two/s-00001-of-00003.gguf"}
    assert known["s"].choices == CHOSEN
    assert known["s"].last_whole is None


def test_a_model_that_was_overwritten_half_and_went_comes_back_with_its_content():
    here = on_disk("one")
    known = chosen_for(after([here], [grown_half(here)], []), "a")
    assert listed(merge(known, [on_disk("two", "b")], (), ALL_DISKS).models) == {"a": "/two/b.gguf"}


@pytest.mark.parametrize("inode", [5, 6], ids=["with the inode that came free", "with an inode of its own"])
def test_of_two_models_with_one_header_the_data_decides(inode):
    def checkpoint(path: str, inode: int, sample: str | None) -> ModelFacts:
        return facts_at(path, inode=inode, fingerprint="f", sample=sample)

    known = chosen_for(after([checkpoint("/m/first.gguf", 5, "1")]), "first")
    other = merge(known, [checkpoint("/m/second.gguf", inode, "2")], ())
    assert listed(other.models) == {"second": "/m/second.gguf"}
    assert other.models["first"].choices == CHOSEN
    for sample in ("1", None):
        same = merge(known, [checkpoint("/m/second.gguf", inode, sample)], ())
        assert listed(same.models) == {"first": "/m/second.gguf"}, "what was never taken tells nothing apart"
    unsampled = chosen_for(after([checkpoint("/m/first.gguf", 5, None)]), "first")
    same = merge(unsampled, [checkpoint("/m/second.gguf", inode, "2")], ())
    assert listed(same.models) == {"first": "/m/second.gguf"}


def test_equal_samples_go_before_what_was_never_sampled():
    names = [("a", "1"), ("b", None), ("c", "3")]
    known = after([facts_at(f"/m/{name}.gguf", fingerprint="f", sample=sample) for name, sample in names])
    moved = [facts_at(f"/n/{number}.gguf", fingerprint="f", sample=number) for number in "123"]
    assert listed(merge(known, moved, ()).models) == {"a": "/n/1.gguf", "b": "/n/2.gguf", "c": "/n/3.gguf"}


def test_a_sample_that_is_known_only_now_is_kept_and_no_news():
    facts = facts_at("/m/a.gguf", fingerprint="f")
    merged = merge(after([facts]), [replace(facts, sample="s")], ())
    assert (merged.is_news, merged.has_learned) == (False, True)
    assert merged.models["a"].facts.sample == "s"
    assert not merge(merged.models, [replace(facts, sample="s")], ()).has_learned


def test_a_file_that_is_put_aside_for_another_keeps_its_id():
    known = chosen_for(after([facts_at("/m/a.gguf", inode=5, fingerprint="f")]), "a")
    merged = merge(known, [facts_at("/m/a.gguf", inode=6), facts_at("/m/b.gguf", inode=5, fingerprint="f")], ())
    assert listed(merged.models) == {"a": "/m/b.gguf", "a-m": "/m/a.gguf"}
    assert merged.models["a"].choices == CHOSEN


def test_a_copy_that_is_put_aside_does_not_take_the_id_from_the_path():
    known = chosen_for(after([facts_at("/m/a.gguf", inode=5, fingerprint="f")]), "a")
    merged = merge(known, [facts_at("/m/a.gguf", inode=6), facts_at("/m/b.gguf", inode=7, fingerprint="f")], ())
    assert listed(merged.models) == {"a": "/m/a.gguf", "b": "/m/b.gguf"}
    assert merged.models["a"].choices == CHOSEN


def test_a_file_that_moves_to_the_path_of_one_that_went_keeps_its_id():
    known = chosen_for(after([facts_at("/m/big.gguf"), facts_at("/m/other.gguf", inode=5, fingerprint="f")]), "big")
    known = merge(known, [facts_at("/m/other.gguf", inode=5, fingerprint="f")], ()).models
    moved = facts_at("/m/big.gguf", inode=5, fingerprint="f")
    merged = merge(known, [moved], ("other",))
    assert listed(merged.models) == {"other": "/m/big.gguf"}
    assert (merged.added, merged.changed, merged.removed) == ((), ("other",), ())
    assert not merge(merged.models, [moved], ()).is_news

    replaced = merge(merged.models, [facts_at("/m/big.gguf", inode=8)], ())
    assert listed(replaced.models) == {"other": "/m/big.gguf"}, "the path is that of the model that is there"

    back = merge(merged.models, [moved, facts_at("/m/back.gguf", inode=9, fingerprint="fp-/m/big.gguf")], ())
    assert listed(back.models) == {"other": "/m/big.gguf", "big": "/m/back.gguf"}
    assert back.models["big"].choices == CHOSEN


def test_of_the_models_that_went_from_one_path_the_last_comes_back():
    first, second = facts_at("/m/x.gguf", inode=1, fingerprint="1"), facts_at("/m/y.gguf", inode=2, fingerprint="2")
    known = after([first, second], [second], [replace(second, file_path="/m/x.gguf")], [])
    assert listed(merge(known, [facts_at("/m/x.gguf", inode=3, fingerprint="3")], ()).models) == {"y": "/m/x.gguf"}
    assert listed(merge(known, [replace(first, file_path="/m/x.gguf")], ()).models) == {"x": "/m/x.gguf"}


def test_files_that_change_places_between_two_looks_keep_their_ids():
    old, new = facts_at("/m/model.gguf", inode=1, fingerprint="1"), facts_at("/m/new.gguf", inode=2, fingerprint="2")
    known = chosen_for(after([old, new]), "model")
    rotated = [replace(old, file_path="/m/old.gguf"), replace(new, file_path="/m/model.gguf")]
    assert listed(merge(known, rotated, ()).models) == {"model": "/m/old.gguf", "new": "/m/model.gguf"}
    swapped = [replace(old, file_path="/m/new.gguf"), replace(new, file_path="/m/model.gguf")]
    assert listed(merge(known, swapped, ()).models) == {"model": "/m/new.gguf", "new": "/m/model.gguf"}


def test_copies_stay_at_their_paths_even_where_disks_change_their_numbers():
    identity = FileIdentity(1, 12, 1000, 1)
    one, other = (facts_at(f"/{disk}/x.gguf", fingerprint="f", identity=identity) for disk in "ab")
    other = replace(other, identity=replace(identity, device=2))
    known = chosen_for(after([one, other]), "x")
    renumbered = [replace(one, identity=other.identity), replace(other, identity=one.identity)]
    assert listed(merge(known, renumbered, ()).models) == {"x": "/a/x.gguf", "x-b": "/b/x.gguf"}


def test_hard_links_that_are_both_listed_keep_their_ids():
    links = [facts_at(f"/m/{name}.gguf", inode=5, fingerprint="f") for name in "ab"]
    known = after(links)
    assert not merge(known, links[::-1], ()).is_news
    assert listed(merge(known, [links[1]], ()).models) == {"b": "/m/b.gguf"}


@pytest.mark.parametrize("how", ["renamed", "copied to another disk"])
def test_equal_files_that_move_together_keep_both_ids(how):
    def at(folder: str, inodes: tuple[int, int]) -> list[ModelFacts]:
        return [
            facts_at(f"/{folder}/{name}.gguf", inode=inode, fingerprint="f")
            for name, inode in zip("ab", inodes, strict=True)
        ]

    known = after(at("m", (5, 6)))
    moved = merge(known, at("n", (5, 6) if how == "renamed" else (7, 8)), ())
    assert listed(moved.models) == {"a": "/n/a.gguf", "b": "/n/b.gguf"}


def test_one_model_moves_to_one_place_only():
    known = chosen_for(after([facts_at("/m/a.gguf", inode=5, fingerprint="f")]), "a")
    merged = merge(known, [facts_at(f"/n/{name}.gguf", inode=0, fingerprint="f") for name in "xyz"], ())
    assert [model.choices for model in merged.models.values()].count(CHOSEN) == 1
    assert len(listed(merged.models)) == 3


def test_a_file_that_got_the_inode_of_one_that_went_is_another_model():
    known = chosen_for(after([facts_at("/m/a.gguf", inode=5, fingerprint="f")]), "a")
    merged = merge(known, [facts_at("/m/b.gguf", inode=5, fingerprint="g")], ())
    assert listed(merged.models) == {"b": "/m/b.gguf"}
    assert merged.models["b"].choices == Choices()


def headerless_at(path: str, *, size: int = 1000, mtime_ns: int = 1) -> ModelFacts:
    identity = FileIdentity(1, 5, size, mtime_ns)
    facts = facts_at(path, size=size, status=ModelStatus.INCOMPLETE, identity=identity)
    return replace(facts, fingerprint=None)


def test_an_empty_file_is_not_told_by_its_inode():
    known = after([headerless_at("/m/alpha.gguf", size=0)], [])
    assert listed(merge(known, [headerless_at("/m/beta.gguf", size=0)], ()).models) == {"beta": "/m/beta.gguf"}


def test_a_file_without_a_header_is_told_by_its_inode_while_nobody_writes_to_it():
    known = after([headerless_at("/m/alpha.gguf")], [])
    later = headerless_at("/m/beta.gguf", mtime_ns=2)
    assert listed(merge(known, [later], ()).models) == {"beta": "/m/beta.gguf"}
    assert listed(merge(known, [headerless_at("/m/beta.gguf")], ()).models) == {"alpha": "/m/beta.gguf"}


def test_a_file_whose_header_became_readable_as_it_was_renamed_keeps_its_id():
    known = after([headerless_at("/m/part.gguf")])
    whole = facts_at("/m/whole.gguf", inode=5, fingerprint="f")
    assert listed(merge(known, [whole], ()).models) == {"part": "/m/whole.gguf"}


def test_a_moved_file_goes_before_a_copy_of_it():
    known = chosen_for(after([facts_at("/m/z.gguf", inode=5, fingerprint="f")]), "z")
    found = [facts_at("/n/a.gguf", inode=6, fingerprint="f"), facts_at("/n/b.gguf", inode=5, fingerprint="f")]
    assert listed(merge(known, found, ()).models) == {"z": "/n/b.gguf", "a": "/n/a.gguf"}


def test_a_damaged_file_is_not_told_by_its_header():
    broken = facts_at("/m/a.gguf", inode=5, fingerprint="f", status=ModelStatus.INCOMPLETE)
    merged = merge(after([broken]), [facts_at("/m/b.gguf", inode=6, fingerprint="f")], ())
    assert listed(merged.models) == {"b": "/m/b.gguf"}


def test_files_moved_away_from_one_place_again_and_again_keep_their_ids():
    known: dict[str, Model] = {}
    for number in range(8):
        arrived = facts_at("/m/new/x.gguf", inode=100 + number, fingerprint=f"f{number}")
        moved = [facts_at(f"/m/x{n}.gguf", inode=100 + n, fingerprint=f"f{n}") for n in range(number)]
        known = merge(known, [arrived, *moved], ()).models
        moved.append(facts_at(f"/m/x{number}.gguf", inode=100 + number, fingerprint=f"f{number}"))
        known = merge(known, moved, ()).models
    assert sorted(listed(known).values()) == [f"/m/x{number}.gguf" for number in range(8)]


def test_a_model_whose_server_runs_stays_listed_as_missing():
    known = chosen_for(after([facts_at("/m/a.gguf"), facts_at("/m/b.gguf")]), "a")
    gone = merge(known, [], ("a",))
    assert listed(gone.models) == {"a": "/m/a.gguf"}
    assert gone.models["a"].facts.status is ModelStatus.MISSING
    assert "cannot be started again until the file is back" in str(gone.models["a"].facts.problem)
    assert (gone.changed, gone.removed) == (("a",), ("b",))
    assert not merge(gone.models, [], ("a",)).is_news
    back = merge(gone.models, [facts_at("/m/a.gguf")], ("a",))
    assert (back.models["a"].facts.status, back.changed) == (ModelStatus.OK, ("a",))
    stopped = merge(gone.models, [], ())
    assert (listed(stopped.models), stopped.removed) == ({}, ("a",))
    assert stopped.models["a"].choices == CHOSEN


def test_of_the_models_that_went_those_nobody_chose_anything_for_are_forgotten_longest_gone_first(monkeypatch):
    monkeypatch.setattr(merging, "MAX_REMEMBERED", 3)
    known = chosen_for(after([facts_at(f"/m/m{number}.gguf") for number in range(10)]), "m0")
    for number in range(1, 11):
        known = merge(known, [facts_at(f"/m/m{n}.gguf") for n in range(number, 10)], ()).models
    assert set(known) == {"m0", "m7", "m8", "m9"}
    assert known["m0"].choices == CHOSEN


def moved_in_the_folder(models: Path) -> None:
    (models / "x-Q8_0.gguf").rename(models / "renamed.gguf")


def moved_to_another_folder(models: Path) -> None:
    (models / "publisher").mkdir()
    (models / "x-Q8_0.gguf").rename(models / "publisher" / "x-Q8_0.gguf")


def moved_with_its_folder(models: Path) -> None:
    moved_to_another_folder(models)
    (models / "publisher").rename(models / "other")


def copied_and_removed(models: Path) -> None:
    shutil.copyfile(models / "x-Q8_0.gguf", models / "copy.gguf")
    (models / "x-Q8_0.gguf").unlink()


def put_into_a_cache_of_links(models: Path) -> None:
    (models / "blobs").mkdir()
    (models / "x-Q8_0.gguf").rename(models / "blobs" / "0")
    (models / "linked.gguf").symlink_to("blobs/0")


@pytest.mark.parametrize(
    "move",
    [
        moved_in_the_folder,
        moved_to_another_folder,
        moved_with_its_folder,
        copied_and_removed,
        put_into_a_cache_of_links,
    ],
)
def test_a_real_file_keeps_its_id_and_choices_wherever_it_goes(tmp_path: Path, move: Callable[[Path], None]):
    write_file(tmp_path / "x-Q8_0.gguf", model_bytes("llama", texts={"general.name": "Moved"}))
    write_file(tmp_path / "y-Q8_0.gguf", model_bytes("llama", texts={"general.name": "Stays"}))
    scanner = Scanner([tmp_path])
    known = chosen_for(after(list(scanner.scan().models)), "x-q8_0")
    path = listed(known)["x-q8_0"]
    move(tmp_path)
    merged = merge(known, scanner.scan().models, ())
    assert (merged.added, merged.changed, merged.removed) == ((), ("x-q8_0",), ())
    assert merged.models["x-q8_0"].choices == CHOSEN
    assert listed(merged.models)["x-q8_0"] != path


def test_a_real_file_keeps_its_id_at_the_path_of_one_that_went(tmp_path: Path):
    for name in ("big", "other"):
        write_file(tmp_path / f"{name}.gguf", model_bytes("llama", texts={"general.name": name}))
    scanner = Scanner([tmp_path])
    known = chosen_for(after(list(scanner.scan().models)), "big")
    (tmp_path / "big.gguf").unlink()
    known = merge(known, scanner.scan().models, ()).models
    (tmp_path / "other.gguf").rename(tmp_path / "big.gguf")
    merged = merge(known, scanner.scan().models, ("other",))
    assert listed(merged.models) == {"other": str(tmp_path / "big.gguf")}
    assert merged.models["other"].choices == Choices()


def test_real_files_that_change_places_keep_their_ids(tmp_path: Path):
    for name in ("model", "new"):
        write_file(tmp_path / f"{name}.gguf", model_bytes("llama", texts={"general.name": name}))
    scanner = Scanner([tmp_path])
    known = after(list(scanner.scan().models))
    (tmp_path / "model.gguf").rename(tmp_path / "old.gguf")
    (tmp_path / "new.gguf").rename(tmp_path / "model.gguf")
    names = {"model": "old", "new": "model"}
    merged = merge(known, scanner.scan().models, ())
    assert listed(merged.models) == {model_id: str(tmp_path / f"{name}.gguf") for model_id, name in names.items()}


@pytest.mark.parametrize("content", [b"", b"no header " * 100], ids=["empty", "headerless"])
def test_a_real_file_without_a_header_is_no_other_that_had_its_inode(tmp_path: Path, content: bytes):
    scanner = Scanner([tmp_path])
    known: dict[str, Model] = {}
    for name in ("alpha", "beta", "gamma"):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        known = merge(known, scanner.scan().models, ()).models
        assert listed(known) == {name: str(path)}
        path.unlink()
        known = merge(known, scanner.scan().models, ()).models


def test_a_real_split_set_that_is_moved_and_renamed_keeps_its_id_and_choices(tmp_path: Path):
    parts = write_split(tmp_path, "Qwen3-235B-Q4_K_M", 3)
    known = chosen_for(after(list(Scanner([tmp_path]).scan().models)), "qwen3-235b-q4_k_m")
    (tmp_path / "Q4_K_M").mkdir()
    for part in parts:
        part.rename(tmp_path / "Q4_K_M" / part.name.replace("Qwen3", "Renamed"))
    merged = merge(known, Scanner([tmp_path]).scan().models, ())
    assert (merged.added, merged.removed) == ((), ())
    assert merged.models["qwen3-235b-q4_k_m"].choices == CHOSEN


class Disk:
    """Files that come, go, move and change."""

    def __init__(self, random_: random.Random) -> None:
        self.random = random_
        self.files: dict[str, tuple[int, str]] = {}  # path → inode and fingerprint
        self.inodes = 0

    def step(self) -> None:
        free = [f"/{folder}/{name}.gguf" for folder in "mn" for name in ("x", "y", "registry", "x-00001-of-00002", "Ü")]
        path = self.random.choice(free)
        action = self.random.choice(["write", "write", "remove", "move"])
        if action == "write":
            self.inodes += 1
            self.files[path] = (self.inodes, self.random.choice(["f1", "f2", f"u{self.inodes}"]))
        elif action == "remove":
            self.files.pop(path, None)
        elif self.files:
            source = self.random.choice(sorted(self.files))
            self.files[path] = self.files.pop(source)

    def found(self) -> list[ModelFacts]:
        found = [facts_at(path, inode=inode, fingerprint=print_) for path, (inode, print_) in self.files.items()]
        self.random.shuffle(found)
        return found


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_nothing_is_lost_and_no_id_doubled_whatever_happens_on_disk(seed):
    random_ = random.Random(seed)
    disk = Disk(random_)
    known: dict[str, Model] = {}
    choices: dict[str, Choices] = {}
    for _ in range(random_.randrange(1, 10)):
        for _ in range(random_.randrange(4)):
            disk.step()
        running = tuple(random_.sample(sorted(known), min(len(known), 2)))
        found = disk.found()
        merged = merge(known, found, running)
        models = merged.models

        assert all(model.model_id == model_id for model_id, model in models.items())
        assert models.keys() >= known.keys()
        assert all(models[model_id].choices == chosen for model_id, chosen in choices.items())
        present = {model_id: model for model_id, model in models.items() if model.present}
        of_files = [model.facts for model in present.values() if model.facts.status is not ModelStatus.MISSING]
        assert sorted(of_files, key=lambda facts: facts.file_path) == sorted(found, key=lambda facts: facts.file_path)
        missing = {model_id for model_id, model in present.items() if model.facts.status is ModelStatus.MISSING}
        assert missing <= set(running)
        lies_at = {inode: path for path, (inode, _) in disk.files.items()}
        gone: dict[str, set[str]] = {}
        went_on: list[tuple[str, str]] = []
        for model_id, model in known.items():
            identity = model.facts.identity
            assert identity is not None or not model.present
            path = lies_at.pop(identity.inode, None) if identity else None
            if path is not None and models[model_id].present:
                assert models[model_id].facts.file_path == path, "a file is told by itself first"
            elif path is not None:
                went_on.append((model_id, path))
            else:
                gone.setdefault(model.facts.file_path, set()).add(model_id)
        at_path = {
            model.facts.file_path: model_id
            for model_id, model in models.items()
            if model_id in present.keys() - missing
        }
        its_content = {facts.file_path: facts.fingerprint for facts in found}
        may_go_on = {
            model_id: known[model_id].facts.fingerprint
            for model_id in set().union(*gone.values())
            if known[model_id].content is not None
        }
        for model_id, path in went_on:
            assert known[model_id].choices == Choices()
            assert model_id not in running
            assert may_go_on[at_path[path]] == its_content[path], "it is one that went, with this content"
        for path in lies_at.values():
            lost = gone.get(path, set())
            if lost and may_go_on.get(at_path[path]) == its_content[path] and at_path[path] not in lost:
                assert any(known[model_id].choices == Choices() for model_id in lost)
            elif lost:
                assert at_path[path] in lost, "what is new at a path is what lay there before"
                assert known[at_path[path]].present or not any(known[model_id].present for model_id in lost)

        before_ids = {model_id for model_id, model in known.items() if model.present}
        assert set(merged.added) == present.keys() - before_ids
        assert set(merged.removed) == before_ids - present.keys()
        assert set(merged.changed) == {
            model_id for model_id in before_ids & present.keys() if models[model_id].facts != known[model_id].facts
        }
        assert not merge(models, found, running).is_news

        known = models
        for model_id in present:
            if random_.random() < 0.2:
                choices[model_id] = Choices(port=random_.randrange(8080, 9000))
                known = chosen_for(known, model_id, choices[model_id])
