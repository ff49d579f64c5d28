"""What ``magictl doctor`` looks at of the agent: configuration, service, answers, launcher."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from magi_agent import __version__
from magi_agent.cli.answers import record, text, texts
from magi_agent.cli.doctor_findings import Finding, failed, ok, unknown, warning
from magi_agent.cli.doctor_patient import UNIT, Patient
from magi_agent.cli.exits import CommandError
from magi_agent.cli.phrasing import counted
from magi_agent.discovery.access import find_obstacle, granting, reason
from magi_agent.errors import ConfigurationError
from magi_agent.host.accounts import Account
from magi_agent.host.systemctl import SystemctlFailed, properties
from magi_agent.launcher.client import DEFAULT_SOCKET
from magi_agent.settings.table import SETTINGS
from magi_agent.tokens import TokensUnreadable, read_tokens
from magi_agent.vocabulary import Scope

AS_ROOT: Final = "sudo magictl doctor"
_MOST_PROBLEMS: Final = 5
_KNOWN: Final = frozenset({"MAGI_CONFIG", *(setting.variable for setting in SETTINGS)})
_OURS: Final = "MAGI_"
_LAUNCHER: Final = "magi-launcher.service"
_FOR_TOKENS: Final = "sudo chown root:{user} {path} && sudo chmod 0640 {path}"
_OF_VARIABLE: Final = re.compile(r"environment variable (\w+): ")
"""How the error begins that is about a variable."""


def configuration(patient: Patient) -> Iterator[Finding]:
    """Whether the service's configuration is valid, as the service reads it."""
    for file in patient.environment_files:
        if file.problem:
            hidden = not patient.is_root and not os.access(file.path, os.R_OK)
            yield unknown(f"{file.path} {file.problem}", AS_ROOT) if hidden else failed(f"{file.path} {file.problem}")
        for line in file.left_out:
            yield warning(f"{file.path}: {line!r} sets nothing; it should be NAME=VALUE", _editing(file.path, patient))
        for name in sorted(name for name in file.variables if name.startswith(_OURS) and name not in _KNOWN):
            yield warning(f"{file.path}: no setting is called {name}", _editing(file.path, patient))
    yield from _of_another(patient)
    is_there = os.path.lexists(patient.config)
    if is_there and not patient.is_root and not os.access(patient.config, os.R_OK):
        yield unknown(f"{patient.config} may not be read by you", AS_ROOT)
        return
    if isinstance(patient.configured, ConfigurationError):
        yield failed(
            f"the configuration is not valid: {patient.configured} ({patient.config}, {patient.why_config})",
            _mending(patient.configured, patient),
        )
        return
    if is_there:
        yield from _may_be_read(patient.config, patient.agents_account)
    set_by_file = sum(len(file.variables) for file in patient.environment_files)
    also = f", with {counted(set_by_file, 'variable')} of the service's environment file" if set_by_file else ""
    judged = f"{patient.config}, {patient.why_config}"
    yield ok(f"{judged}, is valid{also}" if is_there else f"there is no {judged}: the defaults hold{also}")


def _of_another(patient: Patient) -> Iterator[Finding]:
    """Whether another configuration file counts for the next start, or may count for the agent that runs."""
    if patient.told and patient.service_unit and patient.config_of_start != patient.config:
        yield warning(
            f"the running agent goes by {patient.config}, and the next start by {patient.config_of_start}, "
            f"which {UNIT} names",
            f"{patient.control} restart {UNIT}",
        )
    elif patient.answers and not patient.told and not patient.service_unit:
        yield unknown(f"the running agent does not say which configuration it goes by; {patient.config} is looked at")


