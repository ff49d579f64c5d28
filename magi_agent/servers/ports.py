"""Which port a model gets."""

from collections.abc import Callable, Collection

from magi_agent.errors import NoFreePort


def free_port(
    port_range: tuple[int, int], given: Collection[int], is_held: Callable[[int], bool], avoid: Collection[int] = ()
) -> int:
    """The lowest port of the range that is given to no model, held by no process and not to be avoided.

    Raises ``NoFreePort``, which says how the range is used up.
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
        + "; widen servers.port_range",
        {"portRange": [low, high], "heldByOthers": held},
    )
