"""Configuration: where values come from, what they may be, and what is said of those that may not."""

import ipaddress
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.cli.agent import main
from magi_agent.errors import ConfigurationError
from magi_agent.runtime_settings.defaults import RuntimeDefaults
from magi_agent.runtime_settings.settings import LoraAdapter, RuntimeSettings
from magi_agent.settings.loading import load_settings
from magi_agent.settings.settings import ProxyRight, Settings, TcpAddress, shown
from magi_agent.settings.table import SETTINGS, Setting
from magi_agent.vocabulary import LimitSource, Scope, ServerAccess, StartPolicy, TcpAccess, Tier, TokenScope

BAD: dict[str, list[object]] = {
    "model_scan_path": ["", ":", [], [""], ["/a:b"], 5, ["/a", 5], "/a\nb"],
    "rescan_interval": ["0", "-1", "soon", "nan", "inf", "604801", True, [], "", 10**400],
    "powerful_min": ["-1", "many", "nan", "inf", {}, 10**400],
    "fast_max": ["-0.5", "few", "1e6"],
    "registry_path": ["", 5, "a\0b", "a\x7fb"],
    "llama_server_path": ["", False],
    "llama_server_alternatives": [
        "llama_server_user=magi-llama",
        "canary=next/llama-server",
        "canary",
        "=/opt/llama-server",
        "canary=",
        "Canary=/a",
        "-canary=/a",
        "a b=/c",
        "a=/b:a=/c",
        "a=/b:",
        "x" * 65 + "=/a",
        "a=/b\nc",
        ["a=/b"],
        5,
    ],
    "allowed_flags": [
        "no-warmup",
        "-fa",
        "--",
        "--temp=0.5",
        "--Temp",
        "--temp;rm",
        "--ctx-size",
        "--no-mmap",
        "--host",
        "--api-key --temp",
        "--log-file",
        ["--temp --top-k"],
        [""],
        [5],
        5,
    ],
    "llama_server_host": ["", "example.org", "1.2.3", "[::1", 127],
    "llama_server_user": ["a\nb", 1000],
    "server_access": ["", "unix", "Port", 1],
    "port_range": [
        "8080",
        "8099-8080",
        "0-5",
        "8080-65536",
        "a-b",
        [1],
        [1, 2, 3],
        [8080.5, 9000],
        8080,
        "",
        "1-2-3",
        "٣-٤",
    ],
    "port_limits": ["8080", "2-1", "0-5", "8080-65536", 5],
    "max_startup_time": ["0", "soon"],
    "readiness_check_interval": ["0", "soon"],
    "stop_timeout": ["0", "soon"],
    "log_rate_limit_interval": ["0", "soon"],
    "log_rate_limit_burst": ["-1", "1.5", "1000001", "many", True],
    "gateway_max_body": ["-1", "1.5G", "much", True],
    "gateway_timeout": ["0", "-1", "soon", True],
    "gateway_queue": ["-1", "1.5", "many", "nan", "inf", True, 1e9],
    "gateway_drain": ["-1", "soon", "nan", "inf", True],
    "memory_reserve": ["-1", -1, "1.5G", "12P", "G", "much", True, str(1 << 61), "2000000T"],
    "memory_limits": ["", "on", "Derived", True, 1],
    "memory_headroom": ["", "a", "0", 0, "0.09", 10.1, -1, "nan", "inf", True],
    "profiles_path": ["", []],
    "active_profile": ["a\tb", 5],
    "tcp": [
        "",
        "8000",
        ":8000",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "host:80",
        "1:2:3",
        8000,
        True,
    ],
    "tcp_access": ["", "write", "READ", 1, []],
    "socket": ["", "/" + "x" * 107, 5, "a\rb"],
    "tokens_path": ["", 5, "a\nb"],
    "trusted_proxies": ["example.org", "10.0.0.0/33", ["10.0.0.1 10.0.0.2"], [5], 5],
    "proxy_access": [
        "www-data",
        "www-data=",
        "=read",
        "www-data=write",
        "www-data=full",
        "www-data=READ",
        "a b=read",
        "10.0.0.0/33=read",
        "33=read",
        "unix=read unix=none",
        "www-data=read=none",
        ["www-data=read 127.0.0.1=read"],
        [5],
        5,
    ],
    "cors_origins": ["*", "example.org", "https://a/path", "https://", ["https://a https://b"], [""], 5],
    "systemd_scope": ["", "session", "User", 0],
    "journal_directory": [5, "a\nb"],
    "log_level": ["", "loud", "INFO", 10],
}


