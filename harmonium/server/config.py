"""What a user may set about serving, and how much a request may ask for."""

from __future__ import annotations

import datetime
import ipaddress
import re
from dataclasses import dataclass, field, fields

from harmonium.errors import ConfigError
from harmonium.harmony.messages import ReasoningEffort, reasoning_effort

_KEY = re.compile(r"[\x21-\x7e]{1,512}")


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one request may hold; one more is a 400 that names the field (a 413 for body_bytes).

    Counts but for body_bytes, text_chars (of a stop string, a name, a metadata value) and schema_bytes (of
    one JSON schema, written compactly).
    """

    body_bytes: int = 16 << 20
    messages: int = 4096
    tools: int = 256
    schema_bytes: int = 256 << 10
    n: int = 16
    prompts: int = 128
    stop: int = 16
    text_chars: int = 1024
    logit_bias: int = 1024
    top_logprobs: int = 20
    metadata: int = 16

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not 1 <= value <= 1 << 40:
                raise ConfigError(f"limit {limit.name} is {value:,}; expected 1 to {1 << 40:,}")
        if self.top_logprobs > 20:
            raise ConfigError(f"limit top_logprobs is {self.top_logprobs}; the sampler reports at most 20")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What a user may set about serving.

    model_names: names that requests may give, the first one is what answers say; (): the engine's own.
    api_keys: one of them must come with every request; (): no key is asked for. max_concurrency: answers that
    run at once; max_queue: answers that may wait for one of them to end. effort: where a request names none.
    current_date: "2026-11-25" as the model is told; None: today in UTC. cors_origins: of web pages that may
    call; "*": any. uses_grammar: whether turns are held to the grammar unless a request says otherwise.
    reasoning_fields: under which names answers give the reasoning. allows_adapter_updates: whether who may
    use the server may load LoRA adapters from its disk and remove them too.
    drain_seconds: how long running answers may take after SIGTERM. idle_write_seconds: a client that takes
    nothing for this long counts as gone. body_seconds: a request's body must be here by then.
    store_path: a file for stored responses. store_url: a database for them that several servers share, which
    may hold a password. With neither they are kept in memory.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    max_concurrency: int = 4
    max_queue: int = 64
    effort: ReasoningEffort = "medium"
    current_date: str | None = None
    cors_origins: tuple[str, ...] = ()
    uses_grammar: bool = True
    reasoning_fields: tuple[str, ...] = ("reasoning_content", "reasoning")
    allows_insecure: bool = False
    allows_adapter_updates: bool = False
    drain_seconds: float = 60.0
    idle_write_seconds: float = 120.0
    body_seconds: float = 30.0
    store_path: str | None = None
    store_url: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        reasoning_effort(self.effort)
        _check_counts(self)
        for key in self.api_keys:
            if not _KEY.fullmatch(key):
                raise ConfigError(
                    "an API key is empty, too long or holds blanks; expected 1 to 512 ASCII letters"
                )
        if self.current_date is not None:
            _check_date(self.current_date)
        if self.store_path is not None and self.store_url is not None:
            raise ConfigError("--store and --store-url (or HARMONIUM_STORE_URL) are given; expected one")
        if not is_loopback(self.host) and not self.api_keys and not self.allows_insecure:
            raise ConfigError(
                f"host {self.host} can be reached from other machines and no API key is set; "
                "give --api-key (or HARMONIUM_API_KEY), or --insecure to serve everybody"
            )


def _check_counts(config: ServerConfig) -> None:
    for name, value, least, most in (
        ("port", config.port, 0, 65535),
        ("max_concurrency", config.max_concurrency, 1, 4096),
        ("max_queue", config.max_queue, 0, 1_000_000),
    ):
        if not least <= value <= most:
            raise ConfigError(f"{name} is {value:,}; expected {least:,} to {most:,}")


def _check_date(date: str) -> None:
    try:
        is_canonical = datetime.date.fromisoformat(date).isoformat() == date
    except ValueError:
        is_canonical = False
    if not is_canonical:
        raise ConfigError(f"date is {date!r}; expected such as 2026-11-25")


def is_loopback(host: str) -> bool:
    """Whether this name or address is this machine's own, out of reach from others."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
