"""What goes to vLLM's /v1/completions and what comes back: token ids in, token ids out.

Source of every field: vLLM 0.32.0, vllm/entrypoints/openai/completion/protocol.py and serving.py, and
vllm/v1/core/sched/utils.py for when an answer stops. `ignore_eos` with `stop_token_ids` makes it stop after
the tokens that are given and no others (its own stops are those of generation_config.json).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harmonium.engine.protocol import Token
from harmonium.errors import EngineError, RequestError, UpstreamError
from harmonium.model.batch import SamplingParams

_TOKEN_PREFIX = "token_id:"
"""How a token is written where `return_tokens_as_token_ids` is set."""

_SIGNED = 1 << 63


@dataclass(frozen=True, slots=True)
class Call:
    """One request to an upstream. allowed_token_ids: None: any token. bias: added to that of the sampling.

    max_tokens: at least 1. seed_step: makes the draws of a later part of an answer others than the first's.
    """

    request_id: str
    model: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    cache_salt: str = ""
    allowed_token_ids: tuple[int, ...] | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    seed_step: int = 0

    def body(self) -> bytes:
        """The JSON to be sent."""
        sampling = self.sampling
        fields: dict[str, Any] = {
            "model": self.model,
            "prompt": self.token_ids,
            "max_tokens": self.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "skip_special_tokens": False,
            "ignore_eos": True,
            "stop_token_ids": [] if sampling.ignore_stop else sorted(self.stop_token_ids),
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "repetition_penalty": sampling.repetition_penalty,
        }
        bias = _sum(sampling.logit_bias, self.bias)
        optional: dict[str, Any] = {
            "seed": None if sampling.seed is None else _signed(sampling.seed + self.seed_step),
            "logit_bias": {str(token_id): value for token_id, value in bias.items()} or None,
            "logprobs": sampling.logprobs,
            "return_tokens_as_token_ids": None if sampling.logprobs is None else True,
            "allowed_token_ids": self.allowed_token_ids,
            "cache_salt": self.cache_salt or None,
        }
        fields.update({name: value for name, value in optional.items() if value is not None})
        return json.dumps(fields, separators=(",", ":")).encode()


def _sum(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """Both biases together, cut to what vLLM takes."""
    total = {key: first.get(key, 0.0) + second.get(key, 0.0) for key in (*first, *second)}
    return {key: min(100.0, max(-100.0, value)) for key, value in total.items()}


def _signed(seed: int) -> int:
    """The seed among vLLM's, which are signed; it takes -1 for none."""
    value = (seed + _SIGNED) % (2 * _SIGNED) - _SIGNED
    return value if value != -1 else _SIGNED - 1


