"""What an upgrade does to those who use the host, and what it leaves as it was."""

from __future__ import annotations

import functools

from tests.system.asking import clients_of
from tests.system.host import TCP, Host, unit_of

_CONFIGURATION = "/etc/magi-agent/agent.toml"


def _is_newer(host: Host) -> bool:
    # Whoever connects just before the old agent ends has no answer, and asks again.
    answer = host.ask("GET", "/")
    return answer.status == 200 and answer.body["version"] == "99"


def test_an_upgrade_under_load_cuts_no_stream_and_refuses_no_connection(serving: Host) -> None:
    serving.add_model("talker.gguf", "talker", within=30)
    serving.run("magictl", "settings", "talker", "n_threads=1", "ctx_size=8192")
    serving.must("POST", "/api/models/servers/talker/start?wait=60", within=65)
    url = serving.until_ready("talker", within=10)["url"]
    before = {unit: serving.main_pid(unit) for unit in (unit_of("talker"), unit_of("toy"))}
    agent = serving.main_pid("magi-agent.service")

    with serving.background("stream", url) as stream, clients_of(serving) as clients:
        serving.until(lambda: stream.count("piece") > 3, "the stream has begun", 20)
        serving.apt("install", serving.parts.newer)
        serving.until(functools.partial(_is_newer, serving), "the new version answers", 20)
        serving.until_ready("talker", within=20)
        seen = stream.count("piece")
        serving.until(lambda: stream.count("piece") > seen + 3, "the same stream goes on", 20)

        assert stream.stop()[-1] == "end told"
        clients.nobody_was_refused(broken=2)
    assert serving.main_pid("magi-agent.service") != agent
    assert {unit: serving.main_pid(unit) for unit in before} == before


def test_an_upgrade_lets_an_answer_through_the_gateway_end_and_refuses_nobody(serving: Host) -> None:
    tokens = 1500
    serving.write("/etc/default/magi-agent", "MAGI_TCP_ACCESS=infer\nMAGI_GATEWAY_DRAIN=120\n")
    serving.run("systemctl", "restart", "magi-agent")
    serving.add_model("talker.gguf", "talker", within=30)
    serving.run("magictl", "settings", "talker", "n_threads=1", "ctx_size=8192")
    serving.must("POST", "/api/models/servers/talker/start?wait=60", within=65)
    agent = serving.main_pid("magi-agent.service")
    server = serving.main_pid(unit_of("talker"))

    with serving.background("stream", f"{TCP}/api/proxy/talker", str(tokens)) as stream:
        serving.until(lambda: stream.count("piece") > 3, "the stream has begun", 20)
        # It comes back when the new agent is up, which is after the answer has ended.
        serving.apt("install", serving.parts.newer, within=240)
        serving.until(functools.partial(_is_newer, serving), "the new version answers", 20)
        lines = stream.stop()

    assert lines[-1] == "end server"
    assert sum(line.startswith("piece ") for line in lines) >= tokens - 1
    assert "finishing " in serving.journal("--unit=magi-agent", "--boot"), "the answer was too quick to show anything"
    assert serving.main_pid("magi-agent.service") != agent
    assert serving.main_pid(unit_of("talker")) == server


def test_an_operators_edits_survive_upgrades(installed: Host) -> None:
    shipped = installed.run("cat", _CONFIGURATION).stdout
    edits = {
        _CONFIGURATION: shipped.replace("[defaults]\n", "[defaults]\n# Ours.\nctx_size = 2048\n"),
        "/etc/default/magi-agent": "# Ours.\nMAGI_PORT_RANGE=8110-8119\n",
        "/etc/magi-agent/profiles/production.yaml": "profile:\n  name: Production\n  description: ours\n",
        "/etc/systemd/system/magi-llama-.service.d/90-ours.conf": "[Service]\nNice=5\n",
    }
    for path, text in edits.items():
        installed.write(path, text)

    installed.apt("install", installed.parts.newer)
    assert {path: installed.run("cat", path).stdout for path in edits} == edits

    # Where the package brings another file as well, the operator is asked, or has said beforehand what to keep.
    installed.apt("-o", "Dpkg::Options::=--force-confold", "install", installed.parts.newer_configuration)
    assert {path: installed.run("cat", path).stdout for path in edits} == edits
    assert "new in this version" in installed.output("cat", f"{_CONFIGURATION}.dpkg-dist")

    installed.until_api_answers(within=20)
    assert installed.must("GET", "/api/models/registry")["portRange"] == [8110, 8119]
    assert installed.must("GET", "/api/models/profiles/production")["description"] == "ours"


def test_an_upgrade_starts_nothing_that_the_operator_switched_off(serving: Host) -> None:
    units = ["magi-agent.service", "magi-agent.socket", "magi-agent-tcp.socket"]
    url = serving.until_ready("toy", within=5)["url"]
    serving.run("systemctl", "disable", "--now", *units)

    serving.apt("install", serving.parts.newer)

    assert {serving.property(unit, "ActiveState") for unit in units} == {"inactive"}
    assert {serving.property(unit, "UnitFileState") for unit in units} == {"disabled"}
    assert serving.answers(url)


def test_a_version_that_does_not_start_drops_no_model_and_the_one_before_knows_all_choices(serving: Host) -> None:
    serving.must("PUT", "/api/models/toy/tier", {"tier": "powerful"})
    url = serving.until_ready("toy", within=5)["url"]
    server = serving.main_pid(unit_of("toy"))

    serving.run("apt-get", "--yes", "install", serving.parts.broken, within=120, check=False)
    serving.until(
        lambda: "this version does not work" in serving.journal("--unit=magi-agent", "--boot"), "the agent fails", 20
    )
    assert serving.ask("GET", "/health", by=url).status == 200
    assert serving.main_pid(unit_of("toy")) == server

    serving.apt("--allow-downgrades", "install", serving.parts.package)
    serving.until_api_answers(within=20)
    serving.until_ready("toy", within=20)
    toy = serving.models()["toy"]
    assert (toy["tierOverride"], toy["enabled"]) == ("powerful", True)
    assert serving.main_pid(unit_of("toy")) == server
