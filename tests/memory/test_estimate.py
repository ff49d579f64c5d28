"""What the estimate makes of settings and devices, without a server."""

from dataclasses import fields, replace
from typing import get_origin

import pytest

from magi_agent.gguf.facts import HeaderFacts
from magi_agent.memory.build import Build, build_of, repacked_types
from magi_agent.memory.estimate import Device, ModelFiles, Surroundings, estimate
from magi_agent.memory.layers import MOST_LAYERS, layers_of
from magi_agent.memory.need import Basis, MemoryNeed, NeedUnknown
from magi_agent.runtime_settings.known_options import read_help
from magi_agent.runtime_settings.settings import LoraAdapter, RuntimeSettings
from magi_agent.vocabulary import ThinkingMode

GIB = 1 << 30
MIB = 1 << 20


def facts(**said) -> HeaderFacts:
    """A model of 32 layers with 8 heads for keys and values: 4 GiB of blocks, 256 MiB each for input and output."""
    nothing: dict[object, object] = {bool: False, int: 0}
    empty = {
        field.name: () if get_origin(field.type) is tuple else nothing.get(field.type) for field in fields(HeaderFacts)
    }
    return HeaderFacts(
        **{
            **empty,
            "architecture": "llama",
            "thinking_mode": ThinkingMode.NONE,
            "fingerprint": "f",
            "context_length": 131072,
            "embedding_length": 4096,
            "block_count": 32,
            "head_count": (32,),
            "head_count_kv": (8,),
            "feed_forward_length": (14336,),
            "vocabulary_size": 128_256,
            "input_bytes": 256 * MIB,
            "embedding_bytes": 256 * MIB,
            "embedding_type": 12,
            "block_bytes": 4 * GIB,
            "rest_bytes": 256 * MIB,
            "has_output_matrix": True,
            **said,
        }
    )


def need_of(model: HeaderFacts | None = None, *devices: Device, host: int = 256 * GIB, **said) -> MemoryNeed:
    where = Surroundings(Build(), devices, host)
    return estimate(ModelFiles((model or facts(),)), RuntimeSettings(**said), where)


def test_without_gpus_all_is_on_the_host():
    need = need_of(ctx_size=8192)
    assert need.basis is Basis.ESTIMATED
    assert need.gpu_bytes == 0
    assert need.gpu_layers == 0
    assert need.weights.host == need.mapped == 4 * GIB + 512 * MIB
    assert need.kv_cache.host == 8192 * 32 * 8 * 128 * 2 * 2
    assert need.host_bytes == sum(split.host for _, split in need.parts())


def test_with_room_on_a_gpu_all_but_the_input_goes_there():
    need = need_of(None, Device("CUDA0", 80 * GIB), ctx_size=8192)
    assert need.gpu_layers == 33
    assert need.weights.gpu == 4 * GIB + 256 * MIB
    assert need.weights.host == need.mapped == 256 * MIB
    assert need.kv_cache.host == 0
    assert need.kv_cache.gpu == 8192 * 32 * 8 * 128 * 2 * 2
    assert need.other.gpu > 0
    assert need.compute.gpu > need.compute.host > 0


def test_an_embedding_matrix_that_is_the_output_matrix_too_is_there_twice():
    tied = facts(has_output_matrix=False, rest_bytes=0)
    need = need_of(tied, Device("CUDA0", 80 * GIB), ctx_size=4096)
    assert need.weights.gpu == 4 * GIB + 256 * MIB
    assert need.weights.host == 256 * MIB


def test_layers_that_are_not_on_the_gpu_keep_their_cache_on_the_host():
    need = need_of(None, Device("CUDA0", 80 * GIB), ctx_size=4096, n_gpu_layers=9)
    # The output is one of the nine.
    assert need.weights.gpu == 4 * GIB * 8 // 32 + 256 * MIB
    assert need.kv_cache.gpu * 3 == need.kv_cache.host
    assert need.compute.host > 0 < need.compute.gpu


def test_a_gpu_that_is_not_wanted_gets_no_layers():
    need = need_of(None, Device("CUDA0", 80 * GIB), ctx_size=4096, n_gpu_layers=0)
    assert need.weights.gpu == need.kv_cache.gpu == 0
    # llama.cpp multiplies large batches there all the same.
    assert need.gpu_bytes == need.compute.gpu + need.other.gpu > 0


def test_experts_that_stay_on_the_host_are_counted_there():
    mixture = facts(expert_count=8, expert_used_count=2, expert_bytes=32 * GIB)
    need = need_of(mixture, Device("CUDA0", 80 * GIB), ctx_size=4096, n_cpu_moe=8)
    assert need.weights.host == 256 * MIB + 8 * GIB
    assert need.weights.gpu == 4 * GIB + 256 * MIB + 24 * GIB


