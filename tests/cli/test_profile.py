"""`magictl profile …`: listed, shown, made, edited, planned, activated, deleted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from magi_agent.cli.exits import CommandError
from magi_agent.cli.profile_yaml import from_yaml, to_yaml
from tests.cli.conftest import Magictl
from tests.cli.stand_in import Answer, StandIn, error, profile, server
from tests.cli.terminal import on_terminal, surroundings

COMMANDS = ["list", "show", "active", "activate", "create", "edit", "delete"]


@pytest.fixture
def busy(agent: StandIn) -> StandIn:
    """An agent with an active profile, and another that differs."""
    agent.profiles["evening"] = {
        **profile("evening"),
        "description": "After work",
        "enabledModels": ["qwen2.5-7b", "gone", "old-14b"],
        "runtimeSettings": {"qwen2.5-7b": {"ctxSize": 4096, "flashAttention": "on"}},
    }
    agent.profiles["daily"] = {**profile("daily"), "enabledModels": ["tiny-chat", "old-14b"]}
    agent.active = "daily"
    agent.models["old-14b"] |= {"enabled": True, "status": "incomplete"}
    agent.servers["tiny-chat"] = server("tiny-chat")
    return agent


MakeEditor = Callable[..., Path]


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeEditor:
    """Makes an editor of a sed script for each time that it is called; one that does nothing saves nothing."""

    def make(*scripts: str, status: int = 0) -> Path:
        for number, script in enumerate(scripts):
            (tmp_path / f"script-{number}").write_text(script)
        program = tmp_path / "editor"
        program.write_text(
            f'#!/bin/sh\ncd {tmp_path}\nset -- "$1" script-*\ncp "$1" "last.yaml"\n'
            f'[ -s "$2" ] && sed -i -f "$2" "$1"\nmv "$2" "done-$2"\nexit {status}\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("VISUAL", str(program))
        # What is kept of a text that was not taken goes the way of all that a test leaves.
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        return program

    return make


def test_the_group_has_help_with_its_commands(magictl: Magictl) -> None:
    told, alone = magictl("profile", "--help"), magictl("profile")

    assert [line.split()[0] for line in told.out.partition("Commands:\n")[2].splitlines()[: len(COMMANDS)]] == COMMANDS
    assert "magictl profile activate" in told.out.partition("Examples:")[2]
    assert "..." not in told.out.partition("Commands:\n")[2].partition("\n\n")[0]
    assert (alone.status, alone.out) == (2, "")
    assert "Commands:" in alone.err
    for command in COMMANDS:
        assert f"magictl profile {command}" in magictl("profile", command, "-h").out.partition("Examples:")[2]


def test_the_list_marks_the_active_one(busy: StandIn, magictl: Magictl) -> None:
    told = magictl("profile", "list")

    assert told.out == (
        "PROFILE      ACTIVE  MODELS  DESCRIPTION\n"
        "daily        yes          2\n"
        "development  no           0\n"
        "evening      no           3  After work\n"
        "fast-only    no           0\n"
        "production   no           0\n"
    )
    assert magictl("profile", "list", "--json").json == sorted(busy.profiles)
    busy.profiles.clear()
    assert "magictl profile create NAME --from-current" in magictl("profile", "list").err


def test_a_profile_that_goes_while_the_list_is_made_is_listed_all_the_same(busy: StandIn, magictl: Magictl) -> None:
    def gone(method: str, path: str, right: Answer) -> Answer:
        return error(404, "ProfileNotFound") if path.endswith("/evening") else right

    busy.fault = gone

    assert re.search(r"^evening +no +-$", magictl("profile", "list").out, re.MULTILINE)


def test_a_profile_is_shown(busy: StandIn, magictl: Magictl) -> None:
    busy.profiles["evening"]["twoStage"]["enabled"] = True

    assert (
        magictl("profile", "show", "evening").out
        == """\
evening
After work

In use
  models           qwen2.5-7b
                   gone
                   old-14b

Settings of qwen2.5-7b
  ctx_size         4k
  flash_attention  on

Requests
  fast             score up to 3  (in about 2 s)
  balanced         score up to 7  (in about 5 s)
  powerful         any score  (in about 15 s)
  two stages       balanced, then powerful  (first up to 500 tokens)
  balancing        round_robin
