"""What a model's files hold, told without reading all of them."""

from dataclasses import dataclass

from magi_agent.discovery.facts import ModelFacts
from magi_agent.vocabulary import ModelStatus


@dataclass(frozen=True, slots=True)
class Content:
    """The same for the same files, wherever they lie and whatever they are called."""

    size: int  # bytes, of all parts
    fingerprint: str  # of the first part's header
    sample: str | None  # of the data; None where none was taken, as by earlier agents

    def may_equal(self, other: "Content | None") -> bool:
        """Whether nothing that is known tells one from the other."""
        return (
            other is not None
            and (self.size, self.fingerprint) == (other.size, other.fingerprint)
            and may_equal(self.sample, other.sample)
        )


def content_of(facts: ModelFacts) -> Content | None:
    """What the files hold; ``None`` where they are not whole."""
    if facts.fingerprint is None or facts.status not in (ModelStatus.OK, ModelStatus.MISSING):
        return None
    return Content(facts.size_bytes, facts.fingerprint, facts.sample)


def may_equal(one: str | None, other: str | None) -> bool:
    """Whether two samples are the same, or one of them was never taken."""
    return one == other or one is None or other is None
