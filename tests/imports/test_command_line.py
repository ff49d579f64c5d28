"""llama-server command lines as people write them: what each becomes, and what is said of the rest."""

import re
from dataclasses import dataclass
from typing import Any

import pytest

from magi_agent.imports.command_line import read_command_line
from magi_agent.imports.imported import ImportedModel, InvalidImport
from magi_agent.runtime_settings.settings import LoraAdapter


def imported(text: str, *allowed_flags: str) -> ImportedModel:
    [model] = read_command_line(text, allowed_flags).models
    return model


def said(model: ImportedModel) -> dict[str, Any]:
    return dict(model.settings.said())


def reasons(model: ImportedModel) -> dict[str, str]:
    return {entry.source: entry.reason for entry in model.left_out}


def became(model: ImportedModel) -> dict[str, str]:
    return {entry.source: entry.became for entry in model.carried}


@dataclass(frozen=True)
class Example:
    """A line, and what it should become."""

    text: str
    settings: dict[str, Any]
    model: str | None = None
    left_out: tuple[str, ...] = ()
    suggested: tuple[str, ...] = ()


EXAMPLES = {
    "smallest": Example("llama-server -m /models/x.gguf", {}, "/models/x.gguf"),
    "short forms": Example(
        "llama-server -m x.gguf -c 8192 -ngl 99 -t 8 -tb 16 -b 2048 -ub 512 -np 4 -ctk q8_0 -ctv q8_0",
        {
            "n_gpu_layers": 99,
            "ctx_size": 8192,
            "n_threads": 8,
            "batch_size": 2048,
            "n_threads_batch": 16,
            "ubatch_size": 512,
            "parallel_slots": 4,
            "cache_type_k": "q8_0",
            "cache_type_v": "q8_0",
        },
        "x.gguf",
    ),
    "bare flash attention, as it was": Example("./llama-server -fa -m x.gguf", {"flash_attention": "on"}, "x.gguf"),
    "flash attention with a value": Example("llama-server -m x.gguf -fa off", {"flash_attention": "off"}, "x.gguf"),
    "flash attention in other words": Example("llama-server -fa 1 -m x.gguf", {"flash_attention": "on"}, "x.gguf"),
    "all layers": Example("llama-server -m x.gguf --gpu-layers all", {"n_gpu_layers": -1}, "x.gguf"),
    "as many layers as fit": Example("llama-server -m x.gguf -ngl auto", {}, "x.gguf"),
    "more layers than there are": Example("llama-server -m x.gguf -ngl 999", {"n_gpu_layers": 999}, "x.gguf"),
    "switches": Example(
        "llama-server -m x.gguf --no-mmap --mlock --jinja --metrics -cb",
        {"mmap": False, "mlock": True},
        "x.gguf",
    ),
    "load mode": Example("llama-server -m x.gguf -lm mmap", {"mmap": True}, "x.gguf"),
    "no load mode": Example("llama-server -m x.gguf --load-mode none", {"mmap": False}, "x.gguf"),
    "locked": Example("llama-server -m x.gguf -lm mlock", {"mmap": False, "mlock": True}, "x.gguf"),
    "mapped and locked": Example("llama-server -m x.gguf -lm mmap+mlock", {"mmap": True, "mlock": True}, "x.gguf"),
    "load mode, as it is anyway": Example("LLAMA_ARG_LOAD_MODE=auto llama-server -m x.gguf", {}, "x.gguf"),
    "load mode that is no setting": Example("llama-server -m x.gguf -lm dio", {}, "x.gguf", ("-lm dio",)),
    "several GPUs": Example(
        "llama-server -m x.gguf -sm row -ts 3,1 -mg 1",
        {"split_mode": "row", "tensor_split": (3.0, 1.0), "main_gpu": 1},
        "x.gguf",
    ),
    "tensor split with slashes": Example("llama-server -m x.gguf -ts 0.5/0.5", {"tensor_split": (0.5, 0.5)}, "x.gguf"),
    "experts on the CPU": Example("llama-server -m x.gguf -ncmoe 24", {"n_cpu_moe": 24}, "x.gguf"),
    "all experts on the CPU": Example("llama-server -m x.gguf -cmoe", {"n_cpu_moe": 999}, "x.gguf"),
    "speculation, as it was": Example(
        "llama-server -m /m/x.gguf -md /m/d.gguf -ngld 99 --draft-max 16 --draft-min 4 --draft-p-min 0.6",
        {"draft_model": "/m/d.gguf", "draft_n_gpu_layers": 99, "draft_max": 16, "draft_min": 4},
        "/m/x.gguf",
        ("--draft-p-min 0.6",),
        ("--draft-p-min=0.6",),
    ),
    "speculation, oldest name": Example("llama-server -m x.gguf --draft 8", {"draft_max": 8}, "x.gguf"),
    "speculation, as it is": Example(
        "llama-server -m x.gguf --spec-draft-model /m/d.gguf --spec-draft-n-max 3 --spec-type draft-simple",
        {"draft_model": "/m/d.gguf", "draft_max": 3},
        "x.gguf",
    ),
    "vision": Example(
        "llama-server -m gemma.gguf --mmproj /m/mmproj-f16.gguf", {"projector": "/m/mmproj-f16.gguf"}, "gemma.gguf"
    ),
    "no vision": Example("llama-server -m gemma.gguf --no-mmproj", {"projector": "none"}, "gemma.gguf"),
    "embeddings": Example(
        "llama-server -m nomic.gguf --embedding --pooling mean -ub 8192",
        {"mode": "embedding", "pooling": "mean", "ubatch_size": 8192},
        "nomic.gguf",
    ),
    "reranking, whichever comes first": Example(
        "llama-server -m bge.gguf --reranking --embeddings --pooling rank",
        {"mode": "rerank", "pooling": "rank"},
        "bge.gguf",
    ),
    "rope": Example(
        "llama-server -m x.gguf --rope-scaling yarn --rope-scale 4 --yarn-orig-ctx 32768 --rope-freq-base 1e6",
        {"rope_scaling": "yarn", "rope_scale": 4.0, "rope_freq_base": 1e6, "yarn_orig_ctx": 32768},
        "x.gguf",
    ),
    "thinking": Example(
        "llama-server -m x.gguf --reasoning-format deepseek --reasoning-budget 0 -rea off",
        {"reasoning": "off", "reasoning_format": "deepseek", "reasoning_budget": 0},
        "x.gguf",
    ),
    "LoRA adapters": Example(
        "llama-server -m x.gguf --lora /m/a.gguf --lora-scaled /m/b.gguf 0.5 --lora-scaled /m/c.gguf:2,/m/d.gguf:-1",
        {
            "lora": (
                LoraAdapter("/m/a.gguf"),
                LoraAdapter("/m/b.gguf", 0.5),
                LoraAdapter("/m/c.gguf", 2.0),
                LoraAdapter("/m/d.gguf", -1.0),
            )
        },
        "x.gguf",
    ),
    "one adapter of two": Example(
        "llama-server -m x.gguf --lora a.gguf --lora /m/b.gguf",
        {"lora": (LoraAdapter("/m/b.gguf"),)},
        "x.gguf",
        ("--lora a.gguf",),
    ),
    "NUMA, and other names": Example(
        "llama-server -m x.gguf --numa distribute --alias gpt-4o,gpt-3.5-turbo",
        {"numa": "distribute", "aliases": ("gpt-4o", "gpt-3.5-turbo")},
        "x.gguf",
    ),
    "a template": Example(
        "llama-server -m x.gguf --chat-template '{% for m in messages %}{{ m }}{% endfor %}'",
        {"chat_template": "{% for m in messages %}{{ m }}{% endfor %}"},
        "x.gguf",
    ),
    "open to the world": Example(
        "llama-server -m x.gguf --host 0.0.0.0 --port 9999 --api-key sk-1234",
        {},
        "x.gguf",
        ("--host 0.0.0.0", "--api-key (hidden)"),
    ),
    "from Hugging Face": Example(
        "llama-server -hf unsloth/Qwen3-8B-GGUF:Q4_K_M -c 0",
        {"ctx_size": 0},
        None,
        ("-hf unsloth/Qwen3-8B-GGUF:Q4_K_M",),
    ),
    "from an URL": Example(
        "llama-server -mu https://user:pass@example.org/x.gguf?token=abc#z",
        {},
        None,
        ("-mu https://example.org/x.gguf?…",),
    ),
    "underscores and equals signs": Example(
        "llama-server --model=x.gguf --ctx_size=4096 --n_gpu_layers 20",
        {"ctx_size": 4096, "n_gpu_layers": 20},
        "x.gguf",
    ),
    "given twice": Example(
        "llama-server -m a.gguf -c 1 -m b.gguf --ctx-size 2 --temp 1 --temp 2",
        {"ctx_size": 2},
        "b.gguf",
        ("-m a.gguf", "-c 1", "--temp 1", "--temp 2"),
        ("--temp=2",),
    ),
    "more than what settings say": Example(
        "llama-server -m x.gguf --temp 0.6 --top-k 20 -n -1 -nkvo --no-warmup --slots",
        {},
        "x.gguf",
        ("--temp 0.6", "--top-k 20", "-n -1", "-nkvo", "--no-warmup"),
        ("--temp=0.6", "--top-k=20", "--n-predict=-1", "--no-kv-offload", "--no-warmup"),
    ),
    "what adds up": Example(
        r"""llama-server -m x.gguf -ot "blk\.[0-9]\.ffn=CPU" -ot '\.exps=CPU'""",
        {},
        "x.gguf",
        (r"-ot blk\.[0-9]\.ffn=CPU", r"-ot \.exps=CPU"),
        (r"--override-tensor=blk\.[0-9]\.ffn=CPU", r"--override-tensor=\.exps=CPU"),
    ),
    "JSON": Example(
        """llama-server -m x.gguf --chat-template-kwargs '{"enable_thinking": false}'""",
        {},
        "x.gguf",
        ('--chat-template-kwargs {"enable_thinking": false}',),
        ('--chat-template-kwargs={"enable_thinking": false}',),
    ),
    "JSON that lost its quotes": Example(
        """llama-server -m x.gguf --chat-template-kwargs {"a":1,"b":2} -c 1""",
        {"ctx_size": 1},
        "x.gguf",
        ("--chat-template-kwargs {a:1,b:2}",),
    ),
    "values that are none": Example(
        "llama-server -m x.gguf -c 8k -ctk q9_9 -sm diagonal --main-gpu -1 -b 0 -t 4",
        {"n_threads": 4},
        "x.gguf",
        ("-c 8k", "-ctk q9_9", "-sm diagonal", "--main-gpu -1", "-b 0"),
    ),
    "values that do not go together": Example(
        "llama-server -m x.gguf --draft-max 4 --draft-min 8 --chat-template chatml --chat-template-file /t.jinja",
        {"draft_max": 4, "chat_template": "chatml"},
        "x.gguf",
        ("--draft-min 8", "--chat-template-file /t.jinja"),
    ),
    "values that are missing": Example(
        "llama-server -m x.gguf -c -ngl 5 --threads", {"n_gpu_layers": 5}, "x.gguf", ("-c", "--threads")
    ),
    "what nobody knows": Example(
        "llama-server -m x.gguf --frobnicate 7 -zz top --quux stray more",
        {},
        "x.gguf",
        ("--frobnicate 7", "-zz top", "more", "--quux stray"),
        ("--frobnicate=7", "--quux=stray"),
    ),
    "environment": Example(
        "LLAMA_ARG_CTX_SIZE=4096 LLAMA_ARG_NO_MMAP=0 LLAMA_ARG_FLASH_ATTN=true LLAMA_ARG_MODEL=/m/x.gguf"
        " LLAMA_ARG_MLOCK=0 CUDA_VISIBLE_DEVICES=0,1 HF_TOKEN=hf_abc llama-server -c 8192",
        {"ctx_size": 8192, "mmap": False, "flash_attention": "on", "mlock": False},
        "/m/x.gguf",
        ("LLAMA_ARG_CTX_SIZE=4096", "CUDA_VISIBLE_DEVICES=0,1", "HF_TOKEN (hidden)"),
    ),
    "behind others": Example(
        "exec sudo -E -u llama-server /usr/bin/env LLAMA_ARG_THREADS=4 nice -n 10 taskset -c 0-7"
        " /opt/llama.cpp/build/bin/llama-server -m x.gguf",
        {"n_threads": 4, "cpu_affinity": "0-7"},
        "x.gguf",
        ("sudo -E -u llama-server", "nice -n 10"),
    ),
    "in the background": Example(
        "nohup ./llama-server -m x.gguf > server.log 2>&1 &", {}, "x.gguf", ("> server.log", "2>&1")
    ),
    "over several lines": Example(
        "$ llama-server \\\n    -m /m/x.gguf \\\n    # how much\n    -c 4096 \\\n    -ngl 99\n".removeprefix("$ "),
        {"ctx_size": 4096, "n_gpu_layers": 99},
        "/m/x.gguf",
    ),
    "over several lines without backslashes": Example(
        "llama-server\n  -m /m/x.gguf\n  -c 4096\n", {"ctx_size": 4096}, "/m/x.gguf"
    ),
    "PowerShell": Example(
        "C:\\llama\\llama-server.exe `\r\n  -m C:\\models\\x.gguf `\r\n  -c 4096",
        {"ctx_size": 4096},
        "C:\\models\\x.gguf",
    ),
    "only options": Example("-c 4096 -ngl 99", {"ctx_size": 4096, "n_gpu_layers": 99}),
    "what a shell would fill in": Example(
        "llama-server -m $HOME/models/x.gguf -t $(nproc) -c ${CTX:-4096} --port $PORT --host $HOST $EXTRA -ngl `cat n`",
        {},
        "x.gguf",
        ("-t $(nproc)", "-c ${CTX:-4096}", "--host $HOST", "$EXTRA", "-ngl `cat n`"),
    ),
    "a model in a variable": Example("llama-server -m $MODEL -c 1", {"ctx_size": 1}, None, ("-m $MODEL",)),
    "through a shell, as it logs in": Example(
        """bash -lc "cd /opt && exec llama-server -m '/m/a b.gguf' -c 1" """, {"ctx_size": 1}, "/m/a b.gguf"
    ),
    "through a shell, as somebody": Example(
        """sudo -u me A_TOKEN=x bash -c 'LLAMA_ARG_THREADS=2 llama-server -m x.gguf' > log""",
        {"n_threads": 2},
        "x.gguf",
        ("sudo -u me", "A_TOKEN=(hidden)", "> log"),
    ),
    "behind many": Example(
        "time timeout -k 5 60 stdbuf -oL gosu me screen -dmS llama-server numactl --interleave all --membind=0"
        " systemd-run --user --scope -p MemoryMax=1G -- llama-server -m x.gguf",
        {},
        "x.gguf",
        ("timeout -k 5 60", "gosu me", "numactl --interleave all --membind=0", "systemd-run"),
    ),
    "in a container": Example(
        "docker run --gpus all -d --rm --name llama-server -v /srv/llama.cpp/models:/models -p8080:8080"
        " -e LLAMA_ARG_THREADS=4 --env=LLAMA_API_KEY=geheim ghcr.io/ggml-org/llama.cpp:server-cuda"
        " -m /models/x.gguf -c 512 --host 0.0.0.0 --mmproj /models/p.gguf -ngl 99",
        {"n_threads": 4, "ctx_size": 512, "n_gpu_layers": 99},
        "x.gguf",
        (
            "docker run … ghcr.io/ggml-org/llama.cpp:server-cuda",
            "LLAMA_API_KEY (hidden)",
            "--host 0.0.0.0",
            "--mmproj /models/p.gguf",
        ),
    ),
    "in a container that has more": Example(
        "podman run -it -v m:/m ghcr.io/ggml-org/llama.cpp:full --server -m /m/x.gguf -c 1",
        {"ctx_size": 1},
        "x.gguf",
        ("podman run … ghcr.io/ggml-org/llama.cpp:full",),
    ),
    "from a unit file": Example(
        "ExecStart=/usr/local/bin/llama-server -m /m/x.gguf \\\n  -c 4096", {"ctx_size": 4096}, "/m/x.gguf"
    ),
    "the router itself": Example(
        "llama-server --models-dir /models --models-max 2 --no-models-autoload",
        {},
        None,
        ("--models-dir /models", "--models-max 2", "--no-models-autoload"),
    ),
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_examples(example: Example) -> None:
    model = imported(example.text)
    assert said(model) == example.settings
    assert model.model_path == example.model
    assert sorted(reasons(model)) == sorted(example.left_out)
    assert model.suggested_flags == example.suggested


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not re.search("container|shell,|many", name)])
def test_nothing_is_lost_silently(name: str) -> None:
    text = EXAMPLES[name].text
    model = imported(text)
    reported = " ".join((*became(model), *reasons(model))).replace("_", "-")
    for word in re.split(r"[\s=]+", text.replace("_", "-")):
        if re.match(r"--?[a-z]", word):
            assert word in reported, word


