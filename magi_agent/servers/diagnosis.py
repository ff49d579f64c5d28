"""What the end of a server means, where it is one of the known ones: the cause in words, and what to do about it.

Read from systemd's result and from what the server itself said last. Its lines are anybody's words (a model file can
have it print what it likes), so they are searched for what llama.cpp and the loader print and never followed further:
whatever is quoted of them is short, and is shown as text.

The lines were taken from runs of llama-server and of ld.so(8) with the fault in question; the words for GPUs from
ggml's sources (ggml-cuda.cu, ggml-vulkan.cpp).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from magi_agent.servers.failure import NOT_EXECUTED, Failure
from magi_agent.servers.launch import unit_name
from magi_agent.servers.memory_limits import LimitOrigin

READ_LINES: Final = 120
"""Lines of a log in which the cause is looked for: after a wrong argument, a page of usage follows."""
_LONGEST_QUOTE: Final = 120
_LONGEST_LINE: Final = 2000
_MODEL: Final = "MODEL"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A cause, and what to do."""

    cause: str
    advice: str


@dataclass(frozen=True, slots=True)
class MemoryEnd:
    """At which limit a server was killed for memory."""

    limit: int | None = None
    """Bytes that the unit might use; ``None`` for no limit, or where nobody tells."""
    group: str | None = None
    """Whose limit it was, as the kernel says: a unit's name, empty for the host's; ``None`` where it was not read."""
    source: LimitOrigin | None = None
    """Where the unit's limit comes from."""

    def diagnosis(self, unit: str) -> Diagnosis:
        """The cause, and what to do, for the server in ``unit``."""
        cause, limit = "it was killed because memory ran out", self.limit and _size(self.limit)
        wider = f"{_WIDER_LIMIT[self.source].format(unit=unit)} {_OR_LESS}"
        if limit and self.group == unit:
            return Diagnosis(f"{cause}, at its limit of {limit} (MemoryMax)", wider)
        if limit and self.group is None:
            return Diagnosis(f"{cause}, its own of {limit} (MemoryMax) or the host's", wider)
        if self.group:
            return Diagnosis(f"{cause}, that of {_quoted(self.group)}", _LESS_MEMORY)
        return Diagnosis(cause if self.group is None else f"{cause}, the host's", _LESS_MEMORY)


@dataclass(frozen=True, slots=True)
class _Sign:
    """What tells a cause: a line of the log. ``{0}`` and on stand for what its groups found, ``MODEL`` for its id."""

    line: re.Pattern[str]
    cause: str
    advice: str

    def in_(self, lines: Sequence[str]) -> Diagnosis | None:
        for line in lines:
            if found := self.line.search(line[:_LONGEST_LINE]):
                quoted = [_quoted(group or "") for group in found.groups()]
                return Diagnosis(self.cause.format(*quoted), self.advice.format(*quoted))
        return None


_LESS_MEMORY: Final = (
    "give it less to hold (magictl settings MODEL ctx_size=…, or a smaller quantization), or stop another model"
)
_WIDER_LIMIT: Final[dict[LimitOrigin | None, str]] = {
    "set": "raise memory_max (magictl settings MODEL memory_max=…; magictl settings MODEL shows where it is set)",
    "operator": "raise MemoryMax where it is set at the unit (systemctl set-property {unit} MemoryMax=…, or a drop-in)",
    "derived": "give it more than follows from its need (magictl settings MODEL memory_max=…)",
    None: "give it more (magictl settings MODEL memory_max=…)",
}
_OR_LESS: Final = "or give it less to hold (magictl settings MODEL ctx_size=…); one that leaks comes to any limit"
_GPU_MEMORY: Final = (
    "the memory of the GPU is too small for it as it is set",
    "keep fewer layers there (magictl settings MODEL n_gpu_layers=…), shorten ctx_size, or stop another model",
)


def _sign(line: str, cause: str, advice: str) -> _Sign:
    return _Sign(re.compile(line), cause, advice)


