"""Profile files: both forms are read, defaults fill what is missing, and what is wrong is said with its line."""

import math
import time

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from magi_agent.profiles.profile import (
    DEFAULT_TIERS,
    LoadBalancing,
    LoadBalancingStrategy,
    Profile,
    TierConfig,
    TwoStage,
)
from magi_agent.profiles.stored import MAX_PROFILE_BYTES, InvalidProfile, read_profile, write_profile
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.vocabulary import Tier
from tests.runtime_settings.strategies import RUNTIME_SETTINGS

NESTED = """
profile:
  name: Night Shift
  description: quiet
enabled_models: [qwen3-8b-q4_k_m, smollm2-135m]
tier_config:
  - {name: fast, max_score: 2.5, expected_time_seconds: 1, description: quick}
  - {name: powerful, max_score: null, expected_time_seconds: 20}
two_stage: {enabled: true, stage1_tier: fast, stage2_tier: balanced, stage1_max_tokens: 100}
load_balancing: {enabled: false, strategy: least_loaded, health_check_interval: 5}
runtime_settings:
  qwen3-8b-q4_k_m: {n_gpu_layers: 99, ctx_size: 8192}
"""
FLAT = NESTED.replace("profile:\n  name", "name").replace("\n  description: quiet", "\ndescription: quiet")
EXPECTED = Profile(
    "Night Shift",
    "quiet",
    ("qwen3-8b-q4_k_m", "smollm2-135m"),
    (TierConfig("fast", 2.5, 1.0, "quick"), TierConfig("powerful", math.inf, 20.0)),
    TwoStage(True, Tier.FAST, Tier.BALANCED, 100),
    LoadBalancing(False, LoadBalancingStrategy.LEAST_LOADED, 5.0),
    {"qwen3-8b-q4_k_m": RuntimeSettings(n_gpu_layers=99, ctx_size=8192)},
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
PROFILES = st.builds(
    Profile,
    name=TEXT.filter(bool),
    description=TEXT,
    enabled_models=st.lists(TEXT, max_size=4).map(tuple),
    tier_config=st.lists(
        st.builds(TierConfig, TEXT.filter(bool), FINITE | st.just(math.inf), st.floats(0, 86_400), TEXT), max_size=4
    ).map(tuple),
    two_stage=st.builds(TwoStage, st.booleans(), st.sampled_from(Tier), st.sampled_from(Tier), st.integers(1, 10**6)),
    load_balancing=st.builds(
        LoadBalancing, st.booleans(), st.sampled_from(LoadBalancingStrategy), st.floats(1e-6, 86_400)
    ),
    runtime_settings=st.dictionaries(TEXT, RUNTIME_SETTINGS, max_size=3),
)


def refusal(text: str | bytes) -> InvalidProfile:
    with pytest.raises(InvalidProfile) as refused:
        read_profile(text if isinstance(text, bytes) else text.encode(), "slug")
    assert "\n" not in str(refused.value)
    return refused.value


@pytest.mark.parametrize("text", [NESTED, FLAT, NESTED.replace("tier_config", "tiers"), "\ufeff" + NESTED])
def test_both_forms_are_read(text):
    assert read_profile(text.encode(), "slug") == EXPECTED


@pytest.mark.parametrize(
    "text",
    [
        "name: slug",
        "profile:\n",
        "profile: {}\nenabled_models: []",
        "profile:\n  name: slug\n  description:\n" + "".join(
            f"{key}:\n" for key in ("enabled_models", "tier_config", "two_stage", "load_balancing", "runtime_settings")
        ),
        "from_another_version: 5\nprofile: {also: this}",
    ],
)  # fmt: skip
def test_what_is_missing_has_the_contracts_defaults(text):
    assert read_profile(text.encode(), "slug") == Profile(
        name="slug",
        description="",
        enabled_models=(),
        tier_config=DEFAULT_TIERS,
        two_stage=TwoStage(False, Tier.BALANCED, Tier.POWERFUL, 500),
        load_balancing=LoadBalancing(True, LoadBalancingStrategy.ROUND_ROBIN, 30.0),
        runtime_settings={},
    )
    assert [(tier.name, tier.max_score, tier.expected_time_seconds) for tier in DEFAULT_TIERS] == [
        ("fast", 3.0, 2.0),
        ("balanced", 7.0, 5.0),
        ("powerful", math.inf, 15.0),
    ]


def test_no_limit_is_null_in_a_file_and_infinite_in_memory():
    document = yaml.safe_load(write_profile(Profile("x")))
    assert document["tier_config"][-1]["max_score"] is None
    for score in ("null", ".inf", ""):
        (tier,) = read_profile(f"tiers: [{{name: a, max_score: {score}}}]".encode(), "x").tier_config
        assert tier.max_score == math.inf
    (tier,) = read_profile(b"tiers: [{name: a}]", "x").tier_config
    assert tier.max_score == math.inf
    assert read_profile(b"tiers: []", "x").tier_config == ()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(Profile("a\x85b", "\u2028 \u2029\r\n\t", ("x: y", "- z", "#", "null", "1e3", "'", '"')))
@given(PROFILES)
def test_what_is_written_is_read_again(profile):
    data = write_profile(profile)
    assert read_profile(data, "other") == profile
    assert set(yaml.safe_load(data)["profile"]) == {"name", "description"}


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", None, "empty"),
        ("# nothing\n", None, "empty"),
        ("- a\n- b\n", 1, "mapping"),
        ("just words", 1, "mapping"),
        ("a: [1\nb: 2", 2, "flow sequence"),
        ("profile:\n\tname: x\n", 2, "token"),
        ("a: 1\n---\nb: 2\n", 2, "single document"),
        (b"name: \xff", None, "UTF-8"),
        ("name: x".encode("utf-16"), None, "UTF-8"),
        (b"name: \0", None, "not YAML"),
        ("x: 1\nprofile: night\nenabled_models: [a]", 2, "profile: "),
        ("profile: [name, x]", 1, "profile: "),
        ("profile:\n  name: x\n  description: [1]\n", 3, "description: "),
        ("profile:\n  description: d\n  name: 2024\n", 3, "name: "),
        ("name: ''\n", 1, "name: "),
        ("enabled_models: all\n", 1, "enabled_models: "),
        ("enabled_models:\n  - a\n  - [b]\n", 3, "enabled_models.1: "),
        ("tier_config:\n  - name: a\n    max_score: many\n", 3, "tier_config.0.max_score: "),
        ("tiers:\n  - {name: a}\n  - {max_score: 1}\n", 3, "tiers.1.name: "),
        ("tier_config: [{name: a, max_score: .nan}]", 1, "tier_config.0.max_score: "),
        ("tier_config: [{name: a, max_score: -.inf}]", 1, "tier_config.0.max_score: "),
        ("tier_config: [{name: a, expected_time_seconds: .nan}]", 1, "expected_time_seconds: "),
        ("\ntwo_stage:\n  stage1_tier: huge\n", 3, "two_stage.stage1_tier: "),
        ("two_stage: {stage1_max_tokens: 0}", 1, "two_stage.stage1_max_tokens: "),
        ("load_balancing:\n  strategy: best\n", 2, "load_balancing.strategy: "),
        ("load_balancing: {health_check_interval: 0}", 1, "load_balancing.health_check_interval: "),
        ("runtime_settings:\n  m:\n    ctx_size: big\n", 3, "runtime_settings.m.ctx_size: "),
        ("runtime_settings: {m: {n_threads: 100000}}", 1, "runtime_settings.m.n_threads: "),
        ("runtime_settings:\n  7: {ctx_size: 5}\n", 2, "runtime_settings.7"),
        ("name: !!python/object/apply:os.system ['true']", 1, "python/object"),
        ("name: !!timestamp x", None, "not YAML"),
        ("name: !!int ''", None, "not YAML"),
        ("name: 2024-13-45", None, "not YAML"),
        ("x: " + "9" * 5000, None, "not YAML"),
        ("? [a]\n: b\n", 1, "unhashable"),
        ("[" * 10_000, 1, "nesting"),
        ("x" * (MAX_PROFILE_BYTES + 1), None, "larger than"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text, line, says):
    refused = refusal(text)
    assert refused.line == line
    assert says in str(refused)
    assert str(refused).startswith(f"line {line}: " if line else refused.reason)


def test_a_bomb_of_aliases_is_refused_before_it_goes_off():
    levels = [f"l{n}: &l{n} [{', '.join(f'*l{n - 1}' for _ in range(9))}]" for n in range(1, 12)]
    begin = time.process_time()
    refused = refusal("l0: &l0 [lol]\n" + "\n".join(levels) + "\nenabled_models: *l11\n")
    assert time.process_time() - begin < 1
    assert (refused.line, "aliases" in str(refused)) == (2, True)
    assert read_profile(b"name: 'star * and anchor &x'\ndescription: 5 * 4\n", "x").description == "5 * 4"


def test_the_largest_profile_takes_bounded_time():
    text = b"x:\n" + b" - a\n" * (MAX_PROFILE_BYTES // 5 - 1)
    begin = time.process_time()
    read_profile(text, "x")
    assert time.process_time() - begin < 5


@given(st.text(st.sampled_from("ab:-[]{}&*!|>'\"\n 1,?#%@`\t.<=~"), max_size=40))
def test_any_text_is_a_profile_or_refused(text):
    try:
        read_profile(text.encode(), "x")
    except InvalidProfile as error:
        assert "\n" not in error.reason  # noqa: PT017 - either outcome is right
