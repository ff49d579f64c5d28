"""The shapes that `magictl check` goes by, the stand-in, and the agent's own schemas say the same."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from magi_agent.api import schemas
from magi_agent.cli import contract
from magi_agent.cli.endpoints import ENDPOINTS
from magi_agent.cli.shapes import Shape
from tests.cli.conftest import Magictl
from tests.cli.stand_in import StandIn, failure, model, profile, server

WITH_FAILURE = server("x", failure=failure(), retryInSeconds=1.5)


@pytest.mark.parametrize(
    ("schema", "example", "shape"),
    [
        (schemas.ModelAnswer, model("x"), contract.MODEL),
        (schemas.ServerAnswer, WITH_FAILURE, contract.SERVER),
        (schemas.ProfileAnswer, profile("x"), contract.PROFILE),
    ],
)
def test_what_the_agents_schemas_write_has_the_contracts_shape(
    schema: type[BaseModel], example: dict[str, Any], shape: Shape
) -> None:
    written = schema.model_validate(example).model_dump(mode="json", by_alias=True)

    assert list(shape(written, "")) == []
    assert list(shape(example, "")) == []
    assert list(written) == list(example), "the stand-in answers as the agent does"


@pytest.mark.parametrize(
    ("example", "shape"),
    [(model("x"), contract.MODEL), (WITH_FAILURE, contract.SERVER), (profile("x"), contract.PROFILE)],
)
def test_every_key_of_the_contract_is_missed_where_it_is_missing(example: dict[str, Any], shape: Shape) -> None:
    optional = {"projectorPath", "projectors", "hasAudio", "isReranker", "retryInSeconds"}
    for key in example.keys() - optional:
        without = {name: value for name, value in example.items() if name != key}

        assert f".x.{key} is missing" in list(shape(without, ".x"))


def test_there_are_eleven_endpoints_in_the_order_of_the_contract() -> None:
    assert [(endpoint.method, endpoint.path.removeprefix("/api/models")) for endpoint in ENDPOINTS] == [
        ("GET", "/registry"),
        ("GET", "/servers"),
        ("GET", "/profiles"),
        ("GET", "/profiles/development"),
        ("GET", "/tiers/powerful"),
        ("PUT", "/{id}/tier"),
        ("PUT", "/{id}/thinking"),
        ("PUT", "/{id}/enabled"),
        ("POST", "/rescan"),
        ("POST", "/profiles"),
        ("DELETE", "/profiles/{name}"),
    ]


def test_the_agents_own_schemas_read_what_the_stand_in_answers(agent: StandIn, magictl: Magictl) -> None:
    agent.servers["tiny-chat"] = WITH_FAILURE
    agent.models["tiny-chat"]["enabled"] = True

    schemas.RegistryAnswer.model_validate(magictl("models", "--json").json)
    schemas.ServersAnswer.model_validate(magictl("servers", "--json").json)
    schemas.ServerActionAnswer.model_validate(magictl("start", "tiny-chat", "--json").json)
    schemas.OperationAnswer.model_validate(magictl("start", "--all", "--json").json)
    schemas.EnabledAnswer.model_validate(magictl("enable", "tiny-chat", "--json").json)
    schemas.RescanAnswer.model_validate(magictl("rescan", "--json").json)


def test_the_agents_own_schemas_read_what_the_stand_in_answers_beyond_the_contract(
    agent: StandIn, magictl: Magictl
) -> None:
    agent.active = "production"
    agent.models["tiny-chat"]["runtimeSettings"] |= {"ctxSize": 4096}
    for schema, words in (
        (schemas.SettingsAnswer, ["settings", "tiny-chat"]),
        (schemas.SettingsChangedAnswer, ["settings", "tiny-chat", "mmap=on"]),
        (schemas.PortAnswer, ["port", "tiny-chat", "8090"]),
        (schemas.PortRangeAnswer, ["port-range", "8080-8090"]),
        (schemas.PlanAnswer, ["profile", "activate", "production", "--dry-run"]),
        (schemas.ActiveProfileAnswer, ["profile", "active"]),
        (schemas.ProfileAnswer, ["profile", "show", "production"]),
        (schemas.DrainAnswer, ["drain"]),
        (schemas.OperationAnswer, ["restart", "--changed"]),
        (schemas.ExportBody, ["export"]),
    ):
        schema.model_validate(magictl(*words, "--json").json)
