"""Whom a process is taken for: real processes of users that only they know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from magi_agent.host.accounts import Account, account_named, account_of_process, group_id, own_account
from tests.host.other_users import READERS, SERVICE, python_beside_other_users

NAMES = """
import json, sys
from magi_agent.host.accounts import account_named, group_id, group_name
account = account_named("magi-agent")
crew = group_name(group_id("crew"))
print(json.dumps([account.name, account.uid, sorted(account.gids), group_id("magi-llama"), crew]))
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def test_a_user_is_in_the_groups_of_the_database(tmp_path: Path) -> None:
    told = json.loads(python_beside_other_users(tmp_path, NAMES))

    assert told == ["user magi-agent", SERVICE, [SERVICE, READERS], READERS, "crew"]


def test_a_process_is_in_the_groups_that_it_began_with() -> None:
    program = (
        "import os, sys; os.setgroups([7, 9]); os.setgid(5); os.setuid(61401); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()

        assert account_of_process(process.pid) == Account("uid 61401", 61401, frozenset({5, 7, 9}))
        process.kill()

    assert account_of_process(process.pid) is None


def test_nobody_by_such_a_name() -> None:
    assert account_named("nobody-has-this-name") is None
    assert account_named("nul\0") is None
    assert group_id("nobody-has-this-name") is None
    assert own_account().uid == os.geteuid()
