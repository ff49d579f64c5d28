"""What is said of a request's length is what a real server allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Serve
from tests.conftest import MakeToyModel

MODEL = "api-context"
TRAINED = 2048


@pytest.mark.parametrize("listener", ["unix"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({}, TRAINED),
        ({"ctxSize": 1024}, 1024),
        ({"ctxSize": 1024, "parallelSlots": 2}, 512),
        ({"parallelSlots": 4}, 512),
        ({"ctxSize": 1024, "parallelSlots": 2, "extraFlags": ["--kv-unified"]}, 1024),
        ({"ctxSize": 8192}, TRAINED),
    ],
)
async def test_a_listed_context_is_that_of_one_slot(
    serve: Serve, models: Path, toy_model: MakeToyModel, settings: dict[str, Any], length: int
) -> None:
    toy_model(models / f"{MODEL}.gguf", context_length=TRAINED)
    api = await serve(allowed_flags="--kv-unified")
    (await api.ask("PUT", f"/api/models/{MODEL}/settings", settings)).success()
    (await api.ask("PUT", f"/api/models/{MODEL}/enabled", {"enabled": True})).success()
    (await api.ask("POST", f"/api/models/servers/{MODEL}/start?wait=60")).success()

    listed = (await api.get(f"/v1/models/{MODEL}"))["context_length"]

    slots = await api.get(f"/api/proxy/{MODEL}/slots")
    assert {slot["n_ctx"] for slot in slots} == {listed} == {length}