# The more particular ones first: what follows from a cause is said in the same log.
_SIGNS: Final = (
    _sign(
        r"error while loading shared libraries: ([^:]+): cannot open shared object file",
        "llama-server needs the library {0}, which is not installed where it is looked for",
        "install it; magictl doctor names the package, or the setting that leads to it",
    ),
    _sign(
        r"(?:libc\.so\.6|libstdc\+\+\.so\.6|libm\.so\.6): version `([^']+)' not found",
        "llama-server was built for a newer system: it needs {0}",
        "use a llama-server that is built for this release of the distribution",
    ),
    _sign(
        r'error while handling argument "--device": invalid device: (\S+)',
        "llama-server does not find the GPU {0} that it was told to use",
        "magictl host --refresh shows which there are now; the next try takes one of these, unless it is set by hand",
    ),
    _sign(
        r"error: invalid argument: (\S+)",
        "llama-server does not know the argument {0}",
        "upgrade llama-server, or take it out: magictl settings MODEL shows what is set",
    ),
    _sign(
        r'error while handling argument "([^"]+)": (.+)',
        "llama-server does not take what is given for {0}: {1}",
        "magictl settings MODEL shows what is set",
    ),
    _sign(
        r"unknown model architecture: '([^']+)'",
        "this llama-server knows no models of the architecture {0}",
        "upgrade llama-server",
    ),
    _sign(
        r"cudaMalloc failed: out of memory|hipMalloc failed|CUDA error: out of memory|ErrorOutOfDeviceMemory",
        *_GPU_MEMORY,
    ),
    _sign(
        r"(?:ggml_gallocr_reserve_n\w*|alloc_tensor_range): failed to allocate (?!CPU)\S+ buffer",
        *_GPU_MEMORY,
    ),
    _sign(
        r"ggml_aligned_malloc: insufficient memory|(?:failed|unable) to allocate (?:CPU\S* )?buffer|std::bad_alloc",
        "there was no memory for what it is set to hold",
        _LESS_MEMORY,
    ),
    _sign(
        r"CUDA driver version is insufficient|no kernel image is available for execution",
        "this llama-server does not fit the GPU or its driver",
        "upgrade the driver, or use a llama-server that is built for this GPU; magictl doctor names what is there",
    ),
    _sign(
        r"data is not within the file bounds|failed to read key-value pairs|failed to read tensor info|read error:",
        "the model's file is damaged, or has not arrived whole",
        "fetch it again",
    ),
    _sign(
        r"invalid magic characters|gguf_init_from_\w+: failed to read magic",
        "the model's file is no GGUF file",
        "fetch it again, or convert it",
    ),
    _sign(
        r"failed to open GGUF file '([^']*)' \(No such file or directory\)",
        "the file {0} is not there",
        "bring it back, or disable the model: magictl disable MODEL",
    ),
    _sign(
        r"failed to open GGUF file '([^']*)' \(Permission denied\)",
        "the user that servers run as may not read {0}",
        "sudo magictl doctor names the component of the path and the command that grants it",
    ),
    _sign(
        r"quantized V cache requires flash_attn",
        "a quantized cache of values needs flash attention",
        "magictl settings MODEL flash_attention=on, or another cache_type_v",
    ),
    _sign(
        r"[Ff]ailed to load CLIP model|failed to load multimodal model",
        "the projector does not fit this model or this llama-server",
        "magictl settings MODEL projector=none runs it without; projectors lists those that go with it",
    ),
    _sign(
        r"failed to (?:apply|load) lora adapter",
        "the LoRA adapter does not fit this model",
        "magictl settings MODEL --unset lora runs it without",
    ),
    _sign(
        r"failed to initialize chat template|the supplied chat template is not supported",
        "llama-server cannot use the chat template",
        "magictl settings MODEL --unset chat_template --unset chat_template_file takes the model's own",
    ),
    _sign(
        r"couldn't bind HTTP server socket, hostname: (\S+), port: (\d+)",
        "nothing can listen at {0}, port {1}: another program does, or the host has no such address",
        "ss -ltnp 'sport = :{1}' shows who does; magictl port MODEL auto gives it another port",
    ),
    _sign(
        r"GGML_ASSERT\((.{1,200})\) failed",
        "llama-server met a defect of its own: GGML_ASSERT({0})",
        "upgrade llama-server, or try the model with other settings",
    ),
)


_AGAINST: Final = {
    "start-timeout": "magictl logs MODEL shows how far it came; where it only takes long, give it more time: "
    "max_startup_time below [servers]",
    "port-in-use": "end that program; where it holds a port, magictl port MODEL auto gives the model another",
    "hung": "the agent starts it again; where it comes back, magictl logs MODEL --run previous shows what it did last",
}
"""What to do about a server that the agent gave up, by the result."""


def advice_on(result: str, model_id: str) -> str | None:
    """What to do about a server that runs and was given up; ``None`` where its message says it all."""
    advice = _AGAINST.get(result)
    return advice and advice.replace(_MODEL, model_id)


def diagnosed(
    failure: Failure,
    lines: Sequence[str],
    model_id: str,
    program_fault: Diagnosis | None = None,
    memory_end: MemoryEnd | None = None,
) -> Failure:
    """The failure with its cause and what to do, where it is a known one; else as it is.

    ``program_fault`` is why the program cannot be executed, where its file tells.
    """
    if failure.result == "oom-kill":
        found: Diagnosis | None = (memory_end or MemoryEnd()).diagnosis(unit_name(model_id))
    else:
        found = next(_diagnoses(failure, lines, program_fault), None)
    if found is None:
        return failure
    message = found.cause if found.cause.startswith(failure.message) else f"{failure.message}: {found.cause}"
    return replace(failure, message=message, advice=found.advice.replace(_MODEL, model_id))


def _diagnoses(failure: Failure, lines: Sequence[str], program_fault: Diagnosis | None) -> Iterator[Diagnosis]:
    if program_fault is not None:
        yield program_fault
    if failure.exit_status == NOT_EXECUTED:
        yield Diagnosis(failure.message, "sudo magictl doctor looks at the program, and at what servers see of it")
    for sign in _SIGNS:
        if diagnosis := sign.in_(lines):
            yield diagnosis
    if failure.signal == "SIGILL":
        yield Diagnosis(
            "llama-server used an instruction that this processor does not have",
            "use one that is built for it, or for any (GGML_NATIVE=OFF, GGML_BACKEND_DL=ON)",
        )


def _size(size: int) -> str:
    unit, word = next((pair for pair in ((1 << 30, "GiB"), (1 << 20, "MiB")) if size >= pair[0]), (1, "bytes"))
    return f"{size / unit:.4g} {word}"


def _quoted(text: str) -> str:
    """What a line said, short and as text."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:_LONGEST_QUOTE]
