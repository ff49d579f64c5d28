"""Which model of a registry is meant, by whatever another program called it."""

import pytest

from magi_agent.imports.matching import Candidate, match

HUB = "/srv/hf/hub/models--unsloth--Qwen3-8B-GGUF/snapshots/0123abcd"
MODELS = (
    Candidate("qwen3-8b-q4_k_m", "/models/Qwen3-8B-Q4_K_M.gguf"),
    Candidate("qwen3-8b-q8_0", "/models/Qwen3-8B-Q8_0.gguf"),
    Candidate("phi-4-q4_k_m", "/models/a/phi-4-Q4_K_M.gguf"),
    Candidate("phi-4-q4_k_m-b", "/models/b/phi-4-Q4_K_M.gguf"),
    Candidate(
        "gpt-oss-120b-mxfp4",
        "/models/gpt-oss-120b-mxfp4-00001-of-00002.gguf",
        ("/models/gpt-oss-120b-mxfp4-00001-of-00002.gguf", "/models/gpt-oss-120b-mxfp4-00002-of-00002.gguf"),
    ),
    Candidate("qwen3-8b-ud-q4_k_xl", f"{HUB}/Qwen3-8B-UD-Q4_K_XL.gguf"),
    Candidate("qwen3-8b-q6_k", f"{HUB}/Qwen3-8B-Q6_K.gguf"),
    Candidate("glm-q8_0", "/lm/publisher/GLM-GGUF/GLM-Q8_0.gguf"),
    Candidate("smol-q4_k_m", "/cache/ggml-org_SmolLM-GGUF_smol-Q4_K_M.gguf"),
    Candidate("smol-q8_0", "/cache/ggml-org_SmolLM-GGUF_smol-Q8_0.gguf"),
)


@pytest.mark.parametrize(
    ("reference", "ids"),
    [
        ("/models/Qwen3-8B-Q4_K_M.gguf", ("qwen3-8b-q4_k_m",)),
        ("/models//x/../Qwen3-8B-Q4_K_M.gguf", ("qwen3-8b-q4_k_m",)),
        ("/elsewhere/Qwen3-8B-Q8_0.gguf", ("qwen3-8b-q8_0",)),
        ("Qwen3-8B-Q8_0.gguf", ("qwen3-8b-q8_0",)),
        ("C:\\llm\\Qwen3-8B-Q8_0.gguf", ("qwen3-8b-q8_0",)),
        ("/models/gpt-oss-120b-mxfp4-00002-of-00002.gguf", ("gpt-oss-120b-mxfp4",)),
        ("/x/gpt-oss-120b-mxfp4-00001-of-00002.gguf", ("gpt-oss-120b-mxfp4",)),
        ("gpt-oss-120b-mxfp4.gguf", ("gpt-oss-120b-mxfp4",)),
        ("phi-4-Q4_K_M.gguf", ("phi-4-q4_k_m", "phi-4-q4_k_m-b")),
        ("/old/b/phi-4-Q4_K_M.gguf", ("phi-4-q4_k_m-b",)),
        ("PHI-4-q4_k_m", ("phi-4-q4_k_m", "phi-4-q4_k_m-b")),
        ("phi-4-q4_k_m-b", ("phi-4-q4_k_m-b",)),
        ("qwen3-8b-Q6_K", ("qwen3-8b-q6_k",)),
        ("unsloth/Qwen3-8B-GGUF:Q6_K", ("qwen3-8b-q6_k",)),
        ("unsloth/qwen3-8b-gguf:ud-q4_k_xl", ("qwen3-8b-ud-q4_k_xl",)),
        ("unsloth/Qwen3-8B-GGUF:Q4_K_M", ()),
        ("unsloth/Qwen3-8B-GGUF", ("qwen3-8b-ud-q4_k_xl", "qwen3-8b-q6_k")),
        ("unsloth/Qwen3-8B-GGUF/Qwen3-8B-Q6_K.gguf", ("qwen3-8b-q6_k",)),
        ("publisher/GLM-GGUF:Q8_0", ("glm-q8_0",)),
        ("publisher/GLM-GGUF", ("glm-q8_0",)),
        ("ggml-org/SmolLM-GGUF", ("smol-q4_k_m",)),
        ("ggml-org/SmolLM-GGUF:Q8_0", ("smol-q8_0",)),
        ("other/SmolLM-GGUF", ()),
        ("nothing-like-it", ()),
        ("qwen", ()),
        ("", ()),
        ("/", ()),
        (".gguf", ()),
    ],
)
def test_match(reference: str, ids: tuple[str, ...]) -> None:
    assert match(reference, MODELS) == ids


def test_an_exact_path_goes_before_a_likeness() -> None:
    assert match("/models/a/phi-4-Q4_K_M.gguf", MODELS) == ("phi-4-q4_k_m",)


def test_no_models_match_nothing() -> None:
    assert match("x", ()) == ()
