"""Modules of a package without the package's ``__init__``, where that imports far more than is used of it.

Of such a package its modules are imported one by one, each from where it stands; nothing is to be had from the package
itself.
"""

import sys
from importlib.util import find_spec, module_from_spec


def only_parts_of(package: str) -> None:
    """Have the modules of a package be imported for themselves from now on.

    One that was imported already is left as it is. Raises ``ModuleNotFoundError`` where there is none.
    """
    if package in sys.modules:
        return
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    # Made, and not executed: it has the folder in which its modules are found.
    sys.modules.setdefault(package, module_from_spec(spec))
