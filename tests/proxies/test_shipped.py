"""What the shipped files say in figures is what the agent says."""

from __future__ import annotations

import re

from magi_agent.api.export_body import MAX_EXPORT
from magi_agent.api.routes import MAX_WAIT
from tests.proxies.shipped import SHIPPED


def test_no_answer_takes_longer_than_the_proxies_wait() -> None:
    nginx, caddy = ((SHIPPED / name).read_text() for name in ("nginx.conf", "Caddyfile"))

    for limit in (r"proxy_read_timeout (\d+)s;", r"response_header_timeout (\d+)s$"):
        [seconds] = re.findall(limit, nginx + caddy, re.MULTILINE)
        assert MAX_WAIT < int(seconds) < 2 * MAX_WAIT


def test_the_largest_body_is_the_agents() -> None:
    nginx, caddy = ((SHIPPED / name).read_text() for name in ("nginx.conf", "Caddyfile"))
    mebibytes = MAX_EXPORT >> 20

    assert re.findall(r"client_max_body_size (\d+)m;", nginx) == [str(mebibytes)]
    assert re.findall(r"max_size (\d+)MiB", caddy) == [str(mebibytes)]
    assert f"> {MAX_EXPORT}.0" in caddy
    for text in (nginx, caddy):
        assert f"larger than {mebibytes} MiB" in text
        assert re.findall(r'"maxBytes": (\d+)', text) == [str(MAX_EXPORT)]
