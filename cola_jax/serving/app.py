"""The server's paths: OpenAI's interface, health, metrics, and a page to type in."""

import asyncio
import contextlib
import functools
import hmac
import importlib.resources
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cola_jax.serving import answers, bodies
from cola_jax.serving.answers import Form
from cola_jax.serving.batcher import Batcher
from cola_jax.serving.desk import Asked, Desk
from cola_jax.serving.errors import ApiError
from cola_jax.serving.exchange import Exchange
from cola_jax.serving.metrics import Metrics
from cola_jax.serving.pictures import ImageForm
from cola_jax.serving.settings import ServeSettings

_LOG = logging.getLogger("cola_jax.serving")
_BODY_SECONDS = 30.0  # for a body to arrive
Handler = Callable[[Request], Awaitable[Response]]


class Service(NamedTuple):
    """What the paths are served from.

    Attributes:
      facts: what GET /v1/models tells of the model under "cola_jax".
      api_key: that requests must bear; None: none.
      log_texts: whether prompts stand in the log.
    """

    desk: Desk
    batcher: Batcher
    metrics: Metrics
    limits: ServeSettings
    facts: dict
    api_key: str | None
    log_texts: bool


def create(service: Service) -> Starlette:
    """The application."""
    endpoints = Endpoints(service)
    guarded = {
        ("GET", "/metrics"): endpoints.metrics,
        ("GET", "/v1/models"): endpoints.models,
        ("GET", "/v1/models/{name:path}"): endpoints.model,
        ("POST", "/v1/completions"): endpoints.completions,
        ("POST", "/v1/chat/completions"): endpoints.chat,
        ("POST", "/v1/images/generations"): endpoints.images,
    }
    routes = [Route("/", _page), Route("/health", endpoints.health)]
    for (method, path), handler in guarded.items():
        routes.append(Route(path, _guarded(service, path, handler), methods=[method]))
    return Starlette(routes=routes, exception_handlers={HTTPException: _no_such_path})