def test_what_needs_nothing_is_said_to() -> None:
    model = imported("/opt/b/llama-server -m x.gguf --jinja --port 1 --host 127.0.0.1 --metrics -ngl auto")
    assert all(text.startswith("nothing: ") for source, text in became(model).items() if source != "-m x.gguf")
    assert set(became(model)) == {
        "/opt/b/llama-server",
        "-m x.gguf",
        "--jinja",
        "--port 1",
        "--host 127.0.0.1",
        "--metrics",
        "-ngl auto",
    }
    assert not model.left_out


def test_what_was_carried_is_said() -> None:
    model = imported("llama-server -m x.gguf --no-mmap -ts 3,1 -c 4096 -a one,two")
    assert became(model) == {
        "-c 4096": "ctx_size = 4096",
        "--no-mmap": "mmap = false",
        "-ts 3,1": "tensor_split = [3.0, 1.0]",
        "-a one,two": 'aliases = ["one", "two"]',
        "-m x.gguf": "the model file x.gguf",
    }


def test_the_default_layers_undo_what_was_said_before() -> None:
    model = imported("llama-server -m x.gguf -ngl 20 -ngl auto")
    assert said(model) == {}
    assert "-ngl 20" in reasons(model)


def test_reasons_say_what_to_do() -> None:
    model = imported("llama-server -m x.gguf --host 0.0.0.0 --temp 1 -c 8k -md d.gguf --sleep-idle-seconds 9")
    said_why = reasons(model)
    assert "servers.llama_server_host" in said_why["--host 0.0.0.0"]
    assert "--temp=1" in said_why["--temp 1"]
    assert "servers.allowed_flags" in said_why["--temp 1"]
    assert said_why["-c 8k"].startswith("ctx_size: ")
    assert said_why["-md d.gguf"] == "draft_model: must be an absolute path without '..'"
    assert "idle_timeout_seconds" in said_why["--sleep-idle-seconds 9"]
    said_why = reasons(imported("CUDA_VISIBLE_DEVICES=1 prime-run llama-server -m x.gguf"))
    assert "the setting gpus" in said_why["CUDA_VISIBLE_DEVICES=1"]
    assert "the setting gpus" in said_why["prime-run"]


