"""The toy model is one that a real llama-server loads."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.conftest import MakeToyModel, PortRanges


def _ask(url: str, body: dict[str, object] | None = None) -> dict[str, object]:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(url, data, timeout=10) as answer:
        return dict(json.load(answer))


def _is_healthy(url: str) -> bool:
    try:
        return _ask(f"{url}/health") == {"status": "ok"}
    except (urllib.error.URLError, ConnectionError):
        return False


def _await_health(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while not _is_healthy(url):
        assert server.poll() is None, "llama-server ended at once"
        assert time.monotonic() < deadline, "llama-server is not ready"
        time.sleep(0.05)


def test_a_real_llama_server_answers_with_as_many_tokens_as_asked(
    tmp_path: Path, toy_model: MakeToyModel, llama_server: Path, unused_ports: PortRanges
) -> None:
    port = str(unused_ports()[0])
    model = toy_model(tmp_path / "toy.gguf", name="other", seed=2)
    command: list[str | Path] = [
        llama_server,
        "--model",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--ctx-size",
        "256",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _await_health(f"http://127.0.0.1:{port}", server)
            answer = _ask(f"http://127.0.0.1:{port}/completion", {"prompt": "hello", "n_predict": 20})
        finally:
            server.kill()

    assert answer["tokens_predicted"] == 20
    content = answer["content"]
    assert isinstance(content, str)
    assert len(content) == 20
    assert content.isascii()


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(
    tmp_path: Path, toy_model: MakeToyModel
) -> None:
    first = toy_model(tmp_path / "first.gguf", name="same").read_bytes()

    assert toy_model(tmp_path / "second.gguf", name="same").read_bytes() == first
    assert toy_model(tmp_path / "third.gguf", name="same", seed=3).read_bytes() != first
