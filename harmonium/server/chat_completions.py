"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from harmonium.chat import ChatRequest
from harmonium.chat_events import ChatResult, Finish, TurnStarted
from harmonium.harmony.render import render_prompt
from harmonium.server.body import ignored_headers, read_model, request_schema
from harmonium.server.chat_input import chat_requests
from harmonium.server.chat_output import ChoiceStream, OutputOptions, choice_json, usage_json
from harmonium.server.chat_schema import ChatCompletionRequest, without_effect
from harmonium.server.merge import merge
from harmonium.server.sse import DONE, encode_json, event, event_stream, unless_gone
from harmonium.server.state import ServerState, cache_salt, state_of
from harmonium.server.tool_input import custom_names
from harmonium.server.turns import Turn, check_finish, close_turns, open_turns

router = APIRouter()


@router.post(
    "/v1/chat/completions", response_class=Response, openapi_extra=dict(request_schema(ChatCompletionRequest))
)
async def create_chat_completion(request: Request) -> Response:
    """OpenAI's Chat Completions API; docs/api.md lists every field and what differs."""
    state = state_of(request)
    body = await read_model(request, ChatCompletionRequest)
    model = state.check_model(body.model)
    completion_id = f"chatcmpl-{uuid.uuid4().hex}"
    salt = cache_salt(state.owner_of(request.headers), body.cache_salt)
    requests = await asyncio.to_thread(chat_requests, state, body, completion_id, salt)
    completion = _Completion(state, body, requests, completion_id, model, int(time.time()))
    headers = ignored_headers(body, without_effect(body))
    if not body.stream:
        answer = await unless_gone(request, completion.whole())
        return Response(encode_json(answer), headers=headers, media_type="application/json")
    chunks = completion.chunks(await open_turns(state, requests))
    return event_stream(request, chunks, headers)


@dataclass(frozen=True, slots=True)
class _Completion:
    """One request on its way to an answer."""

    state: ServerState
    body: ChatCompletionRequest
    requests: list[ChatRequest]
    completion_id: str
    model: str
    created: int

    @property
    def options(self) -> OutputOptions:
        """What the client wants to see."""
        body = self.body
        return OutputOptions(
            reasoning_fields=self.state.config.reasoning_fields
            if body.include_reasoning is not False
            else (),
            has_logprobs=bool(body.logprobs),
            has_reasoning_logprobs=bool(body.reasoning_logprobs),
            has_token_ids=bool(body.return_token_ids),
            has_tools=bool(body.tools),
            custom_tools=custom_names(body.tools),
        )

    def envelope(self, kind: str) -> dict[str, Any]:
        """What answer and chunks have in common."""
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def prompt_token_ids(self) -> list[int]:
        """What the model reads, for clients that ask for it."""
        return render_prompt(self.requests[0].conversation)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece. Raises what the turns raise."""
        turns = await open_turns(self.state, self.requests)
        try:
            results = await _results(turns)
        finally:
            await close_turns(turns)
        options = self.options
        answer = self.envelope("chat.completion")
        answer["choices"] = [choice_json(index, result, options) for index, result in enumerate(results)]
        answer["usage"] = usage_json([result.usage for result in results])
        answer["service_tier"] = "default"
        if self.body.metadata is not None:
            answer["metadata"] = self.body.metadata
        if results[0].warnings:
            answer["warnings"] = list(results[0].warnings)
        if options.has_token_ids:
            answer["prompt_token_ids"] = self.prompt_token_ids()
        return answer

    async def chunks(self, turns: list[Turn]) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; closing the generator aborts the turns."""
        try:
            streams = [ChoiceStream(index, self.options) for index in range(len(turns))]
            for index, (stream, turn) in enumerate(zip(streams, turns, strict=True)):
                first = stream.first(turn.started.prompt_tokens)
                yield self._chunk(stream, first, turn.started if index == 0 else None)
            async for index, chat_event in merge([aiter(turn) for turn in turns]):
                if isinstance(chat_event, Finish):
                    check_finish(chat_event)
                for choice in streams[index].push(chat_event):
                    yield self._chunk(streams[index], choice)
            if self.body.wants_usage_event:
                usage = usage_json([stream.usage for stream in streams])
                yield event({**self.envelope("chat.completion.chunk"), "choices": [], "usage": usage})
            yield DONE
        finally:
            await close_turns(turns)

    def _chunk(
        self, stream: ChoiceStream, choice: dict[str, Any], started: TurnStarted | None = None
    ) -> bytes:
        """started: for the first chunk of all, which says what is known before the answer."""
        chunk = self.envelope("chat.completion.chunk")
        chunk["choices"] = [choice]
        if self.body.wants_running_usage:
            chunk["usage"] = usage_json([stream.usage])
        elif self.body.wants_usage_event:
            chunk["usage"] = None
        if started is not None and started.warnings:
            chunk["warnings"] = list(started.warnings)
        if started is not None and self.body.return_token_ids:
            chunk["prompt_token_ids"] = self.prompt_token_ids()
        return event(chunk)


async def _results(turns: list[Turn]) -> list[ChatResult]:
    """All results; when one fails, or the caller is cancelled, the others end too."""
    tasks = [asyncio.create_task(turn.result()) for turn in turns]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
