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
    # What the memory depends on that the model needs.
    feed_forward_length: tuple[int, ...] = ()  # {arch}.feed_forward_length: one value, or one a layer
    expert_feed_forward_length: int | None = None  # {arch}.expert_feed_forward_length
    leading_dense_block_count: int | None = None  # {arch}.leading_dense_block_count
    nextn_predict_layers: int | None = None  # {arch}.nextn_predict_layers: blocks at the end, not of the model proper
    key_length_swa: int | None = None  # {arch}.attention.key_length_swa: in layers with a sliding window
    value_length_swa: int | None = None  # {arch}.attention.value_length_swa
    shared_kv_layers: int | None = (
        None  # {arch}.attention.shared_kv_layers: layers at the end without a cache of theirs
    )
    recurrent_layers: tuple[int, ...] = ()  # {arch}.attention.recurrent_layers: one flag a layer
    indexer_key_length: int | None = None  # {arch}.attention.indexer.key_length
    wkv_head_size: int | None = None  # {arch}.wkv.head_size
    token_shift_count: int | None = None  # {arch}.token_shift_count
    shortconv_cache: int | None = None  # {arch}.shortconv.l_cache
    kda_head_dim: int | None = None  # {arch}.kda.head_dim
    merges_count: int | None = None  # length of tokenizer.ggml.merges
    vision_image_size: int | None = None  # clip.vision.image_size, pixels a side
    vision_patch_size: int | None = None  # clip.vision.patch_size, pixels a side
    vision_embedding_length: int | None = None  # clip.vision.embedding_length
    vision_feed_forward_length: int | None = None  # clip.vision.feed_forward_length
    input_bytes: int = 0  # of the tensors that look tokens up
    block_bytes: int = 0  # of the blocks' tensors, without experts
    expert_bytes: int = 0  # of the blocks' experts
    rest_bytes: int = 0  # of all other tensors: output matrix, output norm
    embedding_bytes: int = 0  # of token_embd.weight
    embedding_type: int | None = None  # its ggml_type
    has_output_matrix: bool = False  # output.weight is there: token_embd.weight does not serve as one
    matrices_by_type: tuple[int, ...] = ()  # ggml_type, bytes, ggml_type, bytes, ...: what llama.cpp could repack
    # Not of the header: of the file's data, where all of it is there and somebody took it.
    sample: str | None = None  # hex; equal for equal files
