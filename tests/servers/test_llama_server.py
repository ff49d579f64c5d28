"""llama-server's command line and environment, and how one that runs is compared with what it should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magi_agent.runtime_settings.known_options import KnownOptions, read_help
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.launch import NO_DEVICE, LaunchSpecification, model_id_of, unit_name
from magi_agent.servers.launcher import service_of
from magi_agent.servers.llama_server import (
    argv_of,
    binary_identity_of,
    devices_of,
    differences,
    environment_of,
    model_path_of,
    offload_asked,
    port_of,
    reach_of,
)
from magi_agent.servers.reach import AtPort, AtSocket
from magi_agent.systemd.transient import Restart, TransientService
from magi_agent.vocabulary import Scope, ServerAccess
from tests.runtime_settings.strategies import RUNTIME_SETTINGS

LAUNCH = LaunchSpecification(
    model_id="qwen3-8b",
    display_name="Qwen3 8B",
    binary=Path("/usr/local/bin/llama-server"),
    model_path="/models/Qwen3 8B.gguf",
    projector_path=None,
    host="127.0.0.1",
    port=8081,
    runtime_settings=RuntimeSettings(),
    readable_folders=(Path("/models"),),
    user=None,
    stop_timeout=20.0,
)
FULL = replace(
    LAUNCH,
    projector_path="/models/mmproj.gguf",
    runtime_settings=RuntimeSettings(n_gpu_layers=-1, ctx_size=4096, n_threads=8, batch_size=512),
)


def _environment(launch: LaunchSpecification) -> list[str]:
    """As systemd lists it."""
    return [f"{name}={value}" for name, value in environment_of(launch).items()]


def _differences(launch: LaunchSpecification, running: LaunchSpecification) -> tuple[str, ...]:
    return differences(launch, argv_of(running), _environment(running))


def test_the_command_line_says_what_ps_should_show() -> None:
    assert argv_of(FULL) == (
        "/usr/local/bin/llama-server", "--host", "127.0.0.1", "--port", "8081", "--alias", "qwen3-8b", "--metrics",
        "--n-gpu-layers", "all", "--ctx-size", "4096", "--threads", "8", "--batch-size", "512",
    )  # fmt: skip
    assert argv_of(LAUNCH)[-1] == "--metrics"
    assert environment_of(FULL) == {
        "LLAMA_ARG_MODEL": "/models/Qwen3 8B.gguf",
        "LLAMA_ARG_MMPROJ": "/models/mmproj.gguf",
    }
    assert environment_of(LAUNCH) == {"LLAMA_ARG_MODEL": "/models/Qwen3 8B.gguf"}


def test_a_server_that_has_nothing_to_fit_does_not_try_and_that_is_no_difference() -> None:
    fits = read_help("-fit,  --fit [on|off]     whether to adjust unset arguments\n       (env: LLAMA_ARG_FIT)\n")
    fitted = replace(FULL, known_options=fits, is_fitted=True)

    assert environment_of(fitted)["LLAMA_ARG_FIT"] == "off"
    assert "LLAMA_ARG_FIT" not in environment_of(replace(fitted, is_fitted=False))
    # Before it was asked, or where it is told in another way, it is left to itself.
    for known in (None, read_help("--fit [on|off]   whether to adjust it\n"), read_help("--metrics   m\n")):
        assert "LLAMA_ARG_FIT" not in environment_of(replace(fitted, known_options=known))
    left = replace(fitted, is_fitted=False)
    assert _differences(left, fitted) == _differences(fitted, left) == ()


@given(path=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_what_a_file_name_can_hold_travels_in_the_environment_only(path: str) -> None:
    launch = replace(FULL, model_path=f"/models/<{path}>", projector_path=f"/models/<p{path}>")

    assert not any("<" in argument for argument in argv_of(launch))
    assert model_path_of(_environment(launch)) == launch.model_path
    assert _differences(launch, launch) == ()


@pytest.mark.parametrize(
    ("launch", "reasons"),
    [
        (LAUNCH, ()),
        (FULL, ()),
        (replace(FULL, display_name="another name", stop_timeout=1.0, readable_folders=()), ()),
        (replace(FULL, port=8085), ("port: runs with 8081, should be 8085",)),
        (replace(FULL, user="llama"), ("user: runs with the default, should be llama",)),
        (replace(FULL, host="0.0.0.0"), ("host: runs with 127.0.0.1, should be 0.0.0.0",)),
        (
            replace(FULL, binary=Path("/opt/llama")),
            ("binary: runs with /usr/local/bin/llama-server, should be /opt/llama",),
        ),
        (replace(FULL, model_path="/m=n.gguf"), ("model file: runs with /models/Qwen3 8B.gguf, should be /m=n.gguf",)),
        (replace(FULL, projector_path=None), ("projector: runs with /models/mmproj.gguf, should be the default",)),
        (
            replace(FULL, runtime_settings=RuntimeSettings(n_gpu_layers=0, n_threads=8)),
            (
                "n-gpu-layers: runs with all, should be 0",
                "ctx-size: runs with 4096, should be the default",
                "batch-size: runs with 512, should be the default",
            ),
        ),
    ],
)  # fmt: skip
def test_each_change_is_its_own_reason(launch: LaunchSpecification, reasons: tuple[str, ...]) -> None:
    running = LAUNCH if launch is LAUNCH else FULL

    assert _differences(launch, running) == reasons
    # And back again: whatever differs, differs seen from either side.
    assert len(_differences(running, launch)) == len(reasons)


def test_what_somebody_else_gave_it_is_a_reason_too() -> None:
    running = (*argv_of(LAUNCH), "--jinja"), [*_environment(LAUNCH), "LLAMA_ARG_FLASH_ATTN=on", "LANG=C"]

    assert differences(LAUNCH, *running) == (
        "jinja: runs with set, should be the default",
        "LLAMA_ARG_FLASH_ATTN: runs with on, should be the default",
    )


SINGLE_ALIAS = read_help("-a,    --alias STRING     set alias for model name\n")
SEVERAL_ALIASES = read_help("-a,    --alias STRING     set model name aliases, comma-separated\n")


@pytest.mark.parametrize(
    ("known", "alias"),
    [(None, "qwen3-8b,gpt-4o,x"), (SEVERAL_ALIASES, "qwen3-8b,gpt-4o,x"), (SINGLE_ALIAS, "qwen3-8b")],
)
def test_aliases_go_beside_the_id_where_the_build_takes_more_than_one(known: KnownOptions | None, alias: str) -> None:
    argv = argv_of(replace(LAUNCH, runtime_settings=RuntimeSettings(aliases=("gpt-4o", "x")), known_options=known))

    assert argv[argv.index("--alias") + 1] == alias


@pytest.mark.parametrize(
    ("found", "chosen", "passed_on"),
    [
        (None, None, None),
        ("/m/found", None, "/m/found"),
        ("/m/found", "/m/chosen", "/m/chosen"),
        ("/m/found", "none", None),
        (None, "/m/chosen", "/m/chosen"),
        (None, "none", None),
    ],
)
def test_the_projector_is_the_chosen_one_else_the_one_that_was_found(
    found: str | None, chosen: str | None, passed_on: str | None
) -> None:
    launch = replace(LAUNCH, projector_path=found, runtime_settings=RuntimeSettings(projector=chosen))

    assert environment_of(launch).get("LLAMA_ARG_MMPROJ") == passed_on


def test_which_binary_it_was_is_kept_and_is_no_difference_of_settings() -> None:
    launch = replace(LAUNCH, binary_identity="1:2:3:4")

    assert binary_identity_of(_environment(launch)) == "1:2:3:4"
    assert binary_identity_of(_environment(LAUNCH)) is None
    assert _differences(launch, LAUNCH) == ()


KNOWS_DEVICES = read_help(
    "-dev,  --device <dev1,dev2,..>  list of devices\n--spec-draft-device, -devd <dev1,dev2,..>  of the draft model\n"
    "--mmproj-offload, --no-mmproj-offload  the projector\n"
    "--spec-draft-model FNAME  (env: LLAMA_ARG_SPEC_DRAFT_MODEL)\n"
)


def test_the_gpus_that_were_chosen_are_said_and_are_no_difference() -> None:
    launch = replace(LAUNCH, known_options=KNOWS_DEVICES)
    placed = replace(launch, devices=("CUDA1", "CUDA3"))
    assert argv_of(placed)[-2:] == ("--device", "CUDA1,CUDA3")
    assert devices_of(argv_of(placed)) == ("CUDA1", "CUDA3")
    assert devices_of(argv_of(launch)) is None
    assert _differences(launch, placed) == _differences(placed, launch) == ()
    assert _differences(replace(placed, devices=("CUDA0",)), placed) == ()
    # A build that knows no such option, or was not asked, is told nothing.
    assert "--device" not in argv_of(replace(placed, known_options=None))
    assert "--device" not in argv_of(replace(placed, known_options=read_help("--x N  y")))


def test_devices_that_the_operator_says_are_a_difference() -> None:
    launch = replace(LAUNCH, known_options=KNOWS_DEVICES)
    by_hand = replace(launch, runtime_settings=RuntimeSettings(extra_flags=("--device=CUDA0",)))
    reason = "device: runs with the default, should be CUDA0"
    assert _differences(by_hand, launch) == (reason,)
    assert _differences(by_hand, replace(launch, devices=("CUDA0",))) == (reason,)
    assert _differences(launch, by_hand) == ("device: runs with CUDA0, should be the default",)
    assert differences(launch, (*argv_of(launch), "--device", "CUDA7"), _environment(launch)) == (
        "device: runs with CUDA7, should be the default",
    )


def test_changed_pins_are_a_difference() -> None:
    launch = replace(LAUNCH, known_options=KNOWS_DEVICES)
    pinned = replace(launch, runtime_settings=RuntimeSettings(gpus=("0000:01:00.0", "GPU-12345678")))
    placed = replace(pinned, devices=("CUDA0", "CUDA1"))
    assert _differences(pinned, placed) == ()
    assert _differences(pinned, launch) == ("gpus: runs with the default, should be 0000:01:00.0,GPU-12345678",)
    assert _differences(launch, placed) == ("gpus: runs with 0000:01:00.0,GPU-12345678, should be the default",)


def test_draft_model_and_projector_go_where_the_model_goes() -> None:
    settings = RuntimeSettings(draft_model="/models/draft.gguf")
    placed = replace(FULL, known_options=KNOWS_DEVICES, runtime_settings=settings, devices=("CUDA1", "CUDA2"))
    assert argv_of(placed)[-4:] == ("--device", "CUDA1,CUDA2", "--spec-draft-device", "CUDA1,CUDA2")
    assert environment_of(placed)["MTMD_BACKEND_DEVICE"] == "CUDA1"
    assert _differences(replace(placed, devices=()), placed) == ()
    on_cpu = replace(placed, devices=NO_DEVICE)
    assert argv_of(on_cpu)[-5:] == ("--device", "none", "--spec-draft-device", "none", "--no-mmproj-offload")
    assert "MTMD_BACKEND_DEVICE" not in environment_of(on_cpu)
    assert _differences(replace(placed, devices=()), on_cpu) == ()


@pytest.mark.parametrize(
    ("said", "devices", "asked"),
    [
        ({}, (), None),
        ({"n_gpu_layers": 99}, (), "n_gpu_layers=99"),
        ({"n_gpu_layers": -1}, (), "n_gpu_layers=all"),
        ({"n_gpu_layers": 0}, (), None),
        ({"n_gpu_layers": 0, "gpus": ("0000:01:00.0",)}, (), None),
        ({"gpus": ("0000:01:00.0",)}, (), "gpus=0000:01:00.0"),
        ({"n_gpu_layers": 99, "extra_flags": ("--device=none",)}, (), None),
        ({"n_gpu_layers": 99}, ("CUDA0",), "n_gpu_layers=99"),
    ],
)
def test_what_asks_for_gpus(said: dict[str, Any], devices: tuple[str, ...], asked: str | None) -> None:
    launch = replace(LAUNCH, runtime_settings=RuntimeSettings(**said), devices=devices)
    assert offload_asked(argv_of(launch), _environment(launch)) == asked


def test_a_limit_is_compared_by_its_own_name() -> None:
    limited = replace(LAUNCH, runtime_settings=RuntimeSettings(memory_max=5, cpu_affinity="0-1"))

    assert _differences(limited, LAUNCH) == (
        "memory_max: runs with the default, should be 5",
        "cpu_affinity: runs with the default, should be 0-1",
    )


@given(RUNTIME_SETTINGS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_server_started_by_a_launch_never_differs_from_it(said: RuntimeSettings) -> None:
    launch = replace(LAUNCH, runtime_settings=said)

    assert _differences(launch, launch) == ()
    # What a person chose reaches systemd, whatever it is.
    assert service_of(launch, Scope.USER).argv == argv_of(launch)


def test_reasons_can_always_be_written_as_text() -> None:
    for reason in _differences(replace(LAUNCH, model_path="/models/\udcff.gguf"), LAUNCH):
        reason.encode()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8081"),
        ("192.168.1.5", "http://192.168.1.5:8081"),
        ("0.0.0.0", "http://127.0.0.1:8081"),
        ("::", "http://[::1]:8081"),
        ("fd00::1", "http://[fd00::1]:8081"),
    ],
)
def test_where_a_server_is_reached(host: str, url: str) -> None:
    argv = argv_of(replace(LAUNCH, host=host))

    reach = reach_of(argv, ())

    assert reach is not None
    assert (port_of(argv), reach.url) == (8081, url)


def test_a_server_that_was_told_no_address_is_reached_on_loopback() -> None:
    assert reach_of(("llama-server", "--port", "8081"), ()) == AtPort("127.0.0.1", 8081)


@pytest.mark.parametrize("argv", [(), ("llama-server",), ("llama-server", "--port"), ("llama-server", "--port", "x")])
def test_a_port_that_is_not_there_is_none(argv: tuple[str, ...]) -> None:
    assert port_of(argv) is None
    assert reach_of(argv, ()) is None
    assert model_path_of(()) is None


AT_PORT = replace(LAUNCH, access=ServerAccess.PORT)
AT_SOCKET = replace(LAUNCH, access=ServerAccess.SOCKET)
WITH_KEY = replace(LAUNCH, access=ServerAccess.KEY)


def test_a_server_at_a_socket_is_told_no_port() -> None:
    argv = argv_of(AT_SOCKET)
    [path] = [argument for argument in argv if argument.endswith(".sock")]

    assert argv[argv.index("--host") + 1] == path
    assert "--port" not in argv
    assert reach_of(argv, _environment(AT_SOCKET)) == AtSocket(Path(path))
    assert path.startswith("/run/magi-llama/qwen3-8b.")


def test_a_server_with_a_key_is_told_where_systemd_puts_it_and_the_agent_where_it_comes_from() -> None:
    service = service_of(WITH_KEY, Scope.SYSTEM, Path("/run/magi-llama-keys/x.1"))
    environment = [f"{name}={value}" for name, value in service.environment.items()]

    assert service.environment["LLAMA_ARG_API_KEY_FILE"] == "/run/credentials/magi-llama-qwen3-8b.service/api-key"
    assert service.load_credentials == {"api-key": PurePosixPath("/run/magi-llama-keys/x.1")}
    assert reach_of(service.argv, environment) == AtPort("127.0.0.1", 8081, Path("/run/magi-llama-keys/x.1"))
    assert not any("key" in argument for argument in service.argv)


@pytest.mark.parametrize("running", [AT_PORT, AT_SOCKET, WITH_KEY], ids=lambda launch: str(launch.access))
@pytest.mark.parametrize("launch", [AT_PORT, AT_SOCKET, WITH_KEY], ids=lambda launch: str(launch.access))
def test_another_access_is_one_reason(launch: LaunchSpecification, running: LaunchSpecification) -> None:
    moved = replace(running, host="::1", port=9000)
    reason = f"server access: runs with {running.access}, should be {launch.access}"

    assert _differences(launch, running) == (() if launch is running else (reason,))
    if launch is not running:
        assert _differences(launch, moved) == (reason,)


def test_a_server_with_a_key_that_moved_is_still_told() -> None:
    assert _differences(WITH_KEY, replace(WITH_KEY, port=9000)) == ("port: runs with 9000, should be 8081",)


@pytest.mark.parametrize(
    ("scope", "user", "mode", "umask"),
    [
        # The agent is of the servers' user's group, or is root, or is the same user.
        (Scope.SYSTEM, "magi-llama", 0o750, 0o007),
        (Scope.SYSTEM, None, 0o700, 0o077),
        (Scope.USER, None, 0o700, 0o077),
    ],
)
def test_who_may_enter_the_folder_of_a_socket(scope: Scope, user: str | None, mode: int, umask: int) -> None:
    service = service_of(replace(AT_SOCKET, user=user), scope)

    assert service.runtime_directory is not None
    assert f"/run/{service.runtime_directory}/server.sock" in service.argv
    assert (service.runtime_directory_mode, service.umask) == (mode, umask)
    assert service_of(replace(AT_PORT, user=user), scope).runtime_directory is None
    assert service_of(replace(AT_PORT, user=user), scope).umask == 0o077


def test_a_socket_whose_path_would_be_too_long_is_refused_before_the_start() -> None:
    with pytest.raises(ValueError, match="longer than 107 bytes"):
        service_of(replace(AT_SOCKET, runtime_root=Path("/run", "x" * 60)), Scope.USER)


@pytest.mark.parametrize("model_id", ["a", "qwen3-8b.q4_k_m", "x.service", "magi-llama-x", "a--b"])
def test_unit_and_model_name_each_other(model_id: str) -> None:
    assert model_id_of(unit_name(model_id)) == model_id


def test_the_unit_of_a_launch() -> None:
    service = service_of(FULL, Scope.SYSTEM)

    assert isinstance(service, TransientService)
    assert service.name == "magi-llama-qwen3-8b.service"
    assert service.slice == "magi-llama.slice"
    assert service.syslog_identifier == "magi-llama-qwen3-8b"
    assert service.restart is Restart.ON_FAILURE
    assert (service.restart_sec, service.start_limit_burst, service.start_limit_interval_sec) == (1.0, 4, 60.0)
    assert service.timeout_stop_sec == 20.0
    assert {str(path) for path in service.read_only_paths} == {"/models", "/usr/local/bin"}
    assert (service.user, service.dynamic_user) == (None, True)
    assert service_of(replace(FULL, user="llama"), Scope.SYSTEM).user == "llama"
    for user in (None, "llama"):
        assert (service_of(replace(FULL, user=user), Scope.USER).user, service.dynamic_user) == (None, True)
        assert not service_of(replace(FULL, user=user), Scope.USER).dynamic_user


def test_the_mount_that_a_link_in_the_path_leads_to_is_required_too(tmp_path: Path) -> None:
    (tmp_path / "disk" / "models").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk")
    launch = replace(FULL, model_path=str(tmp_path / "link" / "models" / "x.gguf"))
    real = tmp_path.resolve()

    required = service_of(launch, Scope.SYSTEM).requires_mounts_for

    assert {str(folder) for folder in required} == {f"{tmp_path}/link/models", f"{real}/disk/models"}
    assert service_of(launch, Scope.USER).requires_mounts_for == ()
