"""Quantization names: finding one in a text, and how many bits a weight takes."""

import re

_QUANTIZATION = re.compile(
    r"""
    (?<![a-z0-9])
    (?:
        (?P<legacy>q[1-8][_-][01](?:[_-][48][_-][48])?)          # q4_0, q5_1, q4_0_4_8
      | (?P<k>q[1-8][_-]?k(?:[_-]?(?:xxl|xl|l|m|s|p))?)           # q4_k_m, q6_k, q2_k_xl, also q4km
      | (?P<i>iq[1-6][_-](?:xxs|xs|s|m|nl|kss|ks|kt|k))           # iq2_xxs, iq4_nl
      | (?P<ternary>tq[12][_-]0|i2[_-]s)
      | (?P<float>mxfp4(?:[_-]moe)?|nvfp4|bf16|fp?16|fp?32|fp8)
      | (?P<bare>q[1-8])
    )
    (?![a-z0-9])
    """,
    re.VERBOSE,
)
_BITS = re.compile(r"(?:iq|tq|q|i|mxfp|nvfp|bf|fp|f|int)(\d{1,2})(?!\d)")


def quantization_in(text: str) -> str | None:
    """Return the last quantization that a file or folder name mentions, as ``q4_k_m``.

    Publishers' prefixes (``UD-``, ``i1-``) are not part of it. ``None`` if there is none.
    """
    found: re.Match[str] | None = None
    for match in _QUANTIZATION.finditer(text.lower()):
        # "Q4_K_M-f16" style names say what the embeddings are after the real quantization: a float never
        # replaces an integer type found before it.
        if found is None or match.lastgroup != "float":
            found = match
    if found is None:
        return None
    name = found.group(0).replace("-", "_")
    if found.lastgroup == "k":
        digits, size = name[:2], name[2:].replace("_", "")[1:]
        return f"{digits}_k_{size}" if size else f"{digits}_k"
    return {"fp16": "f16", "fp32": "f32"}.get(name, name)


def without_quantization(text: str) -> str:
    """Return the text without the quantization it mentions, its publisher's prefix and the separators around it."""
    quantization = None
    for match in _QUANTIZATION.finditer(text.lower()):
        if quantization is None or match.lastgroup != "float":
            quantization = match
    if quantization is None or len(text) != len(text.lower()):
        return text
    before = re.sub(r"(?i)(?:(?<![a-z0-9])(?:ud|i1))?[-_. ]*$", "", text[: quantization.start()])
    after = text[quantization.end() :]
    return before + after if before else after.lstrip("-_. ")


def bits_of(quantization: str | None) -> int | None:
    """Return the nominal bits of one weight: 4 for ``q4_k_m``, ``iq4_xs`` and ``mxfp4``, 16 for ``bf16``.

    ``None`` for a name that says nothing.
    """
    match = _BITS.match(quantization.lower()) if quantization else None
    return int(match.group(1)) if match else None


def refined(header: str | None, name: str | None) -> str | None:
    """Return the quantization to show, from what the header and the file name say.

    The header wins. Only where the name says the same in more detail is it taken: a header cannot say ``q4_k_xl``
    (there is no such number in GGUF's ``general.file_type``), and says ``q4_k`` where it counted tensors.
    """
    if header is None or name is None:
        return header or name
    if name.startswith(f"{header}_"):
        return name
    if name.endswith(("_l", "_xl", "_xxl", "_p")) and name != "q3_k_l" and bits_of(name) == bits_of(header):
        return name
    return header
