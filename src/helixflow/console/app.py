"""The FastAPI application: all endpoints, bound to one channel to the auth service."""

import asyncio
import json
from functools import cached_property
from typing import Any, Final

import grpc
from fastapi import FastAPI, Request, Response

from helixflow import __version__
from helixflow.console.binding import PREFIX, add_endpoint
from helixflow.console.document import build_document
from helixflow.console.envelope import MAX_IN_FLIGHT, Envelope
from helixflow.console.openai_usage import add_openai_usage
from helixflow.console.problems import add_problems
from helixflow.console.tags import TAGS
from helixflow.core.clock import Clock, SystemClock

DOCUMENT_PATH: Final = f"{PREFIX}/openapi.json"


def create_app(channel: grpc.aio.Channel, *, max_in_flight: int = MAX_IN_FLIGHT, clock: Clock | None = None) -> FastAPI:
    """The admin API over `channel`, which the caller owns and closes."""
    app = FastAPI(
        title="HelixFlow admin API",
        version=__version__,
        # The pages would load scripts from elsewhere; the document is served below, complete.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Envelope, max_in_flight=max_in_flight)
    add_problems(app)
    for tag in TAGS:
        for endpoint in tag.endpoints:
            add_endpoint(app, channel, tag.name, endpoint)
    add_openai_usage(app, channel, clock or SystemClock())
    document = _Document(app)
    app.add_api_route(DOCUMENT_PATH, document.serve, methods=["GET", "HEAD"], include_in_schema=False)
    return app


class _Document:
    """The OpenAPI document, built when somebody first asks."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def serve(self, request: Request) -> Response:
        return Response(await asyncio.to_thread(lambda: self._content), media_type="application/json")

    @cached_property
    def _content(self) -> bytes:
        document: dict[str, Any] = build_document(self._app)
        return json.dumps(document, ensure_ascii=False).encode()
