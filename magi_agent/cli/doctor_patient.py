"""What the checks of ``magictl doctor`` share: the configuration as the service has it, its unit, users, and answers.

Each thing is looked at when a check first asks for it, and kept.
"""

import os
import re
import shlex
import socket
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from magi_agent.cli.address import SocketAddress
from magi_agent.cli.answers import models_of, record, records, text
from magi_agent.cli.client import Client
from magi_agent.cli.exits import CommandError
from magi_agent.cli.phrasing import number
from magi_agent.errors import ConfigurationError
from magi_agent.host.accounts import DYNAMIC, Account, account_named, account_of_process, own_account
from magi_agent.host.environment_file import read_environment_file
from magi_agent.host.gpu_devices import Tree
from magi_agent.host.systemctl import SystemctlFailed, properties
from magi_agent.settings.loading import DEFAULT_CONFIG, load_settings
from magi_agent.settings.settings import Settings
from magi_agent.settings.table import SETTINGS
from magi_agent.vocabulary import Scope

UNIT: Final = "magi-agent.service"
_UNIT_PROPERTIES: Final = (
    "LoadState", "ActiveState", "SubState", "UnitFileState", "Result", "NRestarts", "MainPID", "User",
    "Environment", "EnvironmentFiles", "ExecStart", "TriggeredBy", "Slice", "IPAddressAllow", "IPAddressDeny",
    "StatusText",
)  # fmt: skip
_SOCKETS: Final = ("magi-agent.socket", "magi-agent-tcp.socket")
_SOCKET_PROPERTIES: Final = ("LoadState", "ActiveState", "Result", "UnitFileState", "Listen")
_NOT_WANTED: Final = frozenset({"not-found", "masked"})
UP: Final = frozenset({"active", "activating", "reloading"})
"""Words of systemd's for a unit that works, or will in a moment."""
_NOT_READY: Final = frozenset({503})
_SECONDS: Final = 10.0
_OF_USER: Final = ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "HOME")
"""Variables that a user's manager gives to its services, and that decide where these look."""
_ARGUMENTS: Final = re.compile(r"argv\[\]=(.*?) ; ")
"""The command line of a unit as ``systemctl show`` has it."""
_CONFIG_OPTION: Final = re.compile(r"(?:^| )--config[ =](\S+)")
_FILE_OF_LIST: Final = re.compile(r"^(.*) \(ignore_errors=(?:yes|no)\)$")


@dataclass(frozen=True, slots=True)
class EnvironmentFile:
    """One ``EnvironmentFile=`` of the service."""

    path: Path
    variables: dict[str, str]
    left_out: tuple[str, ...]
    """Lines that set nothing, shortened."""
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class SocketUnit:
    """One of the units that make the agent's sockets."""

    properties: dict[str, str]

    @property
    def state(self) -> str:
        """Its ``ActiveState``."""
        return self.properties.get("ActiveState", "")

    @property
    def addresses(self) -> tuple[str, ...]:
        """What it listens on: paths, and addresses with a port."""
        # Shown as "127.0.0.1:8000 (Stream)".
        lines = self.properties.get("Listen", "").splitlines()
        return tuple(line.rpartition(" (")[0] for line in lines)


