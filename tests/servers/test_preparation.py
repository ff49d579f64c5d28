"""What must be settled before a start, while others change their minds."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from magi_agent.errors import SettingsNotUsable
from magi_agent.runtime_settings.settings import RuntimeSettings
from tests.conftest import MakeToyModel
from tests.servers.conftest import MakeAgent


async def test_what_is_launched_is_what_was_checked(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-checked.gguf")
    async with make_agent() as agent:
        port = (await agent.preparation.give_port("srv-checked")).choices.port
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", port or 0))
            holder.listen()
            launch = asyncio.create_task(agent.preparation.launch_for("srv-checked"))
            await asyncio.sleep(0.3)  # by then it was checked, and waits for the port
            assert not launch.done()
            agent.effective.hold_profile({"srv-checked": RuntimeSettings(extra_flags=("--agent",))})
        with pytest.raises(SettingsNotUsable, match="--agent"):
            await launch


async def test_layers_that_do_not_go_together_are_an_error_before_the_start(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-layers.gguf")
    async with make_agent() as agent:
        model = agent.registry.model("srv-layers")
        agent.effective.hold_profile({"srv-layers": RuntimeSettings(memory_high=1 << 34)})
        await agent.preparation.check(model)
        await agent.registry.choose(
            "srv-layers", lambda choices: type(choices)(runtime_settings=RuntimeSettings(memory_max=1 << 33))
        )
        with pytest.raises(SettingsNotUsable, match="memory_high"):
            await agent.preparation.check(agent.registry.model("srv-layers"))


def test_one_template_takes_the_place_of_another_whatever_form_they_have() -> None:
    host = RuntimeSettings(chat_template_file="/models/host.jinja", ctx_size=512)

    assert RuntimeSettings(chat_template="chatml").over(host) == RuntimeSettings(chat_template="chatml", ctx_size=512)
    assert RuntimeSettings(chat_template_file="/m.jinja").over(RuntimeSettings(chat_template="chatml")) == (
        RuntimeSettings(chat_template_file="/m.jinja")
    )
    assert RuntimeSettings(ctx_size=1).over(host).chat_template_file == "/models/host.jinja"
