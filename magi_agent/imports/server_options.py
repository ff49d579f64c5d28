"""llama-server's options by every name that people write, and what an import makes of each.

Those that are settings come from the table by which settings are passed on; here are their short forms, older names
and environment variables, and what becomes of all other options. The names are those of llama-server's ``--help`` and
of its earlier builds. An option that is in no table is a value or a switch, as the text shows, and may become an extra
flag.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

from magi_agent.runtime_settings.passing import LOAD_MODE, LORA, MODES, PASSINGS, RESERVED, Form


@dataclass(frozen=True, slots=True)
class Option:
    """One option of llama-server."""

    names: tuple[str, ...]
    """Its names with their dashes; the first long one is what an extra flag is called."""
    variables: tuple[str, ...] = ()
    """The environment variables that say the same."""
    negations: tuple[str, ...] = ()
    """The names that say no."""
    setting: str | None = None
    """The runtime setting it stands for."""
    meaning: str | None = None
    """The value of the setting that a switch stands for; a switch that is no more than yes or no has none."""
    switch: bool = False
    """Whether it takes no value."""
    any_text: bool = False
    """Whether its value may look like an option."""
    second_number: bool = False
    """Whether earlier builds took a number in a word of its own behind its value."""
    repeats: bool = False
    """Whether giving it again adds to what was given before, instead of replacing it."""
    refused: str | None = None
    """Why it is never carried over."""
    needless: str | None = None
    """Why nothing needs to be done for it."""
    secret: bool = False
    """Whether nobody may see its value."""

    @property
    def name(self) -> str:
        """Its name for an extra flag."""
        return next((name for name in self.names if name.startswith("--")), self.names[0])


@dataclass(frozen=True, slots=True)
class Named:
    """An option, and whether the name it was found by says no."""

    option: Option
    negated: bool = False


_OTHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "n_gpu_layers": ("-ngl", "LLAMA_ARG_N_GPU_LAYERS"),
        "ctx_size": ("-c", "LLAMA_ARG_CTX_SIZE"),
        "n_threads": ("-t", "LLAMA_ARG_THREADS"),
        "n_threads_batch": ("-tb", "LLAMA_ARG_THREADS_BATCH"),
        "batch_size": ("-b", "LLAMA_ARG_BATCH"),
        "ubatch_size": ("-ub", "LLAMA_ARG_UBATCH"),
        "parallel_slots": ("-np", "LLAMA_ARG_N_PARALLEL"),
        "flash_attention": ("-fa", "LLAMA_ARG_FLASH_ATTN"),
        "cache_type_k": ("-ctk", "LLAMA_ARG_CACHE_TYPE_K"),
        "cache_type_v": ("-ctv", "LLAMA_ARG_CACHE_TYPE_V"),
        "mmap": ("LLAMA_ARG_MMAP",),
        "mlock": ("LLAMA_ARG_MLOCK",),
        "split_mode": ("-sm", "LLAMA_ARG_SPLIT_MODE"),
        "tensor_split": ("-ts", "LLAMA_ARG_TENSOR_SPLIT"),
        "main_gpu": ("-mg", "LLAMA_ARG_MAIN_GPU"),
        "n_cpu_moe": ("-ncmoe", "LLAMA_ARG_N_CPU_MOE"),
        "draft_model": ("-md", "LLAMA_ARG_SPEC_DRAFT_MODEL", "LLAMA_ARG_MODEL_DRAFT"),
        "draft_n_gpu_layers": ("-ngld", "LLAMA_ARG_N_GPU_LAYERS_DRAFT"),
        "draft_max": ("--draft", "--draft-n", "LLAMA_ARG_SPEC_DRAFT_N_MAX", "LLAMA_ARG_DRAFT_MAX"),
        "draft_min": ("--draft-n-min", "LLAMA_ARG_SPEC_DRAFT_N_MIN", "LLAMA_ARG_DRAFT_MIN"),
        "rope_scaling": ("LLAMA_ARG_ROPE_SCALING_TYPE",),
        "rope_scale": ("LLAMA_ARG_ROPE_SCALE",),
        "rope_freq_base": ("LLAMA_ARG_ROPE_FREQ_BASE",),
        "rope_freq_scale": ("LLAMA_ARG_ROPE_FREQ_SCALE",),
        "yarn_orig_ctx": ("LLAMA_ARG_YARN_ORIG_CTX",),
        "pooling": ("LLAMA_ARG_POOLING",),
        "chat_template": ("LLAMA_ARG_CHAT_TEMPLATE",),
        "chat_template_file": ("LLAMA_ARG_CHAT_TEMPLATE_FILE",),
        "reasoning": ("-rea", "LLAMA_ARG_REASONING"),
        "reasoning_format": ("LLAMA_ARG_THINK",),
        "reasoning_budget": ("LLAMA_ARG_THINK_BUDGET",),
        "numa": ("LLAMA_ARG_NUMA",),
        "embedding": ("LLAMA_ARG_EMBEDDINGS",),
        "rerank": ("LLAMA_ARG_RERANKING",),
    }
)
"""Short forms, earlier names and variables of the options that are settings."""

MODEL: Final = Option(("--model", "-m"), ("LLAMA_ARG_MODEL",))
HF_REPO: Final = Option(("--hf-repo", "-hf", "-hfr"), ("LLAMA_ARG_HF_REPO",))
HF_FILE: Final = Option(("--hf-file", "-hff"), ("LLAMA_ARG_HF_FILE",))
ALIAS: Final = Option(("--alias", "-a"), ("LLAMA_ARG_ALIAS",), repeats=True)
LORA_PLAIN: Final = Option(("--lora",), repeats=True)
LORA_SCALED: Final = Option(LORA, second_number=True, repeats=True)
PROJECTOR: Final = Option(("--mmproj", "-mm"), ("LLAMA_ARG_MMPROJ",), setting="projector")
PROJECTOR_AUTO: Final = Option(
    ("--mmproj-auto",),
    ("LLAMA_ARG_MMPROJ_AUTO",),
    ("--no-mmproj", "--no-mmproj-auto"),
    switch=True,
    needless="the projector found with the model is used",
)
LOADING: Final = Option((LOAD_MODE, "-lm"), ("LLAMA_ARG_LOAD_MODE",))
ALL_EXPERTS: Final = Option(("--cpu-moe", "-cmoe"), ("LLAMA_ARG_CPU_MOE",), switch=True)
HOST: Final = Option(("--host",), ("LLAMA_ARG_HOST",))

_DEFAULT: Final = "it is what llama-server does anyway"
_KEY: Final = "keys are no model's setting; the agent is where callers are asked for one"
_BROWSER: Final = "the agent is what browsers speak with: see api.cors_origins in agent.toml"
_DOWNLOAD: Final = "servers download nothing: put the file into the model folders first"
_LOG: Final = "what a server writes goes to the journal: see magictl logs"
_FILES: Final = "no server may be told to write files, or to hand out those of the host"
_TOOLS: Final = "no server runs tools"
_ROUTER: Final = "the agent is the router"
_ASKING: Final = "it asks llama-server something, and starts no server"
_TRANSPORT: Final = "only the agent speaks with the servers, on this host: encrypt in a reverse proxy before the agent"
_VECTORS: Final = "control vectors are no setting"
_GRAMMAR: Final = "requests bring their grammar along: no server reads one from a file"

_MODELS_BY_FLAG: Final = (
    *("--embd-gemma-default", "--fim-qwen-1.5b-default", "--fim-qwen-3b-default", "--fim-qwen-7b-default"),
    *("--fim-qwen-7b-spec", "--fim-qwen-14b-spec", "--fim-qwen-30b-default", "--gpt-oss-20b-default"),
    *("--gpt-oss-120b-default", "--vision-gemma-4b-default", "--vision-gemma-12b-default"),
)

_SPECIAL: Final = (
    MODEL,
    HF_REPO,
    HF_FILE,
    ALIAS,
    LORA_PLAIN,
    LORA_SCALED,
    PROJECTOR,
    PROJECTOR_AUTO,
    LOADING,
    ALL_EXPERTS,
    HOST,
    Option(
        ("--port",),
        ("LLAMA_ARG_PORT",),
        needless="the agent gives each model a port of servers.port_range",
    ),
    Option(
        ("--metrics",),
        ("LLAMA_ARG_ENDPOINT_METRICS",),
        switch=True,
        needless="the agent starts every server with it",
    ),
    Option(("--jinja",), ("LLAMA_ARG_JINJA",), ("--no-jinja",), switch=True, needless=_DEFAULT),
    Option(
        ("--cont-batching", "-cb"),
        ("LLAMA_ARG_CONT_BATCHING",),
        ("--no-cont-batching", "-nocb"),
        switch=True,
        needless=_DEFAULT,
    ),
    Option(("--cache-prompt",), ("LLAMA_ARG_CACHE_PROMPT",), ("--no-cache-prompt",), switch=True, needless=_DEFAULT),
    Option(("--slots",), ("LLAMA_ARG_ENDPOINT_SLOTS",), ("--no-slots",), switch=True, needless=_DEFAULT),
    Option(("--warmup",), (), ("--no-warmup",), switch=True, needless=_DEFAULT),
    Option(
        ("--kv-offload", "-kvo"),
        ("LLAMA_ARG_KV_OFFLOAD",),
        ("--no-kv-offload", "-nkvo"),
        switch=True,
        needless=_DEFAULT,
    ),
    Option(("--reuse-port",), ("LLAMA_ARG_REUSE_PORT",), switch=True, refused="each server has a port of its own"),
    Option(("--api-key",), ("LLAMA_API_KEY", "LLAMA_ARG_API_KEY"), refused=_KEY, secret=True),
    Option(("--api-key-file",), ("LLAMA_ARG_API_KEY_FILE",), refused=_KEY),
    Option(("--hf-token", "-hft"), ("HF_TOKEN",), refused=_DOWNLOAD, secret=True),
    Option(("--ssl-key-file",), ("LLAMA_ARG_SSL_KEY_FILE",), refused=_TRANSPORT),
    Option(("--ssl-cert-file",), ("LLAMA_ARG_SSL_CERT_FILE",), refused=_TRANSPORT),
    Option(("--api-prefix",), ("LLAMA_ARG_API_PREFIX",), refused="a path prefix is a reverse proxy's: see there"),
    Option(("--model-url", "-mu"), ("LLAMA_ARG_MODEL_URL",), refused=_DOWNLOAD),
    Option(("--docker-repo", "-dr"), ("LLAMA_ARG_DOCKER_REPO",), refused=_DOWNLOAD),
    Option(("--mmproj-url", "-mmu"), ("LLAMA_ARG_MMPROJ_URL",), refused=_DOWNLOAD),
    Option(
        ("--spec-draft-hf", "-hfd", "-hfrd", "--hf-repo-draft"),
        ("LLAMA_ARG_SPEC_DRAFT_HF_REPO",),
        refused=f"{_DOWNLOAD}, and name it in draft_model",
    ),
    Option(("--hf-repo-v", "-hfv", "-hfrv"), ("LLAMA_ARG_HF_REPO_V",), refused=_DOWNLOAD),
    Option(("--hf-file-v", "-hffv"), ("LLAMA_ARG_HF_FILE_V",), refused=_DOWNLOAD),
    Option(("--model-vocoder", "-mv"), refused="vocoders are no setting"),
    Option(("--rpc",), ("LLAMA_ARG_RPC",), refused="servers compute on this host only; other hosts have no say in it"),
    Option(("--log-file",), ("LLAMA_ARG_LOG_FILE",), refused=_LOG),
    Option(("--log-disable",), switch=True, refused=_LOG),
    Option(("--log-prompts-dir",), refused=_FILES),
    Option(("--path",), ("LLAMA_ARG_STATIC_PATH",), refused=_FILES),
    Option(("--media-path",), refused=_FILES),
    Option(("--slot-save-path",), refused=_FILES),
    Option(("--lookup-cache-static", "-lcs"), refused=_FILES),
    Option(("--lookup-cache-dynamic", "-lcd"), refused=_FILES),
    Option(("--ui-config-file", "--webui-config-file"), ("LLAMA_ARG_UI_CONFIG_FILE",), refused=_FILES),
    Option(("--tools",), ("LLAMA_ARG_TOOLS",), refused=_TOOLS),
    Option(("--tools-runtime",), ("LLAMA_ARG_TOOLS_RUNTIME",), refused=_TOOLS),
    Option(("--mcp-servers-config",), ("LLAMA_ARG_MCP_SERVERS_CONFIG",), refused=_TOOLS),
    Option(("--mcp-servers-json",), ("LLAMA_ARG_MCP_SERVERS_JSON",), refused=_TOOLS, any_text=True),
    Option(("--agent", "-ag"), ("LLAMA_ARG_AGENT",), ("--no-agent", "-no-ag"), switch=True, refused=_TOOLS),
    Option(
        ("--ui-mcp-proxy", "--webui-mcp-proxy"),
        ("LLAMA_ARG_UI_MCP_PROXY",),
        ("--no-ui-mcp-proxy", "--no-webui-mcp-proxy"),
        switch=True,
        refused=_TOOLS,
    ),
    Option(("--props",), ("LLAMA_ARG_ENDPOINT_PROPS",), switch=True, refused="settings are changed by the agent"),
    Option(("--models-dir",), ("LLAMA_ARG_MODELS_DIR",), refused=f"{_ROUTER}: see discovery.model_scan_path"),
    Option(
        ("--models-preset",),
        ("LLAMA_ARG_MODELS_PRESET",),
        refused=f"{_ROUTER}: import that file by itself",
    ),
    Option(("--models-max",), ("LLAMA_ARG_MODELS_MAX",), refused=_ROUTER),
    Option(
        ("--models-autoload",),
        ("LLAMA_ARG_MODELS_AUTOLOAD",),
        ("--no-models-autoload",),
        switch=True,
        refused=f"{_ROUTER}: see the setting start_policy",
    ),
    Option(
        ("--sleep-idle-seconds",),
        refused="the agent stops idle servers itself: see the settings start_policy and idle_timeout_seconds",
    ),
    Option(("--cors-origins",), ("LLAMA_ARG_CORS_ORIGINS",), refused=_BROWSER),
    Option(("--cors-methods",), ("LLAMA_ARG_CORS_METHODS",), refused=_BROWSER),
    Option(("--cors-headers",), ("LLAMA_ARG_CORS_HEADERS",), refused=_BROWSER),
    Option(
        ("--cors-credentials",),
        ("LLAMA_ARG_CORS_CREDENTIALS",),
        ("--no-cors-credentials",),
        switch=True,
        refused=_BROWSER,
    ),
    Option(("--control-vector",), refused=_VECTORS, repeats=True),
    Option(("--control-vector-scaled",), refused=_VECTORS, second_number=True, repeats=True),
    Option(("--control-vector-layer-range",), refused=_VECTORS, second_number=True),
    Option(("--grammar-file",), refused=_GRAMMAR),
    Option(("--json-schema-file", "-jf"), refused=_GRAMMAR),
    *(Option((name,), switch=True, refused=f"it stands for a model: {_DOWNLOAD}") for name in _MODELS_BY_FLAG),
    Option(("--help", "-h", "--usage"), switch=True, refused=_ASKING),
    Option(("--version",), switch=True, refused=_ASKING),
    Option(("--list-devices",), switch=True, refused=_ASKING),
    Option(("--cache-list", "-cl"), switch=True, refused=_ASKING),
    Option(("--completion-bash",), switch=True, refused=_ASKING),
)
"""Options with a meaning of their own for the agent."""

_SWITCHES: Final = (
    Option(("--swa-full",), ("LLAMA_ARG_SWA_FULL",), switch=True),
    Option(("--perf",), ("LLAMA_ARG_PERF",), ("--no-perf",), switch=True),
    Option(("--escape", "-e"), (), ("--no-escape",), switch=True),
    Option(("--repack",), ("LLAMA_ARG_REPACK",), ("--no-repack", "-nr"), switch=True),
    Option(("--no-host",), ("LLAMA_ARG_NO_HOST",), switch=True),
    Option(("--direct-io", "-dio"), ("LLAMA_ARG_DIO",), ("--no-direct-io", "-ndio"), switch=True),
    Option(("--check-tensors",), switch=True),
    Option(("--op-offload",), (), ("--no-op-offload",), switch=True),
    Option(("--verbose", "-v", "--log-verbose"), switch=True),
    Option(("--offline",), ("LLAMA_ARG_OFFLINE",), switch=True),
    Option(("--log-prefix",), ("LLAMA_ARG_LOG_PREFIX",), ("--no-log-prefix",), switch=True),
    Option(("--log-timestamps",), ("LLAMA_ARG_LOG_TIMESTAMPS",), ("--no-log-timestamps",), switch=True),
    Option(("--ignore-eos",), switch=True),
    Option(("--backend-sampling", "-bs"), ("LLAMA_ARG_BACKEND_SAMPLING",), switch=True),
    Option(
        ("--spec-draft-cpu-moe", "-cmoed", "--cpu-moe-draft"),
        ("LLAMA_ARG_SPEC_DRAFT_CPU_MOE",),
        switch=True,
    ),
    Option(
        ("--spec-draft-backend-sampling",),
        ("LLAMA_ARG_SPEC_DRAFT_BACKEND_SAMPLING",),
        ("--no-spec-draft-backend-sampling",),
        switch=True,
    ),
    Option(("--kv-unified", "-kvu"), ("LLAMA_ARG_KV_UNIFIED",), ("--no-kv-unified", "-no-kvu"), switch=True),
    Option(("--cache-idle-slots",), ("LLAMA_ARG_CACHE_IDLE_SLOTS",), ("--no-cache-idle-slots",), switch=True),
    Option(("--context-shift",), ("LLAMA_ARG_CONTEXT_SHIFT",), ("--no-context-shift",), switch=True),
    Option(("--special", "-sp"), switch=True),
    Option(("--spm-infill",), switch=True),
    Option(("--mmproj-offload",), ("LLAMA_ARG_MMPROJ_OFFLOAD",), ("--no-mmproj-offload",), switch=True),
    Option(("--ui", "--webui"), ("LLAMA_ARG_UI",), ("--no-ui", "--no-webui"), switch=True),
    Option(("--reasoning-preserve",), ("LLAMA_ARG_REASONING_PRESERVE",), ("--no-reasoning-preserve",), switch=True),
    Option(("--skip-chat-parsing",), ("LLAMA_ARG_SKIP_CHAT_PARSING",), ("--no-skip-chat-parsing",), switch=True),
    Option(("--prefill-assistant",), ("LLAMA_ARG_PREFILL_ASSISTANT",), ("--no-prefill-assistant",), switch=True),
    Option(("--lora-init-without-apply",), switch=True),
    Option(("--tts-use-guide-tokens",), switch=True),
    Option(("--spec-default",), switch=True),
)
"""Other options that take no value; they may become extra flags."""

_VALUES: Final = (
    *(
        Option((f"--{name}",), (f"LLAMA_ARG_{name.upper().replace('-', '_')}",))
        for name in ("yarn-ext-factor", "yarn-attn-factor", "yarn-beta-slow", "yarn-beta-fast")
    ),
    *(
        Option((f"--spec-draft-{name}", f"--{name}-draft"))
        for name in ("cpu-strict", "cpu-strict-batch", "prio", "prio-batch", "poll", "poll-batch")
    ),
    Option(("--temp", "--temperature")),
    Option(("--typical", "--typical-p")),
    Option(("--top-nsigma", "--top-n-sigma")),
    Option(("--sampler-seq", "--sampling-seq")),
    Option(("--cpu-mask", "-C")),
    Option(("--cpu-range", "-Cr")),
    Option(("--cpu-mask-batch", "-Cb")),
    Option(("--cpu-range-batch", "-Crb")),
    Option(("--n-predict", "-n", "--predict"), ("LLAMA_ARG_N_PREDICT",)),
    Option(("--defrag-thold", "-dt"), ("LLAMA_ARG_DEFRAG_THOLD",)),
    Option(("--device", "-dev"), ("LLAMA_ARG_DEVICE",)),
    Option(("--override-tensor", "-ot"), ("LLAMA_ARG_OVERRIDE_TENSOR",), repeats=True),
    Option(("--override-kv",), repeats=True),
    Option(("--fit", "-fit"), ("LLAMA_ARG_FIT",)),
    Option(("--fit-target", "-fitt"), ("LLAMA_ARG_FIT_TARGET",)),
    Option(("--fit-ctx", "-fitc"), ("LLAMA_ARG_FIT_CTX",)),
    Option(("--log-colors",), ("LLAMA_ARG_LOG_COLORS",)),
    Option(("--verbosity", "-lv", "--log-verbosity"), ("LLAMA_ARG_LOG_VERBOSITY",)),
    Option(("--spec-draft-type-k", "-ctkd", "--cache-type-k-draft"), ("LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K",)),
    Option(("--spec-draft-type-v", "-ctvd", "--cache-type-v-draft"), ("LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V",)),
    Option(("--seed", "-s")),
    Option(("--top-k",), ("LLAMA_ARG_TOP_K",)),
    Option(("--dry-sequence-breaker",), any_text=True, repeats=True),
    Option(("--logit-bias", "-l"), repeats=True),
    Option(("--json-schema", "-j"), any_text=True),
    Option(("--grammar",), any_text=True),
    Option(("--reverse-prompt", "-r"), any_text=True, repeats=True),
    Option(("--spec-draft-threads", "-td", "--threads-draft")),
    Option(("--spec-draft-threads-batch", "-tbd", "--threads-batch-draft")),
    Option(("--spec-draft-cpu-mask", "-Cd", "--cpu-mask-draft")),
    Option(("--spec-draft-cpu-range", "-Crd", "--cpu-range-draft")),
    Option(("--spec-draft-cpu-mask-batch", "-Cbd", "--cpu-mask-batch-draft")),
    Option(("--spec-draft-override-tensor", "-otd", "--override-tensor-draft"), repeats=True),
    Option(
        ("--spec-draft-n-cpu-moe", "-ncmoed", "--spec-draft-ncmoe", "--n-cpu-moe-draft"),
        ("LLAMA_ARG_SPEC_DRAFT_N_CPU_MOE",),
    ),
    Option(("--spec-draft-p-split", "--draft-p-split"), ("LLAMA_ARG_SPEC_DRAFT_P_SPLIT", "LLAMA_ARG_DRAFT_P_SPLIT")),
    Option(("--spec-draft-p-min", "--draft-p-min"), ("LLAMA_ARG_SPEC_DRAFT_P_MIN", "LLAMA_ARG_DRAFT_P_MIN")),
    Option(("--spec-draft-device", "-devd", "--device-draft")),
    Option(("--spec-type",), ("LLAMA_ARG_SPEC_TYPE",)),
    Option(("--ctx-checkpoints", "-ctxcp", "--swa-checkpoints"), ("LLAMA_ARG_CTX_CHECKPOINTS",)),
    Option(("--checkpoint-min-step", "-cms"), ("LLAMA_ARG_CHECKPOINT_MIN_SPACING_NT",)),
    Option(("--cache-ram", "-cram"), ("LLAMA_ARG_CACHE_RAM",)),
    Option(("--image-min-tokens",), ("LLAMA_ARG_IMAGE_MIN_TOKENS",)),
    Option(("--image-max-tokens",), ("LLAMA_ARG_IMAGE_MAX_TOKENS",)),
    Option(("--mtmd-batch-max-tokens",), ("LLAMA_ARG_MTMD_BATCH_MAX_TOKENS",)),
    Option(("--tags",), ("LLAMA_ARG_TAGS",)),
    Option(("--ui-config", "--webui-config"), ("LLAMA_ARG_UI_CONFIG",), any_text=True),
    Option(("--chat-template-kwargs",), ("LLAMA_ARG_CHAT_TEMPLATE_KWARGS",), any_text=True),
    Option(("--timeout", "-to"), ("LLAMA_ARG_TIMEOUT",)),
    Option(("--sse-ping-interval",), ("LLAMA_ARG_SSE_PING_INTERVAL",)),
    Option(("--threads-http",), ("LLAMA_ARG_THREADS_HTTP",)),
    Option(("--cache-reuse",), ("LLAMA_ARG_CACHE_REUSE",)),
    Option(("--reasoning-budget-message",), ("LLAMA_ARG_THINK_BUDGET_MESSAGE",), any_text=True),
    Option(("--reasoning-effort",), ("LLAMA_ARG_REASONING_EFFORT",)),
    Option(("--slot-prompt-similarity", "-sps")),
)
"""Other options with a value that have a second name, a variable, or a value that may look like an option."""


def option_named(name: str) -> Named | None:
    """The option that ``name`` stands for: with its dashes, or an environment variable."""
    return _by_name().get(name)


@cache
def _by_name() -> Mapping[str, Named]:
    index: dict[str, Named] = {}
    for option in (*_settings(), *_SPECIAL, *_SWITCHES, *_VALUES):
        for name in (*option.names, *option.variables):
            index[name] = Named(option)
        for name in (*option.negations, *_negated_variables(option)):
            index[name] = Named(option, negated=True)
    for name in RESERVED.difference(index):
        index[name] = Named(Option((name,), refused="the agent lets nobody set it"))
    return MappingProxyType(index)


def _settings() -> Iterator[Option]:
    for passing in PASSINGS:
        dashed, variables = _sorted(_OTHER_NAMES.get(passing.setting, ()))
        names = (*passing.names, *dashed)
        yield Option(
            names,
            tuple(dict.fromkeys((*variables, *filter(None, (passing.variable,))))),
            tuple(f"--no-{name[2:]}" for name in names if name.startswith("--")) if passing.form is Form.SWITCH else (),
            setting=passing.setting,
            switch=passing.form is Form.SWITCH,
            any_text=passing.form is Form.TEXT,
        )
    for mode, names in MODES.items():
        dashed, variables = _sorted(_OTHER_NAMES.get(mode, ()))
        yield Option((*names, *dashed), variables, setting="mode", meaning=mode, switch=True)


def _sorted(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names with dashes, and variables."""
    return tuple(name for name in names if name.startswith("-")), tuple(
        name for name in names if not name.startswith("-")
    )


def _negated_variables(option: Option) -> Iterator[str]:
    # llama-server reads these too, for every switch that can be negated.
    if option.negations:
        for variable in option.variables:
            yield variable.replace("LLAMA_ARG_", "LLAMA_ARG_NO_", 1)
