"""LiteLLM's own proxy with what ``magictl export litellm`` prints, before an agent.

LiteLLM is large, and nobody has it by chance: packaging/workbench/test_packages brings it where it is asked to.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import locations
import pytest
import yaml
from toy_projector import write_toy_ear, write_toy_eye

from magi_agent.tokens import Token, digest_of, line_of, new_secret
from magi_agent.vocabulary import TokenScope
from tests.agent_process import AgentProcess, ended, wait_until
from tests.conftest import MakeToyModel, PortRanges, SampleModels, SystemdUser
from tests.gateway.test_forms import recording
from tests.gateway.test_senses import DATA

ONE, OTHER, EMBEDS, RANKS = "lit-one", "lit-other", "lit-embeds", "lit-ranks"
TALKS, SEES, HEARS = "lit-talks", "lit-sees", "lit-gpt-5-hears"
"""The last is called as OpenAI's own are, of which LiteLLM believes to know what they take."""
UNITS_OF_THESE_TESTS = "magi-llama-lit-*.service"
SECRET, KEY = new_secret(), "sk-of-the-tests-0123456789abcdef0123456789abcdef"
BEGINS = 90.0
"""Seconds that LiteLLM may take until it listens."""

pytestmark = pytest.mark.timeout(240)


@dataclass
class LiteLlm:
    """LiteLLM's proxy, and the agent behind it."""

    port: int
    agent: AgentProcess

    def ask(self, path: str, body: object = None) -> tuple[int, dict[str, str], Any]:
        """The status, the headers, and what was said: of a stream its events, the last one aside."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            content = answer.read().decode()
        told = {name.lower(): value for name, value in answer.headers.items()}
        if not told["content-type"].startswith("text/event-stream"):
            return answer.status, told, json.loads(content)
        *events, end = [line.removeprefix("data: ") for line in content.splitlines() if line.startswith("data: ")]
        assert end == "[DONE]"
        return answer.status, told, [json.loads(event) for event in events]

    def must(self, path: str, body: object = None) -> Any:
        status, _, said = self.ask(path, body)
        assert status == 200, said
        return said

    def chat(self, name: str, *parts: object, **more: object) -> tuple[int, dict[str, str], Any]:
        content = [{"type": "text", "text": "hi"}, *parts] if parts else "hi"
        asked = {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}
        return self.ask("/v1/chat/completions", asked)

    def asked_model(self, name: str, *parts: object, **more: object) -> str:
        """The model of the agent's that answered a chat, as the agent said it."""
        status, headers, said = self.chat(name, *parts, **more)
        assert status == 200, said
        return headers["llm_provider-x-magi-model"]

    def state(self, model_id: str) -> str:
        return str(self.agent.must("GET", f"/api/models/{model_id}")["server"]["state"])

    def stop(self, model_id: str) -> None:
        self.agent.must("POST", f"/api/models/servers/{model_id}/stop?wait=60")


def program() -> Path:
    """LiteLLM, if the host or the workbench has it; otherwise the test is skipped."""
    found = shutil.which("litellm", path=f"{os.environ['PATH']}:{locations.CACHE / 'litellm' / 'bin'}")
    if found is None:
        pytest.skip("there is no litellm: MAGI_TEST_LITELLM=1 packaging/workbench/test_packages brings it")
    return Path(found)


def configure(agent: AgentProcess, model_id: str, tier: str, **settings: object) -> None:
    agent.must("PUT", f"/api/models/{model_id}/tier", {"tier": tier})
    agent.must("PUT", f"/api/models/{model_id}/settings", {"startPolicy": "onDemand", **settings})
    agent.must("PUT", f"/api/models/{model_id}/enabled", {"enabled": True})


