"""From a header to the facts that the agent uses."""

import os
from collections.abc import Mapping

from magi_agent.gguf.chat_template import mentions_tools, thinking_mode
from magi_agent.gguf.facts import HeaderFacts
from magi_agent.gguf.ggml import TENSOR_TYPES, quantization_of
from magi_agent.gguf.header import GgufArray, GgufHeader, GgufText, GgufValue, ValueType, read_header
from magi_agent.vocabulary import ThinkingMode

_MAX_TEXT = 512  # characters of a name; what is longer is no name
_MAX_TAGS = 64
_MAX_INTEGER = 2**63 - 1


def read_facts(file: str | bytes | os.PathLike[str] | os.PathLike[bytes] | int) -> HeaderFacts:
    """Read a GGUF file's header, given by its path or an open descriptor, and return what it says.

    Raises what ``read_header`` raises.
    """
    return facts_of(read_header(file))


def facts_of(header: GgufHeader) -> HeaderFacts:
    """Return what a header says. A value of another type than its key asks for counts as not given."""
    entries = _Entries(header.metadata)
    architecture = entries.text("general.architecture")
    of = f"{architecture or ''}."
    template = _chat_template(header.metadata)
    experts = entries.integer(of + "expert_count")
    experts_used = entries.integer(of + "expert_used_count")
    groups = header.tensor_groups
    return HeaderFacts(
        architecture=architecture,
        general_type=entries.text("general.type"),
        name=entries.text("general.name"),
        basename=entries.text("general.basename"),
        finetune=entries.text("general.finetune"),
        version=entries.text("general.version"),
        size_label=entries.text("general.size_label"),
        tags=entries.texts("general.tags"),
        quantization=_quantization(header, entries.integer("general.file_type")),
        parameter_count=header.parameter_count,
        active_parameter_count=_active_parameters(header, experts, experts_used),
        required_size=header.required_size,
        context_length=entries.integer(of + "context_length"),
        embedding_length=entries.integer(of + "embedding_length"),
        block_count=entries.integer(of + "block_count"),
        head_count=entries.integers(of + "attention.head_count"),
        head_count_kv=entries.integers(of + "attention.head_count_kv"),
        key_length=entries.integer(of + "attention.key_length"),
        value_length=entries.integer(of + "attention.value_length"),
        key_length_mla=entries.integer(of + "attention.key_length_mla"),
        value_length_mla=entries.integer(of + "attention.value_length_mla"),
        kv_lora_rank=entries.integer(of + "attention.kv_lora_rank"),
        sliding_window=entries.integer(of + "attention.sliding_window"),
        sliding_window_pattern=entries.integers(of + "attention.sliding_window_pattern"),
        ssm_conv_kernel=entries.integer(of + "ssm.conv_kernel"),
        ssm_state_size=entries.integer(of + "ssm.state_size"),
        ssm_inner_size=entries.integer(of + "ssm.inner_size"),
        ssm_group_count=entries.integer(of + "ssm.group_count"),
        full_attention_interval=entries.integer(of + "full_attention_interval"),
        expert_count=experts,
        expert_used_count=experts_used,
        vocabulary_size=entries.length("tokenizer.ggml.tokens") or entries.integer(of + "vocab_size"),
        pooling_type=entries.integer(of + "pooling_type"),
        causal_attention=entries.flag(of + "attention.causal"),
        has_chat_template=template is not None,
        thinking_mode=thinking_mode(template) if template else ThinkingMode.NONE,
        template_has_tools=_offers_tools(header.metadata, template),
        has_vision_encoder=entries.flag("clip.has_vision_encoder") or False,
        has_audio_encoder=entries.flag("clip.has_audio_encoder") or False,
        projector_type=entries.text("clip.projector_type"),
        split_no=entries.integer("split.no"),
        split_count=entries.integer("split.count"),
        split_tensors_count=entries.integer("split.tensors.count"),
        tensor_count=header.tensor_count,
        fingerprint=header.fingerprint,
        expert_parameter_count=header.expert_parameter_count,
        has_classifier=header.has_classifier,
        classifier_labels=entries.length(of + "classifier.output_labels"),
        feed_forward_length=entries.integers(of + "feed_forward_length"),
        expert_feed_forward_length=entries.integer(of + "expert_feed_forward_length"),
        leading_dense_block_count=entries.integer(of + "leading_dense_block_count"),
        nextn_predict_layers=entries.integer(of + "nextn_predict_layers"),
        key_length_swa=entries.integer(of + "attention.key_length_swa"),
        value_length_swa=entries.integer(of + "attention.value_length_swa"),
        shared_kv_layers=entries.integer(of + "attention.shared_kv_layers"),
        recurrent_layers=entries.integers(of + "attention.recurrent_layers"),
        indexer_key_length=entries.integer(of + "attention.indexer.key_length"),
        wkv_head_size=entries.integer(of + "wkv.head_size"),
        token_shift_count=entries.integer(of + "token_shift_count"),
        shortconv_cache=entries.integer(of + "shortconv.l_cache"),
        kda_head_dim=entries.integer(of + "kda.head_dim"),
        merges_count=entries.length("tokenizer.ggml.merges"),
        vision_image_size=entries.integer("clip.vision.image_size"),
        vision_patch_size=entries.integer("clip.vision.patch_size"),
        vision_embedding_length=entries.integer("clip.vision.embedding_length"),
        vision_feed_forward_length=entries.integer("clip.vision.feed_forward_length"),
        input_bytes=groups.input,
        block_bytes=groups.blocks,
        expert_bytes=groups.experts,
        rest_bytes=groups.rest,
        embedding_bytes=groups.embedding,
        embedding_type=groups.embedding_type,
        has_output_matrix=groups.has_output,
        matrices_by_type=tuple(number for entry in groups.matrices_by_type.items() for number in entry),
    )


