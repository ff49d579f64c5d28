"""Agents in this process with real servers behind their gateway."""

from tests.api.conftest import (
    listener,
    models,
    no_units_left,
    nothing_broke_unnoticed,
    options,
    serve,
)

__all__ = ["listener", "models", "no_units_left", "nothing_broke_unnoticed", "options", "serve"]
