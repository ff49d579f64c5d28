"""SIGHUP: the configuration is read again, a good one holds from then on, a bad one changes nothing."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import locations
import pytest

from magi_agent import configuration
from magi_agent.agent import Agent
from magi_agent.configuration import NEEDS_RESTART, Configuration, ConfigurationSources
from magi_agent.discovery.facts import TierThresholds
from magi_agent.discovery.scanner import Scanner
from magi_agent.errors import ConfigurationError
from magi_agent.events import ConfigurationReloaded
from magi_agent.servers.launcher import DirectLauncher
from magi_agent.settings.loading import load_settings
from magi_agent.settings.settings import Settings, TcpAddress
from magi_agent.settings.table import SETTINGS
from magi_agent.vocabulary import Tier
from tests.agent_process import AgentProcess, ended, remove_units, unit_property, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser
from tests.systemd.units import until

UNIT = "reload-agent.service"
AGENT = str(locations.VENV / "bin" / "magi-agent")
SECTIONS = {setting.name: setting.section for setting in SETTINGS}


@dataclass
class ConfiguredAgent(AgentProcess):
    """An agent whose settings are all in its file."""

    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.folder / "agent.toml"

    def environment(self) -> dict[str, str]:
        return {**os.environ, "MAGI_CONFIG": str(self.config), **self.settings}

    def choose(self, **changed: Any) -> None:
        """Write the file, with these settings changed since the last time."""
        self.chosen |= changed
        by_section: dict[str, list[str]] = {}
        for name, value in self.chosen.items():
            by_section.setdefault(SECTIONS.get(name, name), []).append(
                "\n".join(f"{key} = {json.dumps(entry)}" for key, entry in value.items())
                if name == "defaults"
                else f"{name} = {json.dumps(value)}"
            )
        self.config.write_text("".join(f"[{name}]\n" + "\n".join(lines) + "\n" for name, lines in by_section.items()))

    def reload(self) -> None:
        """Have it read its file again, and return once it has."""
        assert self.process is not None
        before = self.reloads()
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.answers() and self.reloads() > before, "it has read its file again")

    def reloads(self) -> int:
        return self.log.read_text().count("the configuration was ")

    def problems(self) -> list[str]:
        found: list[str] = self.ask("GET", "/health/ready").body["problems"]
        return found

    def models_listed(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.must("GET", "/api/models/registry")["models"]
        return found

    def server(self, model_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.must("GET", f"/api/models/servers/{model_id}")
        return found


@pytest.fixture
def agent(
    systemd_user: SystemdUser, tmp_path: Path, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> Iterator[ConfiguredAgent]:
    """An agent that runs, with the model reload-one."""
    toy_model(tmp_path / "models" / "reload-one.gguf", name="One")
    low, high = unused_ports(4)
    agent = ConfiguredAgent(tmp_path, tmp_path / "models", (low, high), llama_server)
    agent.choose(
        model_scan_path=str(agent.models),
        registry_path=str(tmp_path / "state" / "registry.json"),
        profiles_path=str(tmp_path / "profiles"),
        active_profile="",
        llama_server_path=str(llama_server),
        port_range=f"{low}-{high}",
        socket=str(agent.socket),
        tcp="off",
        rescan_interval=3600,
    )
    with ended(agent, "magi-llama-reload-*"):
        agent.start()
        agent.wait_settled()
        yield agent


def test_a_bad_configuration_changes_nothing_and_is_told_of_until_a_good_one_comes(agent: ConfiguredAgent) -> None:
    before = agent.must("GET", "/api/models/registry")["portRange"]
    good = agent.config.read_text()
    agent.config.write_text(good.replace("port_range", "port_rage"))
    line = good[: good.index("port_range")].count("\n") + 1

    agent.reload()

    said = f"the configuration was not reloaded: {agent.config}:{line}: servers.port_rage: unknown key; [servers] has "
    [problem] = agent.problems()
    assert problem.startswith(said)
    assert f"ERROR   {said}" in agent.log.read_text()
    assert agent.must("GET", "/api/models/registry")["portRange"] == before
    assert agent.ask("GET", "/health/ready").body["status"] == "ready"

    agent.choose(port_range="9200-9209")
    agent.reload()

    assert agent.problems() == []
    assert agent.must("GET", "/api/models/registry")["portRange"] == [9200, 9209]


@pytest.mark.parametrize(
    "bad", ["", "not TOML", "[api]\ntcp = 'off'\nsocket = 'off'\n", "[agent]\nlog_level = 'loud'\n"]
)
def test_a_file_that_went_or_is_broken_is_bad(agent: ConfiguredAgent, bad: str) -> None:
    if bad:
        agent.config.write_text(bad)
    else:
        agent.config.unlink()

    agent.reload()

    [problem] = agent.problems()
    assert problem.startswith("the configuration was not reloaded: ")
    assert agent.must("GET", "/api/models/registry")["scanPath"] == str(agent.models)


def test_what_runs_is_not_touched_and_shows_what_differs(agent: ConfiguredAgent) -> None:
    agent.must("POST", "/api/models/servers/reload-one/start?wait=60")
    before = agent.server("reload-one")
    other = agent.folder / "llama-server-other"
    other.symlink_to(agent.llama_server)
    more = agent.folder / "more"
    more.mkdir()
    agent.choose(
        llama_server_path=str(other), defaults={"ctx_size": 256}, model_scan_path=[str(agent.models), str(more)]
    )

    agent.reload()

    wait_until(lambda: agent.server("reload-one")["restartRequired"], "it is to be restarted")
    after = agent.server("reload-one")
    assert (after["pid"], after["state"], after["port"]) == (before["pid"], "ready", before["port"])
    assert {reason.partition(":")[0] for reason in after["restartReasons"]} == {"binary", "ctx-size"}

    agent.must("POST", "/api/models/servers/reload-one/restart?wait=60")
    assert agent.server("reload-one")["restartReasons"] == []


def test_a_flag_that_is_not_allowed_any_more_is_a_reason(agent: ConfiguredAgent) -> None:
    agent.choose(allowed_flags=["--no-warmup"])
    agent.reload()
    agent.must("PUT", "/api/models/reload-one/settings", {"extraFlags": ["--no-warmup"]})
    agent.must("POST", "/api/models/servers/reload-one/start?wait=60")
    before = agent.server("reload-one")
    assert before["restartReasons"] == []
    agent.choose(allowed_flags=[])

    agent.reload()

    wait_until(lambda: agent.server("reload-one")["restartRequired"], "it shows")
    after = agent.server("reload-one")
    [reason] = after["restartReasons"]
    assert reason.startswith("extra_flags: --no-warmup is not allowed")
    refused = agent.ask("POST", "/api/models/servers/reload-one/restart?wait=60")
    assert (refused.status, refused.body["error"]) == (409, "SettingsNotUsable")
    assert agent.server("reload-one")["pid"] == before["pid"], "what runs is left as it is"
    agent.must("PUT", "/api/models/reload-one/settings", {})
    agent.must("POST", "/api/models/servers/reload-one/restart?wait=60")
    assert agent.server("reload-one")["restartReasons"] == []


def test_other_folders_are_scanned_and_watched_from_then_on(agent: ConfiguredAgent, toy_model: MakeToyModel) -> None:
    old, new = agent.models, agent.folder / "others"
    toy_model(new / "reload-two.gguf", name="Two")
    agent.choose(model_scan_path=str(new))

    agent.reload()

    wait_until(lambda: set(agent.models_listed()) == {"reload-two"}, "what the new folder holds is listed")
    assert agent.must("GET", "/api/models/registry")["scanPaths"] == [str(new)]
    toy_model(old / "reload-late.gguf", name="Late")
    toy_model(new / "reload-three.gguf", name="Three")
    wait_until(lambda: "reload-three" in agent.models_listed(), "the new folder is watched")
    assert set(agent.models_listed()) == {"reload-two", "reload-three"}

    agent.choose(model_scan_path=[str(old), str(new)])
    agent.reload()
    everything = {"reload-one", "reload-late", "reload-two", "reload-three"}
    wait_until(lambda: set(agent.models_listed()) == everything, "what both folders hold is listed")


def test_a_new_folder_that_is_not_there_yet_is_seen_when_it_comes(
    agent: ConfiguredAgent, toy_model: MakeToyModel
) -> None:
    late = agent.folder / "late"
    agent.choose(model_scan_path=[str(agent.models), str(late)])

    agent.reload()

    wait_until(lambda: any(str(late) in problem for problem in agent.problems()), "it is missed")
    toy_model(agent.folder / "away" / "reload-four.gguf", name="Four")
    (agent.folder / "away").rename(late)
    wait_until(lambda: "reload-four" in agent.models_listed(), "what came with it is listed")
    assert agent.problems() == []


def test_a_model_that_runs_outside_the_new_folders_runs_on_as_missing(agent: ConfiguredAgent) -> None:
    agent.must("POST", "/api/models/servers/reload-one/start?wait=60")
    pid = agent.server("reload-one")["pid"]
    (agent.folder / "others").mkdir()
    agent.choose(model_scan_path=str(agent.folder / "others"))

    agent.reload()

    wait_until(lambda: agent.models_listed()["reload-one"]["status"] == "missing", "its file is seen no more")
    assert (agent.server("reload-one")["pid"], agent.server("reload-one")["state"]) == (pid, "ready")


def test_tiers_are_assigned_anew(agent: ConfiguredAgent) -> None:
    assert agent.models_listed()["reload-one"]["assignedTier"] == "balanced"
    agent.choose(powerful_min=0, fast_max=0)

    agent.reload()

    wait_until(lambda: agent.models_listed()["reload-one"]["assignedTier"] == "powerful", "it is powerful now")
    thresholds = agent.must("GET", "/api/models/registry")["tierThresholds"]
    assert thresholds == {"powerful_min": 0.0, "fast_max": 0.0}


def has_problems(agent: ConfiguredAgent, count: int) -> bool:
    return len(agent.problems()) == count


def test_a_changed_active_profile_is_applied_and_nobodys_choice_undone_by_an_unchanged_one(
    agent: ConfiguredAgent, toy_model: MakeToyModel
) -> None:
    for name, problems in (("nowhere", 1), ("", 0)):
        agent.choose(active_profile=name)
        agent.reload()
        wait_until(partial(has_problems, agent, problems), f"{name!r} is looked for")
    profiles = agent.folder / "others"
    profiles.mkdir()
    (profiles / "mine.yaml").write_text("profile: {name: mine}\nenabled_models: [reload-one]\n")
    agent.choose(profiles_path=str(profiles), active_profile="mine")

    agent.reload()

    wait_until(lambda: agent.server("reload-one")["state"] == "ready", "the profile's model is up", 60)
    assert agent.must("GET", "/api/models/profiles") == ["mine"]
    assert agent.ask("GET", "/health/ready").body["activeProfile"] == "mine"

    agent.must("PUT", "/api/models/reload-one/enabled?apply=true", {"enabled": False})
    agent.reload()
    agent.reload()
    toy_model(agent.models / "reload-two.gguf", name="Two")
    wait_until(lambda: "reload-two" in agent.models_listed(), "it has gone on")
    assert agent.models_listed()["reload-one"]["enabled"] is False
    assert agent.server("reload-one")["state"] == "stopped"

    agent.choose(active_profile="nowhere")
    agent.reload()
    wait_until(lambda: any("nowhere" in problem for problem in agent.problems()), "it is said that there is none")
    agent.choose(active_profile="")
    agent.reload()
    wait_until(lambda: agent.problems() == [], "none is asked for")


def test_what_a_start_alone_can_carry_out_waits_and_the_rest_holds(agent: ConfiguredAgent) -> None:
    registry = agent.chosen["registry_path"]
    agent.choose(registry_path=str(agent.folder / "elsewhere" / "r.json"), port_range="9300-9309", tcp="127.0.0.1:9299")

    agent.reload()

    said = "registry.registry_path, api.tcp: changed, and takes effect when the agent is restarted"
    assert agent.problems() == [said]
    assert f"WARNING {said}" in agent.log.read_text()
    assert agent.must("GET", "/api/models/registry")["portRange"] == [9300, 9309]
    agent.must("PUT", "/api/models/reload-one/tier", {"tier": "fast"})
    assert "reload-one" in Path(registry).read_text()

    agent.choose(registry_path=registry, tcp="off")
    agent.reload()

    assert agent.problems() == []


def test_who_may_what_holds_for_the_next_request_of_an_open_connection(
    agent: ConfiguredAgent, unused_ports: PortRanges
) -> None:
    agent.stop()
    port, _ = unused_ports()
    agent.choose(tcp=f"127.0.0.1:{port}", tcp_access="full", cors_origins=["https://old.example"])
    agent.start()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(method: str, origin: str = "https://old.example") -> tuple[int, str | None]:
        connection.request(method, "/api/models/reload-one/tier", '{"tier": null}', {
            "Content-Type": "application/json", "Origin": origin,
        })  # fmt: skip
        response = connection.getresponse()
        response.read()
        return response.status, response.headers["Access-Control-Allow-Origin"]

    try:
        wait_until(lambda: "reload-one" in agent.models_listed(), "it is listed")
        assert ask("PUT") == (200, "https://old.example")
        used = connection.sock
        agent.choose(cors_origins=["https://new.example"])
        agent.reload()
        assert ask("PUT") == (403, None)
        assert ask("PUT", "https://new.example") == (200, "https://new.example")
        agent.choose(tcp_access="none")
        agent.reload()
        assert ask("PUT", "https://new.example")[0] == 401
        assert connection.sock is used
    finally:
        connection.close()


def test_many_at_once_are_one_after_another(agent: ConfiguredAgent) -> None:
    agent.must("POST", "/api/models/servers/reload-one/start?wait=60")
    pid = agent.server("reload-one")["pid"]
    assert agent.process is not None
    for number in range(50):
        agent.choose(port_range=f"{9400 + number}-9499")
        agent.process.send_signal(signal.SIGHUP)

    wait_until(lambda: agent.must("GET", "/api/models/registry")["portRange"] == [9449, 9499], "the last one holds")
    assert agent.server("reload-one")["pid"] == pid
    assert agent.problems() == []


def test_systemd_is_told_when_it_begins_and_ends(agent: ConfiguredAgent) -> None:
    agent.stop()
    with ExitStack() as opened:
        manager = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(agent.folder / "notify"))
        manager.settimeout(30)
        agent.settings = {"NOTIFY_SOCKET": str(agent.folder / "notify")}

        def told(until: str) -> list[dict[str, str]]:
            """What is said up to a message with this word in it."""
            messages: list[dict[str, str]] = []
            while not messages or until not in messages[-1]:
                lines = manager.recv(4096).decode().splitlines()
                messages.append(dict(line.partition("=")[::2] for line in lines))
            return messages

        agent.start()
        told("READY")
        agent.wait_settled()
        for text, status in ((None, "1 models; 0 of 0 servers ready"), ("nonsense", "was not reloaded: ")):
            if text:
                agent.config.write_text(text)
            agent.reload()
            begin = told("RELOADING")[-1]
            assert int(begin["MONOTONIC_USEC"]) > 0
            end = told("READY")[-1]
            assert status in end["STATUS"]


class TestUnderSystemd:
    @pytest.fixture
    def unit(self, agent: ConfiguredAgent) -> Iterator[ConfiguredAgent]:
        """The agent as a service of the private manager."""
        agent.stop()
        names = ("MAGI_", "XDG_RUNTIME_DIR", "DBUS_")
        variables = [
            f"--setenv={name}={value}" for name, value in agent.environment().items() if name.startswith(names)
        ]
        subprocess.run(
            ["systemd-run", "--user", "--quiet", "--unit", UNIT, "-p", "Type=notify", "-p", "TimeoutStartSec=30",
             "-p", "ExecReload=/bin/kill -HUP $MAINPID", *variables, AGENT],
            check=True, timeout=60,
        )  # fmt: skip
        yield agent
        remove_units(UNIT)

    def test_systemctl_reload_reloads_it_and_shows_what_was_wrong(self, unit: ConfiguredAgent) -> None:
        pid = unit_property(UNIT, "MainPID")
        unit.choose(port_range="9500-9509")
        subprocess.run(["systemctl", "--user", "reload", UNIT], check=True, timeout=60)
        wait_until(lambda: unit.must("GET", "/api/models/registry")["portRange"] == [9500, 9509], "the new range holds")

        unit.config.write_text("nonsense")
        subprocess.run(["systemctl", "--user", "reload", UNIT], check=True, timeout=60)
        wait_until(
            lambda: "the configuration was not reloaded: " in unit_property(UNIT, "StatusText"), "systemctl shows it"
        )

        wait_until(lambda: unit_property(UNIT, "ActiveState") == "active", "the reload has ended")
        assert unit_property(UNIT, "MainPID") == pid
        assert unit_property(UNIT, "NRestarts") == "0"


class TestEveryPart:
    """What of a setting shows in no answer of the API."""

    @pytest.fixture
    async def changed(
        self, tmp_path: Path, systemd_user: SystemdUser, llama_server: Path
    ) -> AsyncIterator[tuple[Agent, Settings]]:
        """An agent in this process that has come upon other settings, and these."""
        (tmp_path / "models").mkdir()
        options = {
            "model_scan_path": str(tmp_path / "models"),
            "registry_path": str(tmp_path / "state" / "registry.json"),
            "profiles_path": str(tmp_path / "profiles"),
            "llama_server_path": str(llama_server),
            "active_profile": "",
            "systemd_scope": "user",
            "journal_directory": str(systemd_user.journal),
            "socket": str(tmp_path / "api.sock"),
            "tcp": "off",
        }
        other = load_settings(
            {
                **options,
                "rescan_interval": "77",
                "max_startup_time": "78",
                "readiness_check_interval": "0.5",
                "stop_timeout": "79",
                "llama_server_user": "nobody",
                "allowed_flags": "--no-warmup",
                "log_level": "warning",
            },
            {},
        )
        level = logging.getLogger("magi_agent").level
        agent = Agent(load_settings(options, {}), {}, lambda: other)
        await agent.start()
        try:
            await until(lambda: agent._settled, "the start is through")
            yield agent, other
        finally:
            await agent.stop()
            logging.getLogger("magi_agent").setLevel(level)

    async def test_each_has_what_it_needs(self, changed: tuple[Agent, Settings]) -> None:
        agent, other = changed
        with agent.services.events.subscribe() as events:
            await agent.reload()
            async with asyncio.timeout(30):
                while not isinstance(event := await events.next(), ConfigurationReloaded):
                    pass

        assert event.changed == (
            "discovery.rescan_interval",
            "servers.allowed_flags",
            "servers.llama_server_user",
            "servers.max_startup_time",
            "servers.readiness_check_interval",
            "servers.stop_timeout",
            "agent.log_level",
        )
        assert event.awaiting_restart == ()
        assert agent.services.settings == agent.settings == other
        assert agent._inventory._interval == 77
        assert agent._reconciler._watch.patience.stillness == 78
        assert agent._reconciler._watch.patience.longest_pause == 0.5
        assert agent._reconciler._stop_timeout == 79
        assert isinstance(agent._launcher, DirectLauncher)
        assert agent._launcher._user == "nobody"
        assert agent._preparation._settings is agent.settings
        assert logging.getLogger("magi_agent").level == logging.WARNING


def test_other_thresholds_cost_no_header_and_the_same_again_costs_nothing(
    tmp_path: Path, toy_model: MakeToyModel
) -> None:
    model = toy_model(tmp_path / "models" / "reload-one.gguf")
    os.utime(model, (1e9, 1e9))  # at rest: one that was written a moment ago is read at each look
    scanner = Scanner([tmp_path / "models"], TierThresholds(14, 7))
    first = scanner.scan()
    scanner.reconfigure([tmp_path / "models"], TierThresholds(14, 7))
    assert scanner.scan().models is first.models

    scanner.reconfigure([tmp_path / "models"], TierThresholds(0, 0))
    assert scanner.refresh([str(model)]).models is first.models
    second = scanner.scan()

    assert (first.headers_read, second.headers_read) == (1, 0)
    assert [first.models[0].assigned_tier, second.models[0].assigned_tier] == [Tier.BALANCED, Tier.POWERFUL]


class TestConfiguration:
    @pytest.mark.parametrize("name", [setting.name for setting in SETTINGS])
    async def test_each_setting_holds_at_once_or_waits_for_a_restart(self, name: str) -> None:
        before = load_settings({}, {})
        others = {"tcp": None, "tokens_path": Path("/nonexistent/tokens"), "proxy_access": ()}
        after = replace(before, **{name: others.get(name, object())})  # type: ignore[arg-type]
        held = Configuration(before, lambda: after)

        reload = await held.reload()

        [key] = [f"{setting.section}.{setting.name}" for setting in SETTINGS if setting.name == name]
        if name in NEEDS_RESTART:
            assert (reload.changed, reload.awaiting_restart) == ((), (key,))
            assert held.settings is before
            assert key in held.problems[0]
        else:
            assert (reload.changed, reload.awaiting_restart) == ((key,), ())
            assert held.settings == after
            assert held.revision == 1

    async def test_the_same_again_is_no_change(self) -> None:
        before = load_settings({}, {})
        held = Configuration(before, lambda: load_settings({}, {}))

        reload = await held.reload()

        assert (reload.changed, reload.awaiting_restart, held.revision) == ((), (), 0)
        assert held.settings is before

    async def test_where_systemd_hands_over_sockets_the_settings_for_them_wait_for_nothing(self) -> None:
        before = load_settings({}, {})
        found = before
        held = Configuration(before, lambda: found)
        held.note_listeners(
            ("unix:/run/magi-agent/api.sock", "http://127.0.0.1:8000"), reached_from_elsewhere=(), are_systemds=True
        )
        assert list(held.problems) == []
        found = replace(before, tcp=TcpAddress("0.0.0.0", 8000), socket=None)

        reload = await held.reload()

        assert reload.awaiting_restart == ()
        tcp, unix = held.problems
        assert tcp.startswith("api.tcp is 0.0.0.0:8000, and systemd has made http://127.0.0.1:8000: the socket unit")
        assert unix.startswith("api.socket is off, and systemd has made unix:/run/magi-agent/api.sock: the socket unit")

        found = before
        await held.reload()

        assert held.problems == ()

    async def test_what_systemd_makes_as_it_was_set_or_where_nothing_was_set_is_right(self) -> None:
        before = load_settings({}, {})
        lan = replace(before, tcp=TcpAddress("192.0.2.1", 8000))
        for settings, made in ((lan, ("http://127.0.0.1:8000", "http://192.0.2.1:8000")), (before, ("unix:/a",))):
            held = Configuration(settings)
            held.note_listeners(made, reached_from_elsewhere=(), are_systemds=True)
            assert held.problems == ()

    def test_a_default_file_that_was_there_is_missed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "agent.toml"
        monkeypatch.setattr("magi_agent.settings.loading.DEFAULT_CONFIG", file)
        monkeypatch.setattr(configuration, "DEFAULT_CONFIG", file)
        without = ConfigurationSources({}, {})
        assert without.read().port_range == without.read().port_range == (8080, 8099)
        file.write_text("[servers]\nport_range = '9000-9009'\n")
        sources = ConfigurationSources({}, {})
        assert sources.read().port_range == without.read().port_range == (9000, 9009)
        file.unlink()

        for each in (sources, without):
            with pytest.raises(ConfigurationError, match="no such file"):
                each.read()

    def test_options_and_environment_win_as_at_the_start(self, tmp_path: Path) -> None:
        file = tmp_path / "agent.toml"
        file.write_text("")
        sources = ConfigurationSources({"port_range": "9000-9009"}, {"MAGI_STOP_TIMEOUT": "5"}, file)
        sources.read()
        file.write_text("[servers]\nport_range = '1-2'\nstop_timeout = 7\nmax_startup_time = 9\n")

        again = sources.read()

        assert (again.port_range, again.stop_timeout, again.max_startup_time) == ((9000, 9009), 5.0, 9.0)
