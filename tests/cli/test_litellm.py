"""`magictl export litellm`: what is enabled, as a LiteLLM router takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import Magictl
from tests.cli.stand_in import StandIn, model, standing_in


def offered(model_id: str, *capabilities: str, **more: Any) -> dict[str, Any]:
    """An entry of the gateway's list."""
    return {"id": model_id, "object": "model", "context_length": 4096, "capabilities": list(capabilities), **more}


@pytest.fixture
def gateway(agent: StandIn) -> StandIn:
    """A chat model that sees, one that thinks, an embedding model, a reranker, and one that only runs."""
    agent.add(*(model(name, enabled=True) for name in ("tiny-chat", "thinker", "embed", "rank", "on", "*x: 1")))
    agent.offered = [
        offered("tiny-chat", "completion", "vision"),
        offered("thinker", "completion", "thinking", "audio", context_length=2048),
        offered("embed", "embedding", context_length=None),
        offered("rank", "reranking"),
        offered("on", "completion", context_length=None),
        offered("*x: 1", "completion"),
        offered("old-14b", "completion"),
        offered("tier:fast", "completion", "vision", "thinking", "embedding", models=["embed", "tiny-chat", "thinker"]),
        offered("tier:balanced", "reranking", models=["rank"]),
        offered("tier:powerful", "completion", models=["old-14b"]),
        offered("auto", "completion", models=["tiny-chat"]),
    ]
    return agent


def test_enabled_models_and_tiers_are_entries(gateway: StandIn, magictl: Magictl) -> None:
    told = magictl("export", "litellm", "--api-base", "https://gpu-1.example:8443/magi/")

    assert (told.status, told.err) == (0, "")
    document = yaml.safe_load(told.out)
    entries = {entry["model_name"]: entry for entry in document["model_list"]}
    models = ["tiny-chat", "thinker", "embed", "rank", "on", "*x: 1"]
    assert list(entries) == [*models, "tier:fast", "tier:balanced", "auto"]
    assert entries["tiny-chat"] == {
        "model_name": "tiny-chat",
        "litellm_params": {
            "model": "hosted_vllm/tiny-chat",
            "api_base": "https://gpu-1.example:8443/magi/v1",
            "api_key": "os.environ/MAGI_TOKEN",
        },
        "model_info": {
            "mode": "chat",
            "max_input_tokens": 4096,
            "supports_vision": True,
            "supports_audio_input": False,
            "supports_reasoning": False,
        },
    }
    assert entries["thinker"]["model_info"]["supports_reasoning"] is True
    assert entries["embed"]["model_info"] == {"mode": "embedding"}
    assert entries["rank"]["model_info"] == {"mode": "rerank", "max_input_tokens": 4096}
    assert entries["rank"]["litellm_params"]["model"] == "hosted_vllm/rank"
    assert entries["*x: 1"]["litellm_params"]["model"] == "hosted_vllm/*x: 1"
    assert magictl("export", "litellm", "--api-base", "https://gpu-1.example:8443/magi", "--json").json == document


def test_a_tier_can_what_all_of_its_models_can_and_sees_or_hears_where_one_does(
    gateway: StandIn, magictl: Magictl
) -> None:
    document = magictl("export", "litellm", "--json").json

    tiers = {one["model_name"]: one for one in document["model_list"] if one["model_name"].startswith("tier:")}
    assert tiers["tier:fast"]["litellm_params"]["model"] == "hosted_vllm/tier:fast"
    assert tiers["tier:fast"]["model_info"] == {
        "mode": "chat",
        "max_input_tokens": 2048,
        "supports_vision": True,
        "supports_audio_input": True,
        "supports_reasoning": False,
    }
    assert tiers["tier:balanced"]["litellm_params"]["model"] == "hosted_vllm/tier:balanced"


def test_auto_is_an_entry_where_the_agent_offers_it(gateway: StandIn, magictl: Magictl) -> None:
    def auto() -> list[dict[str, Any]]:
        entries = magictl("export", "litellm", "--json").json["model_list"]
        return [entry for entry in entries if entry["model_name"] == "auto"]

    (entry,) = auto()
    assert entry["litellm_params"]["model"] == "hosted_vllm/auto"
    assert (entry["model_info"]["mode"], entry["model_info"]["max_input_tokens"]) == ("chat", 4096)

    # For none that is enabled; not at all; and of a model that is called so, as a model.
    gateway.offered[-1]["models"] = ["old-14b"]
    assert auto() == []
    del gateway.offered[-1]
    assert auto() == []
    gateway.add(model("auto", enabled=True))
    gateway.offered.append(offered("auto", "embedding"))
    (entry,) = auto()
    assert entry["model_info"]["mode"] == "embedding"


def test_the_address_is_the_one_that_magictl_uses(gateway: StandIn, magictl: Magictl) -> None:
    told = magictl("export", "litellm")

    bases = {entry["litellm_params"]["api_base"] for entry in yaml.safe_load(told.out)["model_list"]}
    assert bases == {f"{gateway.url}/v1"}
    assert told.err.startswith("only programs on this host reach the agent at http://127.0.0.1:")
    given = magictl("export", "litellm", "--api-base", "http://gpu-1/v1", "--json").json
    assert given["model_list"][0]["litellm_params"]["api_base"] == "http://gpu-1:80/v1"


def test_behind_a_socket_the_address_has_to_be_said(
    magictl: Magictl, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = open_folder / "api.sock"
    with standing_in(StandIn(), path):
        told = magictl("--socket", str(path), "export", "litellm")
        assert told.status == 1
        assert "--api-base URL" in told.err
        done = magictl("--socket", str(path), "export", "litellm", "--api-base", "http://gpu-1:8000")
        assert yaml.safe_load(done.out) == {"model_list": []}


@pytest.mark.parametrize("url", ["ftp://gpu-1", "http://", "http://a:b@gpu-1", "http://gpu-1?x=1", ""])
def test_what_is_no_url_is_refused(gateway: StandIn, magictl: Magictl, url: str) -> None:
    told = magictl("export", "litellm", "--api-base", url)

    assert told.status == 2
    assert told.err.startswith("magictl: --api-base: ")
    assert told.out == ""


def test_choices_have_no_address(agent: StandIn, magictl: Magictl, tmp_path: Path) -> None:
    told = magictl("export", str(tmp_path / "backup.json"), "--api-base", "http://gpu-1")

    assert told.status == 2
    assert "--api-base is for: magictl export litellm" in told.err
    assert list(tmp_path.iterdir()) == []