def test_a_context_that_is_not_set_is_cut_to_what_the_gpu_has_free():
    roomy = need_of(None, Device("CUDA0", 80 * GIB, 60 * GIB))
    assert roomy.context == 131072
    assert not roomy.context_is_cut
    tight = need_of(None, Device("CUDA0", 80 * GIB, 16 * GIB))
    assert tight.context_is_cut
    assert 4096 < tight.context < 131072
    assert tight.gpu_layers == 33
    assert 13 * GIB < tight.gpu_bytes <= 15 * GIB


@pytest.mark.parametrize("ctx_size", [0, 131072])
def test_a_context_that_was_set_is_not_cut(ctx_size):
    need = need_of(None, Device("CUDA0", 80 * GIB, 16 * GIB), ctx_size=ctx_size)
    assert need.context == 131072
    assert not need.context_is_cut
    # Layers make room instead.
    assert 0 < need.gpu_layers < 33
    assert need.gpu_bytes <= 15 * GIB


def test_a_mixture_makes_room_by_leaving_experts_on_the_host():
    mixture = facts(expert_count=8, expert_used_count=2, expert_bytes=32 * GIB)
    need = need_of(mixture, Device("CUDA0", 24 * GIB), ctx_size=4096)
    assert need.gpu_layers == 33
    assert need.gpu_bytes <= 23 * GIB
    assert need.weights.host > 10 * GIB


def test_several_gpus_share():
    two = need_of(None, Device("CUDA0", 24 * GIB), Device("CUDA1", 24 * GIB), ctx_size=4096)
    one = need_of(None, Device("CUDA0", 24 * GIB), Device("CUDA1", 24 * GIB), ctx_size=4096, split_mode="none")
    assert two.weights == one.weights
    assert two.other.gpu == 2 * one.other.gpu


def test_slots_that_are_not_set_share_one_cache():
    assert need_of(ctx_size=8192).slots == 4
    assert need_of(ctx_size=8192, parallel_slots=-1).kv_cache == need_of(ctx_size=8192).kv_cache
    # With caches of their own, each slot's is padded.
    assert need_of(ctx_size=8192, parallel_slots=3).context == 3 * 2816


def test_what_nobody_needs_is_none():
    assert need_of(ctx_size=4096).recurrent_state.total == 0
    need = need_of(ctx_size=4096)
    assert (need.projector.total, need.draft.total, need.lora.total) == (0, 0, 0)


def test_projector_draft_and_adapters_add_what_they_are():
    small = facts(block_bytes=100 * MIB, rest_bytes=0, input_bytes=50 * MIB, block_count=4)
    projector = facts(
        architecture="clip", input_bytes=0, block_bytes=0, rest_bytes=800 * MIB,
        vision_image_size=896, vision_patch_size=14, vision_embedding_length=1152, vision_feed_forward_length=4304,
    )  # fmt: skip
    files = ModelFiles((facts(),), projector, (small,), (facts(block_bytes=40 * MIB, input_bytes=0, rest_bytes=0),))
    settings = RuntimeSettings(ctx_size=4096, draft_model="/d.gguf", lora=(LoraAdapter("/l.gguf"),))
    need = estimate(files, settings, Surroundings(host_bytes=256 * GIB))
    assert 800 * MIB < need.projector.host < 1200 * MIB
    assert 150 * MIB < need.draft.host < 800 * MIB
    assert need.lora.host == 40 * MIB
    on_gpu = estimate(files, settings, Surroundings(devices=(Device("CUDA0", 80 * GIB),), host_bytes=256 * GIB))
    assert on_gpu.projector.host == 0 < on_gpu.projector.gpu
    assert on_gpu.draft.gpu > on_gpu.draft.host
    assert on_gpu.lora.gpu == 40 * MIB


def test_parts_of_a_split_set_are_summed():
    first = facts(block_bytes=GIB, rest_bytes=0, has_output_matrix=False)
    second = facts(block_bytes=3 * GIB, input_bytes=0, embedding_bytes=0)
    need = estimate(ModelFiles((first, second)), RuntimeSettings(ctx_size=4096), Surroundings(host_bytes=256 * GIB))
    assert need.weights.host == 4 * GIB + 512 * MIB


def test_weights_that_the_cpu_reorders_are_there_twice_where_they_are_mapped():
    model = facts(matrices_by_type=(12, GIB, 8, GIB))
    where = Surroundings(Build(repacked=frozenset({12})), (), 256 * GIB)
    mapped = estimate(ModelFiles((model,)), RuntimeSettings(ctx_size=4096), where)
    read = estimate(ModelFiles((model,)), RuntimeSettings(ctx_size=4096, mmap=False), where)
    assert mapped.weights.host - mapped.mapped == GIB
    assert read.mapped == 0
    assert read.weights.host == mapped.weights.host - GIB
    # Beside a GPU, the weights on the host are kept as that takes them in.
    beside = replace(where, devices=(Device("CUDA0", 80 * GIB),))
    partly = estimate(ModelFiles((model,)), RuntimeSettings(ctx_size=4096, n_gpu_layers=1), beside)
    assert partly.weights.host == partly.mapped == 4 * GIB + 256 * MIB