@pytest.fixture
def config(tmp_path: Path):
    """Write a configuration file and name it."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "agent.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def load(environment: dict[str, str] | None = None, config: Path | None = None, **options: str) -> Settings:
    return load_settings(options, environment or {}, config or Path(os.devnull))


def refusal(environment: dict[str, str] | None = None, config: Path | None = None, **options: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        load(environment, config, **options)
    assert "\n" not in refused.value.message
    return refused.value.message


def setting(name: str) -> Setting:
    return next(setting for setting in SETTINGS if setting.name == name)


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, str):
        return (
            '"'
            + "".join(rf"\u{ord(letter):04x}" if ord(letter) < 32 or ord(letter) == 127 else letter for letter in value)
            + '"'
        )
    return str(value)


def test_the_defaults_are_those_of_the_contract():
    settings = load()
    assert settings.model_scan_path == (Path("/models"),)
    assert settings.registry_path == Path("data/model_registry.json").absolute()
    assert settings.llama_server_path == Path("/usr/local/bin/llama-server")
    assert settings.llama_server_host == "127.0.0.1"
    assert (settings.max_startup_time, settings.readiness_check_interval) == (120.0, 2.0)
    assert settings.active_profile == "development"
    assert settings.profiles_path == (Path("config/profiles").absolute(),)
    assert settings.tcp == TcpAddress("127.0.0.1", 8000)
    assert settings.tcp_access is TcpAccess.READ
    assert settings.socket == Path("/run/magi-agent/api.sock")
    assert settings.systemd_scope is Scope.SYSTEM
    assert settings.port_range == (8080, 8099)
    assert (settings.powerful_min, settings.fast_max) == (14.0, 7.0)
    assert settings.cors_origins == ()


def test_the_environment_wins_over_the_file_and_the_command_line_over_both(config):
    file = config('[api]\ntcp = "127.0.0.1:1111"\nsocket = "/run/file.sock"\ntcp_access = "none"\n')
    environment = {"MAGI_TCP": "127.0.0.1:2222", "MAGI_SOCKET": "/run/environment.sock"}
    settings = load(environment, file, tcp="127.0.0.1:3333")
    assert settings.tcp == TcpAddress("127.0.0.1", 3333)
    assert settings.socket == Path("/run/environment.sock")
    assert settings.tcp_access is TcpAccess.NONE


def test_the_file_is_named_by_option_else_by_the_environment(config, tmp_path):
    file = config('[agent]\nlog_level = "debug"\n')
    other = tmp_path / "other.toml"
    other.write_text('[agent]\nlog_level = "error"\n')
    assert load_settings({}, {"MAGI_CONFIG": str(file)}).log_level == "debug"
    assert load_settings({}, {"MAGI_CONFIG": str(file)}, other).log_level == "error"


def test_every_setting_has_a_place_of_its_own():
    for names in (
        [setting.name for setting in SETTINGS],
        [setting.variable for setting in SETTINGS],
        [setting.option for setting in SETTINGS],
    ):
        assert len(set(names)) == len(SETTINGS)
    # The defaults of runtime settings are a section of the file, and nothing else says them.
    assert {setting.name for setting in SETTINGS} == {*Settings.__slots__} - {"defaults"}


@pytest.mark.parametrize("name", [setting.name for setting in SETTINGS])
def test_every_setting_is_read_from_file_environment_and_option(config, name):
    where = setting(name)
    values = {
        "model_scan_path": "/a:/b",
        "rescan_interval": "17.25",
        "powerful_min": "20",
        "fast_max": "3.5",
        "registry_path": "/var/lib/r.json",
        "llama_server_path": "/opt/llama-server",
        "llama_server_alternatives": "canary=/opt/next/llama-server:rocm-7=/opt/rocm/llama-server",
        "allowed_flags": "--no-warmup --temp",
        "llama_server_host": "::1",
        "llama_server_user": "llama",
        "server_access": "key",
        "port_range": "9000-9001",
        "port_limits": "8000-9999",
        "max_startup_time": "33.5",
        "readiness_check_interval": "0.25",
        "stop_timeout": "44",
        "log_rate_limit_interval": "45.5",
        "log_rate_limit_burst": "46",
        "memory_reserve": "47M",
        "gateway_max_body": "9M",
        "gateway_timeout": "12.5",
        "gateway_queue": "7",
        "gateway_drain": "8.5",
        "memory_limits": "off",
        "memory_headroom": "0.5",
        "profiles_path": "/p:/q",
        "active_profile": "night",
        "tcp": "[::1]:8001",
        "tcp_access": "full",
        "socket": "/run/user/7/a.sock",
        "tokens_path": "/srv/tokens",
        "trusted_proxies": "10.0.0.0/8 unix",
        "proxy_access": "caddy=read 10.0.0.0/8=infer unix=none",
        "cors_origins": "https://a.example http://localhost:3000",
        "systemd_scope": "user",
        "launcher_socket": "/run/l.sock",
        "journal_directory": "/var/log/journal",
        "log_level": "warning",
    }
    value = values[name]
    by_file = load(config=config(f"[{where.section}]\n{name} = {toml(value)}\n"))
    by_environment = load({where.variable: value})
    by_option = load({}, None, **{name: value})
    assert by_file == by_environment == by_option
    assert shown(by_option)[name] == value
    assert shown(load())[name] != value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_with_its_place_and_what_is_allowed(config, name, value):
    where = setting(name)
    file = config(f"# the first line\n\n[{where.section}]\n{name} = {toml(value)}\n")
    message = refusal(config=file)
    assert message.startswith(f"{file}:4: {where.section}.{name}: must ")
    assert len(message) < 500
    if isinstance(value, str):
        assert refusal({where.variable: value}).startswith(f"environment variable {where.variable}: must ")
        message = refusal({}, None, **{name: value})
        assert message.startswith(f"{where.option}: must ")
        assert message.endswith(f", not {value!r}")


@pytest.mark.parametrize("section", ["defaults", "defaults.fast"])
def test_a_default_flag_that_is_not_allowed_is_refused_at_once(tmp_path: Path, section: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(
        f'[{section}]\nextra_flags = ["--no-warmup", "--x=1"]\n[servers]\nallowed_flags = ["--no-warmup"]\n'
    )
    assert refusal({}, file).startswith(f"{section}.extra_flags: --x must be among servers.allowed_flags ({file}:")


def test_each_refusal_says_what_would_be_right():
    assert "'127.0.0.1:8000'" in refusal({"MAGI_TCP": "8000"})
    assert "'off'" in refusal({"MAGI_SOCKET": ""})
    assert "'8080-8099'" in refusal({"MAGI_PORT_RANGE": "many"})
    assert "system, user" in refusal({"MAGI_SYSTEMD_SCOPE": "both"})
    assert "none, read, infer, full" in refusal({"MAGI_TCP_ACCESS": "some"})
    assert "debug, info, warning, error" in refusal({"MAGI_LOG_LEVEL": "loud"})
    assert "seconds" in refusal({"MAX_STARTUP_TIME": "soon"})
    assert "https://" in refusal({"MAGI_CORS_ORIGINS": "*"})


@pytest.mark.parametrize(
    ("text", "begins", "holds"),
    [
        (
            "\n[apis]\n",
            ":2: apis: unknown section; ",
            "discovery, registry, servers, gateway, profiles, api, systemd, agent, defaults",
        ),
        ("\n[ api ]\n\n  tpc = 1\n", ":4: api.tpc: unknown key; [api] has ", "tcp, tcp_access, socket"),
        ("api.tpc = 1\n", ":1: api.tpc: unknown key; ", "tcp"),
        ('[api]\n"tpc" = 1\n', ":2: api.tpc: unknown key; ", "tcp"),
        ("api = { tpc = 1 }\n", ":1: api.tpc: unknown key; ", "tcp"),
        ("log_level = 1\n", ":1: log_level: unknown section; ", "agent"),
        ("api = 5\n", ":1: api: must be a section, [api]", ""),
        ("[[api]]\n", ":1: api: must be a section, [api]", ""),
        ("[servers]\ntcp = 'off'\n", ":2: servers.tcp: unknown key; ", "port_range"),
        ('[api]\n"a\\nb" = 1\n', ":1: api.'a\\nb': unknown key; ", "tcp"),
        ('["a\\nb"]\n', ": 'a\\nb': unknown section; ", "api"),
        ("[api]\ntcp = \n", ":2: is not TOML: ", ""),
        ("[api]\ntcp = 1\ntcp = 2\n", ":3: is not TOML: ", ""),
        ("[api", ": is not TOML: ", ""),
        ("a = " + "[" * 2000, ": is nested too deeply", ""),
        ("a = " + "9" * 5000, ": is not TOML: ", ""),
        (b"\xff\xfe", ": is not UTF-8 text", ""),
        ("#" * (1 << 20) + "\n", ": larger than ", ""),
    ],
)
def test_what_is_no_configuration_is_refused_with_its_line(config, text, begins, holds):
    file = config(text)
    message = refusal(config=file)
    assert message.startswith(f"{file}{begins}")
    assert holds in message


def test_other_binaries_are_a_table_in_the_file_too(config):
    text = """
