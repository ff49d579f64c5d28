"""Whether a start fits, as the pure function it is, and the arithmetic in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.host.memory import HostMemory, MemoryLimit
from magi_agent.host.unit_memory import UnitMemory
from magi_agent.memory.need import Basis, MemoryNeed, Split
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.launch import LaunchSpecification
from magi_agent.servers.placed import GpuShortage, Placed
from magi_agent.servers.shortage import Room, insufficient_memory, outstanding, room_of, shortage_of, size

MIB, GIB = 1 << 20, 1 << 30
LAUNCH = LaunchSpecification(
    "m", "M", Path("/llama-server"), "/m.gguf", None, "127.0.0.1", 1, RuntimeSettings(), (), None, 1.0
)
BYTES = st.integers(0, 1 << 50)


def placed(anonymous: int, mapped: int, gpu: GpuShortage | None = None) -> Placed:
    need = MemoryNeed(weights=Split(mapped), kv_cache=Split(anonymous), mapped=mapped)
    return Placed(LAUNCH, need, None, {}, gpu)


@given(anonymous=BYTES, mapped=BYTES, available=BYTES, promised=BYTES, reserve=BYTES)
def test_nothing_is_admitted_beyond_the_room_less_what_is_promised_and_reserved(
    anonymous: int, mapped: int, available: int, promised: int, reserve: int
) -> None:
    shortage = shortage_of(placed(anonymous, mapped), Room(available, promised, reserve))

    fits = anonymous + mapped <= available - promised - reserve
    assert (shortage is None) is fits
    if shortage is not None:
        assert shortage.short_by == anonymous + mapped + promised + reserve - available > 0
        # With exactly so much more it would be admitted, and with a byte less it would not.
        assert shortage_of(placed(anonymous, mapped), Room(available + shortage.short_by, promised, reserve)) is None
        assert shortage_of(placed(anonymous, mapped), Room(available + shortage.short_by - 1, promised, reserve))


@given(
    starts=st.lists(st.tuples(st.integers(0, 8 * GIB), st.integers(0, 8 * GIB)), max_size=12),
    available=st.integers(0, 64 * GIB),
    reserve=st.integers(0, 8 * GIB),
    taken=st.floats(0, 1),
)
def test_starts_one_after_the_other_never_take_more_than_there_is(
    starts: list[tuple[int, int]], available: int, reserve: int, taken: float
) -> None:
    admitted: list[tuple[Placed, UnitMemory]] = []
    for anonymous, mapped in starts:
        used = sum(each.anonymous + each.mapped for _, each in admitted)
        promised = sum(outstanding(before, each, is_ready=False) for before, each in admitted)
        start = placed(anonymous, mapped)
        if shortage_of(start, Room(available - used, promised, reserve)) is None:
            # Meanwhile it takes a part of what it was promised.
            use = UnitMemory(int(anonymous * taken), int(mapped * taken), "process")
            admitted.append((start, use))

    assert sum(each.need.host_bytes for each, _ in admitted if each.need) <= max(0, available - reserve)


def test_what_nobody_knows_is_no_reason_to_refuse() -> None:
    assert shortage_of(placed(GIB, GIB), None) is None
    assert shortage_of(Placed(LAUNCH, None, "no header", {}, None), Room(0, 0, GIB)) is None


@pytest.mark.parametrize(
    ("used", "is_ready", "left"),
    [
        (None, False, 30),
        (None, True, 0),
        (UnitMemory(0, 0, "process"), False, 30),
        (UnitMemory(4, 15, "process"), False, 11),
        (UnitMemory(50, 15, "process"), False, 5),
        (UnitMemory(10, 99, "process"), False, 0),
        (UnitMemory(4, 0, "process"), True, 6),
        (UnitMemory(99, 0, "process"), True, 0),
    ],
)
def test_what_a_server_will_take_yet(used: UnitMemory | None, is_ready: bool, left: int) -> None:
    assert outstanding(placed(10, 20), used, is_ready=is_ready) == left


def test_what_a_gpu_takes_of_the_hosts_memory_counts_there() -> None:
    start = replace(placed(10 * MIB, 20 * MIB), gpu_bytes={"Vulkan0": 40 * MIB}, shared_bytes=40 * MIB)
    shortage = shortage_of(start, Room(69 * MIB, 0, 0))
    assert shortage is not None
    assert shortage.short_by == MIB
    assert "it needs 70 MiB of memory (10 MiB of its own and 20 MiB of weights mapped from files, 40 MiB for GPUs" in (
        insufficient_memory("m", shortage).message
    )
    assert shortage_of(start, Room(70 * MIB, 0, 0)) is None
    assert outstanding(start, None, is_ready=False) == 70 * MIB
    assert outstanding(start, UnitMemory(10 * MIB, 20 * MIB, "process"), is_ready=False) == 40 * MIB
    assert outstanding(start, UnitMemory(10 * MIB, 20 * MIB, "process"), is_ready=True) == 0


def test_the_refusal_has_the_arithmetic() -> None:
    need = MemoryNeed(weights=Split(3 * GIB), kv_cache=Split(GIB), mapped=3 * GIB, basis=Basis.MEASURED)
    limit = MemoryLimit("/magi.slice", "magi.slice", None, 6 * GIB, GIB)
    room = room_of(HostMemory(64 * GIB, 32 * GIB, 0, 0, None, (limit,)), 2 * GIB, GIB // 2)
    shortage = shortage_of(Placed(LAUNCH, need, None, {}, None), room)
    assert shortage is not None

    error = insufficient_memory("m", shortage)

    assert error.message == (
        "model m does not fit: it needs 4.0 GiB of memory (1.0 GiB of its own and 3.0 GiB of weights mapped from "
        "files, measured); 5.0 GiB are available below the limit of magi.slice, of which 2.0 GiB are promised to other "
        "servers and 512 MiB are kept in reserve (memory_reserve): 1.5 GiB are missing"
    )
    assert (error.error, error.status) == ("InsufficientMemory", 409)
    advice = error.details.pop("advice")
    assert str(advice).endswith("magictl start --force m")
    assert error.details == {
        "modelId": "m",
        "neededBytes": 4 * GIB,
        "anonymousBytes": GIB,
        "mappedBytes": 3 * GIB,
        "sharedBytes": 0,
        "basis": "measured",
        "availableBytes": 5 * GIB,
        "promisedBytes": 2 * GIB,
        "reserveBytes": GIB // 2,
        "limitOf": "magi.slice",
        "shortByBytes": 3 * GIB // 2,
    }


def test_what_is_missing_on_gpus_alone_is_said_of_them_alone() -> None:
    shortage = shortage_of(placed(1, 1, GpuShortage(8 * GIB, 6 * GIB, GIB, ("CUDA0", "CUDA1"))), Room(GIB, 0, 0))
    assert shortage is not None
    assert (shortage.short_by, shortage.gpu_short_by) == (0, 3 * GIB)

    error = insufficient_memory("m", shortage)

    assert error.message == (
        "model m does not fit: it needs 8.0 GiB of GPU memory (estimated) on CUDA0, CUDA1; 6.0 GiB are free, of which "
        "1.0 GiB are promised to other servers: 3.0 GiB are missing"
    )
    assert error.details["shortByBytes"] == 0
    assert error.details["gpu"] == {
        "devices": ["CUDA0", "CUDA1"],
        "neededBytes": 8 * GIB,
        "basis": "estimated",
        "freeBytes": 6 * GIB,
        "promisedBytes": GIB,
        "shortByBytes": 3 * GIB,
    }


def test_what_running_servers_have_mapped_is_no_room() -> None:
    assert room_of(HostMemory(9 * GIB, 8 * GIB, 0, 0, None, (), mapped=3 * GIB), 0, 0).available == 5 * GIB
    assert room_of(HostMemory(9 * GIB, GIB, 0, 0, None, (), mapped=3 * GIB), 0, 0).available == 0


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 MiB"), (1, "1 MiB"), (MIB, "1 MiB"), (MIB + 1, "2 MiB"), (GIB - 1, "1024 MiB"), (3 * GIB // 2, "1.5 GiB")],
)
def test_sizes_in_words(count: int, said: str) -> None:
    assert size(count) == said
