"""What was measured is kept, bounded, and counts more than what was estimated."""

import json
import logging
from pathlib import Path

import pytest

from magi_agent.memory.measured import MOST_KEPT, MeasuredStore, Measurement, with_measured
from magi_agent.memory.need import Basis, MemoryNeed, Split
from magi_agent.memory.reported import Reported

MIB = 1 << 20
NEED = MemoryNeed(weights=Split(host=100 * MIB), compute=Split(host=20 * MIB), output=Split(host=MIB), mapped=90 * MIB)


def test_a_measurement_is_there_for_the_next_agent(tmp_path):
    reported = Reported(weights=Split(1, 2), kv_cache=Split(3, 4), compute=Split(5, 6), mapped=7)
    seen = Measurement(anonymous_at_ready=10, anonymous_later=20, reported=reported)
    MeasuredStore(tmp_path / "memory.json").put("key", seen)
    again = MeasuredStore(tmp_path / "memory.json")
    assert again.get("key") == seen
    assert again.get("other") is None


def test_what_an_earlier_version_kept_of_gpus_is_passed_over(tmp_path):
    entry = {"anonymous_at_ready": 10, "anonymous_later": 20, "gpu": 30, "reported": None}
    (tmp_path / "memory.json").write_text(json.dumps({"version": 1, "measured": {"key": entry}}))
    store = MeasuredStore(tmp_path / "memory.json")
    assert store.get("key") == Measurement(anonymous_at_ready=10, anonymous_later=20)
    store.put("other", Measurement())
    assert "gpu" not in json.loads((tmp_path / "memory.json").read_bytes())["measured"]["key"]


def test_the_oldest_give_way(tmp_path):
    store = MeasuredStore(tmp_path / "memory.json")
    for number in range(MOST_KEPT + 1):
        store.put(f"{number}", Measurement(anonymous_at_ready=number))
    assert len(json.loads((tmp_path / "memory.json").read_bytes())["measured"]) == MOST_KEPT
    # One that is seen again is not old.
    store.put("1", Measurement(anonymous_at_ready=1, anonymous_later=2))
    store.put("new", Measurement())
    again = MeasuredStore(tmp_path / "memory.json")
    assert again.get("0") is None
    assert again.get("2") is None
    assert again.get("1") is not None
    assert again.get("3") is not None


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'{"version": 2, "measured": {}}', b'{"version": 1, "measured": []}',
        b'{"version": 1, "measured": {"key": {}}}', b'{"version": 1, "measured": {"key": 5}}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_made_anew(tmp_path, content):
    path = tmp_path / "memory.json"
    path.write_bytes(content)
    store = MeasuredStore(path)
    assert store.get("key") is None
    store.put("key", Measurement(anonymous_at_ready=1))
    assert MeasuredStore(path).get("key") == Measurement(anonymous_at_ready=1)


def test_what_a_killed_agent_left_half_written_is_cleared_away(tmp_path):
    (tmp_path / ".memory.json.x1y2.tmp").write_bytes(b"half")
    MeasuredStore(tmp_path / "memory.json").load()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_said(tmp_path, caplog):
    (tmp_path / "file").touch()
    store = MeasuredStore(Path(tmp_path / "file" / "memory.json"))
    with caplog.at_level(logging.WARNING):
        store.put("key", Measurement(anonymous_at_ready=1))
    assert "cannot be written" in caplog.text
    assert store.get("key") == Measurement(anonymous_at_ready=1)


def test_nothing_measured_leaves_an_estimate():
    assert with_measured(NEED, None) is NEED
    assert with_measured(NEED, Measurement()) == NEED


def test_what_was_reserved_and_not_touched_yet_is_added():
    need = with_measured(NEED, Measurement(anonymous_at_ready=50 * MIB))
    assert need.basis is Basis.MEASURED
    assert need.anonymous_bytes == 71 * MIB
    assert need.host_bytes == 161 * MIB
    assert need.weights == NEED.weights


def test_what_it_came_to_counts_where_it_is_more():
    need = with_measured(NEED, Measurement(anonymous_at_ready=50 * MIB, anonymous_later=80 * MIB))
    assert need.anonymous_bytes == 80 * MIB
    assert (need.basis, need.gpu_basis) == (Basis.MEASURED, Basis.ESTIMATED)


def test_of_a_server_that_was_adopted_what_it_came_to_is_all_there_is():
    need = with_measured(NEED, Measurement(anonymous_later=80 * MIB))
    assert need.basis is Basis.MEASURED
    assert need.anonymous_bytes == 80 * MIB


def test_a_report_alone_refines():
    reported = Reported(weights=Split(host=200 * MIB), compute=Split(host=MIB), mapped=200 * MIB)
    need = with_measured(NEED, Measurement(reported=reported))
    assert need.basis is Basis.REPORTED
    assert need.host_bytes == 201 * MIB
