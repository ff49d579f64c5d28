"""How many tokens one request to a model may have, its answer included, as the model's server would be started now."""

from typing import Final

from magi_agent.discovery.facts import ModelFacts
from magi_agent.runtime_settings.settings import RuntimeSettings

_UNIFIED: Final = "--kv-unified"


def context_length(facts: ModelFacts, settings: RuntimeSettings) -> int | None:
    """The context of one slot; ``None`` where nobody said one, and the model's header does not either.

    llama-server takes the whole context for each slot where it chooses their number itself, and else divides it; no
    slot has more than the model was trained for. Where memory is short it may take less.
    """
    tokens = settings.ctx_size or facts.context_length
    if tokens is None:
        return None
    slots = settings.parallel_slots or 0
    if slots > 0 and _UNIFIED not in (settings.extra_flags or ()):
        tokens //= slots
    return tokens if facts.context_length is None else min(tokens, facts.context_length)
