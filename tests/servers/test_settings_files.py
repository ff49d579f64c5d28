"""The files that settings name: there, readable, and inside the model folders whatever links lead to them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from magi_agent.runtime_settings.settings import LoraAdapter, RuntimeSettings
from magi_agent.servers.settings_files import file_faults


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    (tmp_path / "models").mkdir()
    (tmp_path / "more").mkdir()
    return [tmp_path / "models", tmp_path / "more"]


@pytest.fixture
def inside(folders: list[Path]) -> Path:
    path = folders[1] / "deep" / "file.gguf"
    path.parent.mkdir()
    path.touch()
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "models-not" / "file.gguf"
    path.parent.mkdir()
    path.touch()
    return path


def naming(path: Path) -> list[tuple[str, RuntimeSettings]]:
    """Every setting that can name a file, naming this one."""
    text = str(path)
    return [
        ("draft_model", RuntimeSettings(draft_model=text)),
        ("chat_template_file", RuntimeSettings(chat_template_file=text)),
        ("projector", RuntimeSettings(projector=text)),
        ("lora", RuntimeSettings(lora=(LoraAdapter(text),))),
    ]


def refused(path: Path, folders: list[Path]) -> str:
    """What is said of the file, which is the same for every setting that names it."""
    messages = set()
    for name, settings in naming(path):
        [fault] = file_faults(settings, folders)
        assert fault.name == name
        messages.add(fault.message)
    [message] = messages
    return message


def test_a_file_inside_is_fine(folders: list[Path], inside: Path) -> None:
    for _, settings in naming(inside):
        assert file_faults(settings, folders) == ()


def test_a_link_inside_to_a_file_inside_is_fine(folders: list[Path], inside: Path) -> None:
    link = folders[0] / "link.gguf"
    link.symlink_to(inside)
    for _, settings in naming(link):
        assert file_faults(settings, folders) == ()


def test_folders_that_are_links_themselves_are_followed(folders: list[Path], inside: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folders[1])
    for path in (tmp_path / "link" / "deep" / "file.gguf", inside):
        for _, settings in naming(path):
            assert file_faults(settings, [tmp_path / "link"]) == ()


def test_a_file_outside_is_refused_with_the_folders(folders: list[Path], outside: Path) -> None:
    message = refused(outside, folders)

    assert message.startswith(f"{outside} lies outside the model folders (")
    assert f"{folders[0]}, {folders[1]}" in message


def test_a_link_inside_to_a_file_outside_is_refused(folders: list[Path], outside: Path) -> None:
    link = folders[0] / "link.gguf"
    link.symlink_to(outside)

    assert "outside" in refused(link, folders)


def test_the_whole_of_the_host_may_be_the_folder(outside: Path) -> None:
    for _, settings in naming(outside):
        assert file_faults(settings, [Path("/")]) == ()


def test_a_file_that_is_not_there_or_no_file_is_refused(folders: list[Path], inside: Path) -> None:
    assert refused(folders[0] / "none.gguf", folders).endswith("there is no such file")
    assert refused(inside.parent, folders).endswith("there is no such file")
    (folders[0] / "loop").symlink_to("loop")
    assert refused(folders[0] / "loop", folders).endswith("there is no such file")


AS_NOBODY = """
import os, sys
from pathlib import Path
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.settings_files import file_faults

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
for fault in file_faults(RuntimeSettings(draft_model=sys.argv[1]), [Path(sys.argv[1]).parent]):
    print(fault.message)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes away permissions from somebody else, as root")
def test_a_file_that_cannot_be_read_is_refused() -> None:
    # A folder that everybody can reach, which pytest's own are not.
    with tempfile.TemporaryDirectory(prefix="magi-settings-files-") as folder:
        Path(folder).chmod(0o755)
        file = Path(folder, "draft.gguf")
        file.touch(mode=0o600)
        command = [sys.executable, "-c", AS_NOBODY, str(file)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert said == f"{file} cannot be read\n"
        file.chmod(0o644)
        assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout == ""


def test_no_projector_is_no_file(folders: list[Path]) -> None:
    assert file_faults(RuntimeSettings(projector="none"), folders) == ()


def test_every_fault_is_told_at_once(folders: list[Path], inside: Path) -> None:
    settings = RuntimeSettings(
        draft_model="/none",
        projector=str(inside),
        lora=(LoraAdapter("/one"), LoraAdapter(str(inside)), LoraAdapter("/two")),
    )

    assert [fault.name for fault in file_faults(settings, folders)] == ["draft_model", "lora", "lora"]