def test_it_may_grow_by_the_prompts_it_keeps():
    assert need_of(ctx_size=4096).may_grow == 8 * GIB
    assert need_of(ctx_size=4096, extra_flags=("--cache-ram=0",)).may_grow == 0


def test_a_server_of_embeddings_has_room_for_an_output_a_token():
    need = need_of(ctx_size=4096, mode="embedding")
    assert need.output.host == 512 * (128_256 + 4096) * 4


@pytest.mark.parametrize("count", [None, 0, MOST_LAYERS + 1, 2**62])
def test_a_header_without_a_sensible_number_of_blocks_is_no_ground_to_reckon_on(count):
    with pytest.raises(NeedUnknown, match="blocks"):
        layers_of(facts(block_count=count))


@pytest.mark.parametrize(
    "said",
    [
        {"embedding_length": 2**62, "feed_forward_length": (2**62,)},
        {"vocabulary_size": 2**62},
        {"head_count": (2**40,), "key_length": 2**40},
        {"context_length": 2**62},
    ],
)
def test_a_header_of_sizes_that_no_machine_has_is_refused(said):
    with pytest.raises(NeedUnknown, match="no machine"):
        estimate(ModelFiles((facts(**said),)), RuntimeSettings(ctx_size=0), Surroundings(host_bytes=GIB))


def test_a_context_nobody_knows_is_no_ground_to_reckon_on():
    with pytest.raises(NeedUnknown, match="context"):
        need_of(facts(context_length=None))


@pytest.mark.parametrize("architecture", ["gemma3", "gpt-oss", "llama4", "smallthinker", "step35", "qwen35", "mamba"])
def test_no_header_makes_the_rules_fail(architecture):
    sparse = replace(
        facts(architecture=architecture), head_count=(), head_count_kv=(), feed_forward_length=(),
        sliding_window=0, sliding_window_pattern=(0,), recurrent_layers=(1, 0), expert_count=4, expert_used_count=2,
    )  # fmt: skip
    assert estimate(ModelFiles((sparse,)), RuntimeSettings(ctx_size=4096), Surroundings()).host_bytes > 0


def test_defaults_are_those_that_the_build_s_help_names():
    build = build_of(
        read_help(
            "-c,    --ctx-size N                     size of the context (default: 4096, 0 = loaded from model)\n"
            "-np,   --parallel N                     number of parallel sequences to decode (default: 1)\n"
            "-ub,   --ubatch-size N                  physical maximum batch size (default: 256)\n"
            "-fa,   --flash-attn                     enable Flash Attention (default: disabled)\n"
            "-ngl,  --gpu-layers, --n-gpu-layers N   number of layers to store in VRAM\n"
        ),
        {2},
    )
    assert (build.context, build.slots, build.ubatch, build.batch) == (4096, 1, 256, 2048)
    assert not build.flash_attention
    assert not build.fits
    assert build.prompt_cache == 0
    assert build.repacked == frozenset()


def test_cpus_reorder_what_they_have_kernels_for():
    assert 12 in repacked_types(["avx2"], "x86_64")
    assert 10 not in repacked_types(["avx2"], "x86_64")
    assert 10 in repacked_types(["avx2", "avx512f"], "x86_64")
    assert repacked_types([], "x86_64") == frozenset()
    assert 14 in repacked_types(["asimddp"], "aarch64")


def test_amx_keeps_more_of_them_and_some_with_sums():
    flags = ["avx2", "avx512f", "avx512_vnni", "amx_tile", "amx_int8"]
    assert {3, 8, 13, 14, 23} <= repacked_types(flags, "x86_64")
    assert repacked_types(flags[:-1], "x86_64").isdisjoint({3, 8, 13, 14, 23})
    with_amx = Build(repacked=repacked_types(flags, "x86_64"))
    assert [with_amx.copy_bytes(kind, 34 * 144 * 176 * 136) for kind in (3, 8, 12, 13, 14, 23, 1)] == [
        34 * 144 * 176 * 136, 38 * 144 * 176 * 136, 34 * 148 * 176 * 136, 34 * 144 * 180 * 136,
        34 * 144 * 176 * 136, 34 * 144 * 176 * 138, 0,
    ]  # fmt: skip
    # An Arm CPU keeps Q8_0 in another order too, and no sums with it.
    assert Build(repacked=repacked_types(["asimddp"], "aarch64")).copy_bytes(8, 3400) == 3400
