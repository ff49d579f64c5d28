"""What the shipped files say in figures is what the agent says."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from magi_agent.api.export_body import MAX_EXPORT
from magi_agent.api.routes import MAX_WAIT
from magi_agent.gateway.openai_errors import openai_error
from magi_agent.settings.loading import load_settings
from magi_agent.vocabulary import Tier
from tests.proxies.shipped import SHIPPED


def test_no_answer_takes_longer_than_the_proxies_wait() -> None:
    text = "".join((SHIPPED / name).read_text() for name in ("nginx.conf", "Caddyfile", "haproxy.cfg"))

    for limit in ("proxy_read_timeout", "response_header_timeout", "timeout client", "timeout server"):
        [seconds] = re.findall(rf"^\s+{limit} (\d+)s;?$", text, re.MULTILINE)
        assert MAX_WAIT < int(seconds) < 2 * MAX_WAIT


def test_haproxy_says_what_it_has_to_say_as_the_gateway_does() -> None:
    said = re.findall(r"status (\d+) .* string '(.*?)'", (SHIPPED / "haproxy.cfg").read_text())

    for (status, text), name in zip(
        said, ("ServiceUnavailable", "ServerSilent", "ServerFailed", "NotFound"), strict=True
    ):
        error = json.loads(text)
        assert error == openai_error(int(status), name, error["error"]["message"], {})


def envoys() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of Envoy's file: how it speaks HTTP, and its clusters."""
    resources = yaml.safe_load((SHIPPED / "envoy.yaml").read_text())["static_resources"]
    (listener,) = resources["listeners"]
    ((connections,),) = (chain["filters"] for chain in listener["filter_chains"])
    return connections["typed_config"], resources["clusters"]


def test_envoy_says_what_it_has_to_say_as_the_gateway_does() -> None:
    http, _ = envoys()
    mappers = http["local_reply_config"]["mappers"]
    said = [(each.get("status_code"), each["body_format_override"]["text_format_source"]) for each in mappers]
    answer = http["route_config"]["virtual_hosts"][0]["routes"][0]["direct_response"]
    said.append((answer["status"], answer["body"]))
    names = ("ServiceUnavailable", "ServerSilent", "ServerFailed", "PayloadTooLarge", "NotFound")

    for (status, source), name in zip(said, names, strict=True):
        error = json.loads(source["inline_string"])
        given = status or {"ServiceUnavailable": 503, "PayloadTooLarge": 413}[name]
        assert error == openai_error(given, name, error["error"]["message"], {})


def test_envoy_asks_the_same_of_every_host() -> None:
    http, clusters = envoys()
    checked = {each["name"]: each for each in clusters if "health_checks" in each}
    paths = {name: each["health_checks"][0]["http_health_check"]["path"] for name, each in checked.items()}

    assert {
        **{tier.value: f"/health/tiers/{tier}" for tier in Tier},
        **{f"{tier}-start": f"/health/tiers/{tier}?onDemand=true" for tier in Tier},
        "auto": "/health/auto",
        "auto-start": "/health/auto?onDemand=true",
        "any": "/health/live",
    }.items() < paths.items()
    alike = [{**each, "name": "", "health_checks": [], "load_assignment": {}} for each in checked.values()]
    assert all(each == alike[0] for each in alike)
    hosts = [{**each["load_assignment"], "cluster_name": ""} for each in checked.values()]
    assert all(each == hosts[0] for each in hosts)
    assert all(each["load_assignment"]["cluster_name"] == name for name, each in checked.items())
    aggregates = [each for each in clusters if each["name"] not in paths]
    tried = {each["name"]: each["cluster_type"]["typed_config"]["clusters"] for each in aggregates}
    assert tried == {
        **{f"{tier}-or-start": [tier.value, f"{tier}-start"] for tier in Tier},
        "auto-or-any": ["auto", "auto-start", "any"],
    }
    routes = http["route_config"]["virtual_hosts"][0]["routes"][1:]
    assert {each["route"]["cluster"] for each in routes} == {*tried, "house", "any"}
    assert {each["route"]["timeout"] for each in routes} == {"0s"}


def test_envoy_takes_and_waits_for_what_an_agent_does() -> None:
    http, _ = envoys()
    assert MAX_WAIT < int(http["stream_idle_timeout"].removesuffix("s")) < 2 * MAX_WAIT
    (most,) = (each["typed_config"]["max_request_bytes"] for each in http["http_filters"] if "buffer" in each["name"])
    assert most == load_settings({}, {}).gateway_max_body


def test_haproxy_asks_the_same_of_every_host() -> None:
    """A backend for each tier and for ``auto``, and one for where none of its models is ready; each has all hosts."""
    text = (SHIPPED / "haproxy.cfg").read_text()
    backends = re.findall(
        r"^backend (\S+) from magi\n    http-check send meth GET uri (\S+)\n((?:    server .*\n)+)", text, re.MULTILINE
    )

    assert len(backends) == text.count("\nbackend ")
    assert {
        **{tier.value: f"/health/tiers/{tier}" for tier in Tier},
        **{f"{tier}-start": f"/health/tiers/{tier}?onDemand=true" for tier in Tier},
        "auto": "/health/auto",
        "auto-start": "/health/auto?onDemand=true",
    }.items() < {name: path for name, path, _ in backends}.items()
    assert len({servers for *_, servers in backends}) == 1


def test_the_largest_body_is_the_agents() -> None:
    nginx, caddy = ((SHIPPED / name).read_text() for name in ("nginx.conf", "Caddyfile"))
    mebibytes = MAX_EXPORT >> 20

    assert re.findall(r"client_max_body_size (\d+)m;", nginx) == [str(mebibytes)]
    assert re.findall(r"max_size (\d+)MiB", caddy) == [str(mebibytes)]
    assert f"> {MAX_EXPORT}.0" in caddy
    for text in (nginx, caddy):
        assert f"larger than {mebibytes} MiB" in text
        assert re.findall(r'"maxBytes": (\d+)', text) == [str(MAX_EXPORT)]
