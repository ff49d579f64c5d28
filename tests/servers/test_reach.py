"""Names of what belongs to one server: short, always the same, and nobody else's."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from magi_agent.servers.reach import MAX_SOCKET_PATH, AtPort, AtSocket, runtime_root, short_name, socket_path
from magi_agent.systemd.transient import TransientService
from magi_agent.vocabulary import MAX_ID_LENGTH, Scope

IDS = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,198}[a-z0-9])?", fullmatch=True)


@given(st.lists(IDS, unique=True, max_size=20))
def test_no_two_models_have_one_name(model_ids: list[str]) -> None:
    assert len({short_name(model_id) for model_id in model_ids}) == len(model_ids)


@given(IDS)
@example("m" * MAX_ID_LENGTH)
def test_a_sockets_path_fits_and_systemd_takes_its_folder(model_id: str) -> None:
    for root in ("/run", "/run/user/4294967294"):
        path = socket_path(Path(root), model_id)
        assert len(os.fsencode(path)) <= MAX_SOCKET_PATH
        folder = str(path.parent.relative_to(root))
        TransientService(name="x.service", description="x", argv=("/bin/true",), runtime_directory=folder)


def test_long_ids_that_begin_alike_are_told_apart() -> None:
    one, other = "m" * MAX_ID_LENGTH, "m" * (MAX_ID_LENGTH - 1) + "n"

    assert short_name(one) != short_name(other)
    # A later agent finds what an earlier one made.
    assert short_name("qwen3-8b") == "qwen3-8b.f9b30c0d4656"


def test_where_managers_make_their_units_folders() -> None:
    assert runtime_root(Scope.SYSTEM, {"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run")
    assert runtime_root(Scope.USER, {"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7")
    assert runtime_root(Scope.USER, {}) == Path(f"/run/user/{os.getuid()}")


def test_the_words_for_people() -> None:
    assert (AtPort("127.0.0.1", 80).url, AtPort("::1", 80).url) == ("http://127.0.0.1:80", "http://[::1]:80")
    assert AtSocket(Path("/run/x.sock")).url == "unix:/run/x.sock"
    assert (AtPort("::1", 80).words, AtSocket(Path("/run/x.sock")).words) == ("port 80", "socket /run/x.sock")
