"""What the agent says of where its own configuration comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from magi_agent.configuration import ConfigurationSources
from tests.api.conftest import Serve


async def test_where_it_comes_from_is_told(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    api = await serve()
    path = "/api/configuration"
    nothing: dict[str, Any] = {"pid": os.getpid(), "file": None, "variables": {}, "options": {}}
    assert await api.get(path) == nothing, "it was made of settings alone"

    environment = {"MAGI_CONFIG": "/srv/\udcff.toml", "MAGI_TCP": "off", "PATH": "/bin", "MAGI_TOKEN_FILE": "/secret"}
    sources = ConfigurationSources({"port_range": "9000-9009"}, environment)
    monkeypatch.setattr(api.services.configuration, "sources", sources)
    told = await api.get(path)
    assert told["file"].startswith("/srv/")
    assert told["variables"].keys() == {"MAGI_CONFIG", "MAGI_TCP"}
    assert told["options"] == {"--port-range": "9000-9009"}

    monkeypatch.chdir(tmp_path)
    sources.config = Path("near.toml")
    assert (await api.get(path))["file"] == f"{tmp_path}/near.toml", "as others find it too"
    monkeypatch.setattr(api.services.configuration, "sources", ConfigurationSources({}, {}))
    assert (await api.get(path))["file"] == "/etc/magi-agent/agent.toml"
