"""The keys of the configuration file as magi-agent.toml(5) has them. Run as a program, it prints that part of the page:

PYTHONPATH=. .venv/bin/python -m tests.cli.man_settings
"""

from __future__ import annotations

from collections.abc import Iterator

from magi_agent.settings.table import SETTINGS


def keys() -> str:
    """The entries of all keys, by section, in the order of the code."""
    return "".join(f"{line}\n" for line in _lines())


def _lines() -> Iterator[str]:
    section = ""
    for setting in SETTINGS:
        if setting.section != section:
            section = setting.section
            yield f".SS [{section}]"
        yield ".TP"
        yield f".B {setting.name}"
        yield f"{_roff(setting.help[:1].upper() + setting.help[1:])}."
        if setting.default:
            yield f".BR ${setting.variable} ;"
            yield f"{_roff(setting.default)} by default."
        else:
            yield f".BR ${setting.variable} ;"
            yield "empty by default."


def _roff(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")


if __name__ == "__main__":
    print(keys(), end="")
