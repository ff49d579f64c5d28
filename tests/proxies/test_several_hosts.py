"""HAProxy, and Envoy, before two hosts: a request goes where its model is ready, as the agents' health paths say."""

from __future__ import annotations

import http.client
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from toy_projector import write_toy_eye

from magi_agent.tokens import Token, digest_of, line_of, new_secret
from magi_agent.vocabulary import TokenScope
from tests.agent_process import AgentProcess, Answer, ended, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser
from tests.gateway.test_senses import PNG
from tests.proxies.proxy_process import Proxy, TlsConnection, program, running
from tests.proxies.shipped import NAME, Surroundings

HOSTS = ("gpu1", "gpu2")
MODEL = {"gpu1": "hap-one", "gpu2": "hap-two"}
UNITS_OF_THESE_TESTS = "magi-llama-hap-*.service"
SECRET = new_secret()
SOON = 6.0
"""Seconds; two checks of a balancer's, a second apart, and some for a machine that is busy."""
TOKENS = 2500
"""As many as take some seconds."""

pytestmark = pytest.mark.timeout(240)


class Host(AgentProcess):
    """One of several hosts, with an agent and one model."""

    model = ""

    def configure(self, *, policy: str = "manual", tier: str = "fast", aliases: tuple[str, ...] = ()) -> None:
        settings = {"startPolicy": policy, "aliases": list(aliases)}
        self.must("PUT", f"/api/models/{self.model}/settings", settings)
        self.must("PUT", f"/api/models/{self.model}/tier", {"tier": tier})
        self.must("PUT", f"/api/models/{self.model}/enabled", {"enabled": True})

    def has_found_it(self) -> bool:
        return self.model in self.must("GET", "/api/models/registry")["models"]

    def start_model(self) -> None:
        assert self.must("POST", f"/api/models/servers/{self.model}/start?wait=60")["server"]["state"] == "ready"

    def stop_model(self) -> None:
        self.must("POST", f"/api/models/servers/{self.model}/stop?wait=60")

    def is_busy(self) -> bool:
        # Asked more often than once in a second, it never looks whether the client of another request is still there.
        time.sleep(1.5)
        slots = self.must("GET", f"/api/proxy/{self.model}/slots")
        return any(slot["is_processing"] for slot in slots)


