"""Which port a model gets."""

from collections.abc import Callable, Collection, Mapping

from magi_agent.errors import NoFreePort


def free_port(
    port_range: tuple[int, int],
    given: Collection[int],
    is_held: Callable[[int], bool],
    avoid: Collection[int] = (),
    gone: Mapping[str, int] | None = None,
) -> int:
    """The lowest port of the range that is given to no model, held by no process and not to be avoided.

    ``gone`` are the ports of models that are not there any more, which somebody may take back. Raises ``NoFreePort``,
    which says how the range is used up.
    """
    low, high = port_range
    held = []
    for port in range(low, high + 1):
        if port in given or port in avoid:
            continue
        if is_held(port):
            held.append(port)
            continue
        return port
    raise NoFreePort(
        f"no port from {low} to {high} is free: {high - low + 1 - len(held)} are given to models"
        + (f", and other programs hold {', '.join(map(str, held))}" if held else "")
        + _ways_out(gone or {}),
        {"portRange": [low, high], "heldByOthers": held, "givenToModelsThatWent": dict(gone or {})},
    )


def _ways_out(gone: Mapping[str, int]) -> str:
    if not gone:
        return "; widen the range: magictl port-range"
    first = next(iter(gone))
    return (
        f"; {len(gone)} of them to models that went: take one back with 'magictl port {first} auto', or widen the range"
    )
