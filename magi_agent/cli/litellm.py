"""``magictl export litellm``: the models in use as the ``model_list`` of a LiteLLM router's configuration."""

from collections.abc import Mapping, Sequence

import click
import yaml

from magi_agent.cli.address import UrlAddress, is_on_this_host, parse_url
from magi_agent.cli.answers import models_of, record, records, text, texts
from magi_agent.cli.exits import CommandError
from magi_agent.cli.options import Session

_HEADER = """\
# For LiteLLM. MAGI_TOKEN is to hold a token of the agent's: magictl token add NAME --scope infer
# Entries of several hosts go into one list: those with the same model_name share its requests.
"""
_KEY = "os.environ/MAGI_TOKEN"
_VERSION = "/v1"
_PROVIDER = "hosted_vllm"
"""LiteLLM's word for servers like ours: it asks the same of the same paths as for ``openai``, and of /rerank too. With
``openai``, a model with gpt-5 anywhere in its name counts as OpenAI's own, for which LiteLLM refuses ``top_p``."""
_MODES = {"completion": "chat", "embedding": "embedding", "reranking": "rerank"}
"""LiteLLM's mode by the agent's word for what a model is for; first what stands before others for several models."""


def export_litellm(session: Session, api_base: str | None) -> None:
    """Print the configuration. ``api_base`` is the agent's URL, as LiteLLM reaches it; without it, as this command did.

    Raises ``CommandError`` where neither is a URL, ``click.UsageError`` where ``api_base`` is none.
    """
    address = _address(session, api_base)
    registry = session.client.get("/api/models/registry", "models")
    enabled = {model_id for model_id, model in models_of(registry) if model.get("enabled") is True}
    listed = records(session.client.get("/v1/models", "data")["data"])
    document: dict[str, object] = {"model_list": _entries(listed, enabled, _below_v1(address))}
    screen = session.screen
    if screen.as_json:
        screen.json(document)
        return
    screen.text(_HEADER + yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    if api_base is None and is_on_this_host(address):
        screen.note(f"only programs on this host reach the agent at {address}; for others give --api-base URL")


def _address(session: Session, api_base: str | None) -> UrlAddress:
    if api_base is not None:
        try:
            return parse_url(api_base)
        except ValueError as error:
            raise click.UsageError(f"--api-base: {error}") from None
    address = session.client.address
    if isinstance(address, UrlAddress):
        return address
    raise CommandError(
        "NoAddress",
        f"LiteLLM needs a URL, and the agent was reached at the socket {address}; say with --api-base URL where it "
        "answers on TCP, such as http://this-host:8000",
    )


def _below_v1(address: UrlAddress) -> str:
    url = str(address)
    return url if url.endswith(_VERSION) else url + _VERSION


def _entries(listed: Sequence[Mapping[str, object]], enabled: set[str], api_base: str) -> list[dict[str, object]]:
    models = {text(one.get("id")): one for one in listed if text(one.get("id")) in enabled}
    entries = [_entry(name, [one], api_base) for name, one in models.items()]
    for one in listed:
        # A tier, or auto: what stands for several.
        members = [models[model_id] for model_id in texts(one.get("models")) if model_id in models]
        if members:
            entries.append(_entry(text(one.get("id")), members, api_base))
    return entries


def _entry(name: str, models: Sequence[Mapping[str, object]], api_base: str) -> dict[str, object]:
    """Return the entry for a name that stands for any of ``models``."""
    kind = next(kind for kind in (*_MODES, "") if not kind or any(kind in _abilities(one) for one in models))
    mode = _MODES.get(kind, "chat")
    meant = [one for one in models if not kind or kind in _abilities(one)]
    lengths = [length for one in meant if isinstance(length := one.get("context_length"), int)]
    info: dict[str, object] = {"mode": mode}
    if lengths:
        info["max_input_tokens"] = min(lengths)
    if mode == "chat":
        # Of a tier, one that sees is given the images, and one that hears what is to be heard.
        info["supports_vision"] = any("vision" in _abilities(one) for one in meant)
        info["supports_audio_input"] = any("audio" in _abilities(one) for one in meant)
        info["supports_reasoning"] = all("thinking" in _abilities(one) for one in meant)
    return {
        "model_name": name,
        "litellm_params": {"model": f"{_PROVIDER}/{name}", "api_base": api_base, "api_key": _KEY},
        "model_info": info,
    }


def _abilities(model: Mapping[str, object]) -> list[str]:
    return texts(record(model).get("capabilities"))
