"""The fields that choose tokens, the same in Chat Completions and Completions, and what they mean here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harmonium.errors import ApiError
from harmonium.model.batch import SamplingParams
from harmonium.server.body import RequestModel
from harmonium.server.config import Limits


class StreamOptions(RequestModel):
    """include_usage: one more event with the usage. continuous_usage_stats: usage in every event (vLLM)."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(RequestModel):
    """What both APIs share. Ranges are those of SamplingParams; None is the default everywhere."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None

    def stop_texts(self) -> tuple[str, ...]:
        """The stop strings, as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage_event(self) -> bool:
        """Whether a stream ends with an event that holds the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every event of a stream holds the usage so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


def sampling_params(
    fields: SamplingFields,
    choice: int,
    max_tokens: int | None,
    logprobs: int | None,
    ignore_stop: bool = False,
) -> SamplingParams:
    """How the choice of this number (from 0) draws its tokens. Raises RequestError for values out of range.

    A seed makes choices differ among themselves and each the same every time: choice i draws with seed + i.
    """
    given: dict[str, Any] = {
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": 0 if fields.top_k == -1 else fields.top_k,
        "min_p": fields.min_p,
        "presence_penalty": fields.presence_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "repetition_penalty": fields.repetition_penalty,
        "logit_bias": _logit_bias(fields.logit_bias),
        "seed": None if fields.seed is None else fields.seed + choice,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "ignore_stop": ignore_stop,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    wrong = next((key for key in given if not (key.isascii() and key.isdecimal() and len(key) <= 10)), None)
    if wrong is not None:
        raise ApiError(
            f"logit_bias names {wrong[:40]!r}; expected token ids as decimal text", param="logit_bias"
        )
    return {int(key): bias for key, bias in given.items()}


def check_counts(fields: SamplingFields, limits: Limits) -> None:
    """Raises ApiError when the request asks for more of something than this server gives."""
    check_most("n", 1 if fields.n is None else fields.n, limits.n, least=1)
    stops = fields.stop_texts()
    check_most("stop", len(stops), limits.stop)
    for text in stops:
        if not text:
            raise ApiError("stop holds an empty text; expected at least one character", param="stop")
        check_most("stop", len(text), limits.text_chars, unit="characters")
    check_most("stop_token_ids", len(fields.stop_token_ids or ()), limits.stop)
    check_most("logit_bias", len(fields.logit_bias or ()), limits.logit_bias)
    check_most("cache_salt", len(fields.cache_salt or ""), limits.text_chars, unit="characters")
    if fields.stream_options is not None and not fields.stream:
        raise ApiError("stream_options is given without stream: true", param="stream_options")


def check_most(name: str, count: int, most: int, least: int = 0, unit: str = "") -> None:
    """Raises ApiError when count is not from least to most."""
    if least <= count <= most:
        return
    what = "has" if unit or not least else "is"
    amount = f"{count:,} {unit or 'entries'}" if what == "has" else f"{count:,}"
    raise ApiError(
        f"{name} {what} {amount}; expected {least:,} to {most:,}", param=name, code="invalid_value"
    )