def test_flags_that_are_allowed_become_extra_flags() -> None:
    model = imported("llama-server -m x.gguf --temp 1 -n 5 -nkvo --top-k 3", "--temp", "--predict", "--no-kv-offload")
    assert said(model) == {"extra_flags": ("--temp=1", "--predict=5", "--no-kv-offload")}
    assert model.suggested_flags == ("--top-k=3",)


@pytest.mark.parametrize("flag", ["--api-key", "--hf-token", "--log-file", "--rpc", "--tools", "--gpt-oss-20b-default"])
def test_what_nobody_may_set_is_not_even_suggested(flag: str) -> None:
    model = imported(f"llama-server -m x.gguf {flag} x", flag)
    assert said(model) == {}
    assert model.suggested_flags == ()
    assert any(source.startswith(flag) for source in reasons(model))


def test_an_extra_flag_that_could_not_be_one_is_left_out() -> None:
    model = imported("llama-server -m x.gguf --samplers 'top_k;temperature'", "--samplers")
    assert said(model) == {}
    assert "';'" in reasons(model)["--samplers top_k;temperature"]


@pytest.mark.parametrize(
    "text",
    [
        "llama-server -m x.gguf --api-key HUSH",
        "llama-server -m x.gguf --api-key=HUSH",
        "llama-server -m x.gguf --api-key -HUSH",
        "llama-server -m x.gguf --api-key two HUSH words",
        'llama-server -m x.gguf --api-key "$X HUSH"',
        "llama-server -m x.gguf -hft HUSH",
        "llama-server -m x.gguf --some-token -HUSH",
        "llama-server -m x.gguf --password=HUSH",
        "LLAMA_API_KEY=HUSH llama-server -m x.gguf",
        "OPENAI_API_KEY=HUSH MY_PASSWORD=HUSH llama-server -m x.gguf",
        "export HF_TOKEN=HUSH\nllama-server -m x.gguf",
        "HF_TOKEN=HUSH\nllama-server -m x.gguf",
        "curl -H 'Authorization: HUSH' http://x; llama-server -m x.gguf",
        "docker run -e HF_TOKEN=HUSH ghcr.io/ggml-org/llama.cpp:server -m x.gguf --api-key HUSH",
        "systemd-run -E HF_TOKEN=HUSH llama-server -m x.gguf",
        "systemd-run --setenv=HF_TOKEN=HUSH llama-server -m x.gguf",
        "llama-server -m x.gguf -mu https://me:HUSH@example.org/y.gguf?token=HUSH",
        "llama-server -m x.gguf -mu https://me:a@HUSH@example.org/y.gguf",
        "llama-server -m x.gguf -mu https://me:a?HUSH@example.org/y.gguf",
        "llama-server -m x.gguf -hft=HUSH",
        "llama-server -m x.gguf -apikey=HUSH",
        "llama-server -m x.gguf -apikey=a HUSH",
        "llama-server -m x.gguf --some-token ${X:-HUSH}",
        "llama-server -m x.gguf -t $(GITHUB_PAT=HUSH ask)",
        "llama-server -m x.gguf -t $(GITHUB_PAT='a HUSH' ask)",
        "GITHUB_PAT=HUSH llama-server -m x.gguf",
        "SOMETHING=HUSH llama-server -m x.gguf",
        "export GITHUB_PAT=HUSH\nllama-server -m x.gguf",
    ],
)
def test_secrets_are_never_shown(text: str) -> None:
    read = read_command_line(text)
    assert "HUSH" not in repr(read)
    assert read.models[0].left_out or read.left_out


