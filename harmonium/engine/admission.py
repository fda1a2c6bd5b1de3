"""What every engine checks before it takes a request."""

from __future__ import annotations

from harmonium.engine.protocol import EngineInfo, Request
from harmonium.errors import PromptTooLong, RequestError


def check_request(request: Request, info: EngineInfo) -> None:
    """Refuse a request that could never be served.

    Raises PromptTooLong when prompt plus one token exceed the context, RequestError for an empty prompt, for
    token ids outside the vocabulary, for an adapter that is not there and for an answer that is over.
    """
    check_adapter(request.adapter, info)
    num_prompt = len(request.token_ids)
    if num_prompt == 0:
        raise RequestError("the prompt is empty; expected at least one token")
    if num_prompt >= info.context_length:
        raise PromptTooLong(
            f"prompt has {num_prompt:,} tokens; the context is {info.context_length:,}, "
            "of which the answer needs at least one"
        )
    check_token_ids(request.token_ids, info.vocabulary_size, "prompt")
    if request.answer_token_ids:
        _check_answer(request, info)
    for token_id in request.sampling.logit_bias:
        if token_id >= info.vocabulary_size:
            raise RequestError(
                f"logit_bias names token {token_id:,}; the vocabulary has {info.vocabulary_size:,}"
            )


def _check_answer(request: Request, info: EngineInfo) -> None:
    """Raises RequestError for a begun answer behind which nothing can come."""
    params, answer = request.sampling, request.answer_token_ids
    check_token_ids(answer, info.vocabulary_size, "answer")
    room = info.context_length - len(request.token_ids)
    limit = room if params.max_tokens is None else min(room, params.max_tokens)
    if len(answer) >= limit:
        raise RequestError(f"the answer has {len(answer):,} tokens already; the limit is {limit:,}")
    if not params.ignore_stop and not request.stop_token_ids.isdisjoint(answer):
        raise RequestError("the answer has a stop token already; nothing follows it")


def refuse_begun_answer(request: Request, engine: str) -> None:
    """For engines that cannot go on as if nothing had happened. Raises RequestError."""
    if request.answer_token_ids:
        raise RequestError(f"{engine} does not go on with an answer that was begun elsewhere")


def check_adapter(name: str | None, info: EngineInfo) -> None:
    """Raises RequestError for an adapter that the engine does not have."""
    if name is not None and name not in info.adapters:
        there = ", ".join(info.adapters) or "none"
        raise RequestError(f"there is no adapter {name[:200]!r}; there is {there}")


def check_token_ids(token_ids: tuple[int, ...], vocabulary_size: int, name: str) -> None:
    """Raises RequestError for the first id that is not in the vocabulary."""
    if min(token_ids) >= 0 and max(token_ids) < vocabulary_size:
        return
    place, token_id = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < vocabulary_size)
    raise RequestError(f"{name} token {place} is {token_id:,}; expected 0 to {vocabulary_size - 1:,}")
