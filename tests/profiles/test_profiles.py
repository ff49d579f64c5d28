"""The profiles in their folders: the operator's and the agent's, on disks that are full, read-only or odd."""

import asyncio
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from magi_agent.errors import (
    ProfileActive,
    ProfileCreationFailed,
    ProfileExists,
    ProfileInvalid,
    ProfileNotFound,
    ProfileReadOnly,
    ProfileSaveFailed,
    ValidationFailed,
)
from magi_agent.events import EventStream, ProfilesChanged
from magi_agent.profiles.profile import Profile
from magi_agent.profiles.profiles import Profiles
from magi_agent.registry.registry import Registry
from tests.conftest import SystemdUser
from tests.faulty_disk import filled, read_only, small_disk

NIGHT = Profile("Night Shift", "quiet", ("a", "b"))


class Kept:
    """Profiles in an operator's folder and the agent's own."""

    def __init__(self, folder: Path, own: Path | None = None) -> None:
        self.operators = folder / "etc"
        self.own = own or folder / "var"
        self.operators.mkdir(parents=True, exist_ok=True)
        self.events = EventStream()
        self.registry = Registry(folder / "registry.json", self.events)
        self.profiles = Profiles([self.operators, self.own], self.registry, self.events)

    def write(self, name: str, text: str | bytes, *, own: bool = True) -> Path:
        folder = self.own if own else self.operators
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path


@pytest.fixture
async def kept(tmp_path: Path) -> Kept:
    kept = Kept(tmp_path)
    await kept.registry.load()
    return kept


def in_folder(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_folders_that_are_not_there_hold_no_profiles(tmp_path):
    profiles = Profiles([tmp_path / "no", tmp_path / "none"], Registry(tmp_path / "r", EventStream()), EventStream())
    assert await profiles.survey() == ([], [])
    with pytest.raises(ProfileNotFound) as missing:
        await profiles.profile("development")
    assert missing.value.details["availableProfiles"] == []


async def test_a_profile_is_made_read_replaced_and_deleted(kept):
    with kept.events.subscribe() as heard:
        slug, path = await kept.profiles.create(NIGHT)
        assert (slug, path) == ("night-shift", kept.own / "night-shift.yaml")
        assert await kept.profiles.profile(slug) == NIGHT
        assert await kept.profiles.names() == [slug]
        changed = replace(NIGHT, enabled_models=("c",))
        assert await kept.profiles.replace(slug, changed) == path
        assert await kept.profiles.profile(slug) == changed
        await kept.profiles.delete(slug)
        assert await kept.profiles.names() == []
        assert in_folder(kept.own) == []
        events = [await heard.next() for _ in range(3)]
        assert [event.name for event in events if isinstance(event, ProfilesChanged)] == [slug] * 3
        assert not heard.waiting


async def test_names_are_sorted_and_other_files_are_left_alone(kept):
    for name in ("zeta.yaml", "alpha.yml", "beta.yaml"):
        kept.write(name, "name: x")
    for name in (".hidden.yaml", "notes.txt", "beta.yaml.tmp", "yaml", ".beta.yaml.abc.tmp", "x.json"):
        kept.write(name, "not: [a profile")
    assert await kept.profiles.survey() == (["alpha", "beta", "zeta"], [])


async def test_what_a_killed_agent_left_half_written_is_cleared_away(kept):
    for name in (".night.yaml.x1y2.tmp", ".day.yml.x1y2.tmp", ".notes.txt.x1y2.tmp", "night.yaml"):
        kept.write(name, "name: x")
    operators = kept.write(".night.yaml.x1y2.tmp", "name: x", own=False)
    await kept.profiles.load()
    assert in_folder(kept.own) == [".notes.txt.x1y2.tmp", "night.yaml"]
    assert operators.exists()


async def test_an_edit_by_hand_needs_no_reload(kept):
    path = kept.write("night.yaml", "enabled_models: [a]")
    assert (await kept.profiles.profile("night")).enabled_models == ("a",)
    path.write_text("enabled_models: [b]")
    assert (await kept.profiles.profile("night")).enabled_models == ("b",)
    path.unlink()
    with pytest.raises(ProfileNotFound):
        await kept.profiles.profile("night")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../registry", "a/b", ".hidden", "active", "x" * 300, "日" * 100, "\ud800"]
)
async def test_a_name_that_can_be_no_profiles_is_not_found(kept, name):
    for hostile in (".hidden.yaml", "active.yaml"):
        kept.write(hostile, "name: x")
    kept.write("../registry.yaml", "name: x")
    for attempt in (kept.profiles.profile, kept.profiles.delete):
        with pytest.raises(ProfileNotFound) as missing:
            await attempt(name)
        assert missing.value.details == {"profileName": name, "availableProfiles": []}
    with pytest.raises(ProfileNotFound):
        await kept.profiles.replace(name, NIGHT)
    assert in_folder(kept.own) == [".hidden.yaml", "active.yaml"]


async def test_a_name_that_can_have_no_file_is_refused(kept):
    with pytest.raises(ValidationFailed):
        await kept.profiles.create(replace(NIGHT, name="../night"))
    assert not kept.own.exists()


