"""What a server in the system scope is shown of the host."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.hidden_folders import hidden_folders
from magi_agent.servers.launch import Wanted, specification_of
from magi_agent.servers.launcher import probe_of, service_of
from magi_agent.settings.loading import load_settings
from magi_agent.vocabulary import Scope


def test_what_a_request_names_is_not_what_is_shown() -> None:
    settings = load_settings(
        {"model_scan_path": "/srv/models", "llama_server_path": "/opt/llama/llama-server", "llama_server_user": "x"}, {}
    )
    wanted = Wanted("m", "m", "/srv/models/a/m.gguf", "/srv/models/b/p.gguf", 8080, RuntimeSettings(projector="none"))
    launch = specification_of(wanted, settings, None, None)

    shown = {str(folder) for folder in service_of(launch, Scope.SYSTEM).read_only_paths}
    assert shown == {"/srv/models", "/opt/llama"}
    by_its_user = {str(folder) for folder in service_of(launch, Scope.USER).read_only_paths}
    assert {"/srv/models/a", "/srv/models/b"} <= by_its_user
    assert service_of(launch, Scope.USER).hidden_folders == ()


def test_folders_below_the_root_and_var_are_hidden_but_for_programs() -> None:
    hidden = {str(folder) for folder in hidden_folders(())}
    there = {str(path) for path in (*Path("/").iterdir(), *Path("/var").iterdir()) if path.is_dir()}
    assert hidden <= there
    assert {"/srv", "/mnt", "/var/lib", "/var/log"} & there <= hidden
    assert not hidden & {"/usr", "/etc", "/opt", "/bin", "/lib", "/proc", "/sys", "/dev", "/run", "/var", "/var/tmp"}
    assert probe_of(Path("/opt/x/llama-server"), Path("/x"), None, Scope.SYSTEM).hidden_folders


def test_what_is_to_be_shown_can_be() -> None:
    everything = set(hidden_folders(()))
    assert PurePosixPath("/srv") in everything
    for shown, left in (
        ("/srv", {PurePosixPath("/srv")}),
        ("/srv/models", set()),
        # Nothing that systemd could bind: the folder stays as it is.
        ("/srv/my models", {PurePosixPath("/srv")}),
        ("/srv/data/my models", set()),
        ("/", everything),
    ):
        assert everything.difference(hidden_folders((PurePosixPath(shown),))) == left, shown
