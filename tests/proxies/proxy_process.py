"""A real nginx, Caddy, HAProxy or Envoy with the shipped file, and a client that speaks TLS to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import locations

from tests.agent_process import Answer, wait_until
from tests.proxies.shipped import NAME, Surroundings, caddy_site, envoy_file, haproxy_file, nginx_site

_PATIENCE = 30.0
_UNPACKED = locations.CACHE / "proxies"
"""Where packaging/workbench/test_packages unpacks the programs that the host has not installed."""
_ENVOY = locations.CACHE / "envoy" / "envoy" / "_bin"


def program(name: str) -> Path | None:
    """The program, if the host or the workbench has it."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:{_UNPACKED}/usr/sbin:{_UNPACKED}/usr/bin:{_ENVOY}")
    return Path(found) if found else None


class TlsConnection(http.client.HTTPSConnection):
    """A connection to the proxy at its port of this host, for the name that its certificate has."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        super().__init__("127.0.0.1", port, timeout=_PATIENCE, context=context)
        self._tls = context

    def connect(self) -> None:
        plain = socket.create_connection(("127.0.0.1", self.port), _PATIENCE)
        self.sock = self._tls.wrap_socket(plain, server_hostname=NAME)


@dataclass
class Proxy:
    """One proxy's process and its folder."""

    kind: str
    folder: Path
    here: Surroundings
    more: dict[str, int] = field(default_factory=dict)
    """Further locations like the agent's own, by name, with the port each leads to. Of HAProxy and Envoy, the hosts."""
    user: str = "root"
    """Who nginx's workers, or Caddy, run as."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / "proxy.log"

    def start(self) -> None:
        """Start it, and return when it takes connections."""
        binary = program(self.kind)
        assert binary is not None
        self.folder.mkdir(exist_ok=True)
        commands = {"nginx": self._nginx, "caddy": self._caddy, "haproxy": self._haproxy, "envoy": self._envoy}
        argv = commands[self.kind](binary)
        environment = {
            **os.environ,
            "XDG_DATA_HOME": str(self.folder / "data"),
            "XDG_CONFIG_HOME": str(self.folder / "config"),
            "LD_LIBRARY_PATH": ":".join(str(path) for path in _UNPACKED.glob("usr/lib/*-linux-*")),
        }
        # nginx takes its user from its file, and begins as root.
        user = None if self.kind == "nginx" or self.user == "root" else self.user
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder, env=environment,
                user=user, group=user, extra_groups=os.getgrouplist(user, pwd.getpwnam(user).pw_gid) if user else None,
            )  # fmt: skip
        wait_until(self._listens, f"{self.kind} listens", _PATIENCE)

    def _nginx(self, binary: Path) -> list[str]:
        """Beside the shipped file: what Debian's own nginx.conf says of the rest, below the test's folder."""
        (self.folder / "site.conf").write_text(nginx_site(self.here, self.more))
        temporary = "".join(
            f"    {kind}_temp_path {self.folder}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        main = self.folder / "main.conf"
        main.write_text(
            f"user {self.user};\nworker_processes 2;\ndaemon off;\npid {self.folder}/nginx.pid;\n"
            f"error_log {self.log};\nevents {{ worker_connections 768; }}\n"
            f"http {{\n    sendfile on;\n    tcp_nopush on;\n    gzip on;\n    default_type application/octet-stream;\n"
            f"    access_log {self.folder}/access.log;\n{temporary}    include {self.folder}/site.conf;\n}}\n"
        )
        return [str(binary), "-p", str(self.folder), "-c", str(main), "-e", str(self.log)]

    def _caddy(self, binary: Path) -> list[str]:
        main = self.folder / "Caddyfile"
        main.write_text(
            f"{{\n\tadmin off\n\tdefault_bind 127.0.0.1\n\thttps_port {self.here.port}\n"
            f"\tauto_https disable_redirects\n}}\n\n{caddy_site(self.here, self.more)}"
        )
        return [str(binary), "run", "--config", str(main), "--adapter", "caddyfile"]

    def _haproxy(self, binary: Path) -> list[str]:
        """Before the shipped file: of what Debian's own file has, the log."""
        main = self.folder / "main.cfg"
        main.write_text("global\n    log stdout format raw local0\n")
        shipped = self.folder / "haproxy.cfg"
        shipped.write_text(haproxy_file(self.here, self.more))
        return [str(binary), "-db", "-f", str(main), "-f", str(shipped)]

    def _envoy(self, binary: Path) -> list[str]:
        shipped = self.folder / "envoy.yaml"
        shipped.write_text(envoy_file(self.here, self.more))
        quietly = ["--disable-hot-restart", "--concurrency", "2", "--log-level", "warning"]
        return [str(binary), "-c", str(shipped), *quietly]

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.kind} ended: {self.log.read_text()[-3000:]}"
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.here.port), _PATIENCE).close()
            return True
        return False

    def stop(self) -> None:
        """End it; its connections are cut."""
        if self.process is None:
            return
        process, self.process = self.process, None
        # nginx takes its workers along only where it is asked; Caddy, asked, waits for its clients to go.
        process.send_signal(signal.SIGTERM if self.kind == "nginx" else signal.SIGKILL)
        try:
            process.wait(_PATIENCE)
        finally:
            process.kill()

    def connect(self) -> TlsConnection:
        """A connection on which nothing was asked yet."""
        return TlsConnection(self.here.port, ssl.create_default_context(cafile=self.here.certificate))

    def ask(self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Ask what is at ``path`` of the proxy's whole site; a body that is no JSON stays the bytes it is."""
        connection = self.connect()
        try:
            sent = {"Host": NAME, **(headers or {})}
            if body is not None:
                sent.setdefault("Content-Type", "application/json")
            connection.request(method, path, json.dumps(body) if body is not None else None, sent)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        told = {name.lower(): value for name, value in response.getheaders()}
        is_json = told.get("content-type", "").startswith("application/json")
        return Answer(response.status, told, json.loads(content) if is_json and content else content)


@contextlib.contextmanager
def running(proxy: Proxy) -> Iterator[Proxy]:
    """Have the proxy run for the block."""
    try:
        proxy.start()
        yield proxy
    finally:
        proxy.stop()
