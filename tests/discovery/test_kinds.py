"""What a header alone tells: models, projectors and what is neither; chat models, embedding models and rerankers."""

from __future__ import annotations

from pathlib import Path

import pytest

from magi_agent.discovery.kinds import Kind, is_embedding, is_reranker, kind_of
from magi_agent.gguf.facts import HeaderFacts
from magi_agent.gguf.reading import read_facts
from tests.gguf.builder import STRING, array_entry, gguf, number_entry, string, tensor, text_entry

MEAN, RANK, CLASSES_OF_TOKENS = 1, 4, 5


def header(
    path: Path,
    architecture: str,
    *,
    general_type: str | None = None,
    pooling: int | None = None,
    labels: int | None = None,
    tensors: tuple[str, ...] = ("token_embd.weight",),
) -> HeaderFacts:
    """What a header with these entries says."""
    entries = [text_entry("general.architecture", architecture)]
    if general_type is not None:
        entries.append(text_entry("general.type", general_type))
    if pooling is not None:
        entries.append(number_entry(f"{architecture}.pooling_type", pooling))
    if labels is not None:
        content = b"".join(string(f"label {number}") for number in range(labels))
        entries.append(array_entry(f"{architecture}.classifier.output_labels", STRING, labels, content))
    described = [tensor(name, (8,), offset=32 * number) for number, name in enumerate(tensors)]
    path.write_bytes(gguf(entries, described, data=32 * len(tensors)))
    return read_facts(path)


@pytest.mark.parametrize(
    ("architecture", "general_type", "tensors", "kind"),
    [
        ("llama", "model", ("output.weight",), Kind.MODEL),
        ("llama", None, ("output.weight",), Kind.MODEL),
        ("clip", "mmproj", ("v.patch_embd.weight",), Kind.PROJECTOR),
        ("clip", None, ("v.patch_embd.weight",), Kind.PROJECTOR),
        ("llama", "adapter", ("blk.0.attn_q.weight.lora_a",), Kind.OTHER),
        ("controlvector", None, ("direction.1",), Kind.OTHER),
        ("llama", "imatrix", ("blk.0.attn_q.weight.in_sum2",), Kind.OTHER),
        ("llama", "model", (), Kind.OTHER),  # a vocabulary alone
    ],
)
def test_models_are_told_from_what_else_is_kept_in_such_files(tmp_path, architecture, general_type, tensors, kind):
    assert kind_of(header(tmp_path / "x", architecture, general_type=general_type, tensors=tensors)) is kind


@pytest.mark.parametrize(
    ("architecture", "pooling", "labels", "head", "embeds", "ranks"),
    [
        ("qwen3", None, None, False, False, False),
        ("qwen3", 0, None, False, False, False),
        ("qwen3", MEAN, None, False, True, False),
        ("qwen3", RANK, 2, True, True, True),
        ("qwen3", RANK, None, False, True, True),
        ("bert", MEAN, None, False, True, False),
        ("bert", None, None, False, True, False),
        ("bert", None, None, True, True, True),  # a head of one score has no labels worth writing down
        ("bert", None, 1, True, True, True),
        ("bert", None, 5, True, True, False),  # it sorts texts into five classes
        ("bert", CLASSES_OF_TOKENS, 217, True, True, False),
        ("bert", MEAN, 1, True, True, False),
    ],
)
def test_rerankers_are_told_from_embedding_models(tmp_path, architecture, pooling, labels, head, embeds, ranks):
    tensors = ("token_embd.weight", "cls.output.weight") if head else ("token_embd.weight",)
    facts = header(tmp_path / "x", architecture, pooling=pooling, labels=labels, tensors=tensors)
    assert (is_embedding(facts), is_reranker(facts)) == (embeds, ranks)
