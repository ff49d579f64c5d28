"""The files that keys are in: who may read them, and how long they are there."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from magi_agent.servers.reach import short_name
from magi_agent.servers.server_keys import drop_keys, new_key, read_key

LONGEST_ID = "m" * 200


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_key_is_256_random_bits_in_a_file_of_ones_own(tmp_path: Path, umask: int) -> None:
    path = new_key(tmp_path, "one")

    assert re.fullmatch(r"[0-9a-f]{64}", read_key(path))
    assert (mode(path.parent), mode(path)) == (0o700, 0o400)
    assert read_key(new_key(tmp_path, "one")) != read_key(path)


def test_a_folder_that_was_made_for_a_group_gives_its_keys_to_the_group(tmp_path: Path, umask: int) -> None:
    (tmp_path / "magi-llama-keys").mkdir()
    (tmp_path / "magi-llama-keys").chmod(0o755)

    assert mode(new_key(tmp_path, "one")) == 0o440


def test_keys_of_one_model_are_dropped_and_no_other_ones(tmp_path: Path) -> None:
    drop_keys(tmp_path, "one")  # where there never was any
    old, kept = new_key(tmp_path, "one"), new_key(tmp_path, "one")
    others = {new_key(tmp_path, name) for name in ("one.two", "on", LONGEST_ID, LONGEST_ID[:-1])}

    drop_keys(tmp_path, "one", keep=kept)
    assert set(kept.parent.iterdir()) == {kept} | others
    assert old not in others
    drop_keys(tmp_path, "one")
    assert set(kept.parent.iterdir()) == others
    drop_keys(tmp_path, LONGEST_ID)
    assert len(set(kept.parent.iterdir())) == len(others) - 1


def test_a_file_in_the_place_of_a_key_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    path = new_key(tmp_path, "one")
    path.unlink()
    target = tmp_path / "target"
    target.touch()
    path.symlink_to(target)

    with pytest.raises(FileExistsError):
        new_key(tmp_path, "one")
    assert target.read_text() == ""


def test_a_model_that_is_called_like_anothers_key_keeps_its_own(tmp_path: Path) -> None:
    one = "a"
    other = short_name(one)
    keys = {model_id: new_key(tmp_path, model_id) for model_id in (one, other)}
    drop_keys(tmp_path, one)
    assert {model_id: key.exists() for model_id, key in keys.items()} == {one: False, other: True}
