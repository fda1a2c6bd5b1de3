"""/health, /ready: how the server stands. /metrics: its counts."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from harmonium.server.metrics import CONTENT_TYPE
from harmonium.server.state import state_of

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health", response_class=JSONResponse)
async def health(request: Request) -> Response:
    """loading, ready, draining or failed, with how far loading is. 200 unless it failed: the server lives."""
    state = state_of(request)
    body: dict[str, object] = {"status": state.status}
    if state.status == "loading":
        body["loaded"] = round(state.loaded_fraction, 4)
    return JSONResponse(body, 503 if state.status == "failed" else 200)


@router.head("/ready", include_in_schema=False)
@router.get("/ready", response_class=JSONResponse)
async def ready(request: Request) -> Response:
    """200 when a request would be served, 503 otherwise: for load balancers."""
    state = state_of(request)
    return JSONResponse({"status": state.status}, 200 if state.status == "ready" else 503)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(state_of(request).metrics.text(), headers={"content-type": CONTENT_TYPE})
