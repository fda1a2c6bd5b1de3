"""`create_app`: routes, error shapes and what surrounds them."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from harmonium import __version__
from harmonium.server import (
    adapters,
    chat_completions,
    completions,
    health,
    messages,
    models,
    page,
    responses,
    tokens,
)
from harmonium.server.body import IGNORED_HEADER
from harmonium.server.errors import add_error_handlers
from harmonium.server.middleware import REQUEST_ID_HEADER, BodyLimit, Gate, RequestLog
from harmonium.server.responses_run import Responses
from harmonium.server.state import ServerState
from harmonium.server.store import ResponseStore

ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    models.router,
    chat_completions.router,
    completions.router,
    tokens.router,
    responses.router,
    page.router,
    messages.router,
    adapters.router,
)


def create_app(state: ServerState, responses: Responses | None = None) -> FastAPI:
    """The application over this state. The engine may come later (`state.set_engine`).

    responses: those that are stored; None keeps them in memory.
    """
    app = FastAPI(
        title="Harmonium",
        version=__version__,
        docs_url=None,  # its page would come from a CDN
        redoc_url=None,
        middleware=_middleware(state),
    )
    app.state.harmonium = state
    app.state.responses = responses or Responses(state, ResponseStore())
    add_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    return app


def _middleware(state: ServerState) -> list[Middleware]:
    """Outermost first."""
    layers = [Middleware(RequestLog, state=state)]
    if state.config.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(state.config.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=[REQUEST_ID_HEADER, IGNORED_HEADER, "retry-after"],
            )
        )
    return [*layers, Middleware(Gate, state=state), Middleware(BodyLimit, state=state)]
