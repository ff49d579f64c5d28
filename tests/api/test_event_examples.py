"""The examples for browsers in docs/api.md, run by Node's EventSource and fetch, across restarts of a real agent."""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import locations
import pytest

from magi_agent.tokens import Token, digest_of, line_of, new_secret
from magi_agent.vocabulary import TokenScope
from tests.agent_process import AgentProcess, ended
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

MODEL = "example-toy"
TOKEN = new_secret()
PROGRAM = """
import * as examples from "./examples.mjs";
const say = (...words) => console.log(JSON.stringify(words));
const show = (event) => say("show", event.type, event.modelId ?? null);
const reload = () => say("reload");
const [base, token] = process.argv.slice(2);
if (token) examples.listenWithToken(base, token, show, reload, new AbortController().signal).then(() => say("over"));
else examples.listen(base, show, reload);
"""


def has_event_source() -> bool:
    node = shutil.which("node")
    if node is None:
        return False
    asked = subprocess.run(
        [node, "--experimental-eventsource", "-e", "new EventSource('http://127.0.0.1:9/').close()"],
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    return asked.returncode == 0


pytestmark = pytest.mark.skipif(not has_event_source(), reason="there is no node here that has an EventSource")


@pytest.fixture
def agent(
    tmp_path: Path, toy_model: MakeToyModel, llama_server: Path, unused_ports: PortRanges, systemd_user: SystemdUser
) -> Iterator[AgentProcess]:
    toy_model(tmp_path / "models" / f"{MODEL}.gguf")
    agent = AgentProcess(tmp_path, tmp_path / "models", unused_ports(2), llama_server)
    agent.settings["MAGI_TCP"] = f"127.0.0.1:{unused_ports()[0]}"
    (tmp_path / "tokens").write_text(f"{line_of(Token('page', TokenScope.READ, digest_of(TOKEN)))}\n")
    with ended(agent, f"magi-llama-{MODEL}.service"):
        agent.start()
        agent.wait_settled()
        yield agent


@contextmanager
def page(agent: AgentProcess, token: str = "") -> Iterator[queue.Queue[list[str]]]:
    """Run the example, and give what it says."""
    examples = re.findall(
        r"^```js\n(.*?)^```", (locations.CHECKOUT / "docs" / "api.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (agent.folder / "examples.mjs").write_text("\n".join(examples))
    (agent.folder / "page.mjs").write_text(PROGRAM)
    words: queue.Queue[list[str]] = queue.Queue()
    command = ["node", "--experimental-eventsource", "page.mjs", f"http://{agent.settings['MAGI_TCP']}", token]
    with subprocess.Popen(command, cwd=agent.folder, stdout=subprocess.PIPE, text=True) as process:

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                words.put(json.loads(line))

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            yield words
        finally:
            process.kill()
            listener.join()


class Unavailable(BaseHTTPRequestHandler):
    """What a proxy says while the agent is away."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.server.answered.set()  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass


def be_unavailable(port: int) -> None:
    """Answer in the place of the agent until somebody was told that it is away."""
    with HTTPServer(("127.0.0.1", port), Unavailable) as server:
        answered = server.answered = threading.Event()  # type: ignore[attr-defined]
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            assert answered.wait(40), "the page does not ask"
        finally:
            server.shutdown()
            serving.join()


@pytest.mark.parametrize("meanwhile", ["nobody", "a proxy"])
@pytest.mark.parametrize("token", ["", TOKEN], ids=["no token", "a token"])
def test_a_page_keeps_up(agent: AgentProcess, token: str, meanwhile: str) -> None:
    with page(agent, token) as said:
        assert said.get(timeout=40) == ["reload"], "it listens, and asks for what it shows"
        agent.must("PUT", f"/api/models/{MODEL}/tier", {"tier": "fast"})
        assert said.get(timeout=40) == ["show", "choicesChanged", MODEL]
        agent.stop()
        if meanwhile == "a proxy":
            be_unavailable(int(agent.settings["MAGI_TCP"].rpartition(":")[2]))
        agent.start()
        assert said.get(timeout=40) == ["reload"], "something may be missing"
        agent.must("PUT", f"/api/models/{MODEL}/tier", {"tier": "balanced"})
        event = said.get(timeout=40)
        while event == ["reload"] or event[1] != "choicesChanged":
            event = said.get(timeout=40)
        assert event == ["show", "choicesChanged", MODEL]


def test_a_page_with_a_token_that_does_not_hold_gives_up(agent: AgentProcess) -> None:
    with page(agent, new_secret()) as said:
        assert said.get(timeout=40) == ["over"]
