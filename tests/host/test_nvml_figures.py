"""What is made of an answer that anybody may have written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from magi_agent.host.nvml_figures import pci_address, read_figures, read_order

GPU: dict[str, Any] = {
    "pciAddress": "00000000:C1:00.0",
    "uuid": "GPU-1",
    "name": "NVIDIA A100",
    "memoryTotalBytes": 1000,
    "memoryFreeBytes": 0,
    "temperatureCelsius": 40,
    "utilizationPercent": 100,
    "processes": {"1": 5, "2": None},
    "reasons": {},
}


def answer(**changes: Any) -> str:
    return json.dumps({"gpus": [GPU | changes], "problem": None})


def test_a_right_answer_is_read_also_behind_other_words() -> None:
    figures = read_figures("NVRM: some warning\n" + answer() + "\n")

    assert figures.gpus[0].pci_address == "0000:c1:00.0"
    assert figures.gpus[0].memory_free_bytes == 0
    assert figures.gpus[0].processes == {1: 5, 2: None}


def test_the_longest_answer_is_read_whole() -> None:
    processes = {str((1 << 31) - number): 1 << 40 for number in range(1, 513)}
    text = json.dumps({"gpus": [GPU | {"processes": processes}] * 64, "problem": None}, separators=(",", ":"))
    assert len(read_figures(text).gpus) == 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 10_000,
        "null",
        "[]",
        '{"gpus": []}',
        answer(memoryTotalBytes="1000"),
        answer(memoryTotalBytes=0),
        answer(memoryTotalBytes=1 << 60),
        answer(memoryFreeBytes=-1),
        answer(memoryFreeBytes=True),
        answer(utilizationPercent=101),
        answer(temperatureCelsius=1e9),
        answer(processes=[1]),
        answer(processes={"-1": 5}),
        answer(processes={"x": 5}),
        answer(processes={"1": -1}),
        answer(processes={"1": 1 << 60}),
        answer(processes={"1": "5"}),
        answer(processes=dict.fromkeys(range(1, 1000), 5)),
        answer(pciAddress="../../etc/passwd"),
        answer(uuid=""),
        answer(name="x" * 300),
        answer(reasons={str(number): "" for number in range(1, 20)}),
        json.dumps({"gpus": [GPU] * 65, "problem": None}),
        "x" * 1_200_000,
    ],
)
def test_what_is_no_right_answer_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="its answer is not as it should be: ") as error:
        read_figures(text)
    assert len(str(error.value)) < 300


def test_names_move_no_cursor() -> None:
    assert read_figures(answer(name="a\x1b[2Jb")).gpus[0].name == "a?[2Jb"


def test_the_order_of_cuda_is_of_addresses() -> None:
    assert read_order('{"order": ["0000:C1:00.0", "0001:02:00.1"], "problem": null}') == (
        "0000:c1:00.0",
        "0001:02:00.1",
    )
    with pytest.raises(ValueError, match="no driver"):
        read_order('{"order": [], "problem": "no driver"}')


@pytest.mark.parametrize("text", ["", "0000:c1:00", "0000:c1:00.8", "c1:00.0", " 0000:c1:00.0", "0000:c1:00.0\n"])
def test_what_is_no_address_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="no PCI address"):
        pci_address(text)