async def test_no_two_profiles_have_one_slug(kept):
    await kept.profiles.create(NIGHT)
    with pytest.raises(ProfileExists, match="PUT replaces it"):
        await kept.profiles.create(replace(NIGHT, name="night_shift", enabled_models=()))
    assert (await kept.profiles.profile("night-shift")).enabled_models == ("a", "b")
    answers = await asyncio.gather(
        *(kept.profiles.create(replace(NIGHT, name="day", description=str(n))) for n in range(8)),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers].count(tuple) == 1
    assert sum(isinstance(answer, ProfileExists) for answer in answers) == 7


async def test_the_operators_profiles_can_be_read_and_not_changed(kept):
    path = kept.write("night.yaml", "enabled_models: [operators]", own=False)
    assert (await kept.profiles.profile("night")).enabled_models == ("operators",)
    with pytest.raises(ProfileReadOnly) as refused:
        await kept.profiles.replace("night", NIGHT)
    assert refused.value.details == {"profileName": "night", "path": str(path)}
    with pytest.raises(ProfileReadOnly):
        await kept.profiles.delete("night")
    with pytest.raises(ProfileExists, match="belongs to the operator"):
        await kept.profiles.create(replace(NIGHT, name="night"))
    assert path.read_text() == "enabled_models: [operators]"


async def test_of_two_of_one_name_the_later_folders_counts(kept):
    kept.write("night.yaml", "enabled_models: [operators]", own=False)
    kept.write("night.yml", "enabled_models: [own]")
    assert (await kept.profiles.profile("night")).enabled_models == ("own",)
    assert await kept.profiles.names() == ["night"]
    await kept.profiles.delete("night")
    assert (await kept.profiles.profile("night")).enabled_models == ("operators",)


async def test_a_broken_own_one_hides_the_operators_and_says_so(kept):
    kept.write("night.yaml", "enabled_models: [operators]", own=False)
    own = kept.write("night.yaml", "enabled_models: [own")
    names, problems = await kept.profiles.survey()
    assert (names, [problem.path for problem in problems]) == ([], [str(own)])
    with pytest.raises(ProfileInvalid):
        await kept.profiles.profile("night")


async def test_a_broken_file_is_named_with_its_line_and_harms_no_other(kept, caplog):
    kept.write("fine.yaml", "name: fine")
    path = kept.write("broken.yaml", "name: x\nenabled_models: [a\n")
    names, problems = await kept.profiles.survey()
    assert names == ["fine"]
    (problem,) = problems
    assert (problem.name, problem.path) == ("broken", str(path))
    assert problem.message.startswith("line 3: ")
    assert str(path) in caplog.text
    caplog.clear()
    assert await kept.profiles.survey() == (names, problems)
    assert not caplog.text  # said once
    with pytest.raises(ProfileInvalid) as invalid:
        await kept.profiles.profile("broken")
    assert (invalid.value.status, invalid.value.details["line"]) == (500, 3)
    assert str(invalid.value.details["reason"]) in invalid.value.message
    # It can be put right, or away, by the API too.
    await kept.profiles.replace("broken", replace(NIGHT, name="broken"))
    assert await kept.profiles.survey() == (["broken", "fine"], [])
    kept.write("broken.yaml", "- nothing")
    await kept.profiles.delete("broken")
    assert await kept.profiles.survey() == (["fine"], [])


async def test_what_is_no_regular_file_is_named_and_never_waited_for(kept):
    kept.write("fine.yaml", "name: fine")
    os.mkfifo(kept.own / "pipe.yaml")
    (kept.own / "folder.yaml").mkdir()
    (kept.own / "dangling.yaml").symlink_to("nowhere")
    (kept.own / "circle.yaml").symlink_to("circle.yaml")
    (kept.own / "device.yaml").symlink_to("/dev/zero")
    odd = ["circle", "dangling", "device", "folder", "pipe"]
    try:
        async with asyncio.timeout(20):
            names, problems = await kept.profiles.survey()
            assert (names, [problem.name for problem in problems]) == (["fine"], odd)
            messages = {problem.name: problem.message for problem in problems}
            assert messages["pipe"] == messages["device"] == "it is not a regular file"
            for name in odd:
                with pytest.raises(ProfileInvalid):
                    await kept.profiles.profile(name)
                with pytest.raises(ProfileExists):
                    await kept.profiles.create(replace(NIGHT, name=name))
    finally:
        os.close(os.open(kept.own / "pipe.yaml", os.O_RDWR))  # frees a thread that waits there after all


async def test_files_with_names_that_no_profile_can_have_are_named(kept):
    for name in (b"under_score.yaml", b"active.yaml", b"caf\xe9.yaml", b"a b.yaml", b"esc\x1b.yaml"):
        kept.write(os.fsdecode(name), "name: x")
    names, problems = await kept.profiles.survey()
    assert names == []
    assert {problem.message for problem in problems} == {"no profile can have this name"}
    assert len(problems) == 5
    assert all((problem.name + problem.path).isprintable() for problem in problems)


