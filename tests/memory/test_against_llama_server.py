"""The rules against a real llama-server, which reports its buffers when it is asked to say more."""

import subprocess
import time
from dataclasses import replace
from pathlib import Path

import locations
import psutil
import pytest

from magi_agent.gguf.reading import read_facts
from magi_agent.memory.build import Build, build_of, repacked_types
from magi_agent.memory.estimate import ModelFiles, Surroundings, estimate
from magi_agent.memory.need import MemoryNeed
from magi_agent.memory.reported import Reported, read_report
from magi_agent.runtime_settings.known_options import KnownOptions, read_help
from magi_agent.runtime_settings.passing import passed
from magi_agent.runtime_settings.settings import RuntimeSettings
from tests.memory.toy_architectures import ARCHITECTURES, write_architecture

MIB = 1 << 20
PATIENCE = 60.0
ROUNDED = 0.04 * MIB
"""Sizes are reported in hundredths of a MiB, a line for each of several buffers."""

SETTINGS = {
    "nothing set": RuntimeSettings(),
    "odd context, quantized keys": RuntimeSettings(ctx_size=1000, parallel_slots=1, cache_type_k="q8_0"),
    "slots with caches of their own": RuntimeSettings(ctx_size=1536, parallel_slots=3, ubatch_size=64),
    "without flash attention": RuntimeSettings(ctx_size=512, parallel_slots=2, flash_attention="off"),
    "quantized keys and values": RuntimeSettings(ctx_size=768, cache_type_k="q4_0", cache_type_v="q5_1"),
}


def here() -> Surroundings:
    flags = next(
        (line.partition(":")[2].split() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith(("flags", "Features"))), [],
    )  # fmt: skip
    return Surroundings(Build(repacked=repacked_types(flags)), (), psutil.virtual_memory().total)


def report_of(model: Path, settings: RuntimeSettings, known: KnownOptions, *more: str) -> Reported:
    """Have llama-server load a model, and return what it says of its buffers."""
    given = passed(settings, known)
    assert not given.faults
    command = [str(locations.LLAMA_SERVER.resolve()), "--model", str(model), "--port", "0", "--offline"]
    process = subprocess.Popen(
        [*command, "--verbosity", "4", "--no-warmup", *given.argv, *more],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    deadline = time.monotonic() + PATIENCE
    try:
        for line in process.stdout:
            lines.append(line)
            if "sched_reserve: graph splits" in line or time.monotonic() > deadline:
                break
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    report = read_report(lines)
    assert report is not None, "".join(lines[-20:])
    return report


def estimated(model: Path, settings: RuntimeSettings) -> MemoryNeed:
    return estimate(ModelFiles((read_facts(model),)), settings, here())


@pytest.fixture(scope="module")
def known() -> KnownOptions:
    command = [str(locations.LLAMA_SERVER.resolve()), "--help"]
    return read_help(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


def test_the_defaults_are_those_of_the_build(known):
    assert build_of(known) == Build()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def toy(request, tmp_path_factory) -> Path:
    return write_architecture(tmp_path_factory.mktemp("toys") / f"{request.param}.gguf", request.param)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_a_toy_of_each_kind_keeps_is_told_to_the_byte(toy, settings, known):
    if toy.stem == "deepseek2" and settings.cache_type_k:
        # Its keys hold the values too: llama-server wants one type for both.
        settings = replace(settings, cache_type_v=settings.cache_type_k)
    report, need = report_of(toy, settings, known), estimated(toy, settings)
    assert abs(need.kv_cache.host - report.kv_cache.host) <= ROUNDED
    assert abs(need.recurrent_state.host - report.recurrent_state.host) <= ROUNDED
    assert abs(need.weights.host - report.weights.host) <= ROUNDED
    assert abs(need.output.host - report.output.host) <= ROUNDED
    # What is computed in is reckoned from the shape of the graph: near, and rather more than less.
    assert 0.7 * report.compute.host <= need.compute.host <= 1.6 * report.compute.host + ROUNDED


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("model", [locations.SMOLLM2, locations.GEMMA], ids=["smollm2", "gemma"])
def test_the_sample_models_buffers_are_told_to_a_few_hundredths(model, settings, known):
    report, need = report_of(model, settings, known), estimated(model, settings)
    assert abs(need.kv_cache.host - report.kv_cache.host) <= ROUNDED
    assert abs(need.weights.host - report.weights.host) <= ROUNDED
    assert abs(need.output.host - report.output.host) <= ROUNDED
    assert abs(need.mapped - report.mapped) <= ROUNDED
    assert need.compute.host == pytest.approx(report.compute.host, rel=0.1)


def test_weights_that_are_not_mapped_are_not_there_twice(known):
    settings = RuntimeSettings(ctx_size=512, mmap=False)
    report, need = report_of(locations.GEMMA, settings, known), estimated(locations.GEMMA, settings)
    assert need.mapped == report.mapped == 0
    assert abs(need.weights.host - report.weights.host) <= ROUNDED


def test_a_context_that_nobody_set_is_cut_to_what_the_host_has(known):
    """By the real rule: as on a host with so much more memory, of which so much is to stay free."""
    total, room = psutil.virtual_memory().total, 370 * MIB
    margin = (total - room) // MIB
    build = Build(repacked=here().build.repacked, fit_margin=margin * MIB)
    need = estimate(ModelFiles((read_facts(locations.GEMMA),)), RuntimeSettings(), Surroundings(build, (), total))
    report = report_of(locations.GEMMA, RuntimeSettings(), known, "--fit-target", str(margin))
    assert need.context_is_cut
    assert 4096 < need.context < 32768
    assert need.kv_cache.host == pytest.approx(report.kv_cache.host, rel=0.05)
