"""``magictl host``: what this host has, on one sheet."""

from collections.abc import Iterator, Mapping
from urllib.parse import urlencode

import click

from magi_agent.cli.answers import record, records, text
from magi_agent.cli.command import command
from magi_agent.cli.grid import Cell, Column, Grid
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import NOTHING, moment, number, size
from magi_agent.cli.sheet import Fact, write_section

_LABEL = 13
_SECONDS = 40.0
"""A driver may take its time, and llama-server too."""
_GPU_COLUMNS = (
    Column("GPU"),
    Column("NAME"),
    Column("ADDRESS", 5),
    Column("MEMORY", 2, "right"),
    Column("FREE", 1, "right"),
    Column("BUSY", 3, "right"),
    Column("TEMP", 4, "right"),
    Column("MODELS"),
)


@command("magictl host", "magictl host --json | jq .gpus", "magictl host --refresh")
@click.option("--binary", metavar="NAME", help="GPUs as this one of llama_server_alternatives sees them.")
@click.option("--refresh", is_flag=True, help="Ask llama-server for its devices again.")
def host(session: Session, binary: str | None, refresh: bool) -> None:
    """Show what this host has: processors, memory, GPUs, disks.

    With --json: the answer of GET /api/host.
    """
    asked = ([("binary", binary)] if binary else []) + ([("refresh", "true")] if refresh else [])
    path = f"/api/host?{urlencode(asked)}" if asked else "/api/host"
    said = session.client.get(path, "memory", "gpus", timeout=_SECONDS)
    screen = session.screen
    if screen.as_json:
        screen.json(said)
        return
    screen.line(Cell(text(said.get("hostname")) or NOTHING, "bold"))
    write_section(screen, "System", _system(said), label_width=_LABEL)
    write_section(screen, "Memory", _memory(record(said.get("memory"))), label_width=_LABEL)
    write_section(screen, "Disks", _disks(records(said.get("disks"))), label_width=_LABEL)
    gpus = list(records(said.get("gpus")))
    screen.line("")
    problem = text(record(said.get("unavailable")).get("devices"))
    if gpus:
        screen.grid(Grid(_GPU_COLUMNS, tuple(map(_gpu, gpus))))
    elif not problem:
        screen.line("No GPU: models run on the CPU")
    if problem:
        screen.line(Cell(problem, "yellow"))
    if driver := text(record(said.get("unavailable")).get("nvidiaDriver")):
        screen.line(Cell(driver, "yellow"))
    for reason in dict.fromkeys(_reasons(gpus)):
        screen.note(f"  {reason}")


def _system(said: Mapping[str, object]) -> Iterator[Fact]:
    yield Fact("kernel", Cell(text(said.get("kernel")) or NOTHING))
    yield Fact("systemd", Cell(text(said.get("systemdVersion")) or NOTHING))
    yield Fact("up since", Cell(moment(said.get("bootedAt"))))
    cpu = record(said.get("cpu"))
    yield Fact("processor", Cell(text(cpu.get("model")) or NOTHING))
    cores, threads = number(cpu.get("cores")), number(cpu.get("threads"))
    yield Fact("cores", Cell(NOTHING if cores is None else f"{cores:.0f}"), f"({threads or 0:.0f} threads)")
    load = cpu.get("load")
    if isinstance(load, list):
        yield Fact("load", Cell(" ".join(f"{number(each) or 0:.2f}" for each in load)), "(1, 5 and 15 minutes)")


def _memory(memory: Mapping[str, object]) -> Iterator[Fact]:
    yield Fact("available", Cell(size(memory.get("availableBytes"))), f"(of {size(memory.get('totalBytes'))})")
    if number(memory.get("swapTotalBytes")):
        yield Fact("swap free", Cell(size(memory.get("swapFreeBytes"))), f"(of {size(memory.get('swapTotalBytes'))})")
    for limit in records(memory.get("limits")):
        limits = (number(limit.get("highBytes")), number(limit.get("maxBytes")))
        least = min((each for each in limits if each is not None), default=None)
        name = text(limit.get("unit")) or text(limit.get("controlGroup"))
        style = "yellow" if limit.get("isBinding") is True else ""
        left = f"({size(limit.get('roomBytes'))} left)"
        yield Fact("limit", Cell(f"{size(least)} for {name}", style), left)
    yield from _room(memory)
    some = record(memory.get("pressure")).get("some")
    if isinstance(some, list) and some and (percent := number(some[0])):
        yield Fact("waited for", Cell(f"{percent:g} % of the last 10 s", "yellow"))


def _room(memory: Mapping[str, object]) -> Iterator[Fact]:
    """What a start is held against, as a sum that adds up."""
    if "reserveBytes" not in memory:
        # An agent of before says no more.
        yield Fact("room", Cell(size(memory.get("roomBytes"))), "(of which memory_reserve is kept for all else)")
        return
    yield Fact("room", Cell(size(memory.get("roomBytes"))), "(available, or left by a limit, and not mapped)")
    yield Fact("promised", Cell(size(memory.get("promisedBytes"))), "(of it, to servers that have not taken it yet)")
    yield Fact("reserve", Cell(size(memory.get("reserveBytes"))), "(of it, for all else: memory_reserve)")
    left, why = memory.get("roomForStartBytes"), text(record(memory.get("unavailable")).get("roomForStartBytes"))
    remark = "" if number(left) else f"({why})" if why else "(what is started now would not fit)"
    yield Fact("for a start", Cell(size(left), "" if number(left) else "yellow"), remark)


def _disks(disks: list[Mapping[str, object]]) -> Iterator[Fact]:
    for disk in disks:
        problem = text(record(disk.get("unavailable")).get("freeBytes"))
        free = Cell(problem, "red") if problem else Cell(f"{size(disk.get('freeBytes'))} free")
        yield Fact(size(disk.get("totalBytes")), free, text(disk.get("folder")))


def _gpu(gpu: Mapping[str, object]) -> tuple[Cell, ...]:
    busy, warmth = number(gpu.get("utilizationPercent")), number(gpu.get("temperatureCelsius"))
    models = gpu.get("models")
    return (
        Cell(text(gpu.get("index")) or NOTHING, "bold"),
        Cell(text(gpu.get("name")) or text(gpu.get("vendor")) or NOTHING),
        Cell(text(gpu.get("pciAddress")) or NOTHING),
        Cell(size(gpu.get("memoryTotalBytes"))),
        Cell(size(gpu.get("memoryFreeBytes"))),
        Cell(NOTHING if busy is None else f"{busy:.0f} %"),
        Cell(NOTHING if warmth is None else f"{warmth:.0f} °C"),
        Cell(", ".join(map(str, models)) if isinstance(models, list) and models else NOTHING),
    )


def _reasons(gpus: list[Mapping[str, object]]) -> Iterator[str]:
    for gpu in gpus:
        name = text(gpu.get("index")) or text(gpu.get("pciAddress")) or "a GPU"
        told: dict[str, list[str]] = {}
        for key, reason in record(gpu.get("unavailable")).items():
            told.setdefault(text(reason), []).append(key)
        yield from (f"{name}: no {', '.join(keys)}: {reason}" for reason, keys in told.items())
