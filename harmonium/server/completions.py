"""POST /v1/completions: text or token ids in, their continuation out, with no conversation around it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from harmonium.engine.protocol import Request as EngineRequest
from harmonium.harmony.vocabulary import END_OF_TEXT, STOP_TOKEN_IDS, vocabulary
from harmonium.server.body import ignored_headers, read_model, request_schema
from harmonium.server.completion_text import CompletionText, LogprobList
from harmonium.server.completions_schema import (
    DEFAULT_MAX_TOKENS,
    CompletionRequest,
    check_completion,
    prompts_of,
)
from harmonium.server.merge import merge
from harmonium.server.raw_turns import RawTurn
from harmonium.server.sampling_fields import sampling_params
from harmonium.server.sse import DONE, encode_json, event, event_stream, unless_gone
from harmonium.server.state import ServerState, cache_salt, state_of
from harmonium.stop_text import TextPiece

router = APIRouter()

_STOPS = STOP_TOKEN_IDS | {END_OF_TEXT}

Json = dict[str, Any]


@router.post(
    "/v1/completions", response_class=Response, openapi_extra=dict(request_schema(CompletionRequest))
)
async def create_completion(request: Request) -> Response:
    """OpenAI's Completions API, with token ids in and out; docs/api.md lists every field."""
    state = state_of(request)
    body = await read_model(request, CompletionRequest)
    model = state.check_model(body.model)
    check_completion(body, state.config.limits)
    prompts = await asyncio.to_thread(prompts_of, body, state.config.limits)
    salt = cache_salt(state.owner_of(request.headers), body.cache_salt)
    completion = _Completion(state, body, f"cmpl-{uuid.uuid4().hex}", model, salt)
    completion.open(prompts)
    headers = ignored_headers(body)
    if body.stream:
        return event_stream(request, completion.chunks(), headers)
    answer = await unless_gone(request, completion.whole())
    return Response(encode_json(answer), headers=headers, media_type="application/json")


@dataclass(frozen=True, slots=True)
class _Step:
    """What an event of the engine adds to an answer."""

    pieces: tuple[TextPiece, ...]
    token_ids: list[int]


class _Choice:
    """One answer on its way: the turn, and what is made of its tokens."""

    def __init__(self, index: int, turn: RawTurn, body: CompletionRequest) -> None:
        self.index = index
        self.turn = turn
        self.body = body
        stops = frozenset() if turn.request.sampling.ignore_stop else turn.request.stop_token_ids
        shows_special = body.skip_special_tokens is False
        self.text = CompletionText(body.stop_texts(), stops, shows_special)
        self.logprobs = LogprobList()

    @property
    def prompt_text(self) -> str:
        """What `echo` puts before the answer."""
        return vocabulary().decode(self.turn.request.token_ids)

    async def steps(self) -> AsyncGenerator[_Step, None]:
        """What is new, event by event, until the answer has ended; the turn is aborted if it has not."""
        text = self.text
        async with aclosing(self.turn.events()) as events:
            async for token_event in events:
                num_before = len(text.token_ids)
                pieces = tuple(text.push(token_event))
                yield _Step(pieces, text.token_ids[num_before:])
                if text.finish_reason is not None:
                    return

    async def whole(self) -> Json:
        """The choice in one piece."""
        pieces: list[TextPiece] = []
        if self.body.echo:
            pieces.append(TextPiece(self.prompt_text, await self.turn.prompt_tokens()))
        async for step in self.steps():
            pieces += step.pieces
        return self.record(pieces)

    def record(self, pieces: Sequence[TextPiece], token_ids: list[int] | None = None) -> Json:
        """A choice of these pieces. token_ids: of a chunk; None: the whole answer's, and the prompt's."""
        tokens = [token for piece in pieces for token in piece.tokens]
        choice: Json = {
            "index": self.index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self.logprobs.of(tokens) if self.body.logprobs is not None else None,
            "finish_reason": self.text.finish_reason,
            "stop_reason": self.text.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = self.text.token_ids if token_ids is None else token_ids
            if token_ids is None:
                choice["prompt_token_ids"] = list(self.turn.request.token_ids)
        return choice

    def first(self) -> Json | None:
        """The chunk that holds what is known before the answer, if the request asks for any of it."""
        if not (self.body.echo or self.body.return_token_ids):
            return None
        text = self.prompt_text if self.body.echo else ""
        self.logprobs.skip(text)
        choice = self.record([TextPiece(text, ())], [])
        if self.body.return_token_ids:
            choice["prompt_token_ids"] = list(self.turn.request.token_ids)
        return choice


@dataclass(slots=True)
class _Completion:
    """One request on its way to an answer."""

    state: ServerState
    body: CompletionRequest
    completion_id: str
    model: str
    cache_salt: str
    created: int = field(default_factory=lambda: int(time.time()))
    choices: list[_Choice] = field(default_factory=list)

    def open(self, prompts: list[tuple[int, ...]]) -> None:
        """Take a slot for every answer, or none. Raises ApiError and what `Engine.admit` raises."""
        turns: list[RawTurn] = []
        try:
            for prompt in prompts:
                for choice in range(self.body.n or 1):
                    turn = self._turn(prompt, choice, len(turns))
                    turn.open()
                    turns.append(turn)
        except BaseException:
            for turn in turns:
                turn.give_back()
            raise
        self.choices = [_Choice(index, turn, self.body) for index, turn in enumerate(turns)]

    def _turn(self, prompt: tuple[int, ...], choice: int, number: int) -> RawTurn:
        body = self.body
        wished = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        sampling = sampling_params(body, choice, max(1, wished), body.logprobs, bool(body.ignore_eos))
        request = EngineRequest(
            f"{self.completion_id}-{number}",
            prompt,
            sampling,
            stop_token_ids=_STOPS | frozenset(body.stop_token_ids or ()),
            cache_salt=self.cache_salt,
            adapter=self.state.adapter_of(body.model),
        )
        return RawTurn(self.state, request, wished > 0, body.logprobs if body.echo else None)

    async def whole(self) -> Json:
        """The answer in one piece. Raises what an answer raises; the others end then."""
        tasks = [asyncio.create_task(choice.whole()) for choice in self.choices]
        try:
            records = list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.close()
        return {**self._envelope(), "choices": records, "usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; closing the generator aborts it."""
        try:
            for choice in self.choices:
                if (first := choice.first()) is not None:
                    yield self._chunk(first)
            async for index, step in merge([choice.steps() for choice in self.choices]):
                choice = self.choices[index]
                if step.pieces or step.token_ids or choice.text.finish_reason is not None:
                    yield self._chunk(choice.record(step.pieces, step.token_ids))
            if self.body.wants_usage_event:
                yield event({**self._envelope(), "choices": [], "usage": self._usage()})
            yield DONE
        finally:
            await self.close()

    def _chunk(self, choice: Json) -> bytes:
        chunk = {**self._envelope(), "choices": [choice]}
        if self.body.wants_running_usage:
            chunk["usage"] = self._usage()
        elif self.body.wants_usage_event:
            chunk["usage"] = None
        return event(chunk)

    def _envelope(self) -> Json:
        return {
            "id": self.completion_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _usage(self) -> Json:
        """Each prompt counts once, whatever n is."""
        firsts = self.choices[:: self.body.n or 1]
        prompt = sum(len(choice.turn.request.token_ids) for choice in firsts)
        answer = sum(len(choice.text.token_ids) for choice in self.choices)
        cached = sum(choice.turn.num_cached for choice in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def close(self) -> None:
        """Give every slot back."""
        await asyncio.gather(*(choice.turn.aclose() for choice in self.choices), return_exceptions=True)