@pytest.fixture(scope="module")
def agent(
    systemd_user: SystemdUser,
    toy_model: MakeToyModel,
    sample_models: SampleModels,
    unused_ports: PortRanges,
    llama_server: Path,
) -> Iterator[AgentProcess]:
    """Its models are started by whoever asks for one; to do so takes a token."""
    program()
    folder = Path(tempfile.mkdtemp(prefix="magi-litellm-"))
    models = folder / "models"
    for seed, model_id in enumerate((ONE, OTHER, EMBEDS, RANKS, SEES, HEARS), 1):
        toy_model(models / f"{model_id}.gguf", seed=seed)
    shutil.copyfile(sample_models.smollm2, models / f"{TALKS}.gguf")
    write_toy_eye(models / f"mmproj-{SEES}.gguf")
    write_toy_ear(models / f"mmproj-{HEARS}.gguf")
    (folder / "tokens").write_text(line_of(Token("litellm", TokenScope.INFER, digest_of(SECRET))) + "\n")
    (folder / "tokens").chmod(0o600)
    agent = AgentProcess(folder, models, unused_ports(len(list(models.iterdir()))), llama_server)
    agent.settings |= {"MAGI_TCP": f"127.0.0.1:{unused_ports()[0]}", "MAGI_TCP_ACCESS": "none"}
    try:
        with ended(agent, UNITS_OF_THESE_TESTS):
            agent.start()
            wait_until(lambda: len(agent.must("GET", "/api/models/registry")["models"]) == 7, "they are found")
            configure(agent, ONE, "fast")
            configure(agent, OTHER, "fast")
            configure(agent, EMBEDS, "balanced", mode="embedding", pooling="mean")
            configure(agent, RANKS, "balanced", mode="rerank", pooling="rank")
            configure(agent, TALKS, "balanced", ctxSize=2048)
            configure(agent, SEES, "powerful")
            configure(agent, HEARS, "powerful")
            yield agent
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def exported(agent: AgentProcess) -> dict[str, Any]:
    magictl = locations.VENV / "bin" / "magictl"
    base = f"http://{agent.settings['MAGI_TCP']}"
    told = subprocess.run(
        [magictl, "--socket", agent.socket, "export", "litellm", "--api-base", base],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    document = yaml.safe_load(told.stdout)
    assert isinstance(document, dict)
    return document


@pytest.fixture(scope="module")
def litellm(agent: AgentProcess, exported: dict[str, Any], unused_ports: PortRanges) -> Iterator[LiteLlm]:
    """With what was exported; beside it one more host, which is down, and an entry with a token of nobody's."""
    (one,) = (entry for entry in exported["model_list"] if entry["model_name"] == ONE)
    down = {**one, "litellm_params": {**one["litellm_params"], "api_base": f"http://127.0.0.1:{unused_ports()[0]}/v1"}}
    nobodys = {**one, "model_name": "nobodys", "litellm_params": {**one["litellm_params"], "api_key": "magi_nobodys"}}
    alone = {**down, "model_name": "down"}
    document = {
        "model_list": [*exported["model_list"], down, nobodys, alone],
        "router_settings": {"allowed_fails": 0, "cooldown_time": 60, "fallbacks": [{"down": [ONE]}]},
    }
    configuration = agent.folder / "litellm.yaml"
    configuration.write_text(yaml.safe_dump(document))
    made = LiteLlm(unused_ports()[0], agent)
    environment = {
        **os.environ,
        "MAGI_TOKEN": SECRET,
        "LITELLM_MASTER_KEY": KEY,
        # Nothing is asked of the world outside.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
    }
    log = agent.folder / "litellm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program(), "--config", configuration, "--host", "127.0.0.1", "--port", str(made.port)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=agent.folder,
        )  # fmt: skip

    def listens() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            return made.ask("/health/readiness")[0] == 200
        return False

    try:
        wait_until(listens, "LiteLLM listens", BEGINS)
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()


def test_it_lists_what_the_agent_has(litellm: LiteLlm) -> None:
    listed = {model["id"]: model for model in litellm.must("/v1/models")["data"]}

    tiers = {"tier:fast", "tier:balanced", "tier:powerful"}
    assert listed.keys() - {"nobodys", "down"} == {ONE, OTHER, EMBEDS, RANKS, TALKS, SEES, HEARS, *tiers, "auto"}
    infos = {entry["model_name"]: entry["model_info"] for entry in litellm.must("/model/info")["data"]}
    assert {name: infos[name]["mode"] for name in (ONE, EMBEDS, RANKS, "tier:balanced", "auto")} == {
        ONE: "chat",
        EMBEDS: "embedding",
        RANKS: "rerank",
        "tier:balanced": "chat",
        "auto": "chat",
    }
    assert infos[TALKS]["max_input_tokens"] == 2048
    assert [infos[name]["supports_vision"] for name in (ONE, SEES, "tier:powerful", "auto")] == [False, *[True] * 3]
    assert [infos[name]["supports_audio_input"] for name in (ONE, HEARS, "tier:powerful")] == [False, True, True]


