"""Tiers: the rules in their order, for every size and quantization."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.discovery.facts import TierThresholds
from magi_agent.discovery.quantization import bits_of, quantization_in
from magi_agent.discovery.tiers import tier_of
from magi_agent.gguf.ggml import FILE_TYPES
from magi_agent.vocabulary import ThinkingMode, Tier

QUANTIZATIONS = st.sampled_from([*FILE_TYPES.values(), "q4_k_xl", "unknown", "i2_s", "fp8"])
DEFAULTS = TierThresholds()


@given(
    size=st.floats(0, 2000),
    quantization=QUANTIZATIONS,
    thinking=st.sampled_from([*ThinkingMode]),
    thresholds=st.builds(TierThresholds, st.floats(7, 100), st.floats(0, 7)),
)
def test_the_rules_hold_in_their_order(size, quantization, thinking, thresholds):
    tier = tier_of(size, quantization, thinking, thresholds)
    bits = bits_of(quantization)
    if thinking is ThinkingMode.ALWAYS or size >= thresholds.powerful_min:
        assert tier is Tier.POWERFUL
    elif 0 < size < thresholds.fast_max and bits is not None and bits <= 4:
        assert tier is Tier.FAST
    else:
        assert tier is Tier.BALANCED
    assert tier_of(size, quantization, ThinkingMode.OPTIONAL, thresholds) is tier_of(
        size, quantization, ThinkingMode.NONE, thresholds
    )


@pytest.mark.parametrize(
    ("size", "quantization", "thinking", "tier"),
    [
        (13.99, "q4_k_m", ThinkingMode.NONE, Tier.BALANCED),
        (14.0, "q4_k_m", ThinkingMode.NONE, Tier.POWERFUL),
        (7.0, "q4_k_m", ThinkingMode.NONE, Tier.BALANCED),
        (6.99, "q4_k_m", ThinkingMode.NONE, Tier.FAST),
        (6.99, "q5_k_m", ThinkingMode.NONE, Tier.BALANCED),
        (0.5, "mxfp4", ThinkingMode.OPTIONAL, Tier.FAST),
        (0.5, "q4_k_m", ThinkingMode.ALWAYS, Tier.POWERFUL),
        (0.0, "q4_k_m", ThinkingMode.NONE, Tier.BALANCED),
        (3.0, None, ThinkingMode.NONE, Tier.BALANCED),
    ],
)
def test_around_the_edges(size, quantization, thinking, tier):
    assert tier_of(size, quantization, thinking, DEFAULTS) is tier


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ("q4_k_m", 4), ("q4_0", 4), ("q4_0_4_8", 4), ("iq4_xs", 4), ("mxfp4", 4), ("nvfp4", 4), ("iq2_xxs", 2),
        ("tq1_0", 1), ("i2_s", 2), ("q8_0", 8), ("fp8", 8), ("f16", 16), ("bf16", 16), ("f32", 32), ("q6_k", 6),
        ("unknown", None), ("", None),
    ],
)  # fmt: skip
def test_the_bits_of_a_weight(quantization, bits):
    assert bits_of(quantization) == bits


@pytest.mark.parametrize("quantization", [*FILE_TYPES.values()])
def test_every_quantization_of_a_header_is_found_in_a_name_too(quantization):
    assert quantization_in(f"Some-Model-7B-{quantization.upper()}") == quantization