def _mending(error: ConfigurationError, patient: Patient) -> str:
    """Where what is not valid can be put right."""
    found = _OF_VARIABLE.match(str(error))
    if not found:
        return _editing(patient.config, patient)
    file = patient.file_of_variable(found[1])
    if file:
        return _editing(file, patient)
    if not patient.service_unit:
        return f"unset {found[1]}, or give it another value"
    edit = f"{patient.control} edit {UNIT} (below [Service] Environment={found[1]}=VALUE)"
    return f"{edit}; then: {patient.control} restart {UNIT}"


def _editing(path: Path, patient: Patient) -> str:
    return f"sudoedit {path}{patient.taking_up(path)}"


def _may_be_read(path: Path, account: Account | None, mend: str | None = None) -> Iterator[Finding]:
    """Whether the service may read a file of its configuration; ``mend`` is what grants it, with path and user."""
    if account is None:
        return
    try:
        obstacle = find_obstacle(str(path), account)
        if obstacle:
            user = account.name.rpartition(" ")[2]
            yield failed(
                f"{path}: {reason(obstacle, account)}",
                mend.format(path=path, user=user) if mend else granting(obstacle, account, None),
            )
    except OSError as error:
        yield unknown(f"{path}: {error.strerror}", AS_ROOT)


def tokens(patient: Patient) -> Iterator[Finding]:
    """Whether the file of tokens is readable by the service, by nobody else, and well formed."""
    settings = patient.settings
    if settings is None:
        yield unknown("where the tokens are is not known without the configuration")
        return
    path, account = settings.tokens_path, patient.agents_account
    try:
        path.stat()
    except FileNotFoundError:
        yield ok("there are none: nobody uses the API by token")
        return
    except OSError as error:
        yield unknown(f"{path}: {error.strerror}", AS_ROOT)
        return
    trouble = [*_may_be_read(path, account, _FOR_TOKENS + patient.taking_up(path)), *_read(path, patient)]
    yield from trouble or [ok(f"{path} is well")]


def _read(path: Path, patient: Patient) -> Iterator[Finding]:
    closing = f"sudo chmod 0640 {path}{patient.taking_up(path)}"
    try:
        found = read_tokens(path)
    except TokensUnreadable:
        yield unknown(f"{path} may not be read by you", AS_ROOT)
    except ConfigurationError as error:
        if not path.is_file():
            mend = f"sudo mv {path} {path}.old{patient.taking_up(path)}"
        elif path.stat().st_mode & stat.S_IWOTH:
            mend = f"sudoedit {path}; then: {closing}"
        else:
            mend = _editing(path, patient)
        yield failed(str(error), mend)
    else:
        for problem in found.problems:
            yield warning(problem, closing)
        for problem in found.not_understood:
            yield warning(problem, _editing(path, patient))


def service(patient: Patient) -> Iterator[Finding]:
    """What systemd says of the service."""
    try:
        unit = patient.unit
    except SystemctlFailed as error:
        yield unknown(f"systemd does not say how {UNIT} is: {error}")
        return
    journal = f"journalctl {'--user-unit' if patient.scope is Scope.USER else '-u'} magi-agent -e"
    if not unit:
        if patient.answers:
            yield warning(f"there is no {UNIT}: the agent that answers was started by hand, and no boot starts it")
        else:
            yield failed(f"there is no {UNIT}", "install the package magi-agent, or start magi-agent yourself")
        return
    state, detail = unit.get("ActiveState", ""), unit.get("SubState", "")
    if state == "active":
        yield ok(f"{UNIT} is active ({detail}), process {unit.get('MainPID')}")
    elif state == "failed":
        yield failed(
            f"{UNIT} has failed ({unit.get('Result')})", f"{journal}; then: {patient.control} restart magi-agent"
        )
    elif detail == "auto-restart" or (state == "activating" and unit.get("NRestarts", "0") != "0"):
        yield failed(f"{UNIT} ended and is started again ({unit.get('NRestarts')} times so far)", journal)
    elif state in {"activating", "reloading"}:
        yield warning(f"{UNIT} is {state} ({detail})")
    elif state == "deactivating" and unit.get("Result") != "success":
        yield failed(
            f"{UNIT} fails whenever it is started ({unit.get('Result')})",
            f"{journal}; then: {patient.control} restart magi-agent",
        )
    elif state == "deactivating":
        said = unit.get("StatusText")
        yield warning(f"{UNIT} is being stopped{f': {said}' if said else ''}")
    else:
        yield failed(f"{UNIT} is {state or 'not there'}", f"{patient.control} start magi-agent")
    if unit.get("UnitFileState") == "disabled":
        yield warning(f"{UNIT} is not enabled: it is down after the next boot", f"{patient.control} enable magi-agent")


