"""Headers are input from strangers: whatever they say, there is a need of sensible size, or a sentence why not."""

from dataclasses import fields
from typing import get_origin

from hypothesis import given
from hypothesis import strategies as some

from magi_agent.gguf.facts import HeaderFacts
from magi_agent.memory.build import Build
from magi_agent.memory.estimate import Device, ModelFiles, Surroundings, estimate
from magi_agent.memory.need import NeedUnknown
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.vocabulary import ThinkingMode

_ARCHITECTURES = (
    *("llama", "gemma2", "gemma3", "gemma3n", "gemma4", "llama4", "smallthinker", "mimo2", "mamba", "rwkv7", "jamba"),
    *("falcon-h1", "nemotron_h", "qwen35", "lfm2", "kimi-linear", "deepseek2", "deepseek32", "minimax-m3", "bert", ""),
)
_SENSIBLE = some.integers(0, 300)
_ANY = some.one_of(_SENSIBLE, some.integers(0, 1 << 24), some.sampled_from([2**31, 2**63 - 1]))


def _value(name: str, kind: object, numbers: some.SearchStrategy[int]) -> some.SearchStrategy[object]:
    if name == "architecture":
        return some.sampled_from(_ARCHITECTURES)
    if name == "block_count":
        return some.one_of(some.integers(0, 80), numbers)
    if name == "thinking_mode":
        return some.just(ThinkingMode.NONE)
    if name == "matrices_by_type":
        return some.lists(some.tuples(some.integers(0, 40), numbers), max_size=3).map(
            lambda entries: tuple(number for entry in entries for number in entry)
        )
    if get_origin(kind) is tuple:
        return some.lists(numbers, max_size=80).map(tuple) if "int" in str(kind) else some.just(())
    if kind is bool:
        return some.booleans()
    if kind is int:
        return numbers
    if kind == int | None:
        return some.one_of(some.none(), numbers)
    if kind == bool | None:
        return some.sampled_from([None, True, False])
    return some.just("") if kind is str else some.none()


def _headers(numbers: some.SearchStrategy[int]) -> some.SearchStrategy[HeaderFacts]:
    said = {field.name: _value(field.name, field.type, numbers) for field in fields(HeaderFacts)}
    return some.builds(HeaderFacts, **said)


_HEADERS = some.one_of(_headers(_SENSIBLE), _headers(_ANY))
_SETTINGS = some.builds(
    RuntimeSettings,
    ctx_size=some.one_of(some.none(), some.integers(0, 100_000_000)),
    parallel_slots=some.one_of(some.none(), some.sampled_from([-1, 1, 3, 1024])),
    ubatch_size=some.one_of(some.none(), some.integers(1, 1_000_000)),
    n_gpu_layers=some.one_of(some.none(), some.integers(-1, 200)),
    n_cpu_moe=some.one_of(some.none(), some.integers(0, 200)),
    flash_attention=some.sampled_from([None, "on", "off"]),
    cache_type_k=some.sampled_from([None, "q4_0", "f32"]),
    mode=some.sampled_from([None, "embedding"]),
    mmap=some.sampled_from([None, False]),
)
_DEVICES = some.lists(some.builds(Device, some.just("CUDA0"), some.integers(0, 1 << 40)), max_size=2).map(tuple)


@given(_HEADERS, _HEADERS, _SETTINGS, _DEVICES, some.integers(0, 1 << 44))
def test_no_header_makes_an_estimate_fail(header, other, settings, devices, host):
    files = ModelFiles((header, other), projector=other)
    try:
        need = estimate(files, settings, Surroundings(Build(repacked=frozenset({2, 12})), devices, host))
    except NeedUnknown:
        return
    assert 0 < need.host_bytes < 1 << 61
    assert 0 <= need.gpu_bytes < 1 << 61
    assert all(split.host >= 0 and split.gpu >= 0 for _, split in need.parts())
    assert 0 <= need.mapped <= need.weights.host
    assert need.context > 0
