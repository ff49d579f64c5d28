"""``magictl show``: all about one model on one sheet."""

from collections.abc import Iterator, Mapping

import click

from magi_agent.cli.answers import record, text, texts
from magi_agent.cli.client import model_path
from magi_agent.cli.command import command
from magi_agent.cli.completing import model_ids
from magi_agent.cli.grid import Cell
from magi_agent.cli.memory import memory_facts
from magi_agent.cli.model_settings import setting_facts
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import NOTHING, number, parameters, size, span, tokens
from magi_agent.cli.screen import Screen
from magi_agent.cli.sheet import Fact, write_section
from magi_agent.cli.tables import STATUS_STYLES, TIER_STYLES, failure_lines, state_cell

_OK = 200
_SHOWN_LOG_LINES = 10
_NARROWEST_LABEL = 13
_THINKING: Mapping[str, str] = {
    "none": "no",
    "optional": "if asked to: its chat template has a switch",
    "always": "always",
}
_POLICIES: Mapping[str, str] = {
    "alwaysOn": "up whenever the host is",
    "onDemand": "started by the first request for it",
    "manual": "started by hand only",
}


@command("magictl show smollm2-135m-instruct.q4_1", "magictl show smollm2-135m-instruct.q4_1 --json | jq .settings")
@click.argument("model_id", metavar="ID", shell_complete=model_ids)
def show(session: Session, model_id: str) -> None:
    """Show all about one model: facts, choices, settings, server.

    With --json: the answers of GET /api/models/ID (model, its server in it), /api/models/ID/settings (settings) and
    /api/models/ID/memory (memory; null from an agent that does not know it).
    """
    path = model_path(model_id)
    model = session.client.get(path, "modelId", "server")
    settings = session.client.get(f"{path}/settings", "effective")
    reply = session.client.ask("GET", f"{path}/memory")
    memory = record(reply.body) if reply.status == _OK else {}
    screen = session.screen
    if screen.as_json:
        screen.json({"model": model, "settings": settings, "memory": memory or None})
        return
    server = record(model.get("server"))
    screen.line(Cell(model_id, "bold"), "  ", state_cell(server.get("state")))
    if (name := text(model.get("displayName"))) and name not in {model_id, text(model.get("filename"))}:
        screen.line(name)
    set_here = list(setting_facts(settings))
    sections = (
        ("Model", [*_facts(model), *memory_facts(memory), *_warnings(settings, memory)]),
        ("Choices", list(_choices(model))),
        ("Settings", set_here or [Fact("none", Cell("llama-server's own defaults hold", "dim"))]),
        ("Server", list(_server(server))),
    )
    width = max(_NARROWEST_LABEL, *(len(fact.label) for _, facts in sections for fact in facts))
    for title, facts in sections:
        write_section(screen, title, facts, label_width=width)
    _show_log(screen, server)


def _warnings(*answers: Mapping[str, object]) -> Iterator[Fact]:
    """What will hardly do, each thing once, whichever of the answers says it."""
    told = dict.fromkeys(warning for answer in answers for warning in texts(answer.get("warnings")))
    yield from (Fact("warning", Cell(warning, "yellow")) for warning in told)


def _facts(model: Mapping[str, object]) -> Iterator[Fact]:
    status = text(model.get("status"))
    yield Fact("status", Cell(status or NOTHING, STATUS_STYLES.get(status, "")))
    if problem := text(model.get("problem")):
        yield Fact("problem", Cell(problem, "yellow"))
    yield Fact("family", Cell(" ".join(filter(None, (text(model.get("family")), text(model.get("version")))))))
    yield Fact("size", Cell(parameters(model.get("sizeParams"))), _parameters_remark(model))
    yield Fact("quantization", Cell(text(model.get("quantization")) or NOTHING))
    yield Fact("kind", Cell(", ".join(_kinds(model))))
    yield Fact("thinks", Cell(_THINKING.get(text(model.get("thinkingMode")), NOTHING)))
    yield Fact("context", Cell(tokens(model.get("contextLength"))), "(trained for)")
    yield Fact("architecture", Cell(text(model.get("architecture")) or NOTHING))
    yield Fact("on disk", Cell(size(model.get("sizeBytes"))))
    parts = texts(model.get("parts"))
    if len(parts) > 1:
        for index, part in enumerate(parts):
            yield Fact("" if index else f"{len(parts)} files", Cell(part))
    else:
        yield Fact("file", Cell(text(model.get("filePath"))))
    chosen = text(model.get("projectorPath"))
    if chosen:
        yield Fact("projector", Cell(chosen))
    for other in texts(model.get("projectors")):
        if other != chosen:
            yield Fact("also offered", Cell(other, "dim"))