class _Entries:
    """Metadata as facts: of the type that is asked for, of sensible size, or nothing."""

    def __init__(self, metadata: Mapping[str, GgufValue]) -> None:
        self._metadata = metadata

    def text(self, key: str) -> str | None:
        return _clean(self._metadata.get(key))

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._metadata.get(key)
        if not isinstance(value, GgufArray) or value.values is None:
            return ()
        texts = (_clean(entry) for entry in value.values[:_MAX_TAGS])
        return tuple(text for text in texts if text is not None)

    def integer(self, key: str) -> int | None:
        return _integer(self._metadata.get(key))

    def integers(self, key: str) -> tuple[int, ...]:
        """One value, or one a layer; flags are 0 and 1."""
        value = self._metadata.get(key)
        if not isinstance(value, GgufArray):
            single = _integer(value)
            return () if single is None else (single,)
        numbers = [_integer(int(entry) if isinstance(entry, bool) else entry) for entry in value.values or ()]
        # Layers are told by their position: with one value unusable, the others would say the wrong thing.
        return () if None in numbers else tuple(number for number in numbers if number is not None)

    def flag(self, key: str) -> bool | None:
        value = self._metadata.get(key)
        return value if isinstance(value, bool) else None

    def length(self, key: str) -> int | None:
        """Return the length of an array of strings."""
        value = self._metadata.get(key)
        return value.length if isinstance(value, GgufArray) and value.element_type is ValueType.STRING else None


def _clean(value: object) -> str | None:
    """Return a text as it may stand in a list or on a terminal: one line, printable, not too long."""
    if not isinstance(value, str):
        return None
    text = "".join(character if character.isprintable() else " " for character in value[:_MAX_TEXT]).strip()
    return text or None


def _integer(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= _MAX_INTEGER else None


def _chat_template(metadata: Mapping[str, GgufValue]) -> str | None:
    """Return the chat template; an empty text where there is one too long to be kept."""
    value = metadata.get("tokenizer.chat_template")
    if isinstance(value, GgufText):
        return ""
    return value if isinstance(value, str) and value.strip() else None


def _offers_tools(metadata: Mapping[str, GgufValue], template: str | None) -> bool:
    # Some models bring a template of their own for requests with tools, beside the usual one.
    return "tokenizer.chat_template.tool_use" in metadata or (template is not None and mentions_tools(template))


def _quantization(header: GgufHeader, file_type: int | None) -> str | None:
    name = None if file_type is None else quantization_of(file_type)
    if name is not None:
        return name
    known = {number: size for number, size in header.bytes_by_type.items() if number in TENSOR_TYPES and size}
    return TENSOR_TYPES[max(known, key=lambda number: known[number])].name if known else None


def _active_parameters(header: GgufHeader, experts: int | None, used: int | None) -> int | None:
    if not experts or not used or used > experts or not header.expert_parameter_count:
        return None
    return header.parameter_count - header.expert_parameter_count * (experts - used) // experts
