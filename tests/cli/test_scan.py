"""`magictl scan`: real files, listed exactly as the registry would list them, and no agent anywhere."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from magi_agent.api.representations import model_answer
from magi_agent.cli.scanned import model_json
from magi_agent.discovery.facts import TierThresholds
from magi_agent.discovery.scanner import Scanner
from magi_agent.registry.merging import merge
from magi_agent.registry.model import Choices, Model
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.vocabulary import StartPolicy, Tier
from tests.cli.conftest import Magictl
from tests.cli.terminal import as_nobody, piped, shown, without_control
from tests.conftest import MakeToyModel, SampleModels

THINKING_TEMPLATE = "{% if enable_thinking %}<think>{% endif %}{{ messages }}</think>"


@pytest.fixture
def folder(tmp_path: Path, toy_model: MakeToyModel) -> Path:
    """A folder with files of many kinds."""
    models = tmp_path / "models"
    toy_model(models / "plain.gguf")
    toy_model(models / "switched-3b.gguf", name="Switched", chat_template=THINKING_TEMPLATE)
    toy_model(models / "deep" / "plain.gguf", name="another", seed=5)
    whole = toy_model(models / "cut.gguf", seed=6)
    os.truncate(whole, 200_000)
    (models / "noise.gguf").write_bytes(b"this is no model at all")
    toy_model(models / "download.gguf.part", seed=7)
    (models / "readme.txt").write_text("not a model")
    return models


def models_in(*folders: Path) -> dict[str, Model]:
    """The models, as an agent that scans these folders for the first time has them."""
    found = Scanner(folders, TierThresholds(), cache_path=None).scan().models
    return merge({}, found, ()).models


def as_the_registry_would(model: Model) -> dict[str, object]:
    policy = model.choices.runtime_settings.start_policy or StartPolicy.ALWAYS_ON
    return model_answer(model, policy).model_dump(mode="json", by_alias=True)


def test_the_sample_models_are_listed_as_the_registry_would(magictl: Magictl, sample_models: SampleModels) -> None:
    told = magictl("scan", str(sample_models.folder), "--json")

    assert told.status == 0
    expected = {model_id: as_the_registry_would(model) for model_id, model in models_in(sample_models.folder).items()}
    assert told.json["models"] == expected
    assert len(expected) == 2
    for model_id, model in expected.items():
        assert list(told.json["models"][model_id]) == list(model), "the keys are in the order of the wire"
    smollm2 = told.json["models"]["smollm2-135m-instruct.q4_1"]
    assert smollm2["sizeBytes"] == sample_models.smollm2.stat().st_size
    assert smollm2["chatTemplate"] is True
    assert told.json["scanPaths"] == [str(sample_models.folder)]
    assert told.json["problems"] == []


def test_files_of_every_kind_are_listed_as_the_registry_would(magictl: Magictl, folder: Path) -> None:
    told = magictl("scan", str(folder), "--json")

    expected = {model_id: as_the_registry_would(model) for model_id, model in models_in(folder).items()}
    assert told.json["models"] == expected
    assert {model["status"] for model in expected.values()} == {"ok", "incomplete", "invalid"}
    assert {model["thinkingMode"] for model in expected.values()} == {"none", "optional"}


def test_choices_too_have_the_keys_and_values_of_the_wire(folder: Path) -> None:
    """A scan knows of none; this holds the function to the whole of the contract all the same."""
    settings = RuntimeSettings(99, 4096, 8, 512, start_policy=StartPolicy.ON_DEMAND)
    choices = Choices(Tier.POWERFUL, True, True, 8085, settings)
    for model in models_in(folder).values():
        facts = replace(
            model.facts,
            projector_path="/m/mmproj-\udcff.gguf",
            projectors=("/m/mmproj-\udcff.gguf", "/m/mmproj-f32.gguf"),
            is_reranker=True,
            active_params=3.0,
            display_name="",
        )
        chosen = replace(model, choices=choices, facts=facts)

        assert model_json(chosen) == as_the_registry_would(chosen)


def test_a_table_for_a_person(magictl: Magictl, folder: Path) -> None:
    told = magictl("scan", str(folder))

    assert told.status == 0
    names = [line.split()[0] for line in told.out.partition("\n\n")[0].splitlines()]
    assert names == ["MODEL", "cut", "noise", "plain", "plain-models", "switched-3b"]
    assert "2 problems\n  cut: " in told.out
    assert told.err == "5 models; ids and ports are given for good by the agent\n"


def test_nothing_is_written(magictl: Magictl, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    magictl("scan", str(folder))

    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_several_folders_and_a_path_below_home(
    magictl: Magictl, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = tmp_path / "more"
    more.mkdir()
    shutil.copy(folder / "plain.gguf", more / "elsewhere.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))

    told = magictl("scan", str(folder), "~/more", "--json")

    assert told.json["scanPath"] == f"{folder}:{more}"
    assert "elsewhere" in told.json["models"]
    assert "plain" in told.json["models"]


def test_a_folder_without_models(magictl: Magictl, tmp_path: Path) -> None:
    told = magictl("scan", str(tmp_path))

    assert (told.status, told.out) == (0, "")
    assert told.err == f"no models found in {tmp_path}\n"
    assert magictl("scan", str(tmp_path), "--json").json["models"] == {}


@pytest.mark.parametrize(("name", "said"), [("missing", "does not exist"), ("file", "is no folder")])
def test_what_is_no_folder_is_a_failure(magictl: Magictl, tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / name)

    told, as_json = magictl("scan", path), magictl("scan", path, "--json")

    assert (told.status, told.err) == (1, f"magictl: {path} {said}\n")
    assert as_json.error == {"error": "FolderUnreadable", "message": f"{path} {said}", "details": {"folder": path}}


def test_a_folder_that_may_not_be_read_is_a_failure_and_one_in_it_a_note(
    open_folder: Path, toy_model: MakeToyModel
) -> None:
    toy_model(open_folder / "models" / "plain.gguf")
    (open_folder / "models" / "closed").mkdir(mode=0o700)
    (open_folder / "locked").mkdir(mode=0o700)

    within = as_nobody("scan", str(open_folder / "models"))
    refused = as_nobody("scan", str(open_folder / "locked"))

    assert within.returncode == 0
    assert "plain" in within.stdout
    assert f"{open_folder}/models/closed" in within.stderr
    assert "chmod" in within.stderr
    assert refused.returncode == 1
    assert f"magictl: cannot read {open_folder}/locked: Permission denied" in refused.stderr


def test_file_names_that_would_take_over_the_terminal_are_harmless(tmp_path: Path, toy_model: MakeToyModel) -> None:
    models = tmp_path / "m"
    toy_model(models / "evil\x1b[31m\x1b]0;owned\x07.gguf", name="Evil\x1b[2J")
    name = os.fsdecode(b"not-utf-8-\xff\xfe.gguf")
    toy_model(models / name, seed=2)
    (models / "damaged\x1b[5m.gguf").write_bytes(b"GGUF")

    status, on_terminal = shown("scan", str(models), columns=200)
    in_pipe, as_json = piped("scan", str(models)), piped("scan", str(models), "--json")

    assert status == in_pipe.returncode == as_json.returncode == 0
    for output in (without_control(on_terminal), in_pipe.stdout, as_json.stdout):
        assert all(letter.isprintable() or letter == "\n" for letter in output)
    assert "\x1b]0;" not in on_terminal
    assert "\x1b[2J" not in on_terminal
    assert "not-utf-8-\ufffd\ufffd.gguf" in as_json.stdout


def test_the_scanner_is_not_kept_waiting_by_schemas() -> None:
    """pydantic and the bus would double the time of a scan."""
    told = piped("scan", "/nonexistent", environment={**os.environ, "PYTHONVERBOSE": "1", "PYTHONIOENCODING": "utf-8"})

    assert "import 'magi_agent.discovery.scanner'" in told.stderr
    for name in ("pydantic", "dbus_next", "aiohttp"):
        assert f"import '{name}'" not in told.stderr
