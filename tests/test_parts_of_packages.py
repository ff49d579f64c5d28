"""Modules of a package that cannot be imported as a whole."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from magi_agent.parts_of_packages import only_parts_of

NAME = "package_of_parts"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that needs what is not there, with a part that does not."""
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "__init__.py").write_text("import no_such_library\n")
    (folder / "part.py").write_text("from .other import VALUE\n")
    (folder / "other.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in (NAME, f"{NAME}.part", f"{NAME}.other"):
        # Taken out again at the end, whatever stands there then.
        monkeypatch.setitem(sys.modules, name, sys)
        del sys.modules[name]
    return NAME


def test_a_part_is_imported_without_the_rest(package: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        importlib.import_module(f"{package}.part")

    only_parts_of(package)
    only_parts_of(package)

    assert importlib.import_module(f"{package}.part").VALUE == 1


def test_what_is_imported_already_stays_whole(package: str, tmp_path: Path) -> None:
    (tmp_path / NAME / "__init__.py").write_text("WHOLE = True\n")
    whole = importlib.import_module(package)

    only_parts_of(package)

    assert importlib.import_module(package) is whole
    assert whole.WHOLE


def test_a_package_that_is_not_there() -> None:
    with pytest.raises(ModuleNotFoundError, match="'no_such_package'"):
        only_parts_of("no_such_package")
    assert "no_such_package" not in sys.modules
