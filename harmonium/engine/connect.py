"""From addresses to a RemoteEngine: wait for the servers, find the model, agree on the context."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from harmonium.engine.http_exchange import parse_address
from harmonium.engine.protocol import EngineInfo
from harmonium.engine.remote import RemoteEngine
from harmonium.engine.upstream import BrokenError, RemoteSettings, Upstream
from harmonium.engine.vllm_wire import ModelCard, RefusedError
from harmonium.errors import ConfigError, UpstreamError, UpstreamUnavailable

_log = logging.getLogger("harmonium.engine")

VOCABULARY_SIZE = 201_088
"""Of both gpt-oss models. Source: vocab_size of their config.json."""

MAX_UPSTREAMS = 256

_RETRY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which of a server's models is meant. names: it has one of them, as its name or as where it came from;
    (): the only one that there is. context_length: None takes the upstreams' least.
    """

    names: tuple[str, ...] = ()
    context_length: int | None = None


@dataclass(slots=True)
class _Found:
    """A server that answered: the model, and its LoRA adapters."""

    upstream: Upstream
    model: ModelCard
    adapters: tuple[str, ...] = field(default=())


def parse_upstreams(addresses: Sequence[str], settings: RemoteSettings) -> list[Upstream]:
    """A server for each address. Raises ConfigError for what is no address, for none, and for one twice."""
    upstreams = [Upstream(parse_address(text.strip()), settings) for text in addresses]
    if not 1 <= len(upstreams) <= MAX_UPSTREAMS:
        raise ConfigError(f"there are {len(upstreams)} addresses of servers; expected 1 to {MAX_UPSTREAMS}")
    texts = [upstream.address.text for upstream in upstreams]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is given twice; expected each server once")
    return upstreams


async def connect(
    upstreams: Sequence[Upstream],
    wanted: Wanted,
    settings: RemoteSettings,
    progress: Callable[[str], None] | None = None,
) -> RemoteEngine:
    """Wait until a server answers and give an engine over all; those that come later join by themselves.

    progress: told now and then why nobody serves yet.

    Raises ConfigError when a server has not the model (or several and none is named), wants another key or
    is no vLLM; UpstreamUnavailable when none answers within start_seconds.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + settings.start_seconds
    while True:
        looks = await asyncio.gather(*(_look(upstream, wanted) for upstream in upstreams))
        found = [look for look in looks if isinstance(look, _Found)]
        if found:
            break
        why = "; ".join(f"{one.address.text}: {one.why_down}" for one in upstreams)
        if loop.time() > end:
            raise UpstreamUnavailable(f"no vLLM server answered within {settings.start_seconds:g} s ({why})")
        if progress is not None:
            progress(why)
        await asyncio.sleep(_RETRY_SECONDS)
    engine = RemoteEngine(upstreams, _info(found, wanted), settings)
    engine.watch()
    return engine


def _info(found: Sequence[_Found], wanted: Wanted) -> EngineInfo:
    """What all that answered have in common; those with another model stay out."""
    name = found[0].model.name
    lengths = [each.model.max_model_len for each in found if each.model.name == name]
    known = [length for length in (*lengths, wanted.context_length) if length is not None]
    for each in found:
        if each.model.name == name:
            each.upstream.admit()
        else:
            each.upstream.eject(f"it serves {each.model.name!r}, not {name!r}")
    shared = [set(each.adapters) for each in found if each.model.name == name]
    adapters = tuple(sorted(set.intersection(*shared)))
    return EngineInfo(name, min(known, default=131_072), VOCABULARY_SIZE, "vllm", adapters)


async def _look(upstream: Upstream, wanted: Wanted) -> _Found | None:
    """What a server has; None, with `why_down` set, while it does not answer or is not well."""
    where = upstream.address.text
    try:
        if not await upstream.is_healthy():
            upstream.why_down = "its /health is not 200"
            return None
        cards = await upstream.models()
    except BrokenError as error:
        upstream.why_down = str(error)
        return None
    except RefusedError as error:
        if error.status in (401, 403):
            raise ConfigError(f"{where} wants an API key; set HARMONIUM_VLLM_API_KEY") from None
        if error.status < 500:
            raise ConfigError(f"{where} is no vLLM: its /v1/models says {error.status}") from None
        upstream.why_down = f"its /v1/models says {error.status}"
        return None
    except UpstreamError as error:
        raise ConfigError(f"{where} is no vLLM: {error}") from None
    model = _choose(where, cards, wanted.names)
    adapters = tuple(card.name for card in cards if card.parent is not None and card.parent == model.name)
    return _Found(upstream, model, adapters)


def _choose(where: str, cards: Sequence[ModelCard], names: Sequence[str]) -> ModelCard:
    models = [card for card in cards if card.parent is None]
    meant = [card for card in models if not names or card.name in names or card.root in names]
    # vLLM lists a model under each name that it was given; the first one will do.
    with contextlib.suppress(IndexError):
        if len({card.root for card in meant}) == 1:
            return meant[0]
    there = ", ".join(f"{card.name!r} (from {card.root!r})" for card in models) or "nothing"
    named = f"not {names[0]!r}" if names else "and none of them is named"
    raise ConfigError(f"{where} serves {there}, {named}; give one of these names as MODEL")
