"""What llama-server prints of its devices, as it is and as nobody should print it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.host.listed_devices import MOST_DEVICES, listed_devices

MIB = 1024 * 1024
REAL = """\
ggml_cuda_init: found 2 CUDA devices:
  Device 0: NVIDIA GeForce RTX 3090, compute capability 8.6, VMM: yes
load_backend: loaded CUDA backend from /opt/llama/libggml-cuda.so
Available devices:
  CUDA0: NVIDIA GeForce RTX 3090 (24135 MiB, 23809 MiB free)
  ROCm1: AMD Radeon RX 7900 XTX (24560 MiB, 0 MiB free)
  Vulkan0: llvmpipe (LLVM 15.0.6, 256 bits) (2048 MiB, 2048 MiB free)
  BLAS: OpenBLAS (0 MiB, 0 MiB free)
  SYCL0: Intel(R) Arc(TM) A770 Graphics
"""


def test_each_device_is_read_as_it_is_printed() -> None:
    found = listed_devices(REAL)

    assert found is not None
    assert [(each.name, each.backend, each.number, each.memory_total, each.memory_free) for each in found] == [
        ("CUDA0", "CUDA", 0, 24135 * MIB, 23809 * MIB),
        ("ROCm1", "ROCm", 1, 24560 * MIB, 0),
        ("Vulkan0", "Vulkan", 0, 2048 * MIB, 2048 * MIB),
        ("SYCL0", "SYCL", 0, None, None),
    ]
    assert found[2].description == "llvmpipe (LLVM 15.0.6, 256 bits)"
    assert found[2].line == "Vulkan0: llvmpipe (LLVM 15.0.6, 256 bits) (2048 MiB, 2048 MiB free)"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Available devices:\n", ()),
        ("Available devices:\n  (none)\n", ()),
        ("usage: llama-server\n  CUDA0: a GPU (1 MiB, 1 MiB free)\n", None),
        ("error: invalid argument: --list-devices\n", None),
        ("", None),
    ],
)
def test_none_is_told_from_no_list(text: str, found: tuple[()] | None) -> None:
    assert listed_devices(text) == found


def test_a_device_that_tells_no_memory_has_none_and_not_0() -> None:
    [device] = listed_devices("Available devices:\n  Vulkan0: a GPU (0 MiB, 0 MiB free)\n") or ()

    assert (device.memory_total, device.memory_free) == (None, None)


def test_hostile_lists_have_an_end_and_no_control_characters() -> None:
    lines = [f"  CUDA{number % 1000}: \x1b[31m{number} (1 MiB, 1 MiB free)" for number in range(100_000)]
    found = listed_devices("Available devices:\n" + "\n".join(lines)) or ()

    assert len(found) == MOST_DEVICES
    assert found[0].description == "?[31m0"
    huge = listed_devices(
        f"Available devices:\n  CUDA0: {'x' * 600} (1 MiB, 1 MiB free)\n  CUDA1: y ({'9' * 40} MiB, 1)"
    )
    assert [each.memory_total for each in huge or ()] == [None]


@given(st.text())
def test_anything_at_all_is_read(text: str) -> None:
    for device in listed_devices(f"Available devices:\n{text}") or ():
        assert device.description.isprintable()