async def _no_such_path(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    posts = "POST /v1/completions, POST /v1/chat/completions, POST /v1/images/generations"
    paths = f"GET /v1/models, {posts}, GET /health, GET /metrics"
    return _refusal(ApiError(status, f"{request.method} {request.url.path[:100]}: the paths are {paths}"))


def _refusal(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _page(request: Request) -> Response:
    page = importlib.resources.files("cola_jax.serving").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(page, headers={"Cache-Control": "no-store"})


def _guarded(service: Service, path: str, handler: Handler) -> Handler:
    """A handler behind the key; whatever goes wrong is an error in OpenAI's form, and is counted."""

    @functools.wraps(handler)
    async def guarded(request: Request) -> Response:
        begin = time.perf_counter()
        try:
            _check_key(service.api_key, request)
            response = await handler(request)
        except ApiError as error:
            response = _refusal(error)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it
        except Exception:
            _LOG.exception("%s %s failed", request.method, request.url.path)
            response = _refusal(ApiError(500, "the server failed; its log has the reason"))
        service.metrics.requests.labels(path, str(response.status_code)).inc()
        seconds = time.perf_counter() - begin
        _LOG.info("%s %s %d %.3f s", request.method, path, response.status_code, seconds)
        return response

    return guarded


def _check_key(key: str | None, request: Request) -> None:
    if key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode("utf-8", "replace"), key.encode("utf-8")):
        raise ApiError(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")


class Endpoints:
    """The handlers of the paths."""

    def __init__(self, service: Service):
        """Args:
        service: what they serve from.
        """
        self._service = service

    async def health(self, request: Request) -> Response:
        """Whether requests are answered: 200, or 503."""
        batcher = self._service.batcher
        status = "ok" if batcher.alive and not batcher.closing else "draining" if batcher.alive else "failed"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self._service.metrics.page(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The one model, by name."""
        name = request.path_params["name"]
        if name != self._service.desk.name:
            message = f"model {name[:64]!r}: not served here; must be {self._service.desk.name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict:
        facts = {"id": self._service.desk.name, "object": "model", "created": 0, "owned_by": "cola_jax"}
        return facts | {"cola_jax": self._service.facts}

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, bodies.CompletionBody, self._service.desk.completion)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, bodies.ChatBody, self._service.desk.chat)

    async def images(self, request: Request) -> Response:
        """POST /v1/images/generations."""
        begin = time.perf_counter()
        _, asked, exchange = await self._begun(request, bodies.ImageBody, self._service.desk.image)
        form = ImageForm(len(asked.jobs), self._service.desk.offers.pictures.size, asked.seed)
        await _collect(request, form, self._watched(exchange, begin))
        return JSONResponse(await asyncio.to_thread(form.whole))  # files take a while to write

    async def _answer(self, request: Request, kind: type[bodies.Body], read: Callable[..., Asked]) -> Response:
        begin = time.perf_counter()
        body, asked, exchange = await self._begun(request, kind, read)
        tokens = sum(map(len, asked.prompts))
        form = Form(kind is bodies.ChatBody, self._service.desk.name, len(asked.jobs), tokens, asked.seed)
        pieces = self._watched(exchange, begin)
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return _Stream(exchange, _events(form, pieces, usage), media_type="text/event-stream")
        await _collect(request, form, pieces)
        return JSONResponse(form.whole())

    async def _begun(
        self, request: Request, kind: type[bodies.AnyBody], read: Callable[..., Asked]
    ) -> tuple[bodies.AnyBody, Asked, Exchange]:
        """A request whose sequences are on their way."""
        service = self._service
        body = bodies.parse(kind, await _body(request, service.limits.body_bytes))
        asked = await asyncio.to_thread(read, body)  # long texts take a while to tokenize
        if service.log_texts:
            _LOG.info("prompts: %s", [service.desk.tokenizer.decode(prompt) for prompt in asked.prompts])
        exchange = Exchange(asked, service.desk.tokenizer, service.batcher, service.limits.request_seconds)
        service.metrics.prompt_tokens.inc(sum(map(len, asked.prompts)))
        return body, asked, exchange

    async def _watched(self, exchange: Exchange, begin: float) -> AsyncIterator[answers.Piece]:
        """The pieces of a request, measured; its sequences end with whoever reads them."""
        metrics, first = self._service.metrics, True
        try:
            async for piece in exchange.pieces():
                if first and piece.tokens:
                    metrics.first.observe(time.perf_counter() - begin)
                    first = False
                yield piece
        finally:
            exchange.cancel()
            metrics.seconds.observe(time.perf_counter() - begin)


class _Stream(StreamingResponse):
    """A stream whose sequences end with its connection, also where nobody has begun to read."""

    def __init__(self, exchange: Exchange, *arguments, **named):
        super().__init__(*arguments, **named)
        self._exchange = exchange

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.cancel()


async def _body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
      ApiError: 415, 413, or 408.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Content-Type: must be application/json", code="unsupported_media_type")
    found = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                found += chunk
                if len(found) > most:
                    raise ApiError(413, f"the body is too long: must be at most {most} bytes", code="too_large")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s", code="timeout") from None
    return bytes(found)


async def _collect(request: Request, form: Form | ImageForm, pieces: AsyncIterator[answers.Piece]) -> None:
    """Lets a form take all pieces; for a client that has gone, there is no more generation.

    Raises:
      ClientDisconnect: it has gone.
    """

    async def all_of_them() -> None:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                form.take(piece)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(all_of_them()), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _events(form: Form, pieces: AsyncIterator[answers.Piece], usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events; an error that comes later than its beginning is one, too."""
    async with contextlib.aclosing(pieces):
        for body in form.beginning():
            yield answers.event(body)
        try:
            async for piece in pieces:
                yield answers.event(form.chunk(piece))
        except ApiError as error:
            yield answers.event(error.body)
            return
        if usage:
            yield answers.event(form.usage_chunk())
        yield answers.DONE
