"""The facts a GGUF header states, as one flat value."""

from dataclasses import dataclass

from magi_agent.vocabulary import ThinkingMode


@dataclass(frozen=True, slots=True)
class HeaderFacts:
    """What one GGUF file says of itself; ``None`` where its header is silent.

    Key names in the comments are GGUF's own (``{arch}`` stands for the architecture).
    """

    architecture: str | None  # general.architecture
    general_type: str | None  # general.type: model, adapter, mmproj, imatrix, ...
    name: str | None  # general.name
    basename: str | None  # general.basename
    finetune: str | None  # general.finetune
    version: str | None  # general.version
    size_label: str | None  # general.size_label
    tags: tuple[str, ...]  # general.tags, at most 64 of them
    quantization: str | None  # lower case, "q4_k_m": general.file_type, else the commonest type by bytes
    parameter_count: int  # exact: the sum of the elements of this file's tensors
    active_parameter_count: int | None  # of a mixture of experts: what one token uses
    required_size: int  # bytes the file must have for all of its tensors to be inside it
    context_length: int | None  # {arch}.context_length
    embedding_length: int | None  # {arch}.embedding_length
    block_count: int | None  # {arch}.block_count
    head_count: tuple[int, ...]  # {arch}.attention.head_count: one value, or one a layer
    head_count_kv: tuple[int, ...]  # {arch}.attention.head_count_kv, likewise; empty if silent
    key_length: int | None  # {arch}.attention.key_length
    value_length: int | None  # {arch}.attention.value_length
    key_length_mla: int | None  # {arch}.attention.key_length_mla
    value_length_mla: int | None  # {arch}.attention.value_length_mla
    kv_lora_rank: int | None  # {arch}.attention.kv_lora_rank
    sliding_window: int | None  # {arch}.attention.sliding_window
    sliding_window_pattern: tuple[int, ...]  # {arch}.attention.sliding_window_pattern: a period, or one flag a layer
    ssm_conv_kernel: int | None  # {arch}.ssm.conv_kernel
    ssm_state_size: int | None  # {arch}.ssm.state_size
    ssm_inner_size: int | None  # {arch}.ssm.inner_size
    ssm_group_count: int | None  # {arch}.ssm.group_count
    full_attention_interval: int | None  # {arch}.full_attention_interval
    expert_count: int | None  # {arch}.expert_count
    expert_used_count: int | None  # {arch}.expert_used_count
    vocabulary_size: int | None  # length of tokenizer.ggml.tokens, else {arch}.vocab_size
    pooling_type: int | None  # {arch}.pooling_type: set by embedding and reranking models
    causal_attention: bool | None  # {arch}.attention.causal
    has_chat_template: bool  # tokenizer.chat_template
    thinking_mode: ThinkingMode  # by the markers in the chat template
    template_has_tools: bool  # the chat template mentions tools
    has_vision_encoder: bool  # clip.has_vision_encoder
    has_audio_encoder: bool  # clip.has_audio_encoder
    projector_type: str | None  # clip.projector_type
    split_no: int | None  # split.no, from 0
    split_count: int | None  # split.count
    split_tensors_count: int | None  # split.tensors.count
    tensor_count: int  # tensors in this file
    fingerprint: str  # hex; equal for equal headers, whatever the file is called
    expert_parameter_count: int = 0  # elements of this file's expert tensors, to sum over a split set
    has_classifier: bool = False  # this file has the tensors of a classification head
    classifier_labels: int | None = None  # length of {arch}.classifier.output_labels
