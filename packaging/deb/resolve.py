"""Prints a lock file for the dependencies that `pyproject.toml` names, as this Python and its pip resolve them.

Runs in the root of one Debian release: `packaging/deb/lock` calls it. Standard library and pip only.

    python3 resolve.py PYPROJECT > debian-12.lock

Every file that may be installed is pinned by its hash: the wheels for x86-64 and for ARM, or the one that fits both.
What is published as source only is named below.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

SOURCE_ONLY = ("sdnotify",)
"""Packages without wheels: small, in pure Python, built while the package is."""
MACHINES = ("x86_64", "aarch64")
C_LIBRARY = 36
"""Minor version of the oldest glibc among the releases that packages are built for: 2.36, Debian 12's."""


def resolve(requirements: list[str], machine: str, *, dependencies: bool) -> dict[str, tuple[str, str]]:
    """Return version and hash of every file that pip would install, by its normalized name."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command += ["--only-binary=:all:", f"--no-binary={','.join(SOURCE_ONLY)}"]
    if not dependencies:
        platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(C_LIBRARY, 4, -1)]
        platforms += [f"manylinux2014_{machine}", f"linux_{machine}"]
        command += ["--no-deps", *(f"--platform={platform}" for platform in platforms)]
        command += [f"--python-version={sys.version_info.major}.{sys.version_info.minor}"]
    with tempfile.TemporaryDirectory() as nowhere:
        command += ["--target", nowhere]
        answer = subprocess.run([*command, *requirements], check=True, stdout=subprocess.PIPE)
    found = {}
    for item in json.loads(answer.stdout)["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        found[re.sub(r"[-_.]+", "-", name).lower()] = (version, digest)
    return found


def main(project: Path) -> None:
    """Print the lock file for ``project``."""
    wanted = tomllib.loads(project.read_text())["project"]["dependencies"]
    chosen = resolve(wanted, "", dependencies=True)
    pins = [f"{name}=={version}" for name, (version, _) in chosen.items()]
    hashes = [resolve(pins, machine, dependencies=False) for machine in MACHINES]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    print(f"# What the package bundles for Python {python}. Made by packaging/deb/lock; README.md beside it says when.")
    for name, (version, _) in sorted(chosen.items()):
        allowed = sorted({machine[name][1] for machine in hashes})
        print(" \\\n".join([f"{name}=={version}", *(f"    --hash=sha256:{each}" for each in allowed)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
