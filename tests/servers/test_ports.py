"""Which port a model gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.errors import NoFreePort
from magi_agent.servers.ports import free_port

PORTS = st.integers(8080, 8090)


def test_the_whole_range_is_usable_both_ends_included() -> None:
    given_out: list[int] = []
    for _ in range(20):
        given_out.append(free_port((8080, 8099), given_out, lambda _: False))

    assert given_out == list(range(8080, 8100))
    with pytest.raises(NoFreePort) as refused:
        free_port((8080, 8099), given_out, lambda _: False)
    assert refused.value.message == (
        "no port from 8080 to 8099 is free: 20 are given to models; widen the range: magictl port-range"
    )
    assert refused.value.details == {"portRange": [8080, 8099], "heldByOthers": [], "givenToModelsThatWent": {}}


def test_ports_of_models_that_went_are_named_with_the_way_to_take_one_back() -> None:
    gone = {"away": 8081}
    with pytest.raises(NoFreePort, match=r"1 of them to models that went: .* 'magictl port away auto'") as refused:
        free_port((8080, 8081), {8080, 8081}, lambda _: False, gone=gone)
    assert refused.value.details["givenToModelsThatWent"] == gone


def test_ports_that_others_hold_are_named() -> None:
    with pytest.raises(NoFreePort, match="1 are given to models, and other programs hold 8081, 8082") as refused:
        free_port((8080, 8082), {8080, 9999}, lambda port: port > 8080)
    assert refused.value.details["heldByOthers"] == [8081, 8082]


@given(given_out=st.sets(PORTS), held=st.sets(PORTS), avoid=st.sets(PORTS), ends=st.tuples(PORTS, PORTS))
def test_the_lowest_port_that_nobody_has(
    given_out: set[int], held: set[int], avoid: set[int], ends: tuple[int, int]
) -> None:
    low, high = sorted(ends)
    free = [port for port in range(low, high + 1) if port not in given_out | held | avoid]
    if free:
        assert free_port((low, high), given_out, held.__contains__, avoid) == free[0]
    else:
        with pytest.raises(NoFreePort):
            free_port((low, high), given_out, held.__contains__, avoid)


def test_nobody_is_asked_about_a_port_that_is_given_out() -> None:
    asked: list[int] = []

    def is_held(port: int) -> bool:
        asked.append(port)
        return False

    assert free_port((8080, 8090), {8080, 8081}, is_held, {8082}) == 8083
    assert asked == [8083]
