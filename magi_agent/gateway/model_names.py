"""Which model a name means that a client asks for.

In this order: an id; an alias of the settings that hold; a file's name without its extension and part numbers, as it is
or in another letter case. A name that means two models means none.
"""

from typing import Final

from magi_agent.discovery.names import stem_of
from magi_agent.errors import InvalidRequest, NotFound
from magi_agent.registry.model import Model
from magi_agent.registry.registry import Registry
from magi_agent.servers.effective import EffectiveSettings

_MOST_NAMED: Final = 10
"""Models that an error lists."""


class UnknownName(NotFound):
    """No model goes by this name."""

    error = "ModelNotFound"


class NoName(InvalidRequest):
    """The request does not say which model it is for."""

    error = "ModelRequired"


class ModelNames:
    """Finds models by the names they go by."""

    def __init__(self, registry: Registry, effective: EffectiveSettings) -> None:
        self._registry = registry
        self._effective = effective
        self._revision: tuple[int, int] | None = None
        self._known: dict[str, frozenset[str]] = {}

    def model(self, name: str | None) -> Model:
        """The model that ``name`` means. Raises ``UnknownName``, ``NoName``, ``ServiceUnavailable``."""
        models = self._registry.models
        if name is None:
            raise NoName(f'say which model it is for: "model": one of {self._examples()}; GET /v1/models lists them')
        if (model := models.get(name)) is not None:
            return model
        known = self._names()
        ids = known.get(name) or known.get(name.casefold(), frozenset())
        if len(ids) == 1:
            return models[next(iter(ids))]
        if ids:
            raise UnknownName(
                f"{name!r} may mean several models: {', '.join(sorted(ids)[:_MOST_NAMED])}; say one of these ids",
                {"model": name, "modelIds": sorted(ids)},
            )
        raise UnknownName(
            f"no model is called {name!r}; there are {self._examples()}; GET /v1/models lists them", {"model": name}
        )

    def names_of(self, model: Model) -> tuple[str, ...]:
        """What else than its id a model goes by."""
        return tuple(dict.fromkeys((*(self._effective.of(model).aliases or ()), stem_of(model.facts.filename))))

    def _names(self) -> dict[str, frozenset[str]]:
        revision = self._registry.revision, self._effective.revision
        if self._revision != revision:
            # An alias was chosen by a person, and wins over what a file happens to be called.
            aliases: dict[str, frozenset[str]] = {}
            stems: dict[str, frozenset[str]] = {}
            for model in self._registry.models.values():
                for alias in self._effective.of(model).aliases or ():
                    _add(aliases, alias, model.model_id)
                stem = stem_of(model.facts.filename)
                for form in {stem, stem.casefold()}:
                    _add(stems, form, model.model_id)
            self._known = {**stems, **aliases}
            self._revision = revision
        return self._known

    def _examples(self) -> str:
        ids = sorted(model.model_id for model in self._registry.models.values() if model.choices.enabled)
        ids = ids or sorted(self._registry.models)
        shown = ", ".join(ids[:_MOST_NAMED])
        return f"{shown}, …" if len(ids) > _MOST_NAMED else shown or "none yet"


def _add(names: dict[str, frozenset[str]], name: str, model_id: str) -> None:
    names[name] = names.get(name, frozenset()) | {model_id}
