"""The facts of a GGUF header as the reference reader, `gguf.GGUFReader`, gives them: a second way to the same answer.

Written from the meaning of each fact, not from our reader. What a chat template means is a judgement of ours that the
reference has no counterpart of; there the two are compared by the template's text, judged by the same function.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    merges = reader.fields.get("tokenizer.ggml.merges")
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
        feed_forward_length=listed(of + "feed_forward_length"),
        expert_feed_forward_length=value(of + "expert_feed_forward_length"),
        leading_dense_block_count=value(of + "leading_dense_block_count"),
        nextn_predict_layers=value(of + "nextn_predict_layers"),
        key_length_swa=value(of + "attention.key_length_swa"),
        value_length_swa=value(of + "attention.value_length_swa"),
        shared_kv_layers=value(of + "attention.shared_kv_layers"),
        recurrent_layers=listed(of + "attention.recurrent_layers"),
        indexer_key_length=value(of + "attention.indexer.key_length"),
        wkv_head_size=value(of + "wkv.head_size"),
        token_shift_count=value(of + "token_shift_count"),
        shortconv_cache=value(of + "shortconv.l_cache"),
        kda_head_dim=value(of + "kda.head_dim"),
        merges_count=len(merges.data) if merges is not None else None,
        vision_image_size=value("clip.vision.image_size"),
        vision_patch_size=value("clip.vision.patch_size"),
        vision_embedding_length=value("clip.vision.embedding_length"),
        vision_feed_forward_length=value("clip.vision.feed_forward_length"),
        **_tensor_facts(reader.tensors),
    )


def _tensor_facts(tensors: Sequence[gguf.ReaderTensor]) -> dict[str, Any]:
    """The bytes of tensors by what part of a model they are."""

    def is_input(tensor: gguf.ReaderTensor) -> bool:
        return re.match(r"(per_layer_)?token_(embd|types)\.|position_embd\.", tensor.name) is not None

    def is_of_block(tensor: gguf.ReaderTensor) -> bool:
        return str(tensor.name).startswith("blk.")

    def is_expert(tensor: gguf.ReaderTensor) -> bool:
        return is_of_block(tensor) and "_exps" in str(tensor.name)

    matrices: dict[int, int] = {}
    for tensor in tensors:
        if not is_input(tensor) and len(tensor.shape) > 1 and tensor.shape[1] % 8 == 0:
            matrices[int(tensor.tensor_type)] = matrices.get(int(tensor.tensor_type), 0) + int(tensor.n_bytes)
    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    return {
        "input_bytes": sum(int(tensor.n_bytes) for tensor in tensors if is_input(tensor)),
        "block_bytes": sum(int(tensor.n_bytes) for tensor in tensors if is_of_block(tensor) and not is_expert(tensor)),
        "expert_bytes": sum(int(tensor.n_bytes) for tensor in tensors if is_expert(tensor)),
        "rest_bytes": sum(
            int(tensor.n_bytes) for tensor in tensors if not is_input(tensor) and not is_of_block(tensor)
        ),
        "embedding_bytes": int(embedding.n_bytes) if embedding is not None else 0,
        "embedding_type": int(embedding.tensor_type) if embedding is not None else None,
        "has_output_matrix": any(tensor.name == "output.weight" for tensor in tensors),
        "matrices_by_type": tuple(number for entry in matrices.items() for number in entry),
    }
