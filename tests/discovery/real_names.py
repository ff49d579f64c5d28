"""The table of real names and headers (``real_names.txt``), and the files that stand for them.

The names in a header are made from the original's repository by the very code that converters use (the ``gguf``
package), so they are what a converter would write, right or wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gguf.metadata import Metadata
from gguf.utility import size_label as _size_label

from magi_agent.gguf import ggml
from magi_agent.vocabulary import ThinkingMode, Tier
from tests.discovery import model_files
from tests.gguf.builder import STRING, array_entry, gguf, number_entry, string, tensor, text_entry

_TABLE = Path(__file__).with_name("real_names.txt")
_TEMPLATES = {
    "chats": model_files.CHATS,
    "switched": model_files.SWITCHED,
    "thinks": model_files.THINKS,
    "analyses": model_files.ANALYSES,
    "none": None,
}
_TEMPLATE_BY_THINKING = {ThinkingMode.OPTIONAL: "switched", ThinkingMode.ALWAYS: "thinks"}
# What llama-quantize writes into the header of what publishers call otherwise.
_FILE_TYPES = {name: number for number, name in ggml.FILE_TYPES.items()} | {
    "mxfp4_moe": 38,
    "q2_k_l": 10,
    "q2_k_xl": 10,
    "q3_k_xl": 12,
    "q4_k_l": 15,
    "q4_k_xl": 15,
    "q6_k_l": 18,
    "q6_k_xl": 18,
    "q8_k_xl": 7,
}
_REMOVED_TENSOR_TYPE = 36  # its elements take no bytes that anyone knows of, so that a file may hold billions of them


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be found."""

    family: str
    version: str | None
    size_params: float
    active_params: float | None
    quantization: str
    flags: str
    thinking_mode: ThinkingMode
    tier: Tier


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    file: str
    source: str
    architecture: str
    expected: Expected
    more: dict[str, str]

    @cached_property
    def differs(self) -> frozenset[str]:
        return frozenset(filter(None, self.more.get("differs", "").split(",")))

    @cached_property
    def parameters(self) -> int:
        return round(float(self.more.get("params", self.expected.size_params)) * 1e9)

    def titles(self) -> dict[str, str]:
        """The names in the header."""
        how, _, source = self.source.rpartition(":")
        if self.source == "-":
            titles: dict[str, str | None] = {}
        elif how == "old":
            titles = {"general.name": source.replace("+", " ")}
        else:
            name, _, basename, finetune, version, size_label = Metadata.get_model_id_components(source, self.parameters)
            assert name
            titles = {
                "general.name": Metadata.id_to_title(name),
                "general.version": version,
                "general.finetune": finetune,
                "general.basename": basename,
                "general.size_label": size_label or _size_label(self.parameters, self.parameters, 0, 0),
            }
            if how == "unsloth":
                words = "-".join(word.title() if word.islower() else word for word in name.split("-"))
                titles |= {"general.name": words, "general.basename": words}
        if "label" in self.more:
            titles["general.size_label"] = self.more["label"]
        return {key: value for key, value in titles.items() if value}

    def content(self) -> bytes:
        """The file: its header as published, and hardly any data."""
        entries = [text_entry("general.architecture", self.architecture)]
        entries += [text_entry(key, value) for key, value in self.titles().items()]
        file_type = _FILE_TYPES.get(self.expected.quantization)
        if file_type is not None:  # else a fork's own
            entries.append(number_entry("general.file_type", file_type))
        if "pooling" in self.more:
            entries.append(number_entry(f"{self.architecture}.pooling_type", int(self.more["pooling"])))
        tensors = [tensor("token_embd.weight", (self.parameters,), _REMOVED_TENSOR_TYPE)]
        if "labels" in self.more:
            labels = int(self.more["labels"])
            content = b"".join(string(f"label {number}") for number in range(labels))
            entries.append(array_entry(f"{self.architecture}.classifier.output_labels", STRING, labels, content))
            tensors.append(tensor("cls.output.weight", (1,), _REMOVED_TENSOR_TYPE))
        usual = _TEMPLATE_BY_THINKING.get(
            self.expected.thinking_mode, "chats" if self.expected.flags == "i" else "none"
        )
        usual = "chats" if usual == "none" and "i" in self.expected.flags and "e" not in self.expected.flags else usual
        template = _TEMPLATES[self.more.get("template", usual)]
        if template is not None:
            entries.append(text_entry("tokenizer.chat_template", template))
        return gguf(entries, tensors, data=32)


def read_table() -> list[Row]:
    """Every row of the table."""
    lines = [line.split() for line in _TABLE.read_text().splitlines() if line and not line.startswith("#")]
    return [_row(line) for line in lines]


def _row(cells: list[str]) -> Row:
    file, source, architecture, family, version, size, active, quantization, flags, thinking, tier = cells[:11]
    expected = Expected(
        family=family,
        version=None if version == "-" else version,
        size_params=float(size),
        active_params=None if active == "-" else float(active),
        quantization=quantization,
        flags=flags.strip("-"),
        thinking_mode=ThinkingMode(thinking),
        tier=Tier(tier),
    )
    return Row(file, source, architecture, expected, dict(cell.split("=", 1) for cell in cells[11:]))
