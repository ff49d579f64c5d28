"""The numbers by which GGUF files name tensor types and quantizations.

Sources: ``enum ggml_type`` with its block sizes (ggml) and ``enum llama_ftype`` (llama.cpp); the reference in
Python is the ``gguf`` package, and a test compares. Numbers are never given a new meaning there, only added.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class TensorType:
    """How a tensor's elements are stored: ``block_size`` elements take ``block_bytes`` bytes."""

    name: str  # lower case
    block_size: int  # elements
    block_bytes: int


TENSOR_TYPES: Final[Mapping[int, TensorType]] = MappingProxyType(
    {
        0: TensorType("f32", 1, 4),
        1: TensorType("f16", 1, 2),
        2: TensorType("q4_0", 32, 18),
        3: TensorType("q4_1", 32, 20),
        6: TensorType("q5_0", 32, 22),
        7: TensorType("q5_1", 32, 24),
        8: TensorType("q8_0", 32, 34),
        9: TensorType("q8_1", 32, 40),
        10: TensorType("q2_k", 256, 84),
        11: TensorType("q3_k", 256, 110),
        12: TensorType("q4_k", 256, 144),
        13: TensorType("q5_k", 256, 176),
        14: TensorType("q6_k", 256, 210),
        15: TensorType("q8_k", 256, 292),
        16: TensorType("iq2_xxs", 256, 66),
        17: TensorType("iq2_xs", 256, 74),
        18: TensorType("iq3_xxs", 256, 98),
        19: TensorType("iq1_s", 256, 50),
        20: TensorType("iq4_nl", 32, 18),
        21: TensorType("iq3_s", 256, 110),
        22: TensorType("iq2_s", 256, 82),
        23: TensorType("iq4_xs", 256, 136),
        24: TensorType("i8", 1, 1),
        25: TensorType("i16", 1, 2),
        26: TensorType("i32", 1, 4),
        27: TensorType("i64", 1, 8),
        28: TensorType("f64", 1, 8),
        29: TensorType("iq1_m", 256, 56),
        30: TensorType("bf16", 1, 2),
        34: TensorType("tq1_0", 256, 54),
        35: TensorType("tq2_0", 256, 66),
        39: TensorType("mxfp4", 32, 17),
        40: TensorType("nvfp4", 64, 36),
        41: TensorType("q1_0", 128, 18),
        42: TensorType("q2_0", 64, 18),
    }
)
"""By ``ggml_type``. A number that is missing here is one that was taken back, or one newer than this table."""

FILE_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        0: "f32",
        1: "f16",
        2: "q4_0",
        3: "q4_1",
        4: "q4_1",  # "some f16": the output tensors were kept larger; no longer written
        7: "q8_0",
        8: "q5_0",
        9: "q5_1",
        10: "q2_k",
        11: "q3_k_s",
        12: "q3_k_m",
        13: "q3_k_l",
        14: "q4_k_s",
        15: "q4_k_m",
        16: "q5_k_s",
        17: "q5_k_m",
        18: "q6_k",
        19: "iq2_xxs",
        20: "iq2_xs",
        21: "q2_k_s",
        22: "iq3_xs",
        23: "iq3_xxs",
        24: "iq1_s",
        25: "iq4_nl",
        26: "iq3_s",
        27: "iq3_m",
        28: "iq2_s",
        29: "iq2_m",
        30: "iq4_xs",
        31: "iq1_m",
        32: "bf16",
        33: "q4_0_4_4",  # this and the next two were taken back; files of the time still say so
        34: "q4_0_4_8",
        35: "q4_0_8_8",
        36: "tq1_0",
        37: "tq2_0",
        38: "mxfp4",
        39: "nvfp4",
        40: "q1_0",
        41: "q2_0",
    }
)
"""The quantization people call a file by, by ``general.file_type``."""

_GUESSED = 1024


def quantization_of(file_type: int) -> str | None:
    """Return the quantization that ``general.file_type`` names, or ``None`` where it names none we know.

    A file type that was guessed when the file was written carries an extra bit; it says nothing certain.
    """
    return None if file_type & _GUESSED else FILE_TYPES.get(file_type)
