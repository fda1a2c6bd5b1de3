"""/v1/models: the one model that is served, under all its names, and its LoRA adapters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from harmonium.server.state import ServerState, state_of

router = APIRouter()


@router.get("/v1/models", response_class=JSONResponse)
async def list_models(request: Request) -> Response:
    """Every name that a request may give as `model`."""
    state = state_of(request)
    names = (*(state.model_names or (state.engine.info.model_name,)), *state.adapter_names)
    return JSONResponse({"object": "list", "data": [_model(state, name) for name in names]})


@router.get("/v1/models/{model:path}", response_class=JSONResponse)
async def retrieve_model(request: Request, model: str) -> Response:
    """One of them."""
    state = state_of(request)
    return JSONResponse(_model(state, state.check_model(model)))


def _model(state: ServerState, name: str) -> dict[str, Any]:
    engine = state.loaded_engine
    is_adapter = state.adapter_of(name) is not None
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "harmonium",
        "root": name if is_adapter else state.model_names[0],
        "parent": state.model_names[0] if is_adapter else None,
        "max_model_len": engine.info.context_length if engine is not None else None,
    }
