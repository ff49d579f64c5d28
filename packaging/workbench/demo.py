"""The demonstration: an agent on a real systemd manager finds two models, starts one and has it answer a question.

Stays up until Ctrl-C and leaves nothing behind. With DEMO_ONCE=1 it asks its question, runs `magictl check`, prints
both and ends: status 0 when all went well. Where PID 1 is systemd the machine's own manager is used (root: the system
manager; somebody else: their user manager), elsewhere a private one (see private_systemd.py).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import private_systemd
from demo_agent import DemoAgent, DemoError
from locations import SMOLLM2
from surroundings import inside_private_systemd

QUESTION = "Name three colors."
_SCAN_SECONDS = 30.0
_READY_SECONDS = 120.0
_ANSWER_SECONDS = 60.0
_POLL_SECONDS = 0.1


def say(text: str = "") -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def find_models(agent: DemoAgent) -> dict[str, Any]:
    """Return the registry's models once both sample models are in it. Raises DemoError when they never come."""
    deadline = time.monotonic() + _SCAN_SECONDS
    while True:
        models: dict[str, Any] = agent.ask("GET", "/api/models/registry")["models"]
        if len(models) >= 2:
            return models
        if time.monotonic() > deadline:
            raise DemoError(f"only {len(models)} of 2 models were found within {_SCAN_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)


def print_models(models: dict[str, Any]) -> None:
    """Print what discovery found, one model a line."""
    wide = max(len(identifier) for identifier in models)
    for identifier, model in models.items():
        size = f"{model['sizeBytes'] / 1e6:.0f} MB"
        template = "chat template" if model["chatTemplate"] else "no chat template"
        say(f"  {identifier:{wide}}  {model['quantization']:8} {size:>7}  {model['effectiveTier']:8}  {template}")


def start_model(agent: DemoAgent, model_id: str) -> dict[str, Any]:
    """Enable one model, have that applied, follow its server until it is ready and return the server."""
    began = time.monotonic()
    agent.ask("PUT", f"/api/models/{model_id}/enabled?apply=true", {"enabled": True})
    last = ""
    while True:
        servers = agent.ask("GET", "/api/models/servers")["servers"]
        server: dict[str, Any] = next((server for server in servers if server["modelId"] == model_id), {})
        state = str(server.get("state", "not listed"))
        passed = time.monotonic() - began
        if state != last:
            say(f"  {passed:5.1f} s  {state}" + (f"  {server['unit']}" if server else ""))
            last = state
        if state == "ready":
            return server
        if state in {"failed", "cooldown", "stuck"} or passed > _READY_SECONDS:
            raise DemoError(f"the server of {model_id} is not ready but {state}: {server.get('failure')}")
        time.sleep(_POLL_SECONDS)


def ask_question(agent: DemoAgent, server: dict[str, Any]) -> None:
    """Ask the llama-server itself, over TCP, by its OpenAI endpoint, and print its answer."""
    url = f"http://127.0.0.1:{server['port']}"
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 48}
    say(f"\nPOST {url}/v1/chat/completions\n  > {QUESTION}")
    answer = agent.ask_url(f"{url}/v1/chat/completions", body, _ANSWER_SECONDS)
    text = str(answer["choices"][0]["message"]["content"]).strip()
    if not text:
        raise DemoError("the model answered with nothing")
    say("\n".join(f"  < {line}" for line in text.splitlines()))


def print_what_next(agent: DemoAgent, server: dict[str, Any]) -> None:
    """Print commands that work as they stand, in another terminal, in the checkout."""
    beside = f"{agent.shell} " if agent.shell else ""
    scope = "" if agent.scope == "system" else " --user"
    unit = server["unit"]
    journal = f"journalctl{'' if agent.shell else scope} -t {unit.removesuffix('.service')} -n 20"
    say(f"""
What to try next, in another terminal (cd {Path.cwd()}):

  curl http://{agent.tcp}/api/models/registry                         # over TCP: reading
  curl --unix-socket {agent.socket} http://magi/api/models/servers    # over the unix socket: everything
  curl --unix-socket {agent.socket} -X POST http://magi/api/models/servers/{server["modelId"]}/restart?wait=60
  xdg-open http://{agent.tcp}/api/docs                                # the API's own page

  export MAGI_SOCKET={agent.socket}
  .venv/bin/magictl status
  .venv/bin/magictl models
  .venv/bin/magictl stop {server["modelId"]}
  .venv/bin/magictl check

  {beside}systemctl{scope} status {unit}
  {beside}systemctl{scope} kill -s KILL {agent.unit}    # the agent dies, the model lives on and is adopted
  {beside}{journal}

Ctrl-C ends it: the model is stopped, nothing stays behind.""")


def demonstrate(agent: DemoAgent, once: bool) -> int:
    """Show the main job; return the exit status."""
    say(f"the agent is up on {agent.tcp} and {agent.socket}, a unit of the {agent.manager}")
    models = find_models(agent)
    say("\nfound in .cache/models:")
    print_models(models)
    model_id = next(name for name, model in models.items() if model["filename"] == SMOLLM2.name)
    say(f"\nPUT /api/models/{model_id}/enabled?apply=true")
    server = start_model(agent, model_id)
    ask_question(agent, server)
    if once:
        say("\nmagictl check")
        return agent.run_magictl("check")
    print_what_next(agent, server)
    while True:
        signal.pause()


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(number)


def main() -> int:
    """Run the demonstration beside the right manager and clean up after it."""
    booted_with_systemd = Path("/run/systemd/system").is_dir()
    if not inside_private_systemd() and not booted_with_systemd:
        return private_systemd.run_or_complain([sys.executable, *sys.argv])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    once = os.environ.get("DEMO_ONCE", "") not in {"", "0"}
    folder = Path(tempfile.mkdtemp(prefix="magi-demo-"))
    agent = DemoAgent(folder)
    try:
        agent.start()
        return demonstrate(agent, once)
    except DemoError as error:
        say(f"\ndemo: {error}")
        say(agent.last_log_lines())
        return 1
    except KeyboardInterrupt:
        say("\nstopping")
        return 1 if once else 0
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        agent.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