[servers]
llama_server_path = "/opt/llama-server"
allowed_flags = ["--no-warmup", "--temp"]

[servers.llama_server_alternatives]
canary = "/opt/next/llama-server"
rocm = "/opt/rocm/llama-server"
"""
    settings = load(config=config(text))
    assert settings.binary(None) == Path("/opt/llama-server")
    assert settings.binary("canary") == Path("/opt/next/llama-server")
    assert settings.binary("mainline") is None
    assert settings.binaries == tuple(
        map(Path, ("/opt/llama-server", "/opt/next/llama-server", "/opt/rocm/llama-server"))
    )
    assert settings.allowed_flags == ("--no-warmup", "--temp")
    file = config(text.replace("canary", "Canary"))
    assert "lower-case letters" in refusal(config=file)


DEFAULTS = """\
[defaults]
ctx_size = 8192
flash_attention = "on"
mmap = false
extra_flags = ["--no-warmup"]
lora = [{path = "/models/a.gguf"}]

[defaults.fast]
parallel_slots = 4
startPolicy = "onDemand"

[servers]
stop_timeout = 9
allowed_flags = ["--no-warmup"]
"""


def test_the_defaults_of_runtime_settings_are_a_section_of_the_file(config):
    settings = load(config=config(DEFAULTS))
    host = RuntimeSettings(
        ctx_size=8192,
        flash_attention="on",
        mmap=False,
        extra_flags=("--no-warmup",),
        lora=(LoraAdapter("/models/a.gguf"),),
    )
    fast = RuntimeSettings(parallel_slots=4, start_policy=StartPolicy.ON_DEMAND)
    assert settings.defaults == RuntimeDefaults(host, {Tier.FAST: fast})
    assert settings.stop_timeout == 9
    assert load().defaults == RuntimeDefaults()
    told = {name: value for name, value in shown(settings).items() if name.startswith("defaults.")}
    assert told["defaults.ctx_size"] == "8192"
    assert told["defaults.mmap"] == "false"
    assert told["defaults.lora"] == '[{"path": "/models/a.gguf", "scale": 1.0}]'
    assert told["defaults.fast.start_policy"] == "onDemand"
    assert len(told) == 7


def test_check_shows_the_defaults_of_runtime_settings_and_says_what_is_wrong_with_them(config, capsys):
    assert main(["--check", "--config", str(config(DEFAULTS))]) == 0
    told = {words[0]: words[1] for words in map(str.split, capsys.readouterr().out.splitlines()) if len(words) > 1}
    assert told["defaults.ctx_size"] == "8192"
    assert told["defaults.flash_attention"] == "on"
    assert told["defaults.fast.parallel_slots"] == "4"
    assert told["servers.stop_timeout"] == "9"
    file = config("[defaults.fast]\nparallel_slots = 0\n")
    assert main(["--check", "--config", str(file)]) == 78
    assert f"{file}:2: defaults.fast.parallel_slots: must be -1, or 1 or more" in capsys.readouterr().err


def test_check_names_what_the_service_alone_would_be_told(config, capsys, tmp_path, monkeypatch):
    file = tmp_path / "default"
    monkeypatch.setattr("magi_agent.cli.agent._ENVIRONMENT_FILE", file)
    monkeypatch.setenv("MAGI_TCP", "off")
    named = ["--check", "--config", str(config(""))]
    assert main(named) == 0
    assert "not counted" not in capsys.readouterr().out
    file.write_text("MAGI_TCP=off\nMODEL_SCAN_PATH=/elsewhere\nCUDA_VISIBLE_DEVICES=0\n")
    assert main(named) == 0
    assert f"not counted: MODEL_SCAN_PATH of {file}, for the service alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("\n[defaults]\n\nctx_size = -1\n", 4, "defaults.ctx_size: "),
        ('[defaults]\nctx_size = "many"\n', 2, "defaults.ctx_size: "),
        ("[defaults]\nctx_size = true\n", 2, "defaults.ctx_size: must not be true or false"),
        ("[defaults]\nctx_sise = 5\n", 2, "defaults.ctx_sise: there is no such setting; did you mean ctx_size?"),
        ("[defaults]\nctx-size = 5\n", 2, "defaults.ctx-size: there is no such setting; did you mean ctx_size?"),
        ("[defaults]\nxyzzy = 5\n", 2, "defaults.xyzzy: there is no such setting"),
        ("[defaults]\nctxSize = -1\n", 2, "defaults.ctxSize: "),
        ('[defaults]\ncpuAffinity = "many"\n', 2, "defaults.cpu_affinity: "),
        ("defaults.ctx_size = -1\n", 1, "defaults.ctx_size: "),
        ("[defaults]\n[defaults.fast]\nmmap = 7\n", 3, "defaults.fast.mmap: "),
        ("[defaults.fast]\n\nmemory_high = 5\nmemory_max = 4\n", 3, "defaults.fast.memory_high: must be at most"),
        ("[defaults]\nfast = 5\n", 2, "defaults.fast: "),
        ("[defaults]\nfast = {ctx_size = -1}\n", 2, "defaults.fast.ctx_size: "),
        ("[defaults.quick]\nctx_size = 1\n", 1, "defaults.quick: there is no such setting"),
        ('[defaults]\nmmap = true\nlora = [{path = "/a", size = 1}]\n', 3, "defaults.lora.0.size: "),
        ("defaults = 5\n", 1, "defaults: must be a section, [defaults]"),
    ],
)
def test_a_bad_default_is_refused_with_its_line(config, text, place, says):
    file = config(text)
    message = refusal(config=file)
    assert message.startswith(f"{file}:{place}: {says}")


def test_a_file_that_is_named_must_be_there_and_one_that_is_not_need_not(tmp_path):
    missing = tmp_path / "missing.toml"
    assert str(missing) in refusal(config=missing)
    with pytest.raises(ConfigurationError, match="MAGI_CONFIG"):
        load_settings({}, {"MAGI_CONFIG": str(missing)})
    assert "Is a directory" in refusal(config=tmp_path)


def test_a_users_agent_has_its_socket_in_the_users_folder(config):
    runtime = {"XDG_RUNTIME_DIR": "/run/user/1000"}
    expected = Path("/run/user/1000/magi-agent/api.sock")
    assert load({**runtime, "MAGI_SYSTEMD_SCOPE": "user"}).socket == expected
    assert load(runtime, config('[systemd]\nsystemd_scope = "user"\n')).socket == expected
    assert load(runtime, None, systemd_scope="user").socket == expected
    assert load(runtime).socket == Path("/run/magi-agent/api.sock")
    assert load({"MAGI_SYSTEMD_SCOPE": "user"}).socket == Path("/run/magi-agent/api.sock")
    assert load({**runtime, "MAGI_SYSTEMD_SCOPE": "user", "MAGI_SOCKET": "/s"}).socket == Path("/s")


@pytest.mark.parametrize(
    "address", ["0.0.0.0:8000", "[::]:8000", "192.168.1.5:80", "[fe80::1%eth0]:80", "[::ffff:0.0.0.0]:80"]
)
def test_tcp_listeners_beyond_loopback_are_known_as_such(config, address):
    """Whether one may be opened is another question: it is asked of the real socket, and of the tokens."""
    settings = load({"MAGI_TCP": address})
    assert settings.tcp is not None
    assert not settings.tcp.is_loopback
    assert load(config=config(f'[api]\ntcp = "{address}"\n')) == settings


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "127.8.9.10:1", "[::1]:8000", "localhost:8000", "127.0.0.1:0"])
def test_tcp_listeners_on_loopback(address):
    settings = load({"MAGI_TCP": address})
    assert settings.tcp is not None
    assert settings.tcp.is_loopback
    assert ipaddress.ip_address(settings.tcp.host).is_loopback


def test_settings_that_make_no_sense_together_are_refused(config):
    message = refusal({"MAGI_TCP": "off"}, None, socket="off")
    assert message.startswith("environment variable MAGI_TCP: ")
    assert "--socket" in message
    file = config("[discovery]\nfast_max = 20\n")
    message = refusal(config=file)
    assert message.startswith(f"{file}:2: discovery.fast_max: ")
    assert "14" in message
    assert load({"MAGI_FAST_MAX": "14"}).fast_max == 14


def test_a_users_agent_has_a_file_of_tokens_of_its_own():
    user = {"MAGI_SYSTEMD_SCOPE": "user", "HOME": "/home/somebody"}
    assert load(user).tokens_path == Path("/home/somebody/.config/magi-agent/tokens")
    assert load({**user, "XDG_CONFIG_HOME": "/c"}).tokens_path == Path("/c/magi-agent/tokens")
    assert load({**user, "MAGI_TOKENS_PATH": "/t"}).tokens_path == Path("/t")
    assert load({"HOME": "/root", "XDG_CONFIG_HOME": "/c"}).tokens_path == Path("/etc/magi-agent/tokens")
    assert load({"MAGI_SYSTEMD_SCOPE": "user"}).tokens_path == Path("/etc/magi-agent/tokens")


def test_what_comes_through_a_proxy_may_do_what_is_said_of_it(config):
    rights = load({"MAGI_PROXY_ACCESS": "www-data=read,unix=none 10.0.0.0/8=admin ::1=infer"}).proxy_access
    assert rights == (
        ProxyRight("www-data", TokenScope.READ),
        ProxyRight("unix", None),
        ProxyRight("10.0.0.0/8", TokenScope.ADMIN),
        ProxyRight("::1", TokenScope.INFER),
    )
    assert [right.user for right in rights] == ["www-data", None, None, None]
    for text in (
        '[api]\nproxy_access = ["www-data=read", "unix=none", "10.0.0.0/8=admin", "::1=infer"]\n',
        '[api.proxy_access]\nwww-data = "read"\nunix = "none"\n"10.0.0.0/8" = "admin"\n"::1" = "infer"\n',
    ):
        assert load(config=config(text)).proxy_access == rights
    assert load({"MAGI_PROXY_ACCESS": ""}).proxy_access == ()
    assert {right.scope for right in load().proxy_access} == {None}
    assert "www-data" in [right.user for right in load().proxy_access]
    assert refusal(config=config("[api.proxy_access]\nwww-data = 5\n")).startswith(f"{config('').parent}")


def test_paths_are_made_absolute_and_links_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "link").symlink_to(tmp_path)
    settings = load({"MODEL_SCAN_PATH": "link:~/models:link/../x:link", "REGISTRY_PATH": "r.json"})
    assert settings.model_scan_path == (tmp_path / "link", Path("/home/somebody/models"), tmp_path / "x")
    assert settings.state_directory == tmp_path


def _paths() -> st.SearchStrategy[str]:
    names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters=":/"), min_size=1)
    return st.lists(names, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))


_HOSTS = st.one_of(st.ip_addresses(v=4, network="127.0.0.0/8").map(str), st.just("[::1]"))
_SECONDS = st.floats(1e-6, 604_800, allow_nan=False).map(repr)
_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
VALUES: dict[str, st.SearchStrategy[str]] = {
    "model_scan_path": st.lists(_paths(), min_size=1, max_size=4).map(":".join),
    "rescan_interval": _SECONDS,
    "powerful_min": st.floats(500_000, 999_999).map(repr),
    "fast_max": st.floats(0, 14).map(repr),
    "registry_path": _paths(),
    "llama_server_path": _paths(),
    "llama_server_alternatives": st.dictionaries(
        st.from_regex(r"[a-z0-9][a-z0-9_-]{0,63}", fullmatch=True), _paths(), max_size=3
    ).map(lambda named: ":".join(f"{name}={path}" for name, path in named.items())),
    "allowed_flags": st.lists(st.from_regex(r"--x-[a-z0-9-]{0,20}", fullmatch=True)).map(" ".join),
    "llama_server_host": st.ip_addresses().map(str),
    "llama_server_user": _TEXT,
    "server_access": st.sampled_from([*ServerAccess]).map(str),
    "port_range": st.tuples(st.integers(2_000, 65_535), st.integers(2_000, 65_535)).map(lambda p: f"{min(p)}-{max(p)}"),
    "port_limits": st.integers(1, 2_000).map(lambda low: f"{low}-65535"),
    "max_startup_time": _SECONDS,
    "readiness_check_interval": _SECONDS,
    "stop_timeout": _SECONDS,
    "log_rate_limit_interval": _SECONDS,
    "log_rate_limit_burst": st.integers(0, 1_000_000).map(str),
    "memory_reserve": st.one_of(
        st.integers(0, 1 << 60).map(str), st.from_regex(r"[0-9]{1,4}[KMGTkmgt](iB)?", fullmatch=True)
    ),
    "memory_limits": st.sampled_from([*LimitSource]).map(str),
    "memory_headroom": st.floats(0.1, 10).map(str),
    "profiles_path": st.lists(_paths(), min_size=1, max_size=4).map(":".join),
    "active_profile": _TEXT,
    "tcp": st.one_of(st.just("off"), st.builds("{}:{}".format, _HOSTS, st.integers(0, 65_535))),
    "tcp_access": st.sampled_from([*TcpAccess]).map(str),
    "socket": _paths().filter(lambda path: len(path.encode()) < 100),
    "trusted_proxies": st.lists(st.one_of(st.ip_addresses().map(str), st.just("unix"))).map(" ".join),
    "tokens_path": _paths(),
    "proxy_access": st.dictionaries(
        st.one_of(
            st.ip_addresses().map(str), st.just("unix"), st.from_regex(r"[a-z_][a-z0-9_-]{0,20}", fullmatch=True)
        ),
        st.sampled_from(["none", *TokenScope]),
    ).map(lambda rights: " ".join(f"{proxy}={scope}" for proxy, scope in rights.items())),
    "cors_origins": st.lists(st.builds("https://h{}.example:{}".format, st.integers(), st.integers(1, 9999))).map(
        ",".join
    ),
    "systemd_scope": st.sampled_from([*Scope]).map(str),
    "launcher_socket": st.one_of(st.just(""), _paths().filter(lambda path: len(path.encode()) < 100)),
    "journal_directory": st.one_of(st.just(""), _paths()),
    "log_level": st.sampled_from(["debug", "info", "warning", "error"]),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_what_is_shown_reads_as_the_same_settings(values):
    settings = load({}, None, **values)
    assert load({}, None, **shown(settings)) == settings


@given(st.dictionaries(st.sampled_from([setting.name for setting in SETTINGS]), _TEXT, min_size=1))
def test_any_text_is_a_setting_or_refused_with_one_line(values):
    try:
        settings = load({setting(name).variable: value for name, value in values.items()})
    except ConfigurationError as error:
        assert "\n" not in error.message  # noqa: PT017 - either outcome is right
        assert "must" in error.message or "reachable" in error.message  # noqa: PT017
    else:
        assert load({}, None, **shown(settings)) == settings


def test_a_dynamic_users_sockets_are_for_root_alone(monkeypatch):
    socket = {"MAGI_SERVER_ACCESS": "socket"}
    assert load(socket).server_access is ServerAccess.SOCKET
    monkeypatch.setattr("os.geteuid", lambda: 990)
    with pytest.raises(ConfigurationError, match=r"^environment variable MAGI_SERVER_ACCESS: must not be 'socket'"):
        load(socket)
    assert load({**socket, "MAGI_LLAMA_SERVER_USER": "magi-llama"}).server_access is ServerAccess.SOCKET
    assert load({**socket, "MAGI_SYSTEMD_SCOPE": "user"}).server_access is ServerAccess.SOCKET
    assert load({"MAGI_SERVER_ACCESS": "key"}).server_access is ServerAccess.KEY


@pytest.mark.parametrize(
    ("written", "count", "told"),
    [
        ("0", 0, "0"), ("512M", 512 << 20, "512M"), ("2GiB", 2 << 30, "2G"), ("3g", 3 << 30, "3G"),
        ("1t", 1 << 40, "1T"), ("1537", 1537, "1537"), ("1536K", 1536 << 10, "1536K"), (str(1 << 31), 1 << 31, "2G"),
        (str(10**18), 10**18, "976562500000000K"), (str((1 << 60) - 1), (1 << 60) - 1, str((1 << 60) - 1)),
    ],
)  # fmt: skip
def test_a_size_is_read_in_powers_of_1024_and_told_as_one_would_write_it(written: str, count: int, told: str) -> None:
    settings = load_settings({"memory_reserve": written}, {})
    assert settings.memory_reserve == count
    assert shown(settings)["memory_reserve"] == told
