"""Where models come from and where they are kept, as the environment says it to the hubs' own programs too.

Hugging Face: HF_ENDPOINT, HF_HOME, HF_HUB_CACHE (HUGGINGFACE_HUB_CACHE), HF_TOKEN (HUGGING_FACE_HUB_TOKEN),
HF_TOKEN_PATH, HF_HUB_DISABLE_IMPLICIT_TOKEN, HF_HUB_OFFLINE (TRANSFORMERS_OFFLINE). ModelScope:
MODELSCOPE_ENDPOINT (MODELSCOPE_DOMAIN), MODELSCOPE_CACHE, MODELSCOPE_API_TOKEN. Ours: HARMONIUM_SOURCE.
Proxies (HTTPS_PROXY, HTTP_PROXY, NO_PROXY) and SSL_CERT_FILE are read by Python's own library;
REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE, which name a file of certificates too, by us.

Source: huggingface/huggingface_hub:src/huggingface_hub/constants.py and the package modelscope-hub 0.5.1
(config.py, _download.py), by behavior.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from harmonium.config import environment_text
from harmonium.errors import ConfigError
from harmonium.text_file import expand_home

SourceName = Literal["huggingface", "modelscope"]
SOURCES: tuple[SourceName, ...] = get_args(SourceName)

_TRUE = ("1", "on", "true", "yes")
_MAX_TOKEN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class HubSettings:
    """Addresses without a slash at the end; caches that need not exist; tokens None where there is none.

    source: what HARMONIUM_SOURCE asks for, else None. remark: something to be told to the user once.
    """

    source: SourceName | None
    huggingface_endpoint: str
    huggingface_cache: Path
    huggingface_token: str | None
    modelscope_endpoint: str
    modelscope_cache: Path
    modelscope_token: str | None
    is_offline: bool
    certificates: str | None
    remark: str | None


def hub_settings() -> HubSettings:
    """What the environment says now. Raises ConfigError for a value that cannot be used."""
    home = _folder("HF_HOME") or _base_cache() / "huggingface"
    cache = _folder("HF_HUB_CACHE") or _folder("HUGGINGFACE_HUB_CACHE") or home / "hub"
    source = checked_source(environment_text("HARMONIUM_SOURCE"), "HARMONIUM_SOURCE")
    remark = None
    if source is None and _is_true("VLLM_USE_MODELSCOPE"):
        remark = (
            "VLLM_USE_MODELSCOPE is vLLM's switch and has no effect here; "
            "HARMONIUM_SOURCE=modelscope (or --source modelscope) is ours"
        )
    domain = environment_text("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return HubSettings(
        source=source,
        huggingface_endpoint=_address("HF_ENDPOINT", "https://huggingface.co"),
        huggingface_cache=cache,
        huggingface_token=_huggingface_token(home),
        modelscope_endpoint=_address("MODELSCOPE_ENDPOINT", f"https://{domain}"),
        modelscope_cache=_folder("MODELSCOPE_CACHE") or expand_home("~/.cache/modelscope"),
        modelscope_token=environment_text("MODELSCOPE_API_TOKEN") or None,
        is_offline=_is_true("HF_HUB_OFFLINE") or _is_true("TRANSFORMERS_OFFLINE"),
        certificates=environment_text("REQUESTS_CA_BUNDLE") or environment_text("CURL_CA_BUNDLE") or None,
        remark=remark,
    )


def checked_source(text: str, name: str) -> SourceName | None:
    """The hub that a text names, None for no text. name: what the text is called in the message."""
    if not text:
        return None
    for source in SOURCES:
        if text.lower() == source:
            return source
    raise ConfigError(f"{name} is {text!r}; expected {' or '.join(SOURCES)}")


def _base_cache() -> Path:
    return _folder("XDG_CACHE_HOME") or expand_home("~/.cache")


def _folder(name: str) -> Path | None:
    text = environment_text(name)
    return expand_home(text) if text else None


def _is_true(name: str) -> bool:
    return environment_text(name).lower() in _TRUE


def _address(name: str, default: str) -> str:
    text = environment_text(name) or default
    if not text.startswith(("http://", "https://")):
        raise ConfigError(f"{name} is {text!r}; expected an address such as {default}")
    return text.rstrip("/")


def _huggingface_token(home: Path) -> str | None:
    """HF_TOKEN, else what `hf auth login` left in a file."""
    given = environment_text("HF_TOKEN") or environment_text("HUGGING_FACE_HUB_TOKEN")
    if given or _is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return given or None
    try:
        with (_folder("HF_TOKEN_PATH") or home / "token").open("rb") as file:
            return file.read(_MAX_TOKEN_BYTES).decode("utf-8").strip() or None
    except (OSError, ValueError):
        return None
