"""The tables of ``magictl``: from the API's JSON to rows and styles."""

from collections.abc import Iterable, Mapping

from magi_agent.cli.answers import record, text, texts
from magi_agent.cli.grid import Cell, Column, Grid
from magi_agent.cli.phrasing import NOTHING, number, parameters, size, span, tokens

STATE_STYLES: Mapping[str, str] = {
    "ready": "green",
    "loading": "cyan",
    "starting": "cyan",
    "stopping": "yellow",
    "degraded": "yellow",
    "cooldown": "yellow",
    "stopped": "dim",
    "failed": "bold red",
    "stuck": "bold red",
}
STATUS_STYLES: Mapping[str, str] = {"ok": "green", "incomplete": "yellow", "missing": "yellow", "invalid": "red"}
TIER_STYLES: Mapping[str, str] = {"fast": "cyan", "balanced": "blue", "powerful": "magenta"}

_PLAIN_RESULTS = frozenset({"success", "exit-code", "signal"})
"""Words of systemd's that say less than the status or signal beside them."""

OVERRIDE_MARK = "*"
OVERRIDE_LEGEND = "* set by hand"

_MODEL_COLUMNS = (
    Column("MODEL"),
    Column("FAMILY", 8),
    Column("SIZE", 2, "right"),
    Column("QUANT", 5),
    Column("TIER", 1),
    Column("THINKS", 4),
    Column("CTX", 6, "right"),
    Column("FILE", 7, "right"),
    Column("ON"),
    Column("PORT", 3, "right"),
    Column("STATUS"),
)

_SERVER_COLUMNS = (
    Column("MODEL"),
    Column("STATE"),
    Column("PORT", 1, "right"),
    Column("PID", 5, "right"),
    Column("UPTIME", 2, "right"),
    Column("MEMORY", 3, "right"),
    Column("RESTARTS", 4, "right"),
    Column("URL", 6),
)


def models_grid(models: Iterable[tuple[str, Mapping[str, object]]]) -> Grid:
    """Return the table of models; a ``*`` marks what a person set against discovery's word."""
    return Grid(_MODEL_COLUMNS, tuple(_model_row(model_id, model) for model_id, model in models))


def has_override(model: Mapping[str, object]) -> bool:
    """Whether a person's word stands against discovery's, so that the table needs its legend."""
    return model.get("tierOverride") is not None or model.get("thinkingOverride") is not None


def servers_grid(servers: Iterable[Mapping[str, object]]) -> Grid:
    """Return the table of servers."""
    return Grid(_SERVER_COLUMNS, tuple(_server_row(server) for server in servers))


def state_cell(state: object) -> Cell:
    """Return a server's state in its colour."""
    word = text(state) or NOTHING
    return Cell(word, STATE_STYLES.get(word, ""))


def failure_lines(server: Mapping[str, object]) -> tuple[str, list[str]]:
    """Return what is known of a server's failure: one sentence, and the last lines of its log."""
    failure = server.get("failure")
    if isinstance(failure, str):
        return failure, []
    return failure_sentence(record(failure)), log_lines(record(failure))


def failure_sentence(failure: Mapping[str, object]) -> str:
    """Return why something ended, from whichever of its keys are there."""
    said = text(failure.get("message")) or text(failure.get("reason"))
    known = ", ".join(fact for fact in failure_facts(failure) if fact not in said)
    advice = text(failure.get("advice"))
    sentence = f"{said} ({known})" if said and known else said or known
    return f"{sentence}; {advice}" if sentence and advice and advice not in sentence else sentence or advice


def failure_facts(failure: Mapping[str, object]) -> list[str]:
    """Return how a server ended: systemd's result, the exit status, the signal; those that are known."""
    facts = []
    result = text(failure.get("result"))
    if result and result not in _PLAIN_RESULTS:
        facts.append(f"result {result}")
    if (status := number(failure.get("exitStatus"))) is not None:
        facts.append(f"status {status:.0f}")
    if (signal := failure.get("signal")) not in {None, 0, ""}:
        facts.append(f"{signal}" if isinstance(signal, str) else f"signal {signal}")
    return facts


def log_lines(failure: Mapping[str, object]) -> list[str]:
    """Return the last lines of the log that a failure carries."""
    return texts(failure.get("logLines")) or texts(failure.get("log"))


def _model_row(model_id: str, model: Mapping[str, object]) -> tuple[Cell, ...]:
    tier = text(model.get("effectiveTier")) or text(model.get("tierOverride")) or text(model.get("assignedTier"))
    marked = tier + (OVERRIDE_MARK if model.get("tierOverride") is not None else "")
    status = text(model.get("status")) or "ok"
    enabled = model.get("enabled") is True
    usable = status == "ok"
    return (
        Cell(model_id, "bold" if enabled else "" if usable else "dim"),
        Cell(text(model.get("family")) or NOTHING),
        Cell(parameters(model.get("sizeParams"))),
        Cell(text(model.get("quantization")) or NOTHING),
        Cell(marked or NOTHING, TIER_STYLES.get(tier, "")),
        _thinking_cell(model),
        Cell(tokens(model.get("ctxSize") or model.get("contextLength"))),
        Cell(size(model.get("sizeBytes"))),
        Cell("yes", "green") if enabled else Cell("no", "dim"),
        _number_cell(model.get("port")),
        Cell(status, STATUS_STYLES.get(status, "")),
    )


def _thinking_cell(model: Mapping[str, object]) -> Cell:
    override = model.get("thinkingOverride")
    if isinstance(override, bool):
        return Cell(("yes" if override else "no") + OVERRIDE_MARK, "" if override else "dim")
    mode = text(model.get("thinkingMode"))
    if mode in {"optional", "always"}:
        return Cell(mode)
    thinks = model.get("effectiveThinking", model.get("isThinkingModel")) is True
    return Cell("yes") if thinks else Cell("no", "dim")


def _server_row(server: Mapping[str, object]) -> tuple[Cell, ...]:
    state = text(server.get("state"))
    restart = server.get("restartRequired") is True
    restarts = number(server.get("restarts")) or 0
    return (
        Cell(text(server.get("modelId")), "bold"),
        Cell(state + (" (restart due)" if restart else ""), "yellow" if restart else state_cell(state).style),
        _number_cell(server.get("port")),
        _number_cell(server.get("pid")),
        Cell(span(server.get("uptimeSeconds")) if server.get("isRunning") is True else NOTHING),
        Cell(size(server.get("memoryBytes"))),
        Cell(f"{restarts:.0f}", "yellow" if restarts else "dim"),
        Cell(text(server.get("url")) or NOTHING, "dim"),
    )


def _number_cell(value: object) -> Cell:
    known = number(value)
    return Cell(NOTHING, "dim") if known is None else Cell(f"{known:.0f}")
