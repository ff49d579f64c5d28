"""Runtime settings reach the real llama-server: what it says of itself is what was chosen."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from magi_agent.errors import SettingsNotUsable
from magi_agent.runtime_settings.settings import LoraAdapter, RuntimeSettings
from magi_agent.servers.pictures import Server
from magi_agent.vocabulary import ServerState
from tests.conftest import MakeToyModel, SystemdUser
from tests.discovery.model_files import model_bytes, write_file
from tests.servers.conftest import MakeAgent
from tests.servers.serving_agent import PATIENCE_OF_TESTS, ServingAgent
from tests.servers.system import complete, systemctl
from tests.servers.toy_adapter import write_toy_adapter

TALKATIVE = "--verbosity=4"
"""Has a llama-server say how it is set up."""
FLAGS = "--verbosity --no-warmup --temp --chat-template-kwargs"
ODD = 'it\'s $HOME; ${x} "100%" größe 模型'


async def asked(server: Server, path: str, body: dict[str, Any] | None = None) -> Any:
    """What a server answers."""
    async with (
        aiohttp.ClientSession() as session,
        session.request("GET" if body is None else "POST", f"{server.url}{path}", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        return await response.json()


async def log_of(systemd_user: SystemdUser, agent: ServingAgent, model_id: str) -> str:
    """What a server that is ready has written since it was started."""
    command = ["journalctl", "--output=cat", "--no-pager", f"--directory={systemd_user.journal}"]
    command.append(f"_SYSTEMD_INVOCATION_ID={agent.unit(model_id).invocation_id}")
    deadline = time.monotonic() + PATIENCE_OF_TESTS
    while True:
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        if b"listening on http" in output:
            return " ".join(output.decode().split())
        assert time.monotonic() < deadline, output.decode()
        await asyncio.sleep(0.05)


def knows(llama_server: Path, option: str) -> bool:
    """Whether this build has an option."""
    told = subprocess.run([llama_server, "--help"], check=True, capture_output=True, text=True, timeout=60)
    return option in told.stdout


def by_load_mode(llama_server: Path) -> bool:
    """Whether this build calls ``--mmap`` and ``--mlock`` deprecated."""
    return knows(llama_server, "--load-mode")


async def test_what_decides_on_memory_and_computing_takes_effect(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, systemd_user: SystemdUser, llama_server: Path
) -> None:
    toy_model(models / "srv-reach-all.gguf")
    async with make_agent(allowed_flags=FLAGS) as agent:
        await agent.choose(
            "srv-reach-all",
            RuntimeSettings(
                n_gpu_layers=-1,
                ctx_size=1024,
                n_threads=1,
                n_threads_batch=2,
                batch_size=64,
                ubatch_size=32,
                parallel_slots=2,
                flash_attention="on",
                cache_type_k="bf16",
                cache_type_v="f32",
                mmap=False,
                mlock=True,
                split_mode="none",
                tensor_split=(1.0, 0.0),
                main_gpu=0,
                n_cpu_moe=0,
                rope_scaling="linear",
                rope_scale=2.0,
                rope_freq_base=20_000.0,
                yarn_orig_ctx=256,
                reasoning_budget=100,
                numa="distribute",
                extra_flags=(TALKATIVE,),
            ),
        )
        server = await agent.ready("srv-reach-all")
        assert server.restart_reasons == ()
        log = await log_of(systemd_user, agent, "srv-reach-all")
        for line in (
            "n_threads = 1 (n_threads_batch = 2)",
            "n_seq_max = 2",
            "n_ctx = 1024",
            "n_batch = 64",
            "n_ubatch = 32",
            "flash_attn = enabled",
            "K (bf16)",
            "V (f32)",
            "load_mode = mlock" if by_load_mode(llama_server) else "mmap = false",
            "freq_base = 20000.0",
            "freq_scale = 0.5",
            "rope scaling = linear",
        ):
            assert line in log, line
        assert "DEPRECATED" not in log
        assert len(await asked(server, "/slots")) == 2
        assert (await asked(server, "/props"))["default_generation_settings"]["n_ctx"] == 512
        assert len(await complete(server.url or "")) == 4


async def test_the_other_way_round_takes_effect_too(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, systemd_user: SystemdUser, llama_server: Path
) -> None:
    toy_model(models / "srv-reach-other.gguf")
    async with make_agent(allowed_flags=FLAGS) as agent:
        await agent.choose(
            "srv-reach-other",
            RuntimeSettings(
                n_gpu_layers=0,
                ctx_size=0,
                parallel_slots=1,
                flash_attention="off",
                mmap=True,
                mlock=False,
                rope_freq_scale=0.25,
                reasoning_format="none",
                projector="none",
                extra_flags=(TALKATIVE, "--no-warmup", "--temp=0.5"),
            ),
        )
        server = await agent.ready("srv-reach-other")
        assert server.restart_reasons == ()
        log = await log_of(systemd_user, agent, "srv-reach-other")
        mapped = "load_mode = mmap" if by_load_mode(llama_server) else "mmap = true"
        for line in ("n_ctx = 512", "flash_attn = disabled", mapped, "freq_scale = 0.25"):
            assert line in log, line
        assert "DEPRECATED" not in log
        assert "warming up" not in log
        props = await asked(server, "/props")
        assert props["total_slots"] == 1
        assert props["default_generation_settings"]["params"]["temperature"] == 0.5


@pytest.mark.parametrize(
    ("said", "pooling", "embeds", "ranks"),
    [
        (RuntimeSettings(), None, False, False),
        (RuntimeSettings(mode="embedding", pooling="mean"), None, True, False),
        (RuntimeSettings(mode="rerank"), None, True, True),
        # What a model is made for holds where nobody chose.
        (RuntimeSettings(), 3, True, False),
        (RuntimeSettings(), 4, True, True),
        (RuntimeSettings(mode="generate"), 3, False, False),
    ],
)
async def test_a_server_is_for_what_was_chosen_or_the_model_is_made_for(
    make_agent: MakeAgent,
    models: Path,
    toy_model: MakeToyModel,
    said: RuntimeSettings,
    pooling: int | None,
    embeds: bool,
    ranks: bool,
) -> None:
    toy_model(models / "srv-mode.gguf", metadata=None if pooling is None else {"llama.pooling_type": pooling})
    async with make_agent() as agent:
        await agent.choose("srv-mode", said)
        server = await agent.ready("srv-mode")
        assert server.restart_reasons == ()
        assert await _can(server, "/embedding", {"content": "a"}) == embeds
        assert await _can(server, "/rerank", {"query": "a", "documents": ["b", "c"]}) == ranks


async def _can(server: Server, path: str, body: dict[str, Any]) -> bool:
    async with aiohttp.ClientSession() as session, session.post(f"{server.url}{path}", json=body) as response:
        assert response.status in (200, 501), await response.text()
        return response.status == 200


async def test_a_server_answers_to_its_id_and_its_aliases(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-aliases.gguf")
    async with make_agent() as agent:
        await agent.choose("srv-aliases", RuntimeSettings(aliases=("gpt-4o", "org/model:tag@1")))
        server = await agent.ready("srv-aliases")
        [listed] = (await asked(server, "/v1/models"))["data"]
        assert set(listed["aliases"]) == {"srv-aliases", "gpt-4o", "org/model:tag@1"}


TEMPLATE = (
    "{% if enable_thinking %}THINK {% else %}PLAIN {% endif %}{% for m in messages %}"
    '<|it\'s $HOME; ${x} "100%" größe \\ 模型|>{{ m.content }}{% endfor %}'
)


@pytest.mark.parametrize(("reasoning", "word"), [("on", "THINK"), ("off", "PLAIN")])
async def test_a_chat_template_of_any_characters_takes_effect_and_so_does_reasoning(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, reasoning: Any, word: str
) -> None:
    toy_model(models / "srv-template.gguf")
    async with make_agent() as agent:
        await agent.choose("srv-template", RuntimeSettings(chat_template=TEMPLATE, reasoning=reasoning))
        server = await agent.ready("srv-template")
        assert server.restart_reasons == ()
        assert (await asked(server, "/props"))["chat_template"] == TEMPLATE
        applied = await asked(server, "/apply-template", {"messages": [{"role": "user", "content": "hi"}]})
        assert applied["prompt"] == f'{word} <|it\'s $HOME; ${{x}} "100%" größe \\ 模型|>hi'


async def test_a_chat_template_is_read_from_a_file_of_any_name(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-template-file.gguf")
    file = models / ODD / f"{ODD}.jinja"
    file.parent.mkdir()
    file.write_text("FROM\nA FILE{% for m in messages %} {{ m.content }}{% endfor %}")
    async with make_agent() as agent:
        await agent.choose("srv-template-file", RuntimeSettings(chat_template_file=str(file)))
        server = await agent.ready("srv-template-file")
        assert server.restart_reasons == ()
        applied = await asked(server, "/apply-template", {"messages": [{"role": "user", "content": "hi"}]})
        assert applied["prompt"] == "FROM\nA FILE hi"


async def test_adapters_are_loaded_each_with_its_scale(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-adapted.gguf")
    first = write_toy_adapter(models / "it's größe 100% %n adapter.gguf")
    second = write_toy_adapter(models / "other.gguf")
    async with make_agent() as agent:
        assert set(agent.registry.models) == {"srv-adapted"}, "an adapter is no model"
        adapters = (LoraAdapter(str(first), -0.5), LoraAdapter(str(second)))
        await agent.choose("srv-adapted", RuntimeSettings(lora=adapters))
        server = await agent.ready("srv-adapted")
        assert server.restart_reasons == ()
        loaded = [(one["path"], one["scale"]) for one in await asked(server, "/lora-adapters")]
        assert loaded == [(str(first), -0.5), (str(second), 1.0)]
        assert len(await complete(server.url or "")) == 4


async def test_a_draft_model_drafts(make_agent: MakeAgent, models: Path, toy_model: MakeToyModel) -> None:
    toy_model(models / "srv-drafted.gguf")
    draft = toy_model(models / ODD / "srv-draft.gguf")
    async with make_agent() as agent:
        said = RuntimeSettings(draft_model=str(draft), draft_max=5, draft_min=1, draft_n_gpu_layers=-1)
        await agent.choose("srv-drafted", said)
        server = await agent.ready("srv-drafted")
        assert server.restart_reasons == ()
        answer = await asked(
            server, "/completion", {"prompt": "a", "n_predict": 16, "temperature": 0, "cache_prompt": False}
        )
        assert "draft-simple" in answer["generation_settings"]["speculative.types"]
        # It is the same model, so whatever it drafts is right.
        assert answer["timings"]["draft_n_accepted"] == answer["timings"]["draft_n"] > 0
        assert all(slot["speculative"] for slot in await asked(server, "/slots"))


async def test_a_projector_that_was_found_can_be_left_out(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-seeing.gguf")
    projector = write_file(models / "mmproj-srv-seeing.gguf", model_bytes("clip", texts={"general.type": "mmproj"}))
    async with make_agent() as agent:
        model = agent.registry.model("srv-seeing")
        assert model.facts.projector_path == str(projector)
        found = agent.preparation.launch_of(model, 1)
        await agent.choose("srv-seeing", RuntimeSettings(projector="none"))
        server = await agent.ready("srv-seeing")
        assert not any(entry.startswith("LLAMA_ARG_MMPROJ=") for entry in agent.unit("srv-seeing").environment)
        assert (await asked(server, "/props"))["modalities"]["vision"] is False
        assert found.projector_path == str(projector)
        # Chosen, it is passed on like one that was found; this one is none that a llama-server could load.
        await agent.choose("srv-seeing", RuntimeSettings(projector=str(projector)))
        again = await agent.servers.server("srv-seeing")
        assert again.restart_reasons == (f"projector: runs with the default, should be {projector}",)


CHANGES = [
    (RuntimeSettings(n_gpu_layers=5), ["n-gpu-layers"]),
    (RuntimeSettings(ctx_size=256), ["ctx-size"]),
    (RuntimeSettings(flash_attention="on"), ["flash-attn"]),
    (RuntimeSettings(mmap=False), ["no-mmap"]),
    (RuntimeSettings(mlock=True), ["mlock"]),
    (RuntimeSettings(mlock=False), []),
    (RuntimeSettings(tensor_split=(1.0,)), ["tensor-split"]),
    (RuntimeSettings(mode="embedding"), ["embeddings"]),
    (RuntimeSettings(mode="generate"), []),
    (RuntimeSettings(aliases=("x",)), ["alias"]),
    (RuntimeSettings(chat_template="chatml"), ["chat template"]),
    (RuntimeSettings(chat_template_file="/m/x"), ["chat template file"]),
    (RuntimeSettings(draft_model="/m/x"), ["spec-type", "draft model"]),
    (RuntimeSettings(projector="/m/x"), ["projector"]),
    (RuntimeSettings(projector="none"), []),
    (RuntimeSettings(lora=(LoraAdapter("/m/x"),)), ["lora-scaled"]),
    (RuntimeSettings(extra_flags=("--no-warmup", "--temp=0.5")), ["no-warmup", "temp"]),
    (RuntimeSettings(memory_max=1 << 30, cpu_quota=1.5), ["memory_max", "cpu_quota"]),
    (RuntimeSettings(start_policy="manual", pinned=True, idle_timeout_seconds=5, max_concurrent=1), []),  # type: ignore[arg-type]
]


async def test_each_change_that_a_restart_would_bring_is_a_reason_and_no_other(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, llama_server: Path
) -> None:
    toy_model(models / "srv-changing.gguf")
    by_other_names = {"no-mmap": "load-mode", "mlock": "load-mode"} if by_load_mode(llama_server) else {}
    async with make_agent(allowed_flags=FLAGS) as agent:
        await agent.ready("srv-changing")
        for said, names in CHANGES:
            await agent.choose("srv-changing", said)
            server = await agent.servers.server("srv-changing")
            expected = [by_other_names.get(name, name) for name in names]
            assert [reason.partition(":")[0] for reason in server.restart_reasons] == expected, said
        await agent.choose("srv-changing", RuntimeSettings())
        assert (await agent.servers.server("srv-changing")).restart_reasons == ()


async def test_argv_and_environment_are_the_same_after_a_reload_and_a_restart_of_systemds(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / ODD / "srv-survivor.gguf")
    draft = toy_model(models / ODD / "srv-$1;draft.gguf")
    adapter = write_toy_adapter(models / 'it\'s größe 100% %n "adapter" \\x.gguf')
    said = RuntimeSettings(
        ctx_size=512,
        tensor_split=(1.0, 0.5),
        lora=(LoraAdapter(str(adapter), 0.5),),
        draft_model=str(draft),
        chat_template=TEMPLATE + "  # 'x' %n %% ${HOME}\\n $$ ",
        aliases=("org/model:tag@1+x",),
        extra_flags=('--chat-template-kwargs={"a b": "it\'s 100% %n \\\\ größe"}', "--no-warmup"),
        memory_high=1 << 40,
        cpu_affinity="0-1",
        cpu_quota=2.0,
    )
    async with make_agent(allowed_flags=FLAGS) as agent:
        await agent.choose("srv-survivor", said)
        before = await agent.ready("srv-survivor")
        assert before.restart_reasons == ()
        argv, environment = _of_process(before.pid)
        assert environment["LLAMA_ARG_CHAT_TEMPLATE"] == said.chat_template
        assert environment["LLAMA_ARG_SPEC_DRAFT_MODEL"] == str(draft)
        assert f"{adapter}:0.5" in argv
        assert '{"a b": "it\'s 100% %n \\\\ größe"}' in argv
        await systemctl("daemon-reload")
        os.kill(before.pid or 0, signal.SIGKILL)
        await agent.until(lambda: agent.unit("srv-survivor").n_restarts == 1, "systemd restarts it")
        after = await agent.until_state("srv-survivor", ServerState.READY)
        assert after.pid != before.pid
        assert after.restart_reasons == ()
        again, environment_again = _of_process(after.pid)
        assert again == argv
        for variables in (environment, environment_again):
            # These say which run it is.
            del variables["INVOCATION_ID"], variables["SYSTEMD_EXEC_PID"], variables["JOURNAL_STREAM"]
        assert environment_again == environment
        assert len(await complete(after.url or "")) == 4


def _of_process(pid: int | None) -> tuple[list[str], dict[str, str]]:
    argv, environment = (
        [os.fsdecode(part) for part in Path(f"/proc/{pid}/{name}").read_bytes().rstrip(b"\0").split(b"\0")]
        for name in ("cmdline", "environ")
    )
    return argv, dict(entry.partition("=")[::2] for entry in environment)


@pytest.mark.parametrize(
    ("said", "name", "says"),
    [
        (RuntimeSettings(extra_flags=("--nonsense",)), "extra_flags", "not allowed"),
        (RuntimeSettings(extra_flags=("--temp",)), "extra_flags", "--temp takes a value"),
        (RuntimeSettings(extra_flags=("--host=0.0.0.0",)), "extra_flags", "no extra flag"),
        (RuntimeSettings(draft_model="/etc/hostname"), "draft_model", "outside the model folders"),
        (RuntimeSettings(lora=(LoraAdapter("/m/none.gguf"),)), "lora", "outside the model folders"),
        (RuntimeSettings(binary="canary"), "binary", "not among servers.llama_server_alternatives (none)"),
    ],
)
async def test_what_cannot_be_carried_out_is_refused_before_anything_is_started(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, said: RuntimeSettings, name: str, says: str
) -> None:
    toy_model(models / "srv-refused.gguf")
    async with make_agent(allowed_flags=FLAGS) as agent:
        await agent.choose("srv-refused", said)
        model = agent.registry.model("srv-refused")
        with pytest.raises(SettingsNotUsable, match="srv-refused cannot be started with its settings") as refused:
            await agent.preparation.check(model)
        error = refused.value.details["errors"][0]  # type: ignore[index]  # a list, as the contract says
        assert error["field"] == name
        assert says in error["message"]
        with pytest.raises(SettingsNotUsable):
            await agent.servers.start("srv-refused", by="test", wait=PATIENCE_OF_TESTS)
        # Wanted by a profile or at boot, it is not started either, and the failure says why.
        await agent.desired.wish(["srv-refused"], run=True, by="test")
        server = await agent.until_state("srv-refused", ServerState.COOLDOWN)
        assert server.failure is not None
        assert server.failure.result == "settings"
        assert says in server.failure.message
        assert not agent.manager.units
        # Mended, it starts.
        await agent.choose("srv-refused", RuntimeSettings())
        assert (await agent.ready("srv-refused")).is_ready


async def test_a_running_server_is_not_stopped_for_a_restart_that_cannot_be(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-kept.gguf")
    async with make_agent() as agent:
        before = await agent.ready("srv-kept")
        await agent.choose("srv-kept", RuntimeSettings(draft_model=str(models / "none.gguf")))
        with pytest.raises(SettingsNotUsable, match="there is no such file"):
            await agent.servers.restart("srv-kept", by="test", wait=PATIENCE_OF_TESTS)
        after = await agent.servers.server("srv-kept")
        assert (after.pid, after.state) == (before.pid, ServerState.READY)


async def test_pages_of_other_sites_may_read_nothing_of_a_server(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, llama_server: Path
) -> None:
    if not knows(llama_server, "--cors-origins"):
        pytest.skip("this build lets nobody say which pages may")
    toy_model(models / "srv-origins.gguf")
    async with make_agent() as agent:
        server = await agent.ready("srv-origins")
        assert server.restart_reasons == ()
        allowed = {}
        async with aiohttp.ClientSession() as session:
            for origin in ("https://elsewhere.example", "http://localhost:3000"):
                async with session.get(f"{server.url}/health", headers={"Origin": origin}) as response:
                    allowed[origin] = response.headers.get("Access-Control-Allow-Origin")
        assert allowed["https://elsewhere.example"] not in ("*", "https://elsewhere.example")
        assert allowed["http://localhost:3000"] == "http://localhost:3000"