def test_more_names_than_there_may_be() -> None:
    names = [f"n{number}" for number in range(70)]
    model = imported(f"llama-server -m x.gguf -a {','.join(names[:60])} -a {','.join(names[50:])}")
    assert said(model) == {"aliases": tuple(names[:64])}
    assert len(model.left_out) == 1


def test_a_shell_may_be_told_to_start_several() -> None:
    read = read_command_line("bash -c 'echo hi'\nbash -c 'llama-server -m a.gguf & llama-server -m b.gguf'")
    assert [model.name for model in read.models] == ["a", "b"]
    assert [entry.source for entry in read.left_out] == ["echo …"]


def test_a_start_script_with_several_servers() -> None:
    read = read_command_line(
        "#!/bin/bash\nset -e\nexport LLAMA_ARG_THREADS=4\ncd /opt/llama\nMODELS=/m\n"
        "./llama-server -m /m/a.gguf -c 1 &\nsleep 5 && ./llama-server -m /m/b.gguf -c 2 | tee log\nwait\n"
    )
    assert [(model.name, said(model)) for model in read.models] == [
        ("a", {"n_threads": 4, "ctx_size": 1}),
        ("b", {"n_threads": 4, "ctx_size": 2}),
    ]
    assert [entry.source for entry in read.left_out] == ["set …", "cd …", "MODELS=…", "sleep …", "| tee …", "wait"]


