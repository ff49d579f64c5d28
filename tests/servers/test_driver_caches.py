"""A folder for each model in which GPU drivers keep what they compile: what it is called, and that servers have it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.driver_caches import cache_directories, cache_environment, cache_root
from magi_agent.servers.launch import LaunchSpecification
from magi_agent.servers.launcher import service_of
from magi_agent.servers.llama_server import argv_of, differences, environment_of
from magi_agent.servers.pictures import Server
from magi_agent.systemd.properties import properties_of
from magi_agent.vocabulary import MAX_ID_LENGTH, Scope
from tests.conftest import MakeToyModel
from tests.servers.conftest import MakeAgent
from tests.servers.serving_agent import PATIENCE_OF_TESTS, ServingAgent
from tests.servers.system import systemctl

LAUNCH = LaunchSpecification(
    model_id="qwen3-8b",
    display_name="Qwen3 8B",
    binary=Path("/usr/local/bin/llama-server"),
    model_path="/models/qwen3-8b.gguf",
    projector_path=None,
    host="127.0.0.1",
    port=8081,
    runtime_settings=RuntimeSettings(),
    readable_folders=(Path("/models"),),
    user="magi-llama",
    stop_timeout=20.0,
)
FOLDERS = ("XDG_CACHE_HOME", "CUDA_CACHE_PATH", "__GL_SHADER_DISK_CACHE_PATH")


def test_each_driver_is_told_of_a_folder_that_systemd_makes() -> None:
    made = {f"/var/cache/{name}" for name in cache_directories("qwen3-8b")}

    told = cache_environment(cache_root(Scope.SYSTEM), "qwen3-8b")

    assert made == {"/var/cache/magi-llama/qwen3-8b", "/var/cache/magi-llama/qwen3-8b/cuda"}
    assert {told[name] for name in FOLDERS} == made
    # Not one that llama-server could download to.
    assert told["LLAMA_CACHE"] == "/nonexistent"


def test_where_a_manager_has_its_units_caches() -> None:
    assert cache_root(Scope.SYSTEM, environment={"XDG_CACHE_HOME": "/x"}) == Path("/var/cache")
    assert cache_root(Scope.SYSTEM, dynamic_user=True) == Path("/var/cache/private")
    assert cache_root(Scope.USER, environment={"XDG_CACHE_HOME": "/x"}) == Path("/x")
    assert cache_root(Scope.USER, environment={}) == Path.home() / ".cache"


@pytest.mark.parametrize(
    ("user", "folder"), [("magi-llama", "/var/cache/magi-llama/"), (None, "/var/cache/private/magi-llama/")]
)
def test_a_server_s_unit_has_them(user: str | None, folder: str) -> None:
    unit = service_of(replace(LAUNCH, user=user), Scope.SYSTEM)
    properties = {each.name: each.value for each in properties_of(unit, scope=Scope.SYSTEM, systemd_version=252)}

    assert properties["CacheDirectory"] == ["magi-llama/qwen3-8b", "magi-llama/qwen3-8b/cuda"]
    assert properties["CacheDirectoryMode"] == 0o700
    assert {unit.environment[name] for name in FOLDERS} == {f"{folder}qwen3-8b", f"{folder}qwen3-8b/cuda"}


def test_a_server_without_them_is_one_that_an_earlier_version_started_and_no_other() -> None:
    new = service_of(LAUNCH, Scope.SYSTEM).environment
    old = environment_of(LAUNCH)
    assert new.keys() > old.keys()
    for environment in (new, old):
        assert differences(LAUNCH, argv_of(LAUNCH), [f"{key}={value}" for key, value in environment.items()]) == ()


@pytest.fixture(autouse=True)
def no_caches_of_others() -> Iterator[None]:
    """They outlive servers, and so tests."""
    remove_caches()
    yield
    remove_caches()


def remove_caches() -> None:
    for folder in (cache_root(Scope.USER) / "magi-llama").glob("srv-*"):
        shutil.rmtree(folder)


def environment_of_process(server: Server) -> dict[str, str]:
    text = Path(f"/proc/{server.pid}/environ").read_bytes().rstrip(b"\0").decode()
    return dict(entry.partition("=")[::2] for entry in text.split("\0"))


def write_as(server: Server, path: Path) -> str:
    """What comes of writing a file where the server runs; empty where it could."""
    command = ["nsenter", f"--target={server.pid}", "--mount", "--", "tee", str(path)]
    ran = subprocess.run(command, input="x", capture_output=True, text=True, timeout=20, check=False)
    return ran.stderr.strip().rpartition(": ")[2]


async def started(agent: ServingAgent, model_id: str) -> tuple[Server, Path]:
    server = await agent.ready(model_id)
    return server, Path(environment_of_process(server)["XDG_CACHE_HOME"])


async def test_a_server_can_write_to_its_own_and_finds_it_again(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-cached.gguf")
    async with make_agent() as agent:
        server, folder = await started(agent, "srv-cached")
        assert folder == cache_root(Scope.USER) / "magi-llama" / "srv-cached"
        assert folder.stat().st_mode & 0o777 == 0o700
        # llama-server itself keeps nothing there.
        assert [path.name for path in folder.iterdir()] == ["cuda"]
        cuda = Path(environment_of_process(server)["CUDA_CACHE_PATH"])
        assert write_as(server, cuda / "index") == ""

        await systemctl("daemon-reload")
        await systemctl("kill", "--signal=KILL", server.unit)
        await agent.until(lambda: agent.unit("srv-cached").n_restarts == 1, "systemd restarts it")
        server, _ = await started(agent, "srv-cached")
        assert (cuda / "index").read_text() == "x"
        assert write_as(server, folder / "shaders") == ""

        await agent.servers.stop("srv-cached", by="test", wait=PATIENCE_OF_TESTS)
        server, _ = await started(agent, "srv-cached")
        assert write_as(server, folder / "shaders") == ""
        assert server.restart_reasons == ()


async def test_a_server_cannot_leave_anything_in_that_of_another(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-one.gguf")
    toy_model(models / "srv-two.gguf")
    async with make_agent() as agent:
        one, of_one = await started(agent, "srv-one")
        two, of_two = await started(agent, "srv-two")
        assert write_as(one, of_one / "x") == ""
        assert write_as(one, of_two / "x") == "Read-only file system"
        assert write_as(two, of_one / "x") == "Read-only file system"
        assert write_as(one, of_one.parent / "x") == "Read-only file system"


async def test_the_longest_name_of_a_model_is_a_folder_too(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / f"srv-{'long' * 60}.gguf")
    async with make_agent() as agent:
        (model_id,) = agent.registry.models
        assert len(model_id) == MAX_ID_LENGTH
        server, folder = await started(agent, model_id)
        assert folder.name == model_id
        assert write_as(server, folder / "x") == ""
