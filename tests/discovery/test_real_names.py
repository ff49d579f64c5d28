"""Names and headers as publishers really make them, and what is found in them.

One row a model: its file (with the folders that name it, where they do), its architecture, and what must be found. To
add one, add a row; what is not given is what most models are (no coder, no embedding model, no thinking).
"""

from dataclasses import dataclass

import pytest

from magi_agent.discovery.facts import ModelFacts
from magi_agent.discovery.scanner import Scanner
from magi_agent.gguf import ggml
from magi_agent.vocabulary import ModelStatus, ThinkingMode, Tier
from tests.discovery.model_files import (
    ANALYSES,
    CHATS,
    SWITCHED,
    THINKS,
    model_bytes,
    write_file,
)

NONE, OPTIONAL, ALWAYS = ThinkingMode.NONE, ThinkingMode.OPTIONAL, ThinkingMode.ALWAYS
FAST, BALANCED, POWERFUL = Tier.FAST, Tier.BALANCED, Tier.POWERFUL
NO_SIZE = 0.0  # from the sum over the tensors, which are next to nothing here


@dataclass(frozen=True, slots=True)
class Row:
    """A model and what is to be found. ``flags``: i for instruct, c for coder, e for embedding."""

    file: str
    architecture: str
    family: str
    version: str | None
    size: float
    quantization: str
    tier: Tier
    flags: str = ""
    thinking: ThinkingMode = NONE
    active: float | None = None
    template: str | None = None
    header: tuple[tuple[str, str], ...] = ()


