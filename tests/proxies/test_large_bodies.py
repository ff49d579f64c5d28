"""Bodies that nobody wants are refused while they are on their way, and leave nothing behind in the agent's memory."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.agent_process import AgentProcess, wait_until
from tests.proxies.conftest import MODEL, Bearer
from tests.proxies.proxy_process import Proxy
from tests.proxies.shipped import NAME

MIB = 1 << 20
HUGE = 100 * MIB
TIER = f"/magi/api/models/{MODEL}/tier"
IMPORT = "/magi/api/import"
WELL_BEFORE = 40 * MIB
"""Far less than the body, and more than what is under way in the buffers of two connections."""
BARELY_GROWN = 8 * MIB
"""Far less than the body, and more than what the buffers of a connection take."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to a body that was sent for as long as there was none."""

    status: int
    body: dict[str, object]
    """Empty where the answer broke off after its head."""
    sent: int
    """Bytes of the body that had been sent when it came."""


def send(proxy: Proxy, path: str, size: int, headers: dict[str, str], *, method: str = "PUT") -> Refusal:
    """Send a body with curl, which stops sending when it is answered."""
    body, answer = proxy.folder / "body", proxy.folder / "answer.json"
    with body.open("wb") as file:
        file.truncate(size)
    given = [word for name, value in headers.items() for word in ("--header", f"{name}: {value}")]
    run = subprocess.run(
        ["curl", "--silent", "--show-error", "--max-time", "30", "--cacert", proxy.here.certificate,
         "--connect-to", f"{NAME}:443:127.0.0.1:{proxy.here.port}", "--request", method, "--upload-file", body,
         "--header", "Content-Type: application/json", *given, "--output", answer,
         "--write-out", "%{http_code} %{size_upload}", f"https://{NAME}{path}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    status, _, sent = run.stdout.partition(" ")
    assert status != "000", run.stderr
    # curl's 18: the answer broke off.
    assert run.returncode == 0 or (run.returncode, proxy.kind) == (18, "caddy"), run.stderr
    return Refusal(int(status), json.loads(answer.read_bytes()) if run.returncode == 0 else {}, int(sent))


def memory(agent: AgentProcess, figure: str = "VmRSS") -> int:
    """A figure of the agent's memory, bytes; ``VmHWM`` is the most it ever had since ``forget_the_most``."""
    assert agent.process is not None
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    [kibibytes] = re.findall(rf"^{figure}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes) * 1024


def forget_the_most(agent: AgentProcess) -> None:
    assert agent.process is not None
    # proc(5): the peak is reset to what is resident now.
    Path(f"/proc/{agent.process.pid}/clear_refs").write_text("5")


@pytest.fixture
def stays_small(agent: AgentProcess) -> Iterator[None]:
    """Have the test fail when the agent needs much more memory in its course, be it for a moment."""
    agent.ask("PUT", "/api/models/prx-none/tier", {"tier": "fast"})
    forget_the_most(agent)
    before = memory(agent, "VmHWM")
    yield
    assert memory(agent, "VmHWM") - before < BARELY_GROWN


ASKED: dict[str, str] = {}
"""Has curl ask whether the body is wanted, and wait for a second whether it is."""
AT_ONCE = {"Expect": ""}
"""Has curl send the body with the request."""
CHUNKED = {"Expect": "", "Transfer-Encoding": "chunked"}
"""Has curl not say how large the body is."""


@pytest.mark.parametrize(
    ("method", "path", "how"),
    [
        ("PUT", TIER, ASKED),
        ("PUT", TIER, AT_ONCE),
        ("PUT", TIER, CHUNKED),
        ("POST", IMPORT, ASKED),
        ("POST", IMPORT, AT_ONCE),
    ],
)
def test_a_huge_body_is_refused_long_before_it_is_there(
    proxy: Proxy, bearer: Bearer, stays_small: None, method: str, path: str, how: dict[str, str]
) -> None:
    refused = send(proxy, path, HUGE, {**how, **bearer()}, method=method)

    assert refused.status == 413
    assert refused.sent < WELL_BEFORE
    if refused.body:
        assert (refused.body["error"], set(refused.body)) == ("PayloadTooLarge", {"error", "message", "details"})


@pytest.mark.parametrize("how", [ASKED, AT_ONCE, CHUNKED], ids=["asked", "at-once", "chunked"])
def test_a_huge_body_of_nobody_is_refused_as_early(proxy: Proxy, stays_small: None, how: dict[str, str]) -> None:
    refused = send(proxy, TIER, HUGE, how)

    assert refused.status == (401 if how is CHUNKED else 413)
    assert refused.sent < WELL_BEFORE


def test_the_agent_refuses_by_itself_what_the_proxy_lets_through(
    proxy: Proxy, bearer: Bearer, stays_small: None
) -> None:
    refused = send(proxy, TIER, 60 * MIB, {**AT_ONCE, **bearer()})

    assert refused.status == 413
    assert refused.sent < WELL_BEFORE
    if refused.body:
        assert refused.body["details"] == {"maxBytes": MIB}


def test_a_body_of_untold_size_ends_at_the_most_that_its_path_takes(
    proxy: Proxy, agent: AgentProcess, bearer: Bearer
) -> None:
    before = memory(agent)

    refused = send(proxy, IMPORT, HUGE, {**CHUNKED, **bearer()}, method="POST")

    assert refused.status == 413
    assert refused.sent < 80 * MIB
    wait_until(lambda: memory(agent) - before < BARELY_GROWN, "the agent gives the memory back", 10)


def test_a_large_body_that_breaks_off_leaves_nothing_behind(proxy: Proxy, agent: AgentProcess, bearer: Bearer) -> None:
    before = memory(agent)
    connection = proxy.connect()
    connection.putrequest("POST", IMPORT, skip_host=True)
    lines = {"Host": NAME, "Content-Type": "application/json", "Content-Length": str(60 * MIB), **bearer()}
    for name, value in lines.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(b" " * 30 * MIB)
    wait_until(lambda: memory(agent) - before > 20 * MIB, "half of the body is there")

    connection.close()

    wait_until(lambda: memory(agent) - before < BARELY_GROWN, "the agent gives the memory back", 10)
    assert proxy.ask("GET", "/magi/health/live").status == 200