def _parameters_remark(model: Mapping[str, object]) -> str:
    said = []
    if (count := number(model.get("parameterCount"))) is not None:
        said.append(f"{count:,.0f} parameters")
    if number(model.get("activeParams")) is not None:
        said.append(f"{parameters(model.get('activeParams'))} active")
    return f"({', '.join(said)})" if said else ""


def _kinds(model: Mapping[str, object]) -> Iterator[str]:
    """Yield what the model is made for."""
    if model.get("isReranker") is True:
        yield "reranker"
    elif model.get("isEmbedding") is True:
        yield "embedding"
    else:
        yield "instruct" if model.get("isInstruct") is True else "base"
        if model.get("isCoder") is True:
            yield "coder"
    if model.get("hasVision") is True:
        yield "vision"
    if model.get("hasAudio") is True:
        yield "audio"
    if model.get("chatTemplate") is False:
        yield "no chat template"


def _choices(model: Mapping[str, object]) -> Iterator[Fact]:
    policy = text(model.get("startPolicy"))
    if model.get("enabled") is True:
        yield Fact("in use", Cell("yes", "green"), f"({_POLICIES.get(policy, policy)})")
    else:
        yield Fact("in use", Cell("no", "dim"))
    tier, found = text(model.get("effectiveTier")), text(model.get("assignedTier"))
    chosen = model.get("tierOverride") is not None
    yield Fact(
        "tier", Cell(tier, TIER_STYLES.get(tier, "")), f"(set by hand; discovery says {found})" if chosen else ""
    )
    thinking = model.get("thinkingOverride")
    if isinstance(thinking, bool):
        yield Fact("thinking", Cell("yes" if thinking else "no"), "(set by hand)")
    port = number(model.get("port"))
    yield Fact("port", Cell(f"{port:.0f}") if port is not None else Cell("given when it is started", "dim"))


def _server(server: Mapping[str, object]) -> Iterator[Fact]:
    running = server.get("isRunning") is True
    uptime = f"(for {span(server.get('uptimeSeconds'))})" if running else ""
    yield Fact("state", state_cell(server.get("state")), uptime)
    if reasons := texts(server.get("restartReasons")):
        yield Fact("restart due", Cell("; ".join(reasons), "yellow"))
    if url := text(server.get("url")):
        yield Fact("address", Cell(url))
    yield Fact("unit", Cell(text(server.get("unit"))))
    if running:
        if (pid := number(server.get("pid"))) is not None:
            yield Fact("process", Cell(f"{pid:.0f}"))
        yield Fact("memory", Cell(size(server.get("memoryBytes"))))
        yield Fact("CPU time", Cell(span(server.get("cpuSeconds"))))
    if restarts := number(server.get("restarts")):
        yield Fact("restarts", Cell(f"{restarts:.0f}", "yellow"))
    sentence, _ = failure_lines(server)
    if sentence:
        yield Fact("failed", Cell(sentence, "red"))
    if (seconds := number(server.get("retryInSeconds"))) is not None:
        yield Fact("tried again", Cell(f"in {span(seconds)}"))


def _show_log(screen: Screen, server: Mapping[str, object]) -> None:
    _, lines = failure_lines(server)
    for line in lines[-_SHOWN_LOG_LINES:]:
        screen.line(Cell("  │ ", "red"), Cell(line, "dim"))