def test_it_talks(litellm: LiteLlm) -> None:
    status, headers, said = litellm.chat(TALKS, temperature=0, max_tokens=12)

    assert status == 200
    assert "ello" in said["choices"][0]["message"]["content"]
    assert said["usage"]["completion_tokens"] > 1
    assert headers["llm_provider-x-magi-model"] == TALKS


def test_a_stream_comes_whole_also_where_its_model_has_to_start(litellm: LiteLlm) -> None:
    litellm.stop(TALKS)

    status, _, events = litellm.chat(TALKS, stream=True, max_tokens=6, ignore_eos=True)

    assert status == 200
    pieces = [event["choices"][0]["delta"].get("content") for event in events if event["choices"]]
    assert len([piece for piece in pieces if piece]) > 2
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_tier_of_several_is_shared_and_auto_picks_one(litellm: LiteLlm) -> None:
    for model_id in (ONE, OTHER):
        assert litellm.asked_model(model_id) == model_id

    assert {litellm.asked_model("tier:fast") for _ in range(6)} == {ONE, OTHER}
    assert litellm.asked_model("auto") in (ONE, OTHER)


def test_what_is_for_other_than_chats_is_found_by_name_by_tier_and_by_auto(litellm: LiteLlm) -> None:
    documents = ["a", "b"]
    for name in (EMBEDS, "tier:balanced", "auto"):
        said = litellm.must("/v1/embeddings", {"model": name, "input": documents})
        assert [len(one["embedding"]) > 8 for one in said["data"]] == [True, True]
    for name in (RANKS, "tier:balanced", "auto"):
        said = litellm.must("/v1/rerank", {"model": name, "query": "x", "documents": documents})
        assert sorted(one["index"] for one in said["results"]) == [0, 1]
    assert litellm.asked_model("tier:balanced") == TALKS


@pytest.mark.parametrize("name", ["tier:powerful", "auto"])
def test_what_is_shown_and_what_is_played_reaches_who_can_take_it(litellm: LiteLlm, name: str) -> None:
    image = {"type": "image_url", "image_url": {"url": DATA}}
    data = base64.b64encode(recording()).decode()
    sound = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}

    assert litellm.asked_model(name, image) == SEES
    assert litellm.asked_model(name, sound) == HEARS


def test_other_apis_are_answered(litellm: LiteLlm) -> None:
    said = litellm.must("/v1/completions", {"model": ONE, "prompt": "a", "max_tokens": 3})
    assert said["usage"]["completion_tokens"] == 3
    said = litellm.must("/v1/responses", {"model": ONE, "input": "a", "max_output_tokens": 20})
    assert said["output"][-1]["content"][0]["text"]
    asked = {"model": ONE, "max_tokens": 3, "messages": [{"role": "user", "content": "a"}]}
    assert litellm.must("/v1/messages", asked)["usage"]["output_tokens"] == 3


@pytest.mark.parametrize("name", [ONE, HEARS, "auto"])
def test_what_clients_set_is_taken_whatever_a_model_is_called(litellm: LiteLlm, name: str) -> None:
    assert litellm.asked_model(name, top_p=0.5, temperature=0.1, stop=["~"], top_k=3, seed=1, logprobs=True)


def test_a_token_that_nobody_has_is_told(litellm: LiteLlm) -> None:
    status, _, said = litellm.chat("nobodys")

    assert status == 401
    assert "the token is not known here" in said["error"]["message"]


def test_hosts_that_are_down_are_passed_over(litellm: LiteLlm) -> None:
    """Of one name, and where another name is to stand in."""
    assert {litellm.asked_model(ONE) for _ in range(12)} == {ONE}
    assert litellm.asked_model("down") == ONE


def test_its_health_check_asks_each_model_which_starts_them(litellm: LiteLlm) -> None:
    for model_id in (ONE, RANKS):
        litellm.stop(model_id)

    said = litellm.must("/health")

    healthy = sorted(one["model"].removeprefix("hosted_vllm/") for one in said["healthy_endpoints"])
    tiers = ["tier:balanced", "tier:fast", "tier:powerful"]
    assert healthy == sorted([ONE, OTHER, EMBEDS, RANKS, TALKS, SEES, HEARS, *tiers, "auto"])
    assert [one["model"] for one in said["unhealthy_endpoints"]] == [f"hosted_vllm/{ONE}"] * 3
    assert [litellm.state(model_id) for model_id in (ONE, RANKS)] == ["ready"] * 2
