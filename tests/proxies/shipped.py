"""The files of packaging/proxies as a test uses them: what ships, with addresses, certificate and socket of the test.

Nothing else of them is changed. Each text that is replaced must be there exactly once, so that a file which has moved
on fails here, and is not tested with the addresses of the host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import locations

SHIPPED = locations.CHECKOUT / "packaging" / "proxies"
NAME = "magi.example.org"
"""The name that both files answer to."""
PREFIX = "/magi"
"""The path below which both files have the agent."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a test has in place of what is on an operator's host."""

    port: int
    certificate: Path
    key: Path
    socket: Path
    tcp: int | None = None
    """The agent's port of loopback, where it is reached by that as docs/reverse-proxy.md has it."""
    images_apart: bool = False
    """Whether HAProxy sends images to hosts that see, as docs/reverse-proxy.md has it."""


def nginx_site(here: Surroundings, more: dict[str, int]) -> str:
    """The file for nginx. ``more`` are locations like the agent's own for other ports of this host, by their names."""
    text = (SHIPPED / "nginx.conf").read_text()
    location = _one(r"^    location /magi/ \{\n.*?^    \}\n", text)
    others = "".join(
        _replaced(
            location,
            {
                "location /magi/": f"location /{name}/",
                "X-Forwarded-Prefix /magi": f"X-Forwarded-Prefix /{name}",
                "http://unix:/run/magi-agent/api.sock:/": f"http://127.0.0.1:{port}/",
            },
        )
        for name, port in more.items()
    )
    return _replaced(
        text,
        {
            "    listen 443 ssl;\n    listen [::]:443 ssl;\n": f"    listen 127.0.0.1:{here.port} ssl;\n{others}",
            "/etc/ssl/certs/magi.pem": str(here.certificate),
            "/etc/ssl/private/magi.key": str(here.key),
            "http://unix:/run/magi-agent/api.sock:/": (
                f"http://127.0.0.1:{here.tcp}/" if here.tcp else f"http://unix:{here.socket}:/"
            ),
        },
    )


def caddy_site(here: Surroundings, more: dict[str, int]) -> str:
    """The file for Caddy, whose port is a matter of its global options. ``more`` as for nginx."""
    text = (SHIPPED / "Caddyfile").read_text()
    handle = _one(r"^\thandle_path /magi/\* \{\n.*?^\t\}\n", text)
    others = "".join(
        _replaced(
            handle,
            {
                "handle_path /magi/*": f"handle_path /{name}/*",
                "X-Forwarded-Prefix /magi": f"X-Forwarded-Prefix /{name}",
                "unix//run/magi-agent/api.sock": f"127.0.0.1:{port}",
            },
        )
        for name, port in more.items()
    )
    return _replaced(
        text,
        {
            handle: handle + others,
            "/etc/ssl/certs/magi.pem": str(here.certificate),
            "/etc/ssl/private/magi.key": str(here.key),
            "unix//run/magi-agent/api.sock": f"127.0.0.1:{here.tcp}" if here.tcp else f"unix/{here.socket}",
        },
    )


def haproxy_file(here: Surroundings, hosts: dict[str, int]) -> str:
    """The file for HAProxy; ``hosts`` are ports of this host by the names that the file has for its two hosts."""
    text = (SHIPPED / "haproxy.cfg").read_text()
    if here.images_apart:
        text = _with_images_apart(text)
    pem = here.certificate.with_name("haproxy.pem")
    pem.write_text(here.certificate.read_text() + here.key.read_text())
    servers = re.findall(r"^    server (\S+) (\S+:8000)$", text, re.MULTILINE)
    assert {name for name, _ in servers} == hosts.keys()
    assert len(set(servers)) == len(hosts)
    for name, address in set(servers):
        text = text.replace(f"server {name} {address}", f"server {name} 127.0.0.1:{hosts[name]}")
    return _replaced(
        text,
        {"bind :443,[::]:443 v6only ssl": f"bind 127.0.0.1:{here.port} ssl", "/etc/ssl/private/magi.pem": str(pem)},
    )


def envoy_file(here: Surroundings, hosts: dict[str, int]) -> str:
    """The file for Envoy; ``hosts`` are ports of this host, in the order of the file's own hosts."""
    text = (SHIPPED / "envoy.yaml").read_text()
    addresses = re.findall(r"address: 10\.\S+, port_value: 8000", text)
    assert len(addresses) == len(hosts)
    replaced = {
        old: f"address: 127.0.0.1, port_value: {port}" for old, port in zip(addresses, hosts.values(), strict=True)
    }
    return _replaced(
        text,
        {
            **replaced,
            'address: "::", ipv4_compat: true, port_value: 443': f"address: 127.0.0.1, port_value: {here.port}",
            "/etc/ssl/certs/magi.pem": str(here.certificate),
            "/etc/ssl/private/magi.key": str(here.key),
        },
    )


def _with_images_apart(text: str) -> str:
    """The file for HAProxy with what the documentation has for images, and the hosts of any other backend."""
    documented = (locations.CHECKOUT / "docs" / "reverse-proxy.md").read_text()
    block = re.sub(
        "^  ", "", _one(r"^  ```\n(      use_backend fast-vision .*?)  ```$", documented), flags=re.MULTILINE
    )
    rule, _, backend = block.partition("\n\n")
    first = "    use_backend fast  "
    hosts = _one(r"^backend fast from magi\n.*?((?:    server [^\n]*\n)+)", text)
    return _replaced(text, {first: f"{rule}\n{first}"}) + f"\n{backend}{hosts}"


def _one(pattern: str, text: str) -> str:
    [found] = re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    return str(found)


def _replaced(text: str, replacements: dict[str, str]) -> str:
    for old in replacements:
        assert text.count(old) == 1, f"{text.count(old)} times in the shipped file: {old}"
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text