def score_body(model: str, token_ids: tuple[int, ...], num_top: int) -> bytes:
    """A request for the log-probabilities of a prompt's own tokens; vLLM writes one token beside them."""
    fields = {"model": model, "prompt": token_ids, "max_tokens": 1, "prompt_logprobs": num_top}
    return json.dumps(fields, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one event of vLLM's stream says. num_cached: None where it says nothing of it."""

    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    num_cached: int | None = None


class LostError(UpstreamError):
    """An upstream went away in the middle of an answer, which may go on elsewhere behind what is here."""


class RefusedError(Exception):
    """vLLM's error object: the request's fault (4xx) or its own. status: as vLLM gives it."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after

    def as_error(self) -> EngineError | RequestError:
        """What the client is told."""
        if self.status in (400, 413, 422):
            return RequestError(f"the request is refused by vLLM: {self}")
        if self.status in (401, 403):
            return UpstreamError("vLLM wants an API key (HARMONIUM_VLLM_API_KEY), or another one")
        return EngineError(str(self))


def refused(status: int, body: bytes, retry_after: str | None = None) -> RefusedError:
    """The error in an answer that is no 200."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    message = _message(value) or f"status {status}"
    seconds = float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
    return RefusedError(status, message, seconds)


def _message(value: object) -> str | None:
    """The text of vLLM's error object: {"error": {...}}, before 0.10.1 {"message": ...}."""
    inner = value.get("error", value) if isinstance(value, dict) else None
    if isinstance(inner, dict):
        inner = inner.get("message")
    return inner[:2000] if isinstance(inner, str) else None


def read_chunk(data: bytes, num_top: int | None, vocabulary_size: int) -> Chunk:
    """One event. num_top: alternatives that were asked for, None: no log-probabilities.

    Raises RefusedError for an error object, UpstreamError for what is no chunk of a completion.
    """
    value = _object(data)
    if "error" in value:
        code = value["error"].get("code") if isinstance(value["error"], dict) else None
        raise RefusedError(code if type(code) is int else 500, _message(value) or "no reason given")
    choices, usage = value.get("choices"), value.get("usage")
    num_cached = _cached(usage)
    if choices == []:
        return Chunk(num_cached=num_cached)
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise UpstreamError("an event of vLLM's stream has no choice in it")
    choice = choices[0]
    reason = choice.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise UpstreamError("an event of vLLM's stream has a finish_reason that is no text")
    token_ids = choice.get("token_ids")
    if token_ids is None and choice.get("text"):
        raise UpstreamError("vLLM's stream has no token_ids; version 0.11 or newer is needed")
    return Chunk(
        _tokens(token_ids or [], choice.get("logprobs"), num_top, vocabulary_size), reason, num_cached
    )


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise UpstreamError("an event of vLLM's stream is no JSON") from None
    if not isinstance(value, dict):
        raise UpstreamError("an event of vLLM's stream is no object")
    return value


def _cached(usage: object) -> int | None:
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    count = details.get("cached_tokens") if isinstance(details, dict) else None
    return count if type(count) is int and count >= 0 else None


def _tokens(
    token_ids: object, logprobs: object, num_top: int | None, vocabulary_size: int
) -> tuple[Token, ...]:
    if not isinstance(token_ids, list) or not all(
        type(token_id) is int and 0 <= token_id < vocabulary_size for token_id in token_ids
    ):
        raise UpstreamError("an event of vLLM's stream has token_ids that are none of gpt-oss's")
    if num_top is None or not token_ids:
        return tuple(Token(token_id) for token_id in token_ids)
    chosen = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    tops = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(chosen, list) or not isinstance(tops, list):
        raise UpstreamError("an event of vLLM's stream lacks the log-probabilities that were asked for")
    if len(chosen) != len(token_ids) or len(tops) != len(token_ids):
        raise UpstreamError("an event of vLLM's stream has not one log-probability for each token")
    return tuple(
        Token(token_id, _number(logprob), _alternatives(top, num_top))
        for token_id, logprob, top in zip(token_ids, chosen, tops, strict=True)
    )


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UpstreamError("an event of vLLM's stream has a log-probability that is no number")
    return float(value)


def _alternatives(top: object, num_top: int) -> tuple[tuple[int, float], ...]:
    """The likeliest, best first. vLLM puts the chosen token in front, whether it is one of them or not."""
    if num_top == 0:
        return ()
    if not isinstance(top, dict):
        raise UpstreamError("an event of vLLM's stream lacks the alternatives that were asked for")
    found = [(_token_id(name), _number(logprob)) for name, logprob in top.items()]
    return tuple(sorted(found, key=lambda pair: -pair[1])[:num_top])


def _token_id(name: str) -> int:
    digits = name.removeprefix(_TOKEN_PREFIX)
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 10):
        raise UpstreamError("an event of vLLM's stream names tokens by their text, not by their ids")
    return int(digits)


def read_scores(data: bytes, token_ids: tuple[int, ...], num_top: int) -> tuple[Token, ...]:
    """The answer to `score_body`. Raises UpstreamError.

    `prompt_logprobs` is a list with, for each token, {id: {"logprob": ..., "rank": ...}}: the token itself
    and the likeliest; null for the first.
    """
    value = _object(data)
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    entries = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        raise UpstreamError("vLLM gave no log-probability for each token of the prompt")
    scores = [Token(token_ids[0])]
    for token_id, entry in zip(token_ids[1:], entries[1:], strict=True):
        found = {
            _token_id(name): _number(one.get("logprob") if isinstance(one, dict) else None)
            for name, one in (entry if isinstance(entry, dict) else {}).items()
        }
        if token_id not in found:
            raise UpstreamError("vLLM gave no log-probability for a token of the prompt")
        best = sorted(found.items(), key=lambda pair: -pair[1])[:num_top]
        scores.append(Token(token_id, found[token_id], tuple(best)))
    return tuple(scores)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """An entry of /v1/models. root: where vLLM took it from. parent: None for the model itself; the model
    that a LoRA adapter is for.
    """

    name: str
    root: str
    parent: str | None
    max_model_len: int | None


def read_models(data: bytes) -> tuple[ModelCard, ...]:
    """The answer of /v1/models. Raises UpstreamError."""
    entries = _object(data).get("data")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in entries
    ):
        raise UpstreamError("its /v1/models is no list of models")
    return tuple(
        ModelCard(
            entry["id"],
            str(entry.get("root") or ""),
            entry["parent"] if isinstance(entry.get("parent"), str) else None,
            entry["max_model_len"] if type(entry.get("max_model_len")) is int else None,
        )
        for entry in entries
    )
