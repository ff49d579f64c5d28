"""What the shipped files say in figures is what the agent says."""

from __future__ import annotations

import json
import re

from magi_agent.api.export_body import MAX_EXPORT
from magi_agent.api.routes import MAX_WAIT
from magi_agent.gateway.openai_errors import openai_error
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
