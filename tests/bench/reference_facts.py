"""The facts of a GGUF header as the reference reader, `gguf.GGUFReader`, gives them: a second way to the same answer.

Written from the meaning of each fact, not from our reader. What a chat template means is a judgement of ours that the
reference has no counterpart of; there the two are compared by the template's text, judged by the same function.
"""

from __future__ import annotations

from typing import Any

import gguf

from magi_agent.gguf.chat_template import mentions_tools, thinking_mode
from magi_agent.gguf.facts import HeaderFacts
from magi_agent.vocabulary import ThinkingMode

NOT_COMPARED = frozenset({"fingerprint"})
"""Fields of HeaderFacts that the reference reader knows nothing of."""


def reference_facts(reader: gguf.GGUFReader) -> HeaderFacts:
    """Return the facts of the file that `reader` has open; the fingerprint is empty."""

    def value(key: str) -> Any:
        field = reader.fields.get(key)
        return None if field is None else field.contents()

    def listed(key: str) -> tuple[int, ...]:
        content = value(key)
        if content is None:
            return ()
        return tuple(int(entry) for entry in content) if isinstance(content, list) else (int(content),)

    architecture = value("general.architecture")
    template = value("tokenizer.chat_template")
    file_type = value("general.file_type")
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    of = f"{architecture}."
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    expert_parameters = sum(int(tensor.n_elements) for tensor in reader.tensors if "_exps" in tensor.name)
    experts, used = value(of + "expert_count"), value(of + "expert_used_count")
    idle = expert_parameters * (experts - used) // experts if experts and used else 0
    return HeaderFacts(
        architecture=architecture,
        general_type=value("general.type"),
        name=value("general.name"),
        basename=value("general.basename"),
        finetune=value("general.finetune"),
        version=value("general.version"),
        size_label=value("general.size_label"),
        tags=tuple(value("general.tags") or ()),
        quantization=None if file_type is None else gguf.LlamaFileType(file_type).name.partition("_")[2].lower(),
        parameter_count=parameters,
        active_parameter_count=parameters - idle if expert_parameters and experts and used else None,
        required_size=max((int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors), default=0),
        context_length=value(of + "context_length"),
        embedding_length=value(of + "embedding_length"),
        block_count=value(of + "block_count"),
        head_count=listed(of + "attention.head_count"),
        head_count_kv=listed(of + "attention.head_count_kv"),
        key_length=value(of + "attention.key_length"),
        value_length=value(of + "attention.value_length"),
        key_length_mla=value(of + "attention.key_length_mla"),
        value_length_mla=value(of + "attention.value_length_mla"),
        kv_lora_rank=value(of + "attention.kv_lora_rank"),
        sliding_window=value(of + "attention.sliding_window"),
        sliding_window_pattern=listed(of + "attention.sliding_window_pattern"),
        ssm_conv_kernel=value(of + "ssm.conv_kernel"),
        ssm_state_size=value(of + "ssm.state_size"),
        ssm_inner_size=value(of + "ssm.inner_size"),
        ssm_group_count=value(of + "ssm.group_count"),
        full_attention_interval=value(of + "full_attention_interval"),
        expert_count=experts,
        expert_used_count=used,
        vocabulary_size=len(tokens.data) if tokens is not None else value(of + "vocab_size"),
        pooling_type=value(of + "pooling_type"),
        causal_attention=value(of + "attention.causal"),
        has_chat_template=template is not None,
        thinking_mode=thinking_mode(template) if template else ThinkingMode.NONE,
        template_has_tools=mentions_tools(template or ""),
        has_vision_encoder=bool(value("clip.has_vision_encoder")),
        has_audio_encoder=bool(value("clip.has_audio_encoder")),
        projector_type=value("clip.projector_type"),
        split_no=value("split.no"),
        split_count=value("split.count"),
        split_tensors_count=value("split.tensors.count"),
        tensor_count=len(reader.tensors),
        fingerprint="",
        expert_parameter_count=expert_parameters,
    )
