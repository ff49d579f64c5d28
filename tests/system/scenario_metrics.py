"""What Prometheus reads of a host with the package."""

from __future__ import annotations

from tests.system.host import SOCKET, Host


def test_agent_host_unit_and_server_are_in_the_metrics(serving: Host) -> None:
    said = serving.output("curl", "--silent", "--show-error", "--fail", "--unix-socket", SOCKET, "http://magi/metrics")

    lines = said.splitlines()
    assert lines[-1] == "# EOF"
    assert any(line.startswith("magi_host_memory_") for line in lines)
    of_toy = {line.partition("{")[0] for line in lines if 'model="toy"' in line}
    assert {"magi_server_scrape_success", "magi_server_state", "magi_server_cpu_seconds_total"} <= of_toy
    assert any(name.startswith("llamacpp") for name in of_toy)
