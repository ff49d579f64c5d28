"""From a package file to answers, and through a boot."""

from __future__ import annotations

from tests.system.host import Host, unit_of


def test_a_model_is_served_minutes_after_the_installation_and_again_after_a_boot(bare: Host) -> None:
    bare.apt("install", bare.parts.package)
    bare.until_api_answers(within=10)
    assert bare.models() == {}

    bare.add_model("toy.gguf", "toy", within=20)
    assert not bare.models()["toy"]["enabled"]
    bare.must("PUT", "/api/models/toy/enabled", {"enabled": True})
    bare.must("POST", "/api/models/servers/toy/start?wait=30", within=35)
    url = bare.until_ready("toy", within=10)["url"]
    assert bare.answers(url)

    bare.reboot()

    # Nobody has asked the agent anything yet: a connection would have started it.
    bare.until(lambda: bare.ask("GET", "/health", by=url).status == 200, "the server answers after the boot", 30)
    assert bare.answers(url)
    bare.until_ready("toy", within=10)
    assert set(bare.units(unit_of("toy")).values()) == {"active"}


def test_no_unit_fails_and_nothing_runs_as_root_that_need_not(serving: Host) -> None:
    assert serving.output("systemctl", "--failed", "--plain", "--no-legend") == ""

    users = {
        unit: serving.output("ps", "-o", "user:32=", "-p", str(serving.main_pid(unit))).strip()
        for unit in ("magi-agent.service", unit_of("toy"))
    }
    assert users == {"magi-agent.service": "magi-agent", unit_of("toy"): "magi-llama"}
