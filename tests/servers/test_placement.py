"""Which GPUs are chosen: made-up hosts, no server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.host.gpu_devices import Vendor
from magi_agent.host.gpus import Gpu
from magi_agent.memory.build import Build
from magi_agent.memory.estimate import Device, ModelFiles, Surroundings, estimate
from magi_agent.memory.need import MemoryNeed
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.placement import (
    Choice,
    UsableGpu,
    choose,
    leaves_nothing_to_fit,
    reckoned,
    shares,
    used_by_default,
)
from tests.memory.test_estimate import facts

GIB = 1 << 30
MIB = 1 << 20
WITHOUT_FIT = Build(fits=False, gpu_layers=0)


def gpu(number: int, free: float, promised: float = 0, total: float = 24) -> UsableGpu:
    return UsableGpu(
        f"CUDA{number}", f"0000:{number + 1:02x}:00.0", int(total * GIB), int(free * GIB), int(promised * GIB)
    )


def chosen(*gpus: UsableGpu, build: Build | None = None, how: Any = choose, blocks: int = 4, **said: Any) -> Choice:
    """What a model with some GiB of blocks is given; its context takes 1 GiB unless said otherwise."""
    settings = RuntimeSettings(**{"ctx_size": 8192, **said})
    files = ModelFiles((facts(block_bytes=blocks * GIB),))
    build = build or Build()

    def need_for(devices: Sequence[Device], whole: bool) -> MemoryNeed:
        its = Build(fits=False, gpu_layers=build.gpu_layers) if whole else build
        return estimate(files, settings, Surroundings(its, tuple(devices), 256 * GIB))

    return how(gpus, need_for, settings, *((build,) if how is choose else ()))  # type: ignore[no-any-return]


def test_the_fullest_one_that_it_fits_on_is_taken() -> None:
    found = chosen(gpu(0, 20), gpu(1, 8), gpu(2, 10), gpu(3, 3))
    assert found.devices == ("CUDA1",)
    assert found.shortage is None
    assert found.gpu_bytes == {"CUDA1": found.need.gpu_bytes}
    assert found.need.gpu_layers == 33


def test_what_was_promised_is_not_free() -> None:
    assert chosen(gpu(0, 20), gpu(1, 8, promised=2)).devices == ("CUDA0",)


def test_of_equals_the_first_address_is_taken() -> None:
    one, two = gpu(1, 20), gpu(0, 20)
    assert chosen(one, two).devices == chosen(two, one).devices == ("CUDA0",)


def test_it_is_split_over_as_few_as_it_fits_on() -> None:
    found = chosen(gpu(0, 6), gpu(1, 20), gpu(2, 16), gpu(3, 4), blocks=24)
    # In llama-server's order, and in proportion to what is free.
    assert found.devices == ("CUDA1", "CUDA2")
    assert sum(found.gpu_bytes.values()) == found.need.gpu_bytes
    assert found.gpu_bytes["CUDA1"] > found.gpu_bytes["CUDA2"] > 10 * GIB
    assert found.shortage is None


def test_the_rest_is_on_the_cpu_where_llama_server_makes_it_fit() -> None:
    found = chosen(gpu(0, 6), gpu(1, 12), blocks=40)
    assert found.devices == ("CUDA0", "CUDA1")
    assert 0 < found.need.gpu_layers < 33
    assert found.shortage is None


def test_without_room_anywhere_it_is_on_the_cpu_and_said_so() -> None:
    found = chosen(gpu(0, 20, promised=20), gpu(1, 0.2))
    assert found.devices == ("none",)
    assert found.gpu_bytes == {}
    assert found.need.gpu_bytes == 0


def test_layers_that_were_asked_for_and_fit_nowhere_are_a_shortage() -> None:
    found = chosen(gpu(0, 6), gpu(1, 12, promised=3), blocks=40, n_gpu_layers=-1)
    assert found.devices == ()
    assert found.shortage is not None
    assert found.shortage.needed == found.need.gpu_bytes > 40 * GIB
    assert (found.shortage.free, found.shortage.promised) == (18 * GIB, 3 * GIB)
    assert found.shortage.devices == ("CUDA0", "CUDA1")


def test_as_many_layers_as_were_asked_for_may_fit_on_one() -> None:
    found = chosen(gpu(0, 20), gpu(1, 8), blocks=40, n_gpu_layers=4)
    assert found.devices == ("CUDA1",)
    assert found.need.gpu_layers == 4


def test_a_context_that_nobody_set_is_cut_before_there_is_a_shortage() -> None:
    found = chosen(gpu(0, 12), n_gpu_layers=99, ctx_size=None)
    assert found.devices == ("CUDA0",)
    assert found.need.context_is_cut
    assert found.shortage is None


def test_where_the_margin_is_missing_and_all_was_asked_for_it_is_tried() -> None:
    need = chosen(gpu(0, 24), n_gpu_layers=99).need.gpu_bytes
    found = chosen(gpu(0, (need + MIB) / GIB), n_gpu_layers=99)
    assert found.devices == ("CUDA0",)
    assert found.shortage is None


def test_what_does_not_fit_where_it_must_is_a_shortage() -> None:
    found = chosen(gpu(0, 1), how=reckoned, n_gpu_layers=-1)
    assert found.shortage is not None
    assert found.shortage.devices == ("CUDA0",)
    assert (found.shortage.free, found.shortage.needed) == (1 * GIB, found.need.gpu_bytes)
    # llama-server makes it fit.
    assert chosen(gpu(0, 3), how=reckoned).shortage is None


@pytest.mark.parametrize(
    ("said", "used"),
    [
        ({"split_mode": "row"}, ["CUDA0", "CUDA1"]),
        ({"split_mode": "none"}, ["CUDA0"]),
        ({"split_mode": "none", "main_gpu": 1}, ["CUDA1"]),
        ({"main_gpu": 1}, ["CUDA0", "CUDA1"]),
        ({"tensor_split": (3.0, 1.0)}, ["CUDA0", "CUDA1"]),
        ({"n_gpu_layers": 0}, ["CUDA0", "CUDA1"]),
        ({"extra_flags": ("--device=CUDA1",)}, ["CUDA1"]),
        ({"extra_flags": ("--device=none",)}, []),
        ({"extra_flags": ("--device=CUDA7",)}, []),
    ],
)
def test_what_was_set_by_hand_is_only_reckoned_with(said: dict[str, Any], used: list[str]) -> None:
    found = chosen(gpu(0, 20), gpu(1, 20), **said)
    assert found.devices == ()
    assert [each.name for each in found.used] == list(found.gpu_bytes) == used
    assert sum(found.gpu_bytes.values()) == found.need.gpu_bytes
    if "tensor_split" in said:
        assert found.gpu_bytes["CUDA0"] > 2 * found.gpu_bytes["CUDA1"]


def test_a_build_that_keeps_all_on_the_host_unless_it_is_told_otherwise_is_let() -> None:
    assert chosen(gpu(0, 20), build=WITHOUT_FIT).devices == ()
    assert chosen(gpu(0, 20), build=WITHOUT_FIT, n_gpu_layers=99).devices == ("CUDA0",)


def test_without_gpus_nothing_is_said() -> None:
    found = chosen()
    assert (found.devices, found.gpu_bytes, found.shortage) == ((), {}, None)
    # Nobody has to be told that there is none where layers were asked for: that is how they run then.
    assert chosen(n_gpu_layers=99).shortage is None


_SIZES = st.floats(0, 48)
_GPUS = st.lists(st.tuples(_SIZES, _SIZES), max_size=6).map(
    lambda pairs: [gpu(number, free, promised, total=48) for number, (free, promised) in enumerate(pairs)]
)
_SAID = st.fixed_dictionaries(
    {},
    optional={
        "n_gpu_layers": st.sampled_from([-1, 1, 17, 99]),
        "ctx_size": st.sampled_from([None, 0, 4096, 131072]),
        "n_cpu_moe": st.integers(0, 40),
        "extra_flags": st.sampled_from([("--fit=off",), ("--no-kv-offload",)]),
    },
)


@given(gpus=_GPUS, said=_SAID, blocks=st.integers(1, 90), fits=st.booleans())
def test_no_more_is_taken_than_is_free_and_promised_to_nobody(
    gpus: list[UsableGpu], said: dict[str, Any], blocks: int, fits: bool
) -> None:
    found = chosen(*gpus, build=Build(fits=fits), blocks=blocks, **said)
    assert sum(found.gpu_bytes.values()) == (found.need.gpu_bytes if found.used else 0)
    assert set(found.gpu_bytes) == {each.name for each in found.used}
    if found.shortage is None:
        assert all(found.gpu_bytes[each.name] <= each.room for each in found.used)
        if gpus:
            assert found.devices == (tuple(each.name for each in found.used) or ("none",))
    else:
        # Who did not ask for layers has no shortage where llama-server makes it fit.
        made_to_fit = fits and "--fit=off" not in said.get("extra_flags", ())
        assert not made_to_fit or "n_gpu_layers" in said or "n_cpu_moe" in said
        assert found.devices == ()


@given(gpus=_GPUS, said=_SAID, blocks=st.integers(1, 90), order=st.randoms())
def test_the_choice_is_always_the_same_and_prefers_one(
    gpus: list[UsableGpu], said: dict[str, Any], blocks: int, order: Any
) -> None:
    found = chosen(*gpus, blocks=blocks, **said)
    assert found == chosen(*gpus, blocks=blocks, **said)
    if len(found.devices) > 1:
        # None of them would do alone and leave the margin that is kept.
        for each in gpus:
            alone = chosen(replace(each, promised=each.promised + 256 * MIB), blocks=blocks, **said)
            assert alone.shortage is not None or alone.need.gpu_layers < 33 or alone.need.context_is_cut
    shuffled = list(gpus)
    order.shuffle(shuffled)
    assert set(chosen(*shuffled, blocks=blocks, **said).devices) == set(found.devices)


@given(
    bytes_each=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=5),
    split=st.none() | st.lists(st.floats(0, 100), min_size=1, max_size=7).map(tuple),
    free=st.integers(0, 1 << 40),
)
def test_shares_are_all_there_is(bytes_each: list[int], split: tuple[float, ...] | None, free: int) -> None:
    gpus = [UsableGpu(f"CUDA{number}", "", 1 << 41, free * number) for number in range(len(bytes_each))]
    need = estimate(
        ModelFiles((facts(block_bytes=sum(bytes_each)),)),
        RuntimeSettings(ctx_size=4096),
        Surroundings(Build(fits=False), tuple(each.device for each in gpus), 1 << 40),
    )
    taken = shares(need, gpus, RuntimeSettings(tensor_split=split))
    assert sum(taken.values()) == need.gpu_bytes
    assert all(size >= 0 for size in taken.values())


def listed(device: str | None, address: str | None, *, is_integrated: bool = False) -> Gpu:
    return Gpu(
        device, "CUDA", Vendor.NVIDIA, "a GPU", None, address, GIB, GIB, None, None, None,
        is_live=True, is_integrated=is_integrated,
    )  # fmt: skip


def test_by_default_each_gpu_is_used_once_and_integrated_ones_only_alone() -> None:
    cuda, vulkan = listed("CUDA0", "0000:01:00.0"), listed("Vulkan0", "0000:01:00.0")
    other, hidden = listed("CUDA1", "0000:02:00.0"), listed(None, "0000:03:00.0")
    part = listed("Vulkan1", "0000:00:02.0", is_integrated=True)
    nameless = [listed("ROCm0", None), listed("ROCm1", None)]
    assert used_by_default([part, cuda, vulkan, other, hidden]) == (cuda, other)
    assert used_by_default([part, hidden]) == (part,)
    assert used_by_default(nameless) == tuple(nameless)
    assert used_by_default([hidden]) == ()


@pytest.mark.parametrize(
    ("said", "on_gpus", "without"),
    [
        ({}, False, False),
        # Without a GPU it can only make the context shorter, and not one that is set.
        ({"ctx_size": 4096}, False, True),
        ({"ctx_size": 0}, False, False),
        ({"n_gpu_layers": 99}, False, False),
        ({"ctx_size": 4096, "n_gpu_layers": 99}, True, True),
        ({"ctx_size": 4096, "n_gpu_layers": 0}, True, True),
        # All of them is what it takes for not set, and so was 999.
        ({"ctx_size": 4096, "n_gpu_layers": -1}, False, True),
        ({"ctx_size": 4096, "n_gpu_layers": 999}, False, True),
        ({"ctx_size": 4096, "n_gpu_layers": 99, "extra_flags": ("--fit=on",)}, False, False),
        ({"ctx_size": 4096, "n_gpu_layers": 99, "extra_flags": ("--fit-target=512",)}, False, False),
        ({"ctx_size": 4096, "n_gpu_layers": 99, "extra_flags": ("--no-warmup",)}, True, True),
        ({"ctx_size": 4096, "n_gpu_layers": 99, "draft_model": "/m/d.gguf"}, False, False),
    ],
)
def test_where_nothing_is_left_to_fit(said: dict[str, Any], on_gpus: bool, without: bool) -> None:
    settings = RuntimeSettings(**said)
    assert leaves_nothing_to_fit(settings, has_gpus=True) is on_gpus
    assert leaves_nothing_to_fit(settings, has_gpus=False) is without
