"""Which settings hold for a model: the active profile's before its own, those before its tier's and the host's."""

from __future__ import annotations

from dataclasses import replace

from magi_agent.registry.model import Choices, Model
from magi_agent.runtime_settings.defaults import RuntimeDefaults
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.effective import EffectiveSettings, Source
from magi_agent.vocabulary import StartPolicy, Tier
from tests.registry.model_facts import facts_at

HOST = RuntimeSettings(ctx_size=1, n_threads=1, batch_size=1, mmap=False, n_gpu_layers=0)
FAST = RuntimeSettings(ctx_size=2, n_threads=2, batch_size=2)
OWN = RuntimeSettings(ctx_size=3, n_threads=3)
PROFILE = RuntimeSettings(ctx_size=4)
MODEL = Model("m", replace(facts_at("/m/m.gguf"), assigned_tier=Tier.FAST), Choices(runtime_settings=OWN))


def effective() -> EffectiveSettings:
    settings = EffectiveSettings(RuntimeDefaults(HOST, {Tier.FAST: FAST}))
    settings.hold_profile({"m": PROFILE, "other": RuntimeSettings(ctx_size=99)})
    return settings


def test_what_is_said_in_the_most_particular_place_holds() -> None:
    settings = effective()

    assert settings.of(MODEL) == RuntimeSettings(ctx_size=4, n_threads=3, batch_size=2, mmap=False, n_gpu_layers=0)
    assert settings.sources(MODEL) == {
        "ctx_size": Source.PROFILE,
        "n_threads": Source.MODEL,
        "batch_size": Source.TIER,
        "mmap": Source.HOST,
        "n_gpu_layers": Source.HOST,
    }


def test_the_tier_is_the_one_that_counts_for_the_model() -> None:
    moved = replace(MODEL, choices=replace(MODEL.choices, tier_override=Tier.POWERFUL))

    assert effective().of(moved).batch_size == 1
    assert effective().sources(moved)["batch_size"] is Source.HOST


def test_no_and_nothing_are_said_and_not_left_open() -> None:
    settings = EffectiveSettings(RuntimeDefaults(RuntimeSettings(mmap=True, aliases=("x",), n_gpu_layers=-1)))
    own = RuntimeSettings(mmap=False, aliases=(), n_gpu_layers=0)

    assert settings.of(replace(MODEL, choices=Choices(runtime_settings=own))) == own


def test_a_model_is_always_on_unless_somebody_says_otherwise() -> None:
    bare = replace(MODEL, choices=Choices())
    on_demand, manual = (
        RuntimeSettings(start_policy=StartPolicy.ON_DEMAND),
        RuntimeSettings(start_policy=StartPolicy.MANUAL),
    )
    settings = EffectiveSettings(RuntimeDefaults())
    assert settings.start_policy(bare) is StartPolicy.ALWAYS_ON
    settings.hold_defaults(RuntimeDefaults(on_demand))
    assert settings.start_policy(bare) is StartPolicy.ON_DEMAND
    settings.hold_defaults(RuntimeDefaults(on_demand, {Tier.FAST: manual}))
    assert settings.start_policy(bare) is StartPolicy.MANUAL
    settings.hold_profile({"m": RuntimeSettings(start_policy=StartPolicy.ALWAYS_ON)})
    assert settings.start_policy(bare) is StartPolicy.ALWAYS_ON
    assert settings.of(bare).start_policy is StartPolicy.ALWAYS_ON


def test_every_change_of_what_holds_is_another_revision() -> None:
    settings = EffectiveSettings(RuntimeDefaults())
    revisions = [settings.revision]
    settings.hold_profile({"m": PROFILE})
    revisions.append(settings.revision)
    settings.hold_defaults(RuntimeDefaults(HOST))
    revisions.append(settings.revision)

    assert len(set(revisions)) == 3


def test_what_was_held_is_not_changed_from_outside() -> None:
    said = {"m": PROFILE}
    settings = EffectiveSettings(RuntimeDefaults())
    settings.hold_profile(said)
    said["m"] = RuntimeSettings(ctx_size=5)

    assert settings.of(MODEL).ctx_size == 4
