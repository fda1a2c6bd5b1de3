"""POST /v1/load_lora_adapter, /v1/unload_lora_adapter: adapters that come and go, where the server lets them.

Paths and bodies are vLLM's, whose operators know them.
Source: vllm-project/vllm: vllm/entrypoints/serve/lora/{api_router,protocol}.py.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from harmonium.config import LoraSource
from harmonium.engine.protocol import AdapterHost
from harmonium.errors import ApiError, CheckpointError
from harmonium.server.body import RequestModel, ignored_headers, read_model, request_schema
from harmonium.server.state import ServerState, state_of

_log = logging.getLogger("harmonium.server")

router = APIRouter()


class LoadAdapterRequest(RequestModel):
    """lora_name: what requests will call it. lora_path: a folder of the server's machine."""

    lora_name: str
    lora_path: str


class UnloadAdapterRequest(RequestModel):
    """lora_name: as it was loaded. lora_int_id: without effect."""

    lora_name: str
    lora_int_id: int | None = None


@router.post(
    "/v1/load_lora_adapter", response_class=Response, openapi_extra=dict(request_schema(LoadAdapterRequest))
)
async def load_adapter(request: Request) -> Response:
    """Serve one more adapter; answers when it is there."""
    state = state_of(request)
    host = _host(state)
    body = await read_model(request, LoadAdapterRequest)
    if not body.lora_path:
        raise ApiError("lora_path is empty; expected a folder", param="lora_path")
    if body.lora_name in state.model_names:
        raise ApiError(f"lora_name is {body.lora_name!r}, the model's own", param="lora_name")
    try:
        await host.load_adapter(LoraSource(body.lora_name, Path(body.lora_path)))
    except CheckpointError as error:
        raise ApiError(f"lora_path holds no adapter for this model: {error}", param="lora_path") from None
    _log.info("adapter %s is served from %r", body.lora_name, body.lora_path)
    return PlainTextResponse(
        f"Success: LoRA adapter '{body.lora_name}' added successfully.", headers=ignored_headers(body)
    )


@router.post(
    "/v1/unload_lora_adapter",
    response_class=Response,
    openapi_extra=dict(request_schema(UnloadAdapterRequest)),
)
async def unload_adapter(request: Request) -> Response:
    """Take no more requests for an adapter; answers that run go on."""
    state = state_of(request)
    host = _host(state)
    body = await read_model(request, UnloadAdapterRequest)
    if body.lora_name not in state.adapter_names:
        raise ApiError(
            f"lora_name is {body.lora_name[:200]!r}; there is {', '.join(state.adapter_names) or 'none'}",
            status=404,
            param="lora_name",
            code="adapter_not_found",
        )
    await host.unload_adapter(body.lora_name)
    _log.info("adapter %s is no longer served", body.lora_name)
    return PlainTextResponse(
        f"Success: LoRA adapter '{body.lora_name}' removed successfully.", headers=ignored_headers(body)
    )


def _host(state: ServerState) -> AdapterHost:
    """Raises ApiError: 403 where it is not allowed, 400 for an engine without adapters, 503 for none."""
    if not state.config.allows_adapter_updates:
        raise ApiError(
            "adapters may not be changed while the server runs: it was started without --allow-lora-updates",
            status=403,
            code="adapter_updates_not_allowed",
        )
    engine = state.engine
    if not isinstance(engine, AdapterHost):
        raise ApiError("this engine takes no adapters", code="unsupported_parameter")
    return engine
