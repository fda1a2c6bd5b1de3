"""The body of POST /v1/completions. What each field does, and which are refused, says docs/api.md."""

from __future__ import annotations

from collections.abc import Iterator

from harmonium.errors import ApiError
from harmonium.harmony.vocabulary import vocabulary
from harmonium.server.body import RequestModel
from harmonium.server.chat_schema import unsupported
from harmonium.server.config import Limits
from harmonium.server.sampling_fields import SamplingFields, check_counts, check_most

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionRequest(SamplingFields):
    """prompt: a text, a list of texts, a list of token ids, or a list of such lists."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None


def check_completion(body: CompletionRequest, limits: Limits) -> None:
    """Raises ApiError for what this server does not do, and for more than it does."""
    check_counts(body, limits)
    if body.suffix:
        raise unsupported("suffix", "the models continue a text, they do not fill gaps")
    if body.best_of not in (None, body.n or 1):
        raise unsupported("best_of", "expected the same number as n")
    if body.prompt_logprobs is not None:
        raise unsupported("prompt_logprobs", "use echo with logprobs")
    if body.include_stop_str_in_output:
        raise unsupported("include_stop_str_in_output", "the stop text is named by stop_reason")
    if body.logprobs is not None:
        check_most("logprobs", body.logprobs, limits.top_logprobs)
    if body.max_tokens is not None and body.max_tokens < (0 if body.echo else 1):
        raise ApiError(f"max_tokens is {body.max_tokens}; expected at least 1", param="max_tokens")
    if body.echo and body.stream and body.logprobs is not None:
        raise unsupported("stream", "echo with logprobs comes in one piece")


def prompts_of(body: CompletionRequest, limits: Limits) -> list[tuple[int, ...]]:
    """The token ids of each prompt. No special token comes from text. Raises ApiError."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [tuple(vocabulary().encode(prompt))]
    if prompt and isinstance(prompt[0], int):
        return [tuple(_ids(prompt))]
    check_most("prompt", len(prompt), limits.prompts, least=1, unit="prompts")
    check_most("prompt", len(prompt) * (body.n or 1), limits.prompts, least=1, unit="answers")
    return [
        tuple(vocabulary().encode(item)) if isinstance(item, str) else tuple(_ids(item)) for item in prompt
    ]


def _ids(prompt: object) -> Iterator[int]:
    assert isinstance(prompt, list), "the schema knows nothing else"
    return (token_id for token_id in prompt if isinstance(token_id, int))


class TokenizeRequest(RequestModel):
    """A text as ordinary text, or messages as the chat would read them."""

    model: str | None = None
    prompt: str | None = None
    text: str | None = None


class DetokenizeRequest(RequestModel):
    """Token ids; special ones come back by their names."""

    model: str | None = None
    tokens: list[int]
