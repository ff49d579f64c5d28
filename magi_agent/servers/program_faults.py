"""Why systemd could not execute a program: what its file says, which is looked at once that has failed.

The file is read and never run. The agent sees it as its own user does; where that does not tell, `magictl doctor` does.
"""

import os
from pathlib import Path
from typing import Final

from magi_agent.host.executable import NotElf, read_executable
from magi_agent.servers.diagnosis import Diagnosis

_ANOTHER: Final = "name another: llama_server_path below [servers]"
_FOR_THIS_MACHINE: Final = "use one that is built for this machine: llama_server_path below [servers]"
_EXECUTABLE_BITS: Final = 0o111


def program_fault(path: Path) -> Diagnosis | None:
    """What is wrong with the program, and what to do; ``None`` where its file does not tell. Blocks a little."""
    try:
        mode = path.stat().st_mode
        if path.is_dir():
            return Diagnosis(f"{path} is a folder", "name the program in it: llama_server_path below [servers]")
        if not mode & _EXECUTABLE_BITS:
            return Diagnosis(f"{path} may not be executed", f"chmod a+x {path}")
        program = read_executable(path)
    except FileNotFoundError:
        return Diagnosis(f"there is no {path}", f"install llama-server there, or {_ANOTHER}")
    except NotElf as error:
        return None if _is_script(path) else Diagnosis(f"{path}: {error}", _FOR_THIS_MACHINE)
    except OSError:
        return None
    if _is_foreign(program.machine):
        return Diagnosis(f"llama-server is a program for {program.machine}, which this host is not", _FOR_THIS_MACHINE)
    if program.interpreter and not Path(program.interpreter).exists():
        return Diagnosis(f"{path} needs the loader {program.interpreter}, which is not here", _FOR_THIS_MACHINE)
    return None


def _is_script(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return False


def _is_foreign(machine: str) -> bool:
    here = os.uname().machine
    # A 64-bit x86 runs what was built for its forerunners, if their libraries are there.
    return machine != here and (machine, here) != ("i686", "x86_64")