ROWS = [
    # Qwen
    Row("Qwen1.5-MoE-A2.7B-Chat.Q4_K_M.gguf", "qwen2moe", "qwen", "1.5", NO_SIZE, "q4_k_m", BALANCED, "i", active=2.7),
    Row("CodeQwen1.5-7B-Chat-Q4_K_M.gguf", "qwen2", "qwen", "1.5", 7, "q4_k_m", BALANCED, "ic"),
    Row("Qwen2-VL-2B-Instruct-Q4_K_M.gguf", "qwen2vl", "qwen", "2", 2, "q4_k_m", FAST, "i"),
    Row("Qwen2.5-0.5B-Instruct-Q4_K_M.gguf", "qwen2", "qwen", "2.5", 0.5, "q4_k_m", FAST, "i"),
    Row("qwen2.5-3b-instruct-q8_0.gguf", "qwen2", "qwen", "2.5", 3, "q8_0", BALANCED, "i"),
    Row("Qwen2.5-Coder-7B-Instruct-Q4_K_M.gguf", "qwen2", "qwen", "2.5", 7, "q4_k_m", BALANCED, "ic"),
    Row("qwen2.5-coder-32b-instruct-q5_k_m.gguf", "qwen2", "qwen", "2.5", 32, "q5_k_m", POWERFUL, "ic"),
    Row("Qwen2.5-14B-Instruct-1M-Q4_K_M.gguf", "qwen2", "qwen", "2.5", 14, "q4_k_m", POWERFUL, "i"),
    Row("Qwen3-0.6B-Q8_0.gguf", "qwen3", "qwen", "3", 0.6, "q8_0", BALANCED, "i", OPTIONAL, template=SWITCHED),
    Row("Qwen3-4B-Q4_K_M.gguf", "qwen3", "qwen", "3", 4, "q4_k_m", FAST, "i", OPTIONAL, template=SWITCHED),
    Row("Qwen3-4B-Instruct-2507-Q4_K_M.gguf", "qwen3", "qwen", "3", 4, "q4_k_m", FAST, "i", template=CHATS),
    Row("Qwen3-4B-Thinking-2507-Q4_K_M.gguf", "qwen3", "qwen", "3", 4, "q4_k_m", POWERFUL, "", ALWAYS),
    Row("Qwen3-8B-Q4_K_M.gguf", "qwen3", "qwen", "3", 8, "q4_k_m", BALANCED, "i", OPTIONAL, template=SWITCHED),
    Row("Qwen3-30B-A3B-UD-Q4_K_XL.gguf", "qwen3moe", "qwen", "3", 30, "q4_k_xl", POWERFUL, "", active=3),
    Row("Qwen3-Coder-30B-A3B-Instruct-IQ4_XS.gguf", "qwen3moe", "qwen", "3", 30, "iq4_xs", POWERFUL, "ic", active=3),
    Row("Qwen3-Next-80B-A3B-Instruct-Q4_K_M.gguf", "qwen3next", "qwen", "3", 80, "q4_k_m", POWERFUL, "i", active=3),
    Row("Qwen3-Embedding-0.6B-Q8_0.gguf", "qwen3", "qwen", "3", 0.6, "q8_0", BALANCED, "e"),
    Row("Qwen3-Reranker-0.6B-Q8_0.gguf", "qwen3", "qwen", "3", 0.6, "q8_0", BALANCED, "e"),
    Row("Qwen3.5-9B-Q4_K_M.gguf", "qwen35", "qwen", "3.5", 9, "q4_k_m", BALANCED, "i", OPTIONAL, template=SWITCHED),
    Row("Qwen3.5-35B-A3B-UD-Q4_K_XL.gguf", "qwen35moe", "qwen", "3.5", 35, "q4_k_xl", POWERFUL, active=3),
    Row("QwQ-32B-Q4_K_M.gguf", "qwen2", "qwen", None, 32, "q4_k_m", POWERFUL, "", ALWAYS),
    Row("qwq-32b-preview-q4_k_m.gguf", "qwen2", "qwen", None, 32, "q4_k_m", POWERFUL, "", ALWAYS),
    Row("QVQ-72B-Preview-Q4_K_M.gguf", "qwen2vl", "qwen", None, 72, "q4_k_m", POWERFUL, "", ALWAYS),
    # Llama and its children
    Row("llama-2-7b-chat.Q4_K_M.gguf", "llama", "llama", "2", 7, "q4_k_m", BALANCED, "i"),
    Row("llama-2-13b.Q4_0.gguf", "llama", "llama", "2", 13, "q4_0", BALANCED),
    Row("Meta-Llama-3-8B-Instruct.Q5_K_M.gguf", "llama", "llama", "3", 8, "q5_k_m", BALANCED, "i"),
    Row("Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf", "llama", "llama", "3.1", 8, "q4_k_m", BALANCED, "i"),
    Row("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "llama", "llama", "3.2", 1, "q4_k_m", FAST, "i"),
    Row("Llama-3.2-3B-Instruct-f16.gguf", "llama", "llama", "3.2", 3, "f16", BALANCED, "i"),
    Row("Llama-3.3-70B-Instruct-IQ2_XS.gguf", "llama", "llama", "3.3", 70, "iq2_xs", POWERFUL, "i"),
    Row("Llama-4-Scout-17B-16E-Instruct-Q2_K.gguf", "llama4", "llama", "4", NO_SIZE, "q2_k", BALANCED, "i", active=17),
    Row("codellama-34b-instruct.Q4_K_M.gguf", "llama", "llama", None, 34, "q4_k_m", POWERFUL, "ic"),
    Row("tinyllama-1.1b-chat-v1.0.Q4_K_M.gguf", "llama", "tinyllama", "1.0", 1.1, "q4_k_m", FAST, "i"),
    Row("Hermes-3-Llama-3.1-8B.Q4_K_M.gguf", "llama", "llama", "3.1", 8, "q4_k_m", BALANCED),
    Row("dolphin-2.9.4-llama3.1-8b-Q4_K_M.gguf", "llama", "llama", "3.1", 8, "q4_k_m", BALANCED),
    Row("Llama-3.1-Nemotron-70B-Instruct-HF-Q4_K_M.gguf", "llama", "nemotron", "3.1", 70, "q4_k_m", POWERFUL, "i"),
    Row("vicuna-7b-v1.5.Q4_K_M.gguf", "llama", "vicuna", "1.5", 7, "q4_k_m", BALANCED),
    # Gemma
    Row("gemma-2-2b-it-Q4_K_M.gguf", "gemma2", "gemma", "2", 2, "q4_k_m", FAST, "i"),
    Row("gemma-3-270m-it-Q8_0.gguf", "gemma3", "gemma", "3", 0.27, "q8_0", BALANCED, "i"),
    Row("gemma-3-4b-it-q4_0.gguf", "gemma3", "gemma", "3", 4, "q4_0", FAST, "i"),
    Row("gemma-3-12b-it-UD-Q4_K_XL.gguf", "gemma3", "gemma", "3", 12, "q4_k_xl", BALANCED, "i"),
    Row("gemma-3-27b-it-Q4_K_M.gguf", "gemma3", "gemma", "3", 27, "q4_k_m", POWERFUL, "i"),
    Row("gemma-3n-E4B-it-Q4_K_M.gguf", "gemma3n", "gemma", "3n", 4, "q4_k_m", FAST, "i"),
    Row("embeddinggemma-300M-Q8_0.gguf", "gemma-embedding", "gemma", None, 0.3, "q8_0", BALANCED, "e"),
    # DeepSeek
    Row("DeepSeek-R1-Distill-Qwen-1.5B-Q4_K_M.gguf", "qwen2", "deepseek", "r1", 1.5, "q4_k_m", POWERFUL, "", ALWAYS),
    Row("DeepSeek-R1-Distill-Qwen-7B-Q4_K_M.gguf", "qwen2", "deepseek", "r1", 7, "q4_k_m", POWERFUL, "", ALWAYS),
    Row("DeepSeek-R1-Distill-Llama-8B-Q4_K_M.gguf", "llama", "deepseek", "r1", 8, "q4_k_m", POWERFUL, "", ALWAYS),
    Row("mystery-3b-Q4_0.gguf", "llama", "llama", None, 3, "q4_0", POWERFUL, "i", ALWAYS, template=THINKS),
    Row("DeepSeek-R1-0528-Qwen3-8B-Q4_K_M.gguf", "qwen3", "deepseek", "r1", 8, "q4_k_m", POWERFUL, "", ALWAYS),
    Row("DeepSeek-V3.1-UD-TQ1_0.gguf", "deepseek2", "deepseek", "3.1", NO_SIZE, "tq1_0", BALANCED),
    Row("DeepSeek-Coder-V2-Lite-Instruct-Q4_K_M.gguf", "deepseek2", "deepseek", "2", NO_SIZE, "q4_k_m", BALANCED, "ic"),
    Row("deepseek-coder-6.7b-instruct.Q4_K_M.gguf", "llama", "deepseek", None, 6.7, "q4_k_m", FAST, "ic"),
    # gpt-oss
    Row("gpt-oss-20b-mxfp4.gguf", "gpt-oss", "gpt-oss", None, 20, "mxfp4", POWERFUL, "i", ALWAYS, template=ANALYSES),
    Row("openai_gpt-oss-20b-MXFP4.gguf", "gpt-oss", "gpt-oss", None, 20, "mxfp4", POWERFUL, "", ALWAYS),
    Row("gpt-oss-120b-F16.gguf", "gpt-oss", "gpt-oss", None, 120, "f16", POWERFUL, "", ALWAYS),
    # Phi
    Row("phi-2.Q4_K_M.gguf", "phi2", "phi", "2", NO_SIZE, "q4_k_m", BALANCED),
    Row("Phi-3-mini-4k-instruct-q4.gguf", "phi3", "phi", "3", NO_SIZE, "q4_k_m", BALANCED, "i"),
    Row("Phi-3.5-mini-instruct-Q4_K_M.gguf", "phi3", "phi", "3.5", NO_SIZE, "q4_k_m", BALANCED, "i"),
    Row("Phi-4-mini-reasoning-Q4_K_M.gguf", "phi3", "phi", "4", NO_SIZE, "q4_k_m", POWERFUL, "", ALWAYS),
    # Mistral
    Row("mistral-7b-instruct-v0.2.Q4_K_M.gguf", "llama", "mistral", "0.2", 7, "q4_k_m", BALANCED, "i"),
    Row("Mistral-Nemo-Instruct-2407-Q4_K_M.gguf", "llama", "mistral", None, NO_SIZE, "q4_k_m", BALANCED, "i"),
    Row("Mistral-Small-3.2-24B-Instruct-2506-Q4_K_M.gguf", "llama", "mistral", "3.2", 24, "q4_k_m", POWERFUL, "i"),
    Row("Ministral-8B-Instruct-2410-Q4_K_M.gguf", "llama", "mistral", None, 8, "q4_k_m", BALANCED, "i"),
    Row("Magistral-Small-2507-Q4_K_M.gguf", "llama", "mistral", None, NO_SIZE, "q4_k_m", POWERFUL, "", ALWAYS),
    Row("Codestral-22B-v0.1-Q4_K_M.gguf", "llama", "mistral", "0.1", 22, "q4_k_m", POWERFUL, "c"),
    Row("mixtral-8x7b-instruct-v0.1.Q4_K_M.gguf", "llama", "mistral", "0.1", NO_SIZE, "q4_k_m", BALANCED, "i"),
    # Granite, SmolLM, Solar
    Row("granite-3.3-8b-instruct-Q4_K_M.gguf", "granite", "granite", "3.3", 8, "q4_k_m", BALANCED, "i"),
    Row("granite-8b-code-instruct.Q4_K_M.gguf", "llama", "granite", None, 8, "q4_k_m", BALANCED, "ic"),
    Row("granite-embedding-125m-english-f16.gguf", "bert", "granite", None, 0.125, "f16", BALANCED, "e"),
    Row("SmolLM2-135M-Instruct.Q4_1.gguf", "llama", "smollm", "2", 0.135, "q4_1", FAST, "i"),
    Row("SmolLM3-3B-Q4_K_M.gguf", "smollm3", "smollm", "3", 3, "q4_k_m", FAST, "i", OPTIONAL, template=SWITCHED),
    Row("solar1.gguf", "llama", "solar", "1", NO_SIZE, "f32", BALANCED),
    Row("solar1-10.7b-instruct.Q4_K_M.gguf", "llama", "solar", "1", 10.7, "q4_k_m", BALANCED, "i"),
    Row("solar-10.7b-instruct-v1.0.Q4_K_M.gguf", "llama", "solar", "1.0", 10.7, "q4_k_m", BALANCED, "i"),
    # And others
    Row("Yi-1.5-9B-Chat-Q4_K_M.gguf", "llama", "yi", "1.5", 9, "q4_k_m", BALANCED, "i"),
    Row("GLM-Z1-9B-0414-Q4_K_M.gguf", "glm4", "glm", "z1", 9, "q4_k_m", POWERFUL, "", ALWAYS),
    Row(
        "Kimi-K2-Instruct-0905-UD-TQ1_0.gguf", "deepseek2", "kimi", "k2", NO_SIZE, "tq1_0", BALANCED, "i",
        header=(("general.name", "Kimi K2 Instruct 0905"),),
    ),
    Row("command-r7b-12-2024-Q4_K_M.gguf", "cohere2", "command-r", None, 7, "q4_k_m", BALANCED),
    Row("Falcon-H1-1.5B-Instruct-Q4_K_M.gguf", "falcon-h1", "falcon", "h1", 1.5, "q4_k_m", FAST, "i"),
    Row("OLMoE-1B-7B-0924-Instruct-Q4_K_M.gguf", "olmoe", "olmo", None, 7, "q4_k_m", BALANCED, "i", active=1),
    Row("Olmo-3-7B-Think-Q4_K_M.gguf", "olmo2", "olmo", "3", 7, "q4_k_m", POWERFUL, "", ALWAYS),
    Row("EXAONE-Deep-7.8B-Q4_K_M.gguf", "exaone", "exaone", None, 7.8, "q4_k_m", POWERFUL, "", ALWAYS),
    Row("LFM2-8B-A1B-Q4_K_M.gguf", "lfm2moe", "lfm", "2", 8, "q4_k_m", BALANCED, active=1),
    Row("ERNIE-4.5-21B-A3B-PT-Q4_K_M.gguf", "ernie4_5-moe", "ernie", "4.5", 21, "q4_k_m", POWERFUL, active=3),
    Row("starcoder2-7b-Q4_K_M.gguf", "starcoder2", "starcoder", "2", 7, "q4_k_m", BALANCED, "c"),
    Row("nomic-embed-text-v1.5.Q8_0.gguf", "nomic-bert", "nomic", "1.5", NO_SIZE, "q8_0", BALANCED, "e"),
    Row("bge-m3-q8_0.gguf", "bert", "bge", None, NO_SIZE, "q8_0", BALANCED, "e"),
    Row("OpenThinker2-7B-Q4_K_M.gguf", "qwen2", "qwen", None, 7, "q4_k_m", POWERFUL, "", ALWAYS),
    Row("Llama-3.1-8B-Instruct-no-think-Q4_K_M.gguf", "llama", "llama", "3.1", 8, "q4_k_m", BALANCED, "i"),
    Row("bitnet-b1.58-2B-4T-i2_s.gguf", "bitnet", "bitnet", None, 2, "i2_s", FAST),
    # Names that say nothing: the folders above do, or the header
    Row("Qwen2.5-7B-Instruct-GGUF/model-q4_k_m.gguf", "qwen2", "qwen", "2.5", 7, "q4_k_m", BALANCED, "i"),
    Row("unsloth/gemma-3-4b-it-GGUF/ggml-model-Q8_0.gguf", "gemma3", "gemma", "3", 4, "q8_0", BALANCED, "i"),
    Row("Llama-3.2-3B-GGUF/Q4_K_M/model.gguf", "llama", "llama", "3.2", 3, "q4_k_m", FAST),
    Row("Qwen3-8B-GGUF/llama-2-7b.Q4_0.gguf", "llama", "llama", "2", 7, "q4_0", BALANCED),
    Row(
        "m.gguf", "llama", "mistral", "0.3", 7, "f32", BALANCED, "i",
        header=(("general.name", "Mistral 7B Instruct v0.3"), ("general.size_label", "7B")),
    ),
    Row(
        "tuned-Q4_K_M.gguf", "llama", "smollm", "2", 1.7, "q4_k_m", FAST, "i",
        header=(
            ("general.basename", "SmolLM2"), ("general.finetune", "Instruct"),
            ("general.size_label", "1.7B"), ("general.name", "SmolLM2 1.7B Instruct"),
        ),
    ),
    Row("renamed-70b.gguf", "llama", "llama", None, 1.2, "f32", BALANCED, header=(("general.size_label", "1.2B"),)),
]  # fmt: skip


# What llama-quantize writes into the header of what publishers call otherwise.
FILE_TYPES = {name: number for number, name in ggml.FILE_TYPES.items()} | {"q4_k_xl": 15, "q2_k_xl": 10}
REMOVED_TENSOR_TYPE = 36


def content_of(row: Row) -> bytes:
    file_type = FILE_TYPES.get(row.quantization)
    if file_type is None:  # a fork's own
        return model_bytes(row.architecture, template=row.template, kind=REMOVED_TENSOR_TYPE)
    numbers = {"general.file_type": file_type}
    return model_bytes(row.architecture, template=row.template, texts=dict(row.header), numbers=numbers)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFacts]:
    """All rows' models, by row; each in a folder of its own, scanned at once."""
    top = tmp_path_factory.mktemp("names") / "m"
    folders = {}
    for number, row in enumerate(ROWS):
        path = write_file(top / f"{number:03d}" / row.file, content_of(row))
        folders[str(path)] = row.file
    result = Scanner([top]).scan()
    assert not result.problems
    return {folders[facts.file_path]: facts for facts in result.models}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.file)
def test_a_real_name_tells_what_people_read_in_it(found: dict[str, ModelFacts], row: Row):
    facts = found[row.file]
    assert facts.status is ModelStatus.OK
    flags = "".join(
        letter
        for letter, is_so in zip("ice", (facts.is_instruct, facts.is_coder, facts.is_embedding), strict=True)
        if is_so
    )
    assert (facts.family, facts.version, round(facts.size_params, 2 if row.size else 1), facts.quantization) == (
        row.family,
        row.version,
        round(row.size, 2),
        row.quantization,
    )
    assert (facts.thinking_mode, facts.assigned_tier, flags) == (row.thinking, row.tier, row.flags)
    assert facts.active_params == row.active
