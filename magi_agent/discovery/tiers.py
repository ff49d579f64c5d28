"""Which tier a model belongs to."""

from magi_agent.discovery.facts import TierThresholds
from magi_agent.discovery.quantization import bits_of
from magi_agent.vocabulary import ThinkingMode, Tier

_FAST_MAX_BITS = 4


def tier_of(
    size_params: float, quantization: str | None, thinking_mode: ThinkingMode, thresholds: TierThresholds
) -> Tier:
    """Assign the tier: what always thinks, or is large, is powerful; small and at most 4-bit is fast; else balanced.

    ``size_params`` is in billions, 0.0 where nobody knows: such a model, and one of unknown quantization, is not
    called fast. Thinking that can be switched off does not move the tier.
    """
    if thinking_mode is ThinkingMode.ALWAYS or size_params >= thresholds.powerful_min:
        return Tier.POWERFUL
    bits = bits_of(quantization)
    if 0.0 < size_params < thresholds.fast_max and bits is not None and bits <= _FAST_MAX_BITS:
        return Tier.FAST
    return Tier.BALANCED