async def test_the_active_profile_cannot_be_deleted(kept):
    await kept.profiles.create(NIGHT)
    await kept.registry.choose_for_all(lambda model: model.choices, active_profile="night-shift")
    with pytest.raises(ProfileActive) as refused:
        await kept.profiles.delete("night-shift")
    assert refused.value.status == 409
    await kept.profiles.replace("night-shift", replace(NIGHT, description="loud"))
    await kept.registry.choose_for_all(lambda model: model.choices, active_profile="other")
    await kept.profiles.delete("night-shift")


async def test_what_could_not_be_read_again_is_not_written(kept):
    for profile in (
        replace(NIGHT, enabled_models=tuple(f"{'x' * 250}{number}" for number in range(1100))),
        replace(NIGHT, enabled_models=("a",) * 10_001),
        replace(NIGHT, description="x" * 10_001),
    ):
        with pytest.raises(ValidationFailed, match="could not be read again"):
            await kept.profiles.create(profile)
    assert await kept.profiles.survey() == ([], [])


async def test_a_full_disk_changes_nothing(tmp_path, systemd_user: SystemdUser):
    with small_disk(tmp_path / "disk", kibibytes=256) as disk:
        kept = Kept(tmp_path, disk / "profiles")
        await kept.registry.load()
        await kept.profiles.create(NIGHT)
        before = (disk / "profiles" / "night-shift.yaml").read_bytes()
        large = replace(NIGHT, enabled_models=tuple(f"model-{number}" for number in range(1000)))
        with filled(disk), kept.events.subscribe() as heard:
            with pytest.raises(ProfileCreationFailed) as failed:
                await kept.profiles.create(replace(large, name="large"))
            assert failed.value.details["reason"] == "No space left on device"
            with pytest.raises(ProfileSaveFailed, match="No space left"):
                await kept.profiles.replace("night-shift", large)
            assert (disk / "profiles" / "night-shift.yaml").read_bytes() == before
            assert in_folder(disk / "profiles") == ["night-shift.yaml"]
            assert not heard.waiting
        await kept.profiles.create(replace(large, name="large"))
        assert await kept.profiles.names() == ["large", "night-shift"]


async def test_a_read_only_disk_changes_nothing(tmp_path, systemd_user: SystemdUser):
    with small_disk(tmp_path / "disk") as disk:
        kept = Kept(tmp_path, disk / "profiles")
        await kept.registry.load()
        await kept.profiles.create(NIGHT)
        with read_only(disk):
            with pytest.raises(ProfileCreationFailed, match="Read-only"):
                await kept.profiles.create(replace(NIGHT, name="day"))
            with pytest.raises(ProfileSaveFailed, match="Read-only"):
                await kept.profiles.replace("night-shift", NIGHT)
            with pytest.raises(ProfileSaveFailed, match="Read-only"):
                await kept.profiles.delete("night-shift")
            assert await kept.profiles.profile("night-shift") == NIGHT


async def test_a_caller_that_goes_away_leaves_a_whole_change(kept):
    large = replace(NIGHT, enabled_models=tuple(f"model-{number}" for number in range(3000)))
    asked = asyncio.create_task(kept.profiles.create(large))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    with pytest.raises(ProfileExists):  # in its turn: the first one is through then
        await kept.profiles.create(NIGHT)
    assert await kept.profiles.profile("night-shift") == large


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes somebody else, as root")
def test_a_folder_that_may_not_be_read_is_named_and_harms_no_other(tmp_path):
    kept = Kept(tmp_path)
    kept.write("fine.yaml", "name: fine")
    kept.write("secret.yaml", "name: secret", own=False)
    kept.write("denied.yaml", "name: denied").chmod(0)
    code = """
import asyncio, concurrent.futures.thread, os, sys
from pathlib import Path
from magi_agent.errors import ProfileInvalid, ProfileNotFound
from magi_agent.events import EventStream
from magi_agent.profiles.profiles import Profiles
from magi_agent.registry.registry import Registry

async def main():
    folders = [Path("etc"), Path("var")]
    profiles = Profiles(folders, Registry(Path("registry.json"), EventStream()), EventStream())
    names, problems = await profiles.survey()
    print(names, [(problem.name, problem.message) for problem in problems])
    for name, expected in (("denied", ProfileInvalid), ("secret", ProfileNotFound), ("none", ProfileNotFound)):
        try:
            await profiles.profile(name)
        except expected as error:
            print(type(error).__name__)

os.chdir(sys.argv[1])
Path(".").chmod(0o755)
Path("etc").chmod(0o700)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
asyncio.run(main())
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout.splitlines() == [
        "['fine'] [('etc', 'cannot be listed: Permission denied'), ('denied', 'Permission denied')]",
        "ProfileInvalid",
        "ProfileNotFound",
        "ProfileNotFound",
    ], ran.stderr


async def test_the_shipped_profiles_are_read_and_name_no_models(tmp_path, kept):
    shutil.copytree(Path(__file__).parents[2] / "etc" / "profiles", kept.operators, dirs_exist_ok=True)
    assert await kept.profiles.survey() == (["development", "fast-only", "production"], [])
    for name in await kept.profiles.names():
        assert (await kept.profiles.profile(name)).enabled_models == ()
