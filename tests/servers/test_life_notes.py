"""What is written down of a server's life is written once."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from magi_agent.servers.desired import Wish
from magi_agent.servers.life_notes import note_start, note_stop
from magi_agent.servers.record import ServerRecord
from magi_agent.systemd.status import unit_status

UNIT = replace(unit_status("magi-llama-toy.service", {}, {}), invocation_id="a" * 32)
WISH = Wish(run=False, by="alice", at=datetime(2026, 1, 1, tzinfo=UTC))


def test_a_start_and_a_stop_of_one_run_are_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "magi_agent.history")
    record = ServerRecord()
    for unit in (UNIT, UNIT, replace(UNIT, invocation_id="b" * 32)):
        note_start("toy", record, replace(WISH, run=True), unit)
        note_stop("toy", record, WISH, unit, is_wanted=False)
        # The signals of what was stopped came late, and it was stopped once more.
        note_stop("toy", record, WISH, unit, is_wanted=False)

    told = [(record.__dict__["magi_event"], record.__dict__["magi_invocation"][0]) for record in caplog.records]
    assert told == [("started", "a"), ("stopped", "a"), ("started", "b"), ("stopped", "b")]


def test_of_what_run_nobody_knows_each_stop_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "magi_agent.history")
    record = ServerRecord()
    for _ in range(2):
        note_stop("toy", record, WISH, replace(UNIT, invocation_id=""), is_wanted=False)

    assert len(caplog.records) == 2
