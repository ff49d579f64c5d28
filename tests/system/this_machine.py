"""The machine that the tests run on, for autopkgtest: the whole of it is the thing under test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

import pytest

_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "DEBIAN_FRONTEND": "noninteractive",
    "SYSTEMD_PAGER": "",
}
_PASSED_ON = ("http_proxy", "https_proxy", "no_proxy")


def _environment() -> dict[str, str]:
    return _ENVIRONMENT | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


class ThisMachine:
    """See machine.Machine. It does not reboot: that would take the tests along."""

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env=_environment(), text=True, errors="replace", bufsize=1, start_new_session=True, cwd="/",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def entered(
        self, command: Sequence[str], *, stdin: str = "", within: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=_environment(), text=True, errors="replace", input=stdin, timeout=within,
            capture_output=True, start_new_session=True, check=check, cwd="/",
        )  # fmt: skip

    def reboot(self) -> None:
        pytest.skip("the machine that the tests run on does not reboot under them")