class Patient:
    """The agent of this host, as far as whoever calls may see."""

    def __init__(self, client: Client, tree: Tree | None = None) -> None:
        self.client = client
        self.tree = tree or Tree()
        self.is_root = os.geteuid() == 0

    @cached_property
    def scope(self) -> Scope:
        """Whose manager the agent's own unit belongs to."""
        return Scope.USER if os.environ.get("MAGI_SYSTEMD_SCOPE") == Scope.USER else Scope.SYSTEM

    @cached_property
    def unit(self) -> dict[str, str]:
        """The service's unit; empty where there is none. Raises ``SystemctlFailed``."""
        found = properties(self.scope, UNIT, *_UNIT_PROPERTIES)
        return found if found.get("LoadState") not in {None, "not-found"} else {}

    @cached_property
    def unit_or_none(self) -> dict[str, str]:
        """The same, and empty too where systemd does not tell."""
        try:
            return self.unit
        except SystemctlFailed:
            return {}

    @cached_property
    def socket_units(self) -> dict[str, SocketUnit]:
        """The units that make the agent's sockets, those that are installed. Raises ``SystemctlFailed``."""
        if not self.unit:
            return {}
        names = dict.fromkeys((*_SOCKETS, *self.unit.get("TriggeredBy", "").split()))
        asked = {name: properties(self.scope, name, *_SOCKET_PROPERTIES) for name in names if name.endswith(".socket")}
        return {name: SocketUnit(each) for name, each in asked.items() if each.get("LoadState") not in _NOT_WANTED}

    @cached_property
    def told(self) -> dict[str, object]:
        """What the agent that answers says its configuration comes from; empty where nobody says it."""
        said = self._ask("/api/configuration")
        return said if text(said.get("file")) else {}

    @cached_property
    def service_unit(self) -> dict[str, str]:
        """The service's unit; empty too where the agent that answers is known to be another process than its."""
        pid = number(self.told.get("pid"))
        is_another = pid is not None and f"{pid:.0f}" != self.unit_or_none.get("MainPID")
        return {} if is_another else self.unit_or_none

    @cached_property
    def environment_files(self) -> tuple[EnvironmentFile, ...]:
        """The files that the service's unit takes variables from, those that are there."""
        lines = self.service_unit.get("EnvironmentFiles", "").splitlines()
        paths = [Path(found[1]) for line in lines if (found := _FILE_OF_LIST.match(line))]
        return tuple(_read(path) for path in paths if os.path.lexists(path))

    @cached_property
    def environment(self) -> dict[str, str]:
        """The variables that the service has: its unit's, or else the agent's own, or else those of this process."""
        of_user = {name: os.environ[name] for name in _OF_USER if name in os.environ}
        if not self.service_unit:
            said = record(self.told.get("variables"))
            return of_user | {name: text(value) for name, value in said.items()} if self.told else dict(os.environ)
        try:
            words = shlex.split(self.service_unit.get("Environment", ""))
        except ValueError:
            words = []
        variables = dict(word.partition("=")[::2] for word in words)
        for file in self.environment_files:
            variables |= file.variables
        return of_user | variables if self.scope is Scope.USER else variables

    @cached_property
    def config(self) -> Path:
        """The configuration file that counts: what the agent that answers goes by, or else what a start would."""
        return Path(text(self.told.get("file")) or self.config_of_start)

    @cached_property
    def config_of_start(self) -> Path:
        """The configuration file that the service's unit names, or without a unit this process's environment."""
        command = _ARGUMENTS.search(self.service_unit.get("ExecStart", ""))
        option = _CONFIG_OPTION.search(command[1]) if command else None
        return Path((option and option[1]) or self.environment.get("MAGI_CONFIG") or DEFAULT_CONFIG)

    @property
    def why_config(self) -> str:
        """Why that file is the one that counts, as the end of a sentence about it."""
        if self.told:
            return "which the running agent goes by"
        where = UNIT if self.service_unit else "MAGI_CONFIG here"
        if self.config == DEFAULT_CONFIG and not self.environment.get("MAGI_CONFIG"):
            return f"the default, as {where} names no other"
        return f"which {where} names"

    @property
    def control(self) -> str:
        """The command that changes the state of the agent's units."""
        return "systemctl --user" if self.scope is Scope.USER else "sudo systemctl"

    def changing(self, key: str) -> str:
        """How another value is given to a key of the configuration, such as ``servers.port_range``."""
        variable = next(setting.variable for setting in SETTINGS if f"{setting.section}.{setting.name}" == key)
        file = self.file_of_variable(variable)
        where = f"{variable} in {file}" if file else f"{key} in {self.config}"
        return f"name another: {where}{self.taking_up(file or self.config)}"

    def file_of_variable(self, variable: str) -> Path | None:
        """The file of the service's environment that sets a variable, which wins over the configuration file."""
        files = [file.path for file in self.environment_files if variable in file.variables]
        return files[-1] if files else None

    def taking_up(self, path: Path) -> str:
        """What is to be done once a file of the service's was changed, as the end of a sentence."""
        if not self.service_unit:
            return ""
        # What an environment file says is taken up by a start alone.
        is_variable = any(path == file.path for file in self.environment_files)
        return f"; then: {self.control} {'restart' if is_variable else 'reload-or-restart'} magi-agent"

    @cached_property
    def configured(self) -> Settings | ConfigurationError:
        """The settings, or why there are none."""
        known = {setting.variable for setting in SETTINGS} | {*_OF_USER}
        variables = {name: value for name, value in self.environment.items() if name in known}
        said = {} if self.service_unit else record(self.told.get("options"))
        options = {setting.name: text(said[setting.option]) for setting in SETTINGS if setting.option in said}
        # That the default is not there is a mistake only where somebody names it.
        config = None if self.config == DEFAULT_CONFIG and not self.environment.get("MAGI_CONFIG") else self.config
        try:
            return load_settings(options, variables, config)
        except ConfigurationError as error:
            return error

    @property
    def settings(self) -> Settings | None:
        """The settings, where they are valid."""
        return self.configured if isinstance(self.configured, Settings) else None

    @property
    def servers_scope(self) -> Scope:
        """Whose manager the servers' units belong to."""
        return self.settings.systemd_scope if self.settings else self.scope

    @cached_property
    def servers_account(self) -> Account | None:
        """Whom the servers run as; ``None`` where there is no such user, or the configuration does not tell."""
        if self.settings is None:
            return None
        if self.settings.systemd_scope is Scope.USER:
            return self.agents_account
        if not self.settings.llama_server_user:
            return DYNAMIC
        return account_named(self.settings.llama_server_user)

    @cached_property
    def agents_account(self) -> Account | None:
        """Whom the agent runs as: its process tells, else its unit; without a unit, whoever calls."""
        if running := self._agents_process():
            return running
        unit = self.service_unit
        if unit and self.scope is Scope.SYSTEM:
            return account_named(unit.get("User") or "root")
        return own_account()

    def _agents_process(self) -> Account | None:
        pid = self.service_unit.get("MainPID", "0")
        if pid.isdecimal() and pid != "0":
            return account_of_process(int(pid))
        if self.service_unit:
            # A socket that systemd made tells of systemd, and a connection to it has the agent started.
            return None
        peer = _listener(self.client)
        return account_of_process(peer) if peer > 1 else None

    @property
    def about(self) -> dict[str, object]:
        """The agent's name and version. Raises ``CommandError`` where it does not answer."""
        if isinstance(self._about, CommandError):
            raise self._about
        return self._about

    @cached_property
    def _about(self) -> dict[str, object] | CommandError:
        if self._would_be_started:
            stops = self.unit_or_none.get("ActiveState") == "deactivating"
            why = "is being stopped, and answers nothing new" if stops else "does not run"
            return CommandError("AgentDown", f"{UNIT} {why}; it is not asked, as that would start it")
        try:
            return self.client.get("/", "name", "version", timeout=_SECONDS)
        except CommandError as error:
            return error

    @cached_property
    def _would_be_started(self) -> bool:
        """Whether a connection to the agent makes systemd start it."""
        if not self.unit_or_none or self.unit_or_none.get("ActiveState") in UP:
            return False
        address = self.client.address
        asked = address.path if isinstance(address, SocketAddress) else f"{address.host}:{address.port}"
        try:
            units = self.socket_units.values()
        except SystemctlFailed:
            return False
        return any(unit.state in UP and asked in unit.addresses for unit in units)

    @property
    def answers(self) -> bool:
        """Whether the agent answers."""
        return not isinstance(self._about, CommandError)

    @cached_property
    def health(self) -> dict[str, object]:
        """What the agent says of itself; empty where it does not answer."""
        return self._ask("/health/ready")

    @cached_property
    def registry(self) -> dict[str, object]:
        """The models and the range of ports; empty where the agent does not answer, or not to whoever calls."""
        return self._ask("/api/models/registry")

    @property
    def models(self) -> dict[str, dict[str, object]]:
        """The models, by id."""
        return {model_id: dict(model) for model_id, model in models_of(self.registry)}

    @cached_property
    def servers(self) -> list[dict[str, object]]:
        """The servers; none where the agent does not answer, or not to whoever calls."""
        return [dict(server) for server in records(self._ask("/api/models/servers").get("servers"))]

    def _ask(self, path: str) -> dict[str, object]:
        if not self.answers:
            return {}
        try:
            reply = self.client.request("GET", path, timeout=_SECONDS, also_accept=_NOT_READY)
        except CommandError:
            return {}
        return dict(record(reply.body))


def _read(path: Path) -> EnvironmentFile:
    try:
        variables, left_out = read_environment_file(path)
    except OSError as error:
        return EnvironmentFile(path, {}, (), f"cannot be read: {error.strerror}")
    except ValueError as error:
        return EnvironmentFile(path, {}, (), f"is no text: {error}")
    return EnvironmentFile(path, variables, left_out)


def _listener(client: Client) -> int:
    """The process that made the unix socket at which the agent answers; 0 where that cannot be told."""
    if not isinstance(client.address, SocketAddress):
        return 0
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(_SECONDS)
        try:
            channel.connect(client.address.path)
            credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return 0
    pid: int = struct.unpack("3i", credentials)[0]
    return pid
