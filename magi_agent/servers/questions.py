"""What is asked in a probe: a program that runs for a moment, as the servers' user, in the servers' sandbox.

The questions are a closed list. Whoever asks the launcher names one of them, and never a command: what is run for each
stands here.
"""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Final

from magi_agent.host import nvml_program

PROBE_PATTERN: Final = "magi-probe*.service"
"""The units of all questions; the servers' drop-in does not catch them."""
_PROGRAM: Final = Path(nvml_program.__file__)


class Question(StrEnum):
    """What can be asked."""

    OPTIONS = "options"
    """The options of a llama-server."""
    DEVICES = "devices"
    """The devices that a llama-server would compute on, the CPU left out."""
    FIGURES = "figures"
    """NVIDIA's GPUs and how they are, as the driver's management library (NVML) says."""
    ORDER = "order"
    """In which order CUDA numbers NVIDIA's GPUs."""

    @property
    def needs_binary(self) -> bool:
        """Whether it is a question to a llama-server."""
        return self in (Question.OPTIONS, Question.DEVICES)

    @property
    def needs_gpus(self) -> bool:
        """Whether GPUs are opened for the answer."""
        return self is not Question.OPTIONS

    @property
    def unit(self) -> str:
        """The unit in which it is asked; each has its own, as one that hangs may keep its name for long."""
        return "magi-probe.service" if self is Question.OPTIONS else f"magi-probe-{self}.service"

    @property
    def option(self) -> str:
        """The one argument by which the program is asked."""
        return _OPTIONS[self]

    @property
    def of(self) -> str:
        """What is asked for, in words."""
        return _WORDS[self]


_OPTIONS: Final = {
    Question.OPTIONS: "--help",
    Question.DEVICES: "--list-devices",
    Question.FIGURES: nvml_program.FIGURES,
    Question.ORDER: nvml_program.ORDER,
}
_WORDS: Final = {
    Question.OPTIONS: "options",
    Question.DEVICES: "devices",
    Question.FIGURES: "figures of NVIDIA's GPUs",
    Question.ORDER: "CUDA's order of GPUs",
}


def argv_of_question(question: Question, binary: Path | None) -> tuple[str, ...]:
    """The command line of a probe; ``binary`` is there exactly where the question needs one."""
    if question.needs_binary:
        if binary is None:
            raise ValueError(f"whose {question.of} are asked for is not said")
        return (str(binary), question.option)
    # As the packaged commands are started: without what pip has installed on this host, and without an environment.
    flags = "-IS" if sys.flags.no_site else "-I"
    return (sys.executable, flags, str(_PROGRAM), question.option)


def program_folders() -> set[Path]:
    """What must be seen for our own program to run: Python, its virtual environment, and this package."""
    package = _PROGRAM.parents[1]
    return {Path(os.path.realpath(sys.executable)).parent, Path(sys.prefix), package, package.resolve()}
