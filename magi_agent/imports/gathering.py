"""What is gathered while one model's options are read: its settings, and what became of all that stood there."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from magi_agent.imports.imported import HIDDEN, Carried, ImportedModel, LeftOut, is_secret, shown
from magi_agent.imports.server_options import (
    ALIAS,
    ALL_EXPERTS,
    HF_FILE,
    HF_REPO,
    HOST,
    LOADING,
    LORA_PLAIN,
    LORA_SCALED,
    MODEL,
    PROJECTOR_AUTO,
    Named,
    Option,
)
from magi_agent.runtime_settings.passing import LOAD_MODES
from magi_agent.runtime_settings.reading import InvalidRuntimeSettings, read_settings, written
from magi_agent.runtime_settings.settings import NO_PROJECTOR, RuntimeSettings

YES: Final = frozenset({"on", "enabled", "true", "1"})
NO: Final = frozenset({"off", "disabled", "false", "0"})
EITHER: Final = frozenset({"auto", "-1"})
_ALL: Final = "all"
_AUTO: Final = "auto"
_MOST_ALIASES: Final = 64
_MORE_LAYERS_THAN_ANY: Final = 999
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_PATHS: Final = frozenset({"draft_model", "chat_template_file", "projector"})
_YES_OR_NO: Final = frozenset({"flash_attention", "reasoning"})
_BY_DRAFT_MODEL: Final = "--spec-type=draft-simple"
_AGAIN: Final = "given again later, and the last one counts"


@dataclass(frozen=True, slots=True)
class _Said:
    """A value, and what stood there for it."""

    source: str
    value: object


@dataclass(frozen=True, slots=True)
class _Flag:
    source: str
    name: str
    text: str


def file_name(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r"[/\\]", path)[-1]


class Gathering:
    """One model, while it is being read."""

    def __init__(self, allowed_flags: Collection[str] = ()) -> None:
        self.in_container = False
        """Whether paths are those of a container."""
        self._allowed = allowed_flags
        self._settings: dict[str, _Said] = {}
        self._flags: list[_Flag] = []
        self._model: _Said | None = None
        self._hf_repo: str | None = None
        self._hf_file: str | None = None
        self._carried: list[Carried] = []
        self._left_out: list[LeftOut] = []
        self._special: Mapping[str, Callable[[str, str], None]] = {
            MODEL.name: self._give_model,
            HF_REPO.name: self._give_repository,
            HF_FILE.name: self._give_repository_file,
            HOST.name: self._give_host,
            LOADING.name: self._give_load_mode,
            ALIAS.name: lambda value, source: self.add_aliases((name.strip() for name in value.split(",")), source),
            LORA_PLAIN.name: lambda value, source: self._add_adapters(
                [{"path": path} for path in value.split(",")], source
            ),
            LORA_SCALED.name: lambda value, source: self._add_adapters(
                [dict(zip(("path", "scale"), part.rsplit(":", 1), strict=False)) for part in value.split(",")], source
            ),
        }

    def carry(self, source: str, became: str) -> None:
        """Note what something became."""
        self._carried.append(Carried(shown(source), shown(became)))

    def leave_out(self, source: str, reason: str) -> None:
        """Note what is not carried over, and why."""
        self._left_out.append(LeftOut(shown(source), reason))

    def set(self, name: str, value: object, source: str) -> None:
        """Give a setting; a value that is none is left out in the end."""
        self._forget(name)
        self._settings[name] = _Said(source, value)

    def add_aliases(self, names: Iterable[str], source: str) -> None:
        """Add to the other names of the model; those that are none are left out."""
        said = self._settings.pop("aliases", None)
        earlier = said.value if said and isinstance(said.value, tuple) else ()
        aliases = dict.fromkeys(map(str, earlier))
        for name in names:
            if len(aliases) == _MOST_ALIASES and name not in aliases:
                self.leave_out(source, f"aliases: there may be no more than {_MOST_ALIASES}")
                break
            try:
                read_settings({"aliases": [name]})
            except InvalidRuntimeSettings as error:
                self.leave_out(source, _message(error))
            else:
                aliases[name] = None
        if said and len(aliases) == len(earlier):
            self._settings["aliases"] = said
        elif aliases:
            self._settings["aliases"] = _Said(f"{said.source}, {source}" if said else source, tuple(aliases))

    def give(self, named: Named, name: str, value: str | None, source: str) -> None:
        """Take one option, by the name it was given by.

        ``source`` is what stood there. Without a value, a switch says yes.
        """
        option = named.option
        if option.secret:
            source = f"{name} {HIDDEN}"
        if option.refused is not None:
            self.leave_out(source, option.refused)
        elif not option.switch:
            self._give_valued(option, name, value, source)
        elif value is not None and value.lower() not in YES | NO:
            self.leave_out(source, f"{name} is a switch, and is either on or off")
        else:
            says_yes = value is None or value.lower() in YES
            self._give_switch(option, name, source, on=says_yes is not named.negated)

    def give_unknown(self, name: str, value: str | None, source: str) -> None:
        """Take an option that is in no table."""
        if is_secret(name):
            self.leave_out(f"{name} {HIDDEN}", "it is no option that is known here, and is called like a secret")
        elif name.startswith("--"):
            self._add_flag((name,), name, value, source, repeats=False)
        else:
            self.leave_out(source, f"{name} is no option of llama-server that is known here")

    def finished(self, name: str) -> ImportedModel:
        """The model with the whole report; without a ``name``, it is called like its file."""
        suggested = self._settle_flags()
        settings = self._settled()
        model = str(self._model.value) if self._model else None
        hf_repo = self._hf_repo
        if hf_repo and self._hf_file:
            hf_repo = f"{hf_repo.partition(':')[0]}/{self._hf_file}"
        if self._model:
            self.carry(self._model.source, f"the model file {model}")
        return ImportedModel(
            name or (file_name(model).removesuffix(".gguf") if model else hf_repo or ""),
            model,
            hf_repo,
            settings,
            suggested,
            (
                *(
                    Carried(shown(self._settings[setting].source), shown(f"{setting} = {_spoken(value)}"))
                    for setting, value in written(settings).items()
                ),
                *self._carried,
            ),
            tuple(self._left_out),
        )

    def _forget(self, setting: str) -> None:
        if earlier := self._settings.pop(setting, None):
            self.leave_out(earlier.source, _AGAIN)

    def _give_valued(self, option: Option, name: str, value: str | None, source: str) -> None:
        if option.needless is not None:
            self.carry(source, f"nothing: {option.needless}")
        elif option.setting in _YES_OR_NO:
            word = (value or "on").lower()
            known = {**dict.fromkeys(YES, "on"), **dict.fromkeys(NO, "off"), **dict.fromkeys(EITHER, "auto")}
            self.set(option.setting, known.get(word, word), source)
        elif not value and (option.setting or option.name in self._special):
            self.leave_out(source, f"{name} has no value")
        elif self.in_container and (option.setting in _PATHS or option in (LORA_PLAIN, LORA_SCALED)):
            self.leave_out(source, "it is a path inside a container: give the one on this host")
        elif give := self._special.get(option.name):
            give(value or "", source)
        elif option.setting is None:
            self._add_flag(option.names, name, value, source, repeats=option.repeats)
        elif "gpu_layers" in option.setting and value in EITHER:
            self._forget(option.setting)
            self.carry(source, "nothing: llama-server decides, as it does where nobody says a number")
        elif "gpu_layers" in option.setting and value == _ALL:
            self.set(option.setting, -1, source)
        else:
            read = re.split(r"[,/]", value or "") if option.setting == "tensor_split" else value
            self.set(option.setting, read, source)

    def _give_switch(self, option: Option, name: str, source: str, *, on: bool) -> None:
        if option.meaning is not None:
            self._give_mode(option.meaning, source, on=on)
        elif option.setting is not None:
            self.set(option.setting, on, source)
        elif option is PROJECTOR_AUTO and not on:
            self.set("projector", NO_PROJECTOR, source)
        elif option is ALL_EXPERTS and on:
            self.set("n_cpu_moe", _MORE_LAYERS_THAN_ANY, source)
        elif option.needless is not None and on:
            self.carry(source, f"nothing: {option.needless}")
        elif names := option.names if on else option.negations:
            self._add_flag(names, name, None, source, repeats=False)
        else:
            self.carry(source, "nothing: it is off where nobody switches it on")

    def _give_mode(self, mode: str, source: str, *, on: bool) -> None:
        earlier = self._settings.get("mode")
        if not on:
            self.carry(source, "nothing: it is off where nobody switches it on")
        elif earlier is None or earlier.value == mode:
            self._settings["mode"] = _Said(source, mode)
        else:
            # Reranking is done with embeddings: both together are reranking, in any order.
            rerank = source if mode == "rerank" else earlier.source
            self._settings["mode"] = _Said(rerank, "rerank")
            self.carry(earlier.source if rerank == source else source, "nothing: reranking includes it")

    def _give_model(self, value: str, source: str) -> None:
        if self._model is not None:
            self.leave_out(self._model.source, _AGAIN)
        path = file_name(value) if self.in_container else value
        self._model = _Said(source, path) if path else None

    def _give_repository(self, value: str, source: str) -> None:
        self._hf_repo = value
        self.leave_out(
            source, "servers download nothing: where the model folders do not have the file yet, put it there first"
        )

    def _give_repository_file(self, value: str, source: str) -> None:
        self._hf_file = value
        self.carry(source, f"the model file {value}")

    def _give_host(self, value: str, source: str) -> None:
        if value in _LOOPBACK:
            self.carry(source, "nothing: the agent's servers listen on this host only")
        else:
            self.leave_out(source, "the agent says where its servers listen: see servers.llama_server_host")

    def _give_load_mode(self, value: str, source: str) -> None:
        if value == _AUTO:
            self.carry(source, "nothing: it is what llama-server does anyway")
        elif value not in LOAD_MODES:
            self.leave_out(source, f"no setting says it: mmap and mlock come to {', '.join(LOAD_MODES)}")
        else:
            for setting, on in LOAD_MODES[value].items():
                self.set(setting, on, source)

    def _add_adapters(self, adapters: list[dict[str, str]], source: str) -> None:
        said = self._settings.pop("lora", None)
        valid = list(said.value) if said and isinstance(said.value, list) else []
        for adapter in adapters:
            try:
                read_settings({"lora": [adapter]})
            except InvalidRuntimeSettings as error:
                self.leave_out(source, _message(error))
            else:
                valid.append(adapter)
        if valid:
            self._settings["lora"] = _Said(f"{said.source} {source}" if said else source, valid)

    def _add_flag(self, names: tuple[str, ...], given: str, value: str | None, source: str, *, repeats: bool) -> None:
        """Note what may become an extra flag, by the one of its ``names`` that is allowed or was given."""
        long = [name for name in names if name.startswith("--")]
        name = next((name for name in (given, *long) if name in self._allowed), given if given in long else long[0])
        if not repeats:
            for earlier in [flag for flag in self._flags if flag.name in names]:
                self._flags.remove(earlier)
                self.leave_out(earlier.source, _AGAIN)
        self._flags.append(_Flag(source, name, name if value is None else f"{name}={value}"))

    def _settle_flags(self) -> tuple[str, ...]:
        """Make those flags a setting that are allowed; the rest may be suggested."""
        allowed: list[_Flag] = []
        suggested: list[str] = []
        for flag in self._flags:
            if flag.text == _BY_DRAFT_MODEL and "draft_model" in self._settings:
                self.carry(flag.source, "nothing: a draft model is always used")
            elif not _is_flag(flag.text):
                self.leave_out(
                    flag.source, "no setting says it, and an extra flag is one printable line without '$' and ';'"
                )
            elif flag.name in self._allowed:
                allowed.append(flag)
            else:
                suggested.append(flag.text)
                self.leave_out(
                    flag.source,
                    f"no setting says it: it may be the extra flag {shown(flag.text)} where servers.allowed_flags in"
                    f" agent.toml names {flag.name}",
                )
        if allowed:
            source = " ".join(flag.source for flag in allowed)
            self._settings["extra_flags"] = _Said(source, [flag.text for flag in allowed])
        return tuple(suggested)

    def _settled(self) -> RuntimeSettings:
        """All settings that are valid, by themselves and together."""
        for name, said in tuple(self._settings.items()):
            try:
                read_settings({name: said.value})
            except InvalidRuntimeSettings as error:
                self._drop(name, _message(error))
        while True:
            try:
                return read_settings({name: said.value for name, said in self._settings.items()})
            except InvalidRuntimeSettings as error:
                for name, message in {fault.name: fault.message for fault in error.faults}.items():
                    self._drop(name, f"{name}: {message}")

    def _drop(self, name: str, message: str) -> None:
        said = self._settings.pop(name)
        self.leave_out(said.source, message)


def _spoken(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _message(error: InvalidRuntimeSettings) -> str:
    fault = error.faults[0]
    return f"{fault.name.partition('.')[0]}: {fault.message}"


def _is_flag(text: str) -> bool:
    try:
        read_settings({"extra_flags": [text]})
    except InvalidRuntimeSettings:
        return False
    return True