"""
    )
    assert magictl("profile", "show", "evening", "--json").json == busy.profiles["evening"]


def test_the_active_one_is_shown_with_what_is_wrong(busy: StandIn, magictl: Magictl) -> None:
    assert magictl("profile", "active").out.startswith("daily\n")
    assert magictl("profile", "active", "--json").json["name"] == "daily"

    busy.active = None
    assert "no profile is active" in magictl("profile", "active").err

    busy.always(200, {"name": "lost", "profile": None, "problem": "the active profile does not hold: no such file"})
    told = magictl("profile", "active")
    assert (told.status, told.out, told.err) == (0, "lost\n", "! the active profile does not hold: no such file\n")


def test_a_dry_run_shows_the_plan_and_changes_nothing(busy: StandIn, magictl: Magictl) -> None:
    told = magictl("profile", "activate", "evening", "--dry-run")

    assert told.status == 0
    assert told.out == (
        "\n"
        "What would change\n"
        "  start         old-14b, qwen2.5-7b\n"
        "  stop          tiny-chat\n"
        "  enable        qwen2.5-7b\n"
        "  disable       tiny-chat\n"
    )
    assert told.err == "! gone: no model has this id\n! old-14b cannot be used: it is cut\n"
    assert busy.active == "daily"
    assert magictl("profile", "activate", "evening", "--dry-run", "--json").json["dryRun"] is True


def test_settings_that_will_hardly_do_are_told_of_by_model(busy: StandIn, magictl: Magictl) -> None:
    busy.warnings = {"qwen2.5-7b": ["memory_max is 5 MiB, and that is little"], "tiny-chat": ["not of this profile"]}
    told = magictl("profile", "activate", "evening", "--dry-run")
    assert "! qwen2.5-7b: memory_max is 5 MiB, and that is little\n" in told.err
    assert "not of this profile" not in told.err


def test_models_that_are_away_are_told_of(busy: StandIn, magictl: Magictl) -> None:
    busy.always(200, {"profile": "evening", "enable": ["far-7b"], "absent": ["far-7b", "far-8b"]})
    told = magictl("profile", "activate", "evening", "--dry-run")
    assert told.err == "! not there now, and in use when they come back: far-7b, far-8b\n"


def test_activation_is_followed_until_it_ends(busy: StandIn, magictl: Magictl) -> None:
    told = magictl("profile", "activate", "evening")

    assert told.status == 0
    assert told.out.startswith("✓ evening is the active profile\n\nWhat changes\n  start ")
    assert told.out.endswith("\n\n✓ qwen2.5-7b ready\n✓ old-14b ready\n")
    assert busy.active == "evening"
    assert busy.seen[-1] == ("GET", "/api/operations/op0")


def test_activation_need_not_be_waited_for(busy: StandIn, magictl: Magictl) -> None:
    def never(method: str, path: str, right: Answer) -> Answer:
        return (200, {**right[1], "status": "running"}) if "operations" in path else right

    busy.fault = never

    told = magictl("profile", "activate", "evening", "--no-wait")

    assert told.status == 0
    assert told.out.endswith("✓ qwen2.5-7b ready\n✓ old-14b ready\n")
    assert "the activation goes on in the agent" in told.err
    assert magictl("profile", "activate", "evening", "--wait", "1").status == 1


def test_activation_with_json_is_the_plan_and_the_operation(busy: StandIn, magictl: Magictl) -> None:
    told = magictl("profile", "activate", "evening", "--json")

    plan, _, operation = told.out.partition("\n}\n")
    assert '"operationId": "op0"' in plan
    assert '"id": "op0"' in operation


def test_activation_that_starts_and_stops_nothing_ends_at_once(busy: StandIn, magictl: Magictl) -> None:
    busy.profiles["daily"] |= {"enabledModels": ["tiny-chat"], "runtimeSettings": {"tiny-chat": {"ctxSize": 1}}}
    busy.models["old-14b"]["enabled"] = False

    told = magictl("profile", "activate", "daily")

    assert told.out == "✓ daily is the active profile\nnothing had to change\n"
    assert told.err == (
        "! other settings hold now for tiny-chat, which are not restarted for it: magictl restart --changed\n"
    )
    assert not [path for _, path in busy.seen if "operations" in path]


def test_ctrl_c_leaves_an_activation_to_the_agent(busy: StandIn) -> None:
    def never(method: str, path: str, right: Answer) -> Answer:
        if "operations" not in path:
            return right
        pending = {"status": "running", "state": "loading", "message": ""}
        return 200, {**right[1], "status": "running", "models": {"qwen2.5-7b": pending}}

    busy.fault = never
    with on_terminal("profile", "activate", "evening", environment=surroundings(MAGI_URL=busy.url)) as terminal:
        terminal.wait_for(lambda output: "loading" in output, "the live line")
        terminal.type("\x03")
        assert terminal.end() == 1

    assert "the activation goes on in the agent; see how: magictl servers" in terminal.text


def test_a_profile_is_made_of_what_is_named(busy: StandIn, magictl: Magictl) -> None:
    told = magictl(
        "profile", "create", "Late Night", "--description", "x", "--model", "tiny-chat", "--model", "qwen2.5-7b"
    )

    assert told.status == 0
    assert told.out == "✓ late-night with 2 models  /profiles/late-night.yaml\n"
    assert "magictl profile activate late-night" in told.err
    assert busy.bodies[-1] == {
        "name": "Late Night", "description": "x", "enabledModels": ["tiny-chat", "qwen2.5-7b"]
    }  # fmt: skip


def test_a_profile_is_made_of_what_holds_now(busy: StandIn, magictl: Magictl) -> None:
    busy.profiles["daily"]["runtimeSettings"] = {"tiny-chat": {"ctxSize": 1}}

    told = magictl("profile", "create", "now", "--from-current", "--model", "qwen2.5-7b", "--json")

    assert told.json["profileName"] == "now"
    assert busy.bodies[-1]["enabledModels"] == ["old-14b", "tiny-chat", "qwen2.5-7b"]
    assert busy.bodies[-1]["runtimeSettings"] == {"tiny-chat": {"ctxSize": 1}}
    assert busy.bodies[-1]["twoStage"] == busy.profiles["daily"]["twoStage"]


def test_without_anything_named_it_is_empty(busy: StandIn, magictl: Magictl) -> None:
    assert magictl("profile", "create", "none").out.startswith("✓ none with 0 models")
    assert busy.bodies == [{"name": "none", "description": ""}]


def test_a_profile_with_a_mistyped_model_is_not_made(busy: StandIn, magictl: Magictl) -> None:
    told = magictl("profile", "create", "x", "--model", "tiny-chet")

    assert (told.status, told.err) == (4, "magictl: no model has the id 'tiny-chet'; did you mean tiny-chat?\n")
    assert "x" not in busy.profiles


def test_the_active_profile_is_not_deleted_and_another_is(busy: StandIn, magictl: Magictl) -> None:
    assert magictl("profile", "delete", "evening").out == "✓ evening deleted\n"
    assert "evening" not in busy.profiles

    told = magictl("profile", "delete", "daily")
    assert (told.status, told.err) == (1, "magictl: profile 'daily' is active; activate another first\n")


@pytest.mark.parametrize("command", ["show", "activate", "edit", "delete"])
def test_an_unknown_profile_gets_a_suggestion(busy: StandIn, magictl: Magictl, command: str) -> None:
    told = magictl("profile", command, "evning")

    assert told.status == 4
    assert told.err.endswith("; did you mean evening?\n")


def test_a_profile_is_edited_as_yaml(busy: StandIn, magictl: Magictl, editor: MakeEditor, tmp_path: Path) -> None:
    editor(
        "s/- gone/- tiny-chat/\n"
        "s/flash_attention: .*/flash_attention: off/\n"
        "s/description: After work/description: 2026-01-01T10:00:00Z/"
    )

    told = magictl("profile", "edit", "evening")

    assert told.status == 0, told.err
    assert told.out == "✓ evening replaced  /profiles/evening.yaml\n"
    assert "magictl profile activate evening" in told.err
    assert busy.profiles["evening"]["enabledModels"] == ["qwen2.5-7b", "tiny-chat", "old-14b"]
    assert busy.bodies[-1]["runtime_settings"] == {"qwen2.5-7b": {"ctx_size": 4096, "flash_attention": "off"}}
    assert busy.bodies[-1]["description"] == "2026-01-01T10:00:00Z"
    assert (tmp_path / "last.yaml").read_text().startswith("# Save and leave, ")


def test_leaving_the_editor_without_saving_changes_nothing(busy: StandIn, magictl: Magictl, editor: MakeEditor) -> None:
    editor("")

    told = magictl("profile", "edit", "evening")

    assert (told.status, told.err) == (0, "nothing was changed\n")
    assert [method for method, _ in busy.seen] == ["GET"]


def test_an_editor_that_fails_is_said(busy: StandIn, magictl: Magictl, editor: MakeEditor) -> None:
    program = editor("s/gone/tiny-chat/", status=1)

    told = magictl("profile", "edit", "evening")

    assert told.status == 1
    assert str(program) in told.err
    assert "set EDITOR to one that works" in told.err
    assert [method for method, _ in busy.seen] == ["GET"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("s/enabled_models:/enabled_models: [/", "this is no YAML"),
        ("1,$d\n", "a profile is a mapping"),
        ("s/two_stage:/two_stge:/", "two_stge"),
    ],
)
def test_what_cannot_be_taken_is_kept(
    busy: StandIn, magictl: Magictl, editor: MakeEditor, script: str, said: str
) -> None:
    editor(script)

    def strict(method: str, path: str, right: Answer) -> Answer:
        if method == "PUT":
            faults = [{"field": "two_stge", "message": "Extra inputs are not permitted"}]
            return error(422, "ValidationError", "the body is not valid", errors=faults)
        return right

    busy.fault = strict
    told = magictl("profile", "edit", "evening")

    assert told.status == 1
    assert said in told.err
    [kept] = re.findall(r"what you wrote is kept in (\S+)", told.err)
    assert "evening" in kept


def test_what_somebody_else_changed_meanwhile_is_not_overwritten(
    busy: StandIn, magictl: Magictl, editor: MakeEditor
) -> None:
    editor("s/gone/tiny-chat/")
    looks = 0

    def changing(method: str, path: str, right: Answer) -> Answer:
        nonlocal looks
        looks += path.endswith("/evening")
        return (200, {**right[1], "description": f"version {looks}"}) if path.endswith("/evening") else right

    busy.fault = changing
    told = magictl("profile", "edit", "evening")

    assert told.status == 1
    assert "somebody else has changed the profile meanwhile" in told.err
    assert [method for method, _ in busy.seen] == ["GET", "GET"]
    assert "what you wrote is kept in " in told.err


def test_at_a_terminal_one_may_mend_what_was_refused(busy: StandIn, editor: MakeEditor) -> None:
    editor("s/enabled_models:/enabled_models: [/\ns/gone/tiny-chat/", "s/enabled_models: \\[/enabled_models:/")
    environment = surroundings(MAGI_URL=busy.url, VISUAL=os.environ["VISUAL"], TMPDIR=os.environ["TMPDIR"])

    with on_terminal("profile", "edit", "evening", environment=environment) as terminal:
        terminal.wait_for(lambda output: "edit it again? [Y/n]" in output, "the question")
        terminal.type("\n")
        assert terminal.end() == 0, terminal.output

    assert "tiny-chat" in busy.profiles["evening"]["enabledModels"]


def test_breaking_off_at_the_question_keeps_what_was_written(busy: StandIn, editor: MakeEditor) -> None:
    editor("s/enabled_models:/enabled_models: [/")
    environment = surroundings(MAGI_URL=busy.url, VISUAL=os.environ["VISUAL"], TMPDIR=os.environ["TMPDIR"])

    with on_terminal("profile", "edit", "evening", environment=environment) as terminal:
        terminal.wait_for(lambda output: "edit it again? [Y/n]" in output, "the question")
        # Ctrl-D comes to the same as Ctrl-C, which readline loses where it comes just before it waits.
        terminal.type("\x04")
        assert terminal.end() == 1

    [kept] = re.findall(r"what you wrote is kept in (\S+)", terminal.text)
    assert "enabled_models: [" in Path(kept).read_text()


def test_what_is_written_for_editing_is_read_as_the_same() -> None:
    whole: dict[str, Any] = {
        **profile("Ünder way"),
        "description": "on",
        "enabledModels": ["1", "yes", "a.b"],
        "runtimeSettings": {"a.b": {"flashAttention": "on", "mmap": False, "tensorSplit": [1.0, 2.0], "ctxSize": None}},
    }
    text = to_yaml(whole)

    again = from_yaml(text)

    assert again["name"] == "Ünder way"
    assert again["description"] == "on"
    assert again["enabled_models"] == whole["enabledModels"]
    assert again["runtime_settings"] == {"a.b": {"flash_attention": "on", "mmap": False, "tensor_split": [1.0, 2.0]}}
    assert again["tier_config"] == yaml.safe_load(text)["tier_config"]
    assert again["two_stage"] == {
        "enabled": False, "stage1_tier": "balanced", "stage2_tier": "powerful", "stage1_max_tokens": 500
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["a: [", "- a", "5", "", "? !!python/object:os.system x", "!!timestamp x", "a: &x [*x]", "a: !!int x"]
)
def test_hardly_anything_is_a_profile(text: str) -> None:
    with pytest.raises(CommandError) as raised:
        from_yaml(text)

    assert raised.value.kind == "ProfileInvalid"


def test_active_stands_for_the_active_one(busy: StandIn, magictl: Magictl, editor: MakeEditor) -> None:
    assert magictl("profile", "show", "active").out == magictl("profile", "show", "daily").out
    assert magictl("profile", "show", "active", "--json").json["name"] == "daily"

    editor("s/^  description:.*/  description: every day/")
    told = magictl("profile", "edit", "active")

    assert told.status == 0
    assert told.out.startswith("✓ daily replaced")
    assert busy.profiles["daily"]["description"] == "every day"