def agent(patient: Patient) -> Iterator[Finding]:
    """Whether the agent answers, and what it says is wrong."""
    try:
        about = patient.about
    except CommandError as error:
        if error.kind == "AgentDown":
            yield unknown(f"what the agent says: {error.message}")
        elif record(error.details).get("reason") == "permission":
            yield unknown(f"whether the agent answers: {error.message}", AS_ROOT)
        else:
            yield failed(error.message)
        return
    version = text(about.get("version"))
    yield ok(f"{text(about.get('name')) or 'the agent'} {version} answers at {patient.client.address}")
    if version != __version__:
        yield warning(
            f"the agent that runs is {version}, and what is installed is {__version__}",
            "sudo systemctl restart magi-agent",
        )
    health = patient.health
    if health.get("systemdConnected") is False:
        yield failed("the agent does not reach systemd, and can start nothing", "systemctl status dbus")
    missing = record(health.get("missing"))
    if missing:
        names = ", ".join(sorted(missing)[:_MOST_PROBLEMS])
        are = "is" if len(missing) == 1 else "are"
        yield warning(f"{counted(len(missing), 'server')} should be ready and {are} not: {names}", "magictl status")
    problems = texts(health.get("problems"))
    for problem in problems[:_MOST_PROBLEMS]:
        yield warning(f"the agent says: {problem}")
    if len(problems) > _MOST_PROBLEMS:
        yield warning(f"the agent says {len(problems) - _MOST_PROBLEMS} more", "magictl status")


def launcher(patient: Patient) -> Iterator[Finding]:
    """Whether the agent can have units started."""
    settings, account = patient.settings, patient.agents_account
    if settings is None:
        yield unknown("where the launcher is is not known without the configuration")
        return
    if account is None:
        yield unknown("whom the agent runs as is not known")
        return
    if settings.systemd_scope is Scope.USER:
        yield ok("the agent starts units with its user's own manager; no launcher is needed")
        return
    if settings.launcher_socket is None and account.uid == 0:
        yield ok("the agent is root and starts units itself; no launcher is needed")
        return
    path = settings.launcher_socket or DEFAULT_SOCKET
    start = "sudo systemctl enable --now magi-launcher.socket"
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            yield failed(f"{path} is no socket", start)
            return
        obstacle = find_obstacle(str(path), account, needed=os.W_OK)
    except FileNotFoundError:
        yield failed(f"there is no socket of the launcher at {path}", start)
        return
    except OSError as error:
        yield unknown(f"the launcher's socket {path}: {error.strerror}", AS_ROOT)
        return
    if obstacle:
        yield failed(
            f"the launcher's socket {path}: {reason(obstacle, account)}", "sudo systemctl restart magi-launcher.socket"
        )
    elif _has_failed(_LAUNCHER):
        yield failed(
            f"{_LAUNCHER} has failed", f"journalctl -u {_LAUNCHER} -e; then: sudo systemctl restart {_LAUNCHER}"
        )
    else:
        yield ok(f"the launcher listens at {path}, and {account.name} may call it; polkit is not needed")


def _has_failed(unit: str) -> bool:
    try:
        return properties(Scope.SYSTEM, unit, "ActiveState").get("ActiveState") == "failed"
    except SystemctlFailed:
        return False
