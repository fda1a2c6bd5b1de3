"""/tokenize, /detokenize, and /v1/chat/completions/render: what the model reads, for a closer look."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from harmonium.errors import ApiError, PromptTooLong
from harmonium.harmony.render import render_prompt
from harmonium.harmony.vocabulary import VOCABULARY_SIZE, vocabulary
from harmonium.server.body import ignored_headers, read_json, read_model, request_schema, validated
from harmonium.server.chat_input import chat_requests
from harmonium.server.chat_schema import ChatCompletionRequest, without_effect
from harmonium.server.completions_schema import DetokenizeRequest, TokenizeRequest
from harmonium.server.sse import encode_json
from harmonium.server.state import ServerState, state_of

router = APIRouter()


@router.post("/tokenize", response_class=Response, openapi_extra=dict(request_schema(TokenizeRequest)))
async def tokenize(request: Request) -> Response:
    """Token ids of `prompt` (or `text`) as ordinary text; or of `messages`, as a chat would render them."""
    state = state_of(request)
    data = await read_json(request)
    if isinstance(data, dict) and "messages" in data:
        body = validated(ChatCompletionRequest, data)
        token_ids = await asyncio.to_thread(_rendered, state, body)
    else:
        fields = validated(TokenizeRequest, data)
        state.check_model(fields.model)
        text = fields.text if fields.prompt is None else fields.prompt
        if text is None:
            raise ApiError("prompt is missing", param="prompt", code="missing_required_parameter")
        token_ids = await asyncio.to_thread(vocabulary().encode, text)
    engine = state.loaded_engine
    return _json(
        {
            "tokens": token_ids,
            "count": len(token_ids),
            "max_model_len": None if engine is None else engine.info.context_length,
        }
    )


@router.post("/detokenize", response_class=Response, openapi_extra=dict(request_schema(DetokenizeRequest)))
async def detokenize(request: Request) -> Response:
    """The text of token ids; special tokens by their names, what is no text as U+FFFD."""
    body = await read_model(request, DetokenizeRequest)
    state_of(request).check_model(body.model)
    wrong = next((token_id for token_id in body.tokens if not 0 <= token_id < VOCABULARY_SIZE), None)
    if wrong is not None:
        raise ApiError(f"tokens holds {wrong:,}; expected 0 to {VOCABULARY_SIZE - 1:,}", param="tokens")
    return _json({"prompt": await asyncio.to_thread(vocabulary().decode, body.tokens)})


@router.post(
    "/v1/chat/completions/render",
    response_class=Response,
    openapi_extra=dict(request_schema(ChatCompletionRequest)),
)
async def render_chat(request: Request) -> Response:
    """The prompt of this chat completion: {"token_ids": [...], "text": "..."}. Nothing is generated."""
    state = state_of(request)
    body = await read_model(request, ChatCompletionRequest)
    token_ids = await asyncio.to_thread(_rendered, state, body)
    answer = {"token_ids": token_ids, "text": vocabulary().decode(token_ids)}
    return _json(answer, ignored_headers(body, without_effect(body)))


def _rendered(state: ServerState, body: ChatCompletionRequest) -> list[int]:
    """The prompt's tokens, if the request as a whole is one that would be served. Raises as chat does."""
    state.check_model(body.model)
    token_ids = render_prompt(chat_requests(state, body, "render")[0].conversation)
    engine = state.loaded_engine
    if engine is not None and len(token_ids) >= engine.info.context_length:
        raise PromptTooLong(
            f"prompt has {len(token_ids):,} tokens; the context is {engine.info.context_length:,}, "
            "of which the answer needs at least one"
        )
    return token_ids


def _json(answer: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(answer), headers=headers, media_type="application/json")
