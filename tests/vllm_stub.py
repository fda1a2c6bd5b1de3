"""A server that speaks vLLM's protocol over an engine of ours: a script or a tiny model in place of vLLM.

It takes the fields of vLLM 0.32.0's CompletionRequest and refuses others, answers with its shapes and its
error objects, and notices at once when its client leaves.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from harmonium.engine import Engine, ScriptedEngine, Token, TokenEvent
from harmonium.engine import Request as EngineRequest
from harmonium.engine.protocol import PromptScorer
from harmonium.errors import EngineBusy, HarmoniumError
from harmonium.harmony.vocabulary import VOCABULARY_SIZE
from harmonium.model.batch import SamplingParams
from harmonium.server.serve import listen
from tests.scripted_chat import gen
from tests.server.live import wait_until

FIELDS = (
    "model prompt max_tokens stream stream_options return_token_ids skip_special_tokens ignore_eos "
    "stop_token_ids temperature top_k top_p min_p presence_penalty frequency_penalty repetition_penalty seed "
    "logit_bias logprobs return_tokens_as_token_ids allowed_token_ids cache_salt prompt_logprobs"
)


@dataclass
class Stub:
    """One vLLM. bodies: of the completions that were asked for. status: of /health. key: None: none is asked
    for. has_details: it was started with --enable-prompt-tokens-details.
    """

    engine: Engine
    model: str = "scripted"
    root: str = "scripted"
    adapters: tuple[str, ...] = ()
    max_model_len: int | None = None
    status: int = 200
    key: str | None = None
    has_details: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[Response] = field(default_factory=list)
    """Answers to the next completions, in place of tokens."""

    def models(self) -> dict[str, Any]:
        length = self.max_model_len or self.engine.info.context_length
        card = {"id": self.model, "object": "model", "root": self.root, "parent": None}
        cards = [{**card, "max_model_len": length}]
        cards += [
            {"id": name, "object": "model", "root": name, "parent": self.model, "max_model_len": None}
            for name in self.adapters
        ]
        return {"object": "list", "data": cards}


def error_object(status: int, message: str) -> dict[str, Any]:
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def refusal(status: int, message: str, **headers: str) -> Response:
    return JSONResponse(error_object(status, message), status, headers)


def _engine_request(stub: Stub, body: dict[str, Any], number: int) -> EngineRequest:
    seed = body.get("seed")
    sampling = SamplingParams(
        temperature=body.get("temperature", 1.0),
        top_k=body.get("top_k", 0),
        top_p=body.get("top_p", 1.0),
        min_p=body.get("min_p", 0.0),
        seed=seed,
        presence_penalty=body.get("presence_penalty", 0.0),
        frequency_penalty=body.get("frequency_penalty", 0.0),
        repetition_penalty=body.get("repetition_penalty", 1.0),
        logit_bias={int(key): bias for key, bias in body.get("logit_bias", {}).items()},
        logprobs=body.get("logprobs"),
        max_tokens=body["max_tokens"],
        ignore_stop=body["ignore_eos"] and not body["stop_token_ids"],
    )
    allowed = body.get("allowed_token_ids")
    model = body["model"]
    return EngineRequest(
        f"stub-{number}",
        tuple(body["prompt"]),
        sampling,
        frozenset(body["stop_token_ids"]),
        body.get("cache_salt", ""),
        None if allowed is None else _Allowed(frozenset(allowed)),
        None if model == stub.model else model,
    )


@dataclass(frozen=True)
class _Allowed:
    """`allowed_token_ids` as a constraint of ours, and its state: it has none."""

    token_ids: frozenset[int]
    is_complete = False

    def start(self) -> _Allowed:
        return self

    def mask(self) -> npt.NDArray[np.uint32]:
        bits = np.zeros(-(-VOCABULARY_SIZE // 32) * 32, np.uint8)
        bits[list(self.token_ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def forced_tokens(self) -> list[int]:
        return []

    def advance(self, token_id: int) -> None:
        assert token_id in self.token_ids

    def rollback(self, num_tokens: int) -> None:
        pass

    def copy(self) -> _Allowed:
        return self


def _logprobs(tokens: tuple[Token, ...], num_top: int | None) -> dict[str, Any] | None:
    """The chosen token in front, then the likeliest, as vLLM has them."""
    if num_top is None:
        return None
    tops = []
    for token in tokens:
        top = {f"token_id:{token.token_id}": token.logprob}
        top.update({f"token_id:{other}": logprob for other, logprob in token.top_logprobs[:num_top]})
        tops.append(top)
    return {
        "text_offset": [0] * len(tokens),
        "token_logprobs": [token.logprob for token in tokens],
        "tokens": [f"token_id:{token.token_id}" for token in tokens],
        "top_logprobs": tops,
    }


def _chunk(body: dict[str, Any], event: TokenEvent, is_first: bool) -> dict[str, Any]:
    reasons = {"aborted": "abort"}
    reason = event.finish_reason and reasons.get(event.finish_reason, event.finish_reason)
    is_stop = reason == "stop" and bool(event.tokens)
    choice = {
        "index": 0,
        "text": "x" * len(event.tokens),
        "logprobs": _logprobs(event.tokens, body.get("logprobs")),
        "finish_reason": reason,
        "stop_reason": event.tokens[-1].token_id if is_stop else None,
        "prompt_token_ids": body["prompt"] if is_first else None,
        "token_ids": [token.token_id for token in event.tokens],
    }
    return {"id": "cmpl-stub", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}


async def _stream(
    stub: Stub, body: dict[str, Any], events: AsyncGenerator[TokenEvent, None]
) -> AsyncGenerator[bytes, None]:
    def sent(value: Any) -> bytes:
        return b"data: %b\n\n" % json.dumps(value).encode()

    num_tokens = num_cached = 0
    is_first = True
    async with aclosing(events):
        async for event in events:
            num_tokens += len(event.tokens)
            num_cached = max(num_cached, event.num_cached_tokens)
            if event.finish_reason == "error":
                yield sent(error_object(500, event.error or "?"))
                break
            yield sent(_chunk(body, event, is_first))
            is_first = False
            if event.finish_reason is not None:
                usage: dict[str, Any] = {
                    "prompt_tokens": len(body["prompt"]),
                    "completion_tokens": num_tokens,
                }
                if stub.has_details:
                    usage["prompt_tokens_details"] = {"cached_tokens": num_cached}
                yield sent({"id": "cmpl-stub", "object": "text_completion", "choices": [], "usage": usage})
                break
    yield b"data: [DONE]\n\n"


async def _score(stub: Stub, body: dict[str, Any]) -> Response:
    engine = stub.engine
    assert isinstance(engine, PromptScorer)
    num_top = body["prompt_logprobs"]
    adapter = None if body["model"] == stub.model else body["model"]
    scores = await engine.score(tuple(body["prompt"]), num_top, adapter)
    entries: list[dict[str, Any] | None] = [None]
    for token in scores[1:]:
        pairs = {token.token_id: token.logprob, **dict(token.top_logprobs)}
        entries.append({str(key): {"logprob": value, "rank": 1} for key, value in pairs.items()})
    choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": entries}
    return JSONResponse({"id": "cmpl-stub", "choices": [choice], "usage": {}})


class VllmServer:
    """Any number of stubs on one socket, each under a path of its own, in a thread."""

    def __init__(self) -> None:
        self.stubs: dict[str, Stub] = {}
        self._numbers = itertools.count()
        routes = [
            Route("/{stub}/health", self._health),
            Route("/{stub}/v1/models", self._models),
            Route("/{stub}/v1/completions", self._completions, methods=["POST"]),
        ]
        self._listener = listen("127.0.0.1", 0)
        self.app = Starlette(routes=routes)
        config = uvicorn.Config(
            self.app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), daemon=True)

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self._server.started)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._listener.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def add(self, stub: Stub) -> str:
        """Serve it; its address."""
        name = str(next(self._numbers))
        self.stubs[name] = stub
        return f"{self.url}/{name}"

    def _of(self, request: Request) -> Stub:
        return self.stubs[request.path_params["stub"]]

    async def _health(self, request: Request) -> Response:
        return Response(status_code=self._of(request).status)

    async def _models(self, request: Request) -> Response:
        stub = self._of(request)
        return self._locked(request, stub) or JSONResponse(stub.models())

    def _locked(self, request: Request, stub: Stub) -> Response | None:
        has_key = stub.key is None or request.headers.get("authorization") == f"Bearer {stub.key}"
        return None if has_key else JSONResponse({"error": "Unauthorized"}, 401)

    async def _completions(self, request: Request) -> Response:
        stub = self._of(request)
        body = json.loads(await request.body())
        stub.bodies.append(body)
        assert set(body) <= set(FIELDS.split()), body
        if (locked := self._locked(request, stub)) is not None:
            return locked
        if stub.refusals:
            return stub.refusals.pop(0)
        if body["model"] not in (stub.model, *stub.adapters):
            return refusal(404, f"The model `{body['model']}` does not exist.")
        if "prompt_logprobs" in body:
            return await _score(stub, body)
        assert body["return_token_ids"] and body["stream"] and body["skip_special_tokens"] is False
        try:
            asked = _engine_request(stub, body, len(stub.bodies))
            stub.engine.admit(asked)
        except EngineBusy as error:
            return refusal(503, str(error))
        except HarmoniumError as error:
            return refusal(error.status, str(error))
        stream = _stream(stub, body, stub.engine.generate(asked))
        return _Closing(stream, media_type="text/event-stream")


class _Closing(StreamingResponse):
    """Closes its source when the client leaves, in the same moment."""

    def __init__(self, source: AsyncGenerator[bytes, None], **options: Any) -> None:
        super().__init__(source, **options)
        self._source = source

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


@contextmanager
def vllm_server(*stubs: Stub) -> Iterator[tuple[VllmServer, list[str]]]:
    """A running server with these stubs, and their addresses."""
    server = VllmServer()
    server.start()
    try:
        yield server, [server.add(stub) for stub in stubs]
    finally:
        server.close()


def continuing(text: str, seconds_per_event: float = 0.0) -> ScriptedEngine:
    """Writes this answer, as a model would: behind a part of it what follows."""
    tokens = gen(text)

    def rest(request: EngineRequest) -> tuple[int, ...]:
        prompt = request.token_ids
        lengths = range(min(len(tokens), len(prompt)), 0, -1)
        written = next((n for n in lengths if prompt[len(prompt) - n :] == tokens[:n]), 0)
        return tokens[written:]

    return ScriptedEngine(rest, seconds_per_event=seconds_per_event)


def run_forever(text: str, seconds_per_event: float) -> None:
    """A stub in a process of its own: prints its address; to be killed."""
    with vllm_server(Stub(continuing(text, seconds_per_event))) as (_, urls):
        print(urls[0], flush=True)
        asyncio.run(asyncio.sleep(3600))
