"""Where hosts come from: booted roots that are thrown away, or this very machine, put back as far as that goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import pytest
from container import booted, disk

from tests.system.host import MEMBER, STRANGER, Host, Parts
from tests.system.this_machine import ThisMachine

TOY = "toy"
"""The model that runs on a host that serves."""

START_SECONDS = 30.0
"""Within this, a toy model's server is ready on a busy machine of two processors."""


class Hosts(Protocol):
    """Gives out hosts, each as if it were new."""

    def bare(self) -> AbstractContextManager[Host]:
        """A host without the package, with a llama-server, a folder for models and two users."""

    def installed(self) -> AbstractContextManager[Host]:
        """A host with the package on it, no model, and one of the users in group magi."""

    def serving(self) -> AbstractContextManager[Host]:
        """A host that was booted with one model enabled, which is ready."""


def furnish(host: Host) -> None:
    """Do what an operator does before the package comes."""
    host.run("ln", "--symbolic", "--force", host.parts.llama_server, "/usr/local/bin/llama-server")
    host.run("mkdir", "--parents", "/models")
    for user in (MEMBER, STRANGER):
        host.run("useradd", "--create-home", "--user-group", user)


def install(host: Host) -> None:
    """Install the package, and let one of the users use it."""
    host.apt("install", host.parts.package)
    host.run("usermod", "--append", "--groups", "magi", MEMBER)
    host.until_api_answers(within=START_SECONDS)


def serve(host: Host) -> None:
    """Have one model run, now and after each boot."""
    host.add_model("toy.gguf", TOY)
    host.must("PUT", f"/api/models/{TOY}/enabled?apply=true", {"enabled": True}, within=START_SECONDS)
    host.until_ready(TOY, within=START_SECONDS)


class ContainerHosts:
    """Hosts in containers. What one was made to be is a layer that the next ones begin with."""

    def __init__(self, root: Path, parts: Parts, shown: Mapping[str, Path]) -> None:
        self._root = root
        self._parts = parts
        self._shown = shown
        self._stack = contextlib.ExitStack()
        self._layers: dict[str, tuple[Path, ...]] = {}
        self._failed: dict[str, str] = {}

    def close(self) -> None:
        """Free what the layers hold."""
        self._stack.close()

    @contextlib.contextmanager
    def bare(self) -> Iterator[Host]:
        with self._booted(self._bare_layers()) as host:
            yield host

    @contextlib.contextmanager
    def installed(self) -> Iterator[Host]:
        with self._booted(self._installed_layers()) as host:
            host.until_api_answers(within=START_SECONDS)
            yield host

    @contextlib.contextmanager
    def serving(self) -> Iterator[Host]:
        with self._booted(self._serving_layers()) as host:
            host.until_ready(TOY, within=START_SECONDS)
            yield host

    @contextlib.contextmanager
    def _booted(self, layers: Sequence[Path]) -> Iterator[Host]:
        with disk(layers) as own, booted(own, self._shown) as container:
            yield Host(container, self._parts)

    def _bare_layers(self) -> tuple[Path, ...]:
        return self._layers.get("bare") or self._make("bare", (self._root,), furnish)

    def _installed_layers(self) -> tuple[Path, ...]:
        return self._layers.get("installed") or self._make("installed", self._bare_layers(), install)

    def _serving_layers(self) -> tuple[Path, ...]:
        return self._layers.get("serving") or self._make("serving", self._installed_layers(), serve)

    def _make(self, name: str, layers: Sequence[Path], change: Callable[[Host], None]) -> tuple[Path, ...]:
        if name in self._failed:
            pytest.fail(f"no host that is {name}: {self._failed[name]}")
        own = self._stack.enter_context(disk(layers))
        with booted(own, self._shown) as container:
            host = Host(container, self._parts)
            try:
                change(host)
            except AssertionError as error:
                # What every other scenario would wait for in vain as well.
                self._failed[name] = str(error)
                host.print_journal()
                raise
            container.power_off()
        self._layers[name] = own.layers
        return own.layers


class ThisMachineHosts:
    """This machine, for autopkgtest: each host is this one, after what the last scenario left was taken away."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @contextlib.contextmanager
    def bare(self) -> Iterator[Host]:
        host = Host(ThisMachine(), self._parts)
        host.run("dpkg", "--purge", "magi-agent", within=120)
        for user in (MEMBER, STRANGER):
            host.run("userdel", "--remove", user, check=False)
        host.run("sh", "-c", "rm -rf /models /etc/systemd/system/magi-*.d /etc/default/magi-agent")
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "reset-failed")
        furnish(host)
        yield host

    @contextlib.contextmanager
    def installed(self) -> Iterator[Host]:
        with self.bare() as host:
            install(host)
            yield host

    @contextlib.contextmanager
    def serving(self) -> Iterator[Host]:
        with self.installed() as host:
            serve(host)
            yield host
