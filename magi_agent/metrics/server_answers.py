"""What a llama-server answers on ``/metrics``, read as the hostile text that it may be.

llama-server describes its metrics in tools/server/README.md ("GET /metrics"): Prometheus's text form, names that begin
with ``llamacpp:``, counters and gauges without labels. What is more than that is let through where it is sane, so that
a later build may say more, and left out where it is not: nothing that a server says can stand for the agent's own
figures or for another server's, and what it says is bounded in number and length.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Final

from magi_agent.metrics.prometheus_parts import Metric, text_string_to_metric_families
from magi_agent.metrics.server_samples import MODEL, ServerSample, UnreadableAnswer

MOST_SAMPLES: Final = 500
"""Of one server."""
MOST_NAMES: Final = 300
"""Of all servers together."""
_MOST_WORK: Final = 4 << 20
"""Of the lines' lengths squared, together: the parser's time grows by that. Of llama-server it is 0.2 M."""
_MOST_LABELS: Final = 8
_MOST_VALUE: Final = 128
"""Characters of a label's value."""
_MOST_HELP: Final = 256
_NAME: Final = re.compile(r"llamacpp:[a-zA-Z_][a-zA-Z0-9_]{0,99}")
_LABEL: Final = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]{0,63}")
_OF_OTHER_TYPES: Final = frozenset({"le", "quantile"})
_TOTAL: Final = "_total"
_NO_COUNTER: Final = re.compile(r"^([ \t]*#[ \t]+TYPE[ \t]+\S+(?<!_total)[ \t]+)counter[ \t]*$", re.MULTILINE)
"""A counter that is not called one, such as ``llamacpp:n_tokens_max``; the parser would rename it."""
_COUNTER: Final = "counter"
_GAUGE: Final = "gauge"
_UNKNOWN: Final = "unknown"
_KINDS: Final = frozenset({_COUNTER, _GAUGE, _UNKNOWN})


def samples_of(answer: bytes) -> tuple[ServerSample, ...]:
    """The figures in an answer; takes up to some tenths of a second. Raises ``UnreadableAnswer``."""
    text = answer.decode(errors="replace")
    if sum(len(line) ** 2 for line in text.split("\n")) > _MOST_WORK:
        raise UnreadableAnswer("the answer is longer than any that is expected")
    found: dict[tuple[str, tuple[tuple[str, str], ...]], ServerSample] = {}
    try:
        for family in text_string_to_metric_families(_NO_COUNTER.sub(r"\1untyped", text)):
            for sample in _sane(family):
                found.setdefault((sample.name, sample.labels), sample)
                if len(found) >= MOST_SAMPLES:
                    return tuple(found.values())
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UnreadableAnswer(f"the answer is not in Prometheus's text form: {_shown(str(error), 80)}") from None
    return tuple(found.values())


def _sane(family: Metric) -> Iterable[ServerSample]:
    if family.type not in _KINDS:
        return
    for sample in family.samples:
        labels = _labels(sample.labels)
        if _NAME.fullmatch(sample.name) is None or labels is None:
            continue
        try:
            value = float(sample.value)
        except OverflowError:
            continue
        if math.isfinite(value):
            kind = family.type
            if kind == _COUNTER and value < 0:
                continue
            yield ServerSample(sample.name, kind, _shown(family.documentation, _MOST_HELP), labels, value)


def _labels(labels: Mapping[str, str]) -> tuple[tuple[str, str], ...] | None:
    """A sample's labels without the model's; ``None`` where they are not what a counter or a gauge may have."""
    kept = {name: value for name, value in labels.items() if name != MODEL}
    if len(kept) > _MOST_LABELS or any(_LABEL.fullmatch(name) is None or name in _OF_OTHER_TYPES for name in kept):
        return None
    if any(len(value) > _MOST_VALUE for value in kept.values()):
        return None
    return tuple(sorted((name, _shown(value, _MOST_VALUE)) for name, value in kept.items()))


def _shown(text: str, most: int) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])


def families_of(answers: Mapping[str, Iterable[ServerSample]]) -> list[Metric]:
    """The figures of all servers, by model, as families that each carry the model.

    Servers of different builds may not agree on what a figure is: it is of unknown kind then.
    """
    by_name: dict[str, list[tuple[str, ServerSample]]] = {}
    for model_id, samples in sorted(answers.items()):
        for sample in samples:
            if sample.name in by_name or len(by_name) < MOST_NAMES:
                by_name.setdefault(sample.name, []).append((model_id, sample))
    return [_family(name, found, by_name) for name, found in sorted(by_name.items())]


def _family(name: str, found: list[tuple[str, ServerSample]], names: Mapping[str, object]) -> Metric:
    kinds = {sample.kind for _, sample in found}
    kind = kinds.pop() if len(kinds) == 1 else _UNKNOWN
    family_name = name
    if kind == _COUNTER:
        family_name = name.removesuffix(_TOTAL)
        if family_name in names:
            kind, family_name = _UNKNOWN, name
    family = Metric(family_name, found[0][1].text, kind)
    for model_id, sample in found:
        family.add_sample(name, {MODEL: model_id, **dict(sample.labels)}, sample.value)
    return family