@pytest.fixture(scope="module")
def started_hosts(
    systemd_user: SystemdUser, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> Iterator[dict[str, Host]]:
    folder = Path(tempfile.mkdtemp(prefix="magi-haproxy-"))
    made = {}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        for number, name in enumerate(HOSTS):
            host = made[name] = Host(folder / name, folder / name / "models", unused_ports(2), llama_server)
            host.model = MODEL[name]
            toy_model(host.models / f"{host.model}.gguf", context_length=16_384, seed=number + 1)
            (host.folder / "tokens").write_text(line_of(Token("all", TokenScope.INFER, digest_of(SECRET))) + "\n")
            (host.folder / "tokens").chmod(0o600)
            host.settings |= {"MAGI_TCP": f"127.0.0.1:{unused_ports()[0]}", "MAGI_TCP_ACCESS": "full"}
            stack.enter_context(ended(host, UNITS_OF_THESE_TESTS))
            host.start()
        yield made


@pytest.fixture
def hosts(started_hosts: dict[str, Host]) -> dict[str, Host]:
    """Both, with their agents up and their models stopped."""
    for host in started_hosts.values():
        if host.process is None:
            host.start()
        wait_until(host.has_found_it, "its model is found")
        host.stop_model()
        host.configure()
    return started_hosts


@pytest.fixture(params=["haproxy", "envoy"])
def kind(request: pytest.FixtureRequest) -> str:
    """The balancer of this run of the test."""
    name = str(request.param)
    if program(name) is None:
        pytest.skip(f"there is no {name} here: packaging/workbench/test_packages brings it")
    return name


@pytest.fixture
def balancer(
    kind: str, hosts: dict[str, Host], tmp_path: Path, certificate: tuple[Path, Path], unused_ports: PortRanges
) -> Iterator[Proxy]:
    here = Surroundings(unused_ports()[0], *certificate, tmp_path / "none.sock")
    with running(Proxy(kind, tmp_path / "proxy", here, ports_of(hosts))) as proxy:
        yield proxy


def ports_of(hosts: dict[str, Host]) -> dict[str, int]:
    return {name: int(host.settings["MAGI_TCP"].rpartition(":")[2]) for name, host in hosts.items()}


def complete(balancer: Proxy, model: str = "tier:fast", **body: Any) -> Answer:
    asked = {"model": model, "prompt": "a", "max_tokens": 2, **body}
    return balancer.ask("POST", "/v1/completions", asked, {"Authorization": f"Bearer {SECRET}"})


def answered_by(balancer: Proxy, times: int = 6, model: str = "tier:fast") -> set[str]:
    """The models that so many requests went to, all of which must succeed."""
    answers = [complete(balancer, model) for _ in range(times)]
    assert {answer.status for answer in answers} == {200}, [answer.body for answer in answers]
    return {answer.headers["x-magi-model"] for answer in answers}


def soon(balancer: Proxy, *models: str, asked_for: str = "tier:fast") -> None:
    """Wait until requests go to these models and no other. HAProxy begins with all hosts up, and then checks them."""

    def so() -> bool:
        # So many that Envoy, which picks by chance, passes over nobody.
        answers = [complete(balancer, asked_for) for _ in range(16)]
        return {answer.headers.get("x-magi-model") for answer in answers} == set(models)

    wait_until(so, f"requests go to {models}", SOON)


def is_refused(balancer: Proxy) -> bool:
    """Whether the balancer itself refuses requests."""
    return complete(balancer).headers.get("retry-after") == "5"


def test_requests_go_where_a_model_is_ready(balancer: Proxy, hosts: dict[str, Host]) -> None:
    first, second = hosts.values()
    second.start_model()
    soon(balancer, second.model)
    assert answered_by(balancer, 20) == {second.model}

    first.start_model()
    soon(balancer, first.model, second.model)
    second.stop_model()
    soon(balancer, first.model)
    assert answered_by(balancer, 20) == {first.model}

    first.stop_model()
    wait_until(lambda: is_refused(balancer), "the balancer knows of no host", SOON)
    away = complete(balancer)
    assert (away.status, away.body["error"]["code"]) == (503, "service_unavailable")
    assert list(away.body["error"]) == ["message", "type", "param", "code", "details"]
    assert away.headers["content-type"] == "application/json"


def test_each_tier_has_its_own(balancer: Proxy, hosts: dict[str, Host]) -> None:
    first, second = hosts.values()
    second.configure(tier="powerful")
    first.start_model()
    second.start_model()
    soon(balancer, first.model)
    soon(balancer, second.model, asked_for="tier:powerful")

    assert answered_by(balancer) == {first.model}
    assert answered_by(balancer, model="Tier:Powerful") == {second.model}
    assert complete(balancer, "tier:balanced").status == 503


def test_where_none_is_ready_one_is_started(balancer: Proxy, hosts: dict[str, Host]) -> None:
    first, second = hosts.values()
    wait_until(lambda: is_refused(balancer), "the balancer knows of no host", SOON)
    second.configure(policy="onDemand", aliases=("house",))
    wait_until(lambda: complete(balancer).status == 200, "a host that starts one is found", SOON)
    assert second.must("GET", f"/api/models/{second.model}")["server"]["state"] == "ready"
    soon(balancer, second.model, asked_for="house")
    assert answered_by(balancer, model="house") == {second.model}

    # One that is ready elsewhere goes before one that would have to be started.
    first.start_model()
    soon(balancer, first.model, second.model)
    second.stop_model()
    # A request before the balancer knows would have it started again.
    time.sleep(SOON / 2)
    assert answered_by(balancer) == {first.model}
    assert second.must("GET", f"/api/models/{second.model}")["server"]["state"] == "stopped"


def test_auto_goes_where_nothing_has_to_be_started_for_it(balancer: Proxy, hosts: dict[str, Host]) -> None:
    first, second = hosts.values()
    second.start_model()
    soon(balancer, second.model, asked_for="auto")
    first.configure(policy="onDemand")
    time.sleep(SOON / 2)
    assert answered_by(balancer, model="auto") == {second.model}
    assert first.must("GET", f"/api/models/{first.model}")["server"]["state"] == "stopped"

    second.stop_model()
    soon(balancer, first.model, asked_for="auto")
    assert answered_by(balancer, model="auto") == {first.model}
    first.configure()
    first.stop_model()
    # No host has one, so one of them says it.
    wait_until(lambda: said_by_a_host(complete(balancer, "auto")), "a host says that there is none", SOON)


def said_by_a_host(answer: Answer) -> bool:
    return answer.status == 503 and "is ready, and none of them is started" in answer.body["error"]["message"]


@pytest.mark.parametrize("kind", ["haproxy"], indirect=True)
def test_images_go_to_hosts_that_see_as_the_documentation_has_it(
    kind: str, hosts: dict[str, Host], tmp_path: Path, certificate: tuple[Path, Path], unused_ports: PortRanges
) -> None:
    first, second = hosts.values()
    write_toy_eye(second.models / f"mmproj-{second.model}.gguf")
    second.must("POST", "/api/models/rescan")
    assert second.must("GET", f"/api/models/{second.model}")["hasVision"]
    for host in hosts.values():
        host.start_model()
    here = Surroundings(unused_ports()[0], *certificate, tmp_path / "none.sock", images_apart=True)
    with running(Proxy(kind, tmp_path / "proxy", here, ports_of(hosts))) as balancer:
        soon(balancer, first.model, second.model)
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
        words = {"type": "text", "text": "an image_url, an image?"}

        def answer_to(*content: object) -> tuple[int, str | None]:
            asked = {"model": "tier:fast", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
            answer = balancer.ask("POST", "/v1/chat/completions", asked, {"Authorization": f"Bearer {SECRET}"})
            return answer.status, answer.headers.get("x-magi-model")

        wait_until(lambda: {answer_to(part) for _ in range(4)} == {(200, second.model)}, "one host sees", SOON)
        assert {answer_to(words, part) for _ in range(6)} == {(200, second.model)}
        assert {answer_to(words) for _ in range(6)} == {(200, first.model), (200, second.model)}


def test_nobody_notices_that_a_host_goes(balancer: Proxy, hosts: dict[str, Host]) -> None:
    first, second = hosts.values()
    for host in hosts.values():
        host.start_model()
    soon(balancer, first.model, second.model)

    first.kill()
    slowest = 0.0
    for _ in range(30):
        began = time.monotonic()
        assert answered_by(balancer, 1) == {second.model}
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 0.9, "another host is tried at once"

    first.start()
    soon(balancer, first.model, second.model)
    # A model's server survives its agent, and an agent that is restarted is no reason to be refused either.
    assert first.stop() == 0
    assert answered_by(balancer, 30) == {second.model}


def asked(balancer: Proxy, **body: Any) -> TlsConnection:
    connection = balancer.connect()
    body = {"model": "tier:fast", "prompt": "once", "ignore_eos": True, "cache_prompt": False, **body}
    headers = {"Host": NAME, "Content-Type": "application/json", "Authorization": f"Bearer {SECRET}"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def events(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while line := response.readline():
        if line.startswith(b"data: "):
            yield line.removeprefix(b"data: ").strip()


def test_a_stream_arrives_token_by_token(balancer: Proxy, hosts: dict[str, Host]) -> None:
    first, _ = hosts.values()
    first.start_model()
    soon(balancer, first.model)

    connection = asked(balancer, max_tokens=TOKENS, stream=True)
    response = connection.getresponse()
    arrived = [(time.monotonic(), event) for event in events(response)]
    connection.close()

    assert response.status == 200
    assert response.getheader("Content-Type", "").startswith("text/event-stream")
    assert arrived[-1][1] == b"[DONE]"
    times = [moment for moment, _ in arrived]
    lasted = times[-1] - times[0]
    assert lasted > 1.0, "too short to tell"
    in_tenths = [sum(tenth <= (at - times[0]) / lasted * 10 < tenth + 1 for at in times) for tenth in range(10)]
    # What is held back until the end leaves tenths empty; a machine that is busy makes some of them thin.
    assert min(in_tenths) > TOKENS / 250, in_tenths
    assert sorted(in_tenths)[5] > TOKENS / 50, in_tenths


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_leaves_no_generation_behind(
    balancer: Proxy, hosts: dict[str, Host], stream: bool
) -> None:
    first, _ = hosts.values()
    first.start_model()
    soon(balancer, first.model)
    connection = asked(balancer, max_tokens=15_000, stream=stream)
    if stream:
        next(events(connection.getresponse()))
    wait_until(first.is_busy, "the generation begins")

    connection.close()

    wait_until(lambda: not first.is_busy(), "the llama-server stops", 8.0)


def test_a_host_that_breaks_off_is_told_and_nobody_is_asked_the_same_again(
    balancer: Proxy, hosts: dict[str, Host]
) -> None:
    first, second = hosts.values()
    first.start_model()
    soon(balancer, first.model)
    connection = asked(balancer, max_tokens=15_000)
    wait_until(first.is_busy, "the generation begins")
    second.start_model()

    first.kill()
    response = connection.getresponse()

    assert (response.status, response.getheader("Content-Type")) == (502, "application/json")
    assert json.loads(response.read())["error"]["code"] == "server_failed"
    connection.close()
    assert not second.is_busy()


def test_answers_go_on_where_a_host_is_down_for_new_requests(balancer: Proxy, hosts: dict[str, Host]) -> None:
    first, second = hosts.values()
    first.start_model()
    soon(balancer, first.model)
    connection = asked(balancer, max_tokens=TOKENS, stream=True)
    said = events(connection.getresponse())
    next(said)

    # It has another tier from now on, so its host is none for this one.
    first.configure(tier="balanced")
    second.start_model()
    soon(balancer, second.model)

    assert list(said)[-1] == b"[DONE]"
    connection.close()


def test_the_name_of_a_model_is_found_as_far_as_is_looked(balancer: Proxy, hosts: dict[str, Host]) -> None:
    first, second = hosts.values()
    for host in hosts.values():
        host.start_model()
    soon(balancer, first.model, second.model)
    first.configure(tier="balanced")
    soon(balancer, second.model)
    ask = {"Authorization": f"Bearer {SECRET}"}

    for letters in (10, 20_000, 200_000):
        body = {"content": "a" * letters, "model": "tier:fast"}
        answers = [balancer.ask("POST", "/tokenize", body, ask) for _ in range(4)]
        assert {answer.headers.get("x-magi-model") for answer in answers} == {second.model}, letters
    # However large a body is, a name that stands before the rest is found, and all of it arrives.
    body = {"model": "tier:fast", "content": "a", "image": "A" * 20_000_000}
    answers = [balancer.ask("POST", "/tokenize", body, ask) for _ in range(4)]
    assert {(answer.status, answer.headers["x-magi-model"]) for answer in answers} == {(200, second.model)}
    # By HAProxy one that stands behind is not, so any host has to do with it.
    body = {"image": "A" * 20_000_000, "content": "a", "model": "tier:fast"}
    statuses = {balancer.ask("POST", "/tokenize", body, ask).status for _ in range(4)}
    assert statuses == ({200, 404} if balancer.kind == "haproxy" else {200})


def test_clients_are_no_callers_of_this_host(balancer: Proxy, hosts: dict[str, Host]) -> None:
    """On loopback an agent would let everybody do everything."""
    for headers in ({}, {"X-Forwarded-For": "127.0.0.1"}, {"Forwarded": "for=127.0.0.1"}):
        refused = balancer.ask("GET", "/v1/models", headers=headers)
        assert refused.status == 401
    for headers in ({"Authorization": f"Bearer {SECRET}"}, {"X-Api-Key": SECRET}):
        assert balancer.ask("GET", "/v1/models", headers=headers).status == 200
    assert SECRET not in balancer.log.read_text()
    assert balancer.ask("GET", "/v1/models", headers={"Host": "evil.example"}).status == 421


@pytest.mark.parametrize(
    "path", ["/api/models/registry", "/api/drain", "/%61pi/drain", "/metrics", "/%6Detrics/targets"]
)
def test_what_manages_a_host_is_asked_of_that_host(balancer: Proxy, path: str) -> None:
    refused = balancer.ask("GET", path, headers={"Authorization": f"Bearer {SECRET}"})

    assert (refused.status, refused.body["error"]["code"]) == (404, "not_found")
    assert refused.body["error"]["message"] == "ask the host itself"


@pytest.mark.parametrize("offered", ["order-66", "x" * 128, None, "not a token", "x" * 129])
def test_a_request_has_one_name_on_the_whole_way(balancer: Proxy, offered: str | None) -> None:
    headers = {} if offered is None else {"X-Request-ID": offered}
    told = balancer.ask("GET", "/health/live", headers=headers).headers["x-request-id"]

    wait_until(lambda: f" {{{told}}} " in balancer.log.read_text(), "it is in the log")
    if offered in ("order-66", "x" * 128):
        assert told == offered
    else:
        assert told != offered
        assert len(told) >= 16