@pytest.mark.parametrize(
    ("text", "name", "reference"),
    [
        ("llama-server -m /m/Qwen3-8B.Q4_K_M.gguf -a gpt", "Qwen3-8B.Q4_K_M", "/m/Qwen3-8B.Q4_K_M.gguf"),
        ("llama-server -hf a/b-GGUF:Q8_0", "a/b-GGUF:Q8_0", "a/b-GGUF:Q8_0"),
        ("llama-server -hf a/b-GGUF -hff b-q8.gguf", "a/b-GGUF/b-q8.gguf", "a/b-GGUF/b-q8.gguf"),
        ("llama-server -c 1", "", ""),
    ],
)
def test_names(text: str, name: str, reference: str) -> None:
    model = imported(text)
    assert (model.name, model.reference) == (name, reference)


@pytest.mark.parametrize(
    "text",
    [
        "ollama serve",
        "vllm serve Qwen/Qwen3-8B --port 8000",
        "echo llama-server -m x.gguf",
        "cd /opt/llama-server",
        "pkill llama-server",
        "sudo systemctl restart llama-server",
        "sudo -n pkill -f llama-server",
        "sudo -u root apt install llama-server",
        "command -v llama-server",
        "timeout 5 curl llama-server",
        "ssh host llama-server -m x.gguf",
        "bash -c 'echo llama-server'",
        "llama-cli -m x.gguf",
        "docker run --rm nginx -m x.gguf",
        "docker run ghcr.io/ggml-org/llama.cpp:full bash -c x",
        "docker compose up llama-server",
        "bash start.sh",
        "A=b",
    ],
)
def test_what_starts_no_server_is_refused(text: str) -> None:
    with pytest.raises(InvalidImport, match="no llama-server command"):
        read_command_line(text)
