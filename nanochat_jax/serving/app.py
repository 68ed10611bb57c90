"""The HTTP side: routes, errors, keys, streams. Everything here runs on one event loop; the engine has its own thread.

A request that has been read becomes jobs for the worker; what these deliver becomes the answer, whole or as a stream of
events. Whoever goes away is noticed, and the slots are free again.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nanochat_jax.serving import tokenizing
from nanochat_jax.serving.answering import Answering, Prompt
from nanochat_jax.serving.metrics import Metrics
from nanochat_jax.serving.requests import (
    Body,
    ChatRequest,
    CompletionRequest,
    Limits,
    Options,
    RequestError,
    read_chat,
    read_completion,
    read_json,
)
from nanochat_jax.serving.responses import ChatFormat, CompletionFormat
from nanochat_jax.serving.worker import EngineWorker

CLIENT_GONE = 499  # nginx's number for it; nobody gets it
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


@dataclass(frozen=True)
class ServerSettings:
    """What is served, to whom, and within which bounds."""

    model: str  # the name that requests give
    limits: Limits
    body_bytes: int  # of a request, at the most
    body_seconds: float = 30.0  # within which they must have come
    api_key: str | None = None  # None: everybody may ask
    cors: tuple[str, ...] = ()  # origins of pages from elsewhere that may ask, "*" for all
    hosts: tuple[str, ...] = ("*",)  # names by which the server may be called; see TrustedHostMiddleware


def make_app(worker: EngineWorker, settings: ServerSettings) -> Starlette:
    """The ASGI application; the worker must have been started."""
    api = Api(worker, settings)
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts), www_redirect=False)]
    if settings.cors:
        allowed = {"allow_methods": ["*"], "allow_headers": ["*"]}
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(settings.cors), **allowed))
    routes = [
        Route("/", page_route()),
        Route("/health", api.health),
        Route("/metrics", api.metrics_text),
        Route("/v1/models", api.guarded("/v1/models", api.models)),
        Route("/v1/models/{name:path}", api.guarded("/v1/models", api.model)),
        Route("/tokenizer_info", api.guarded("/tokenizer_info", api.tokenizer_info)),
        Route("/tokenize", api.guarded("/tokenize", api.tokenize), methods=["POST"]),
        Route("/detokenize", api.guarded("/detokenize", api.detokenize), methods=["POST"]),
        Route("/v1/chat/completions", api.guarded("/v1/chat/completions", api.chat), methods=["POST"]),
        Route("/v1/completions", api.guarded("/v1/completions", api.completions), methods=["POST"]),
    ]
    handlers = {HTTPException: http_error, Exception: unexpected_error}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def page_route() -> Callable[[Request], Response]:
    """The page, with a policy that allows its own script and style and nothing from elsewhere."""
    page = files("nanochat_jax.serving").joinpath("page.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'" for x in found)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = HEADERS | {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return lambda request: HTMLResponse(page, headers=headers)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """In ASCII: a text may hold half of a surrogate pair, which has no UTF-8."""
    return Response(json.dumps(body), status, HEADERS | (headers or {}), "application/json")


def error_response(error: RequestError) -> Response:
    """OpenAI's form of an error."""
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return json_response(error.body(), error.status, headers)


def http_error(request: Request, error: HTTPException) -> Response:
    """An unknown path, or a method that it does not have."""
    said = f"{request.method:.20} {request.url.path:.200}: {error.detail}"
    response = error_response(RequestError(said, status=error.status_code))
    response.headers.update(error.headers or {})
    return response


def unexpected_error(request: Request, error: Exception) -> Response:
    """A fault of ours; the traceback goes to standard error."""
    return error_response(RequestError("the server has made a mistake, and has written it down", status=500))


class Api:
    """The endpoints."""

    def __init__(self, worker: EngineWorker, settings: ServerSettings):
        self.worker, self.settings, self.metrics = worker, settings, Metrics()
        self.tokenizer, self._began = worker.engine.tokenizer, int(time.time())

    # ------------------------------------------------------------------------------------------------ small endpoints
    async def health(self, request: Request) -> Response:
        """200 while requests are answered."""
        alive = self.worker.alive
        return json_response({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def metrics_text(self, request: Request) -> Response:
        """For Prometheus."""
        gauges = {
            "slots": ("Answers that can be generated at once.", lambda: self.worker.engine.slots),
            "slots_busy": ("Answers that are being generated.", lambda: self.worker.running),
            "jobs_open": ("Answers and scores that wait or are in work.", lambda: self.worker.open_jobs),
            "programs_compiled": ("Device programs compiled so far.", lambda: self.worker.engine.compiles),
        }
        return PlainTextResponse(self.metrics.text(gauges), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The one model."""
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The model by its name."""
        name = request.path_params["name"]
        if name != self.settings.model:
            raise RequestError(f"the model {name!r:.100} is not served", code="model_not_found", status=404)
        return json_response(self._model())

    def _model(self) -> dict:
        settings, context = self.settings, self.worker.engine.context
        sampling = settings.limits.sampling
        return {
            "id": settings.model,
            "object": "model",
            "created": self._began,
            "owned_by": "nanochat_jax",
            "max_model_len": context,
            "defaults": {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p},
        }

    async def tokenizer_info(self, request: Request) -> Response:
        """The special tokens."""
        return json_response(tokenizing.tokenizer_info(self.tokenizer))

    async def tokenize(self, request: Request) -> Response:
        """A text's ids."""
        return json_response(tokenizing.tokenize(self.tokenizer, await self._read(request)))

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        return json_response(tokenizing.detokenize(self.tokenizer, await self._read(request)))

    # -------------------------------------------------------------------------------------------------------- answers
    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        wanted = read_chat(await self._read(request), self.settings.model, self.settings.limits)
        answering = Answering(self.worker, self.metrics, [Prompt(self._chat_ids(wanted))], wanted.options)
        form = ChatFormat(self.tokenizer, self.settings.model, wanted.options.alternatives is not None)
        return await self._answer(request, answering, wanted.options, form)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        wanted = read_completion(await self._read(request), self.settings.model, self.settings.limits)
        prompts = [self._completion_prompt(prompt, wanted) for prompt in wanted.prompts]
        more = {"echo": wanted.echo, "generate": wanted.generate}
        answering = Answering(self.worker, self.metrics, prompts, wanted.options, **more)
        form = CompletionFormat(self.tokenizer, self.settings.model, wanted.options.alternatives is not None)
        return await self._answer(request, answering, wanted.options, form)

    def _chat_ids(self, wanted: ChatRequest) -> np.ndarray:
        messages = [*wanted.messages, {"role": "assistant", "content": ""}]
        try:
            ids, _ = self.tokenizer.render_conversation({"messages": messages}, max_tokens=None)
        except ValueError as e:
            raise RequestError(str(e), param="messages") from None
        return self._checked(ids[:-1], "messages", room=1)  # without assistant_end

    def _completion_prompt(self, prompt: str | tuple[int, ...], wanted: CompletionRequest) -> Prompt:
        """It begins with bos, as every text in training: that is added, unseen, where it is missing."""
        try:
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        except ValueError as e:
            raise RequestError(str(e), param="prompt") from None
        text = prompt if isinstance(prompt, str) else ""
        hidden = int(ids[:1] != [self.tokenizer.bos])
        ids = [self.tokenizer.bos] * hidden + ids
        if max(ids) >= self.tokenizer.vocab_size:
            raise RequestError(
                f"prompt must hold ids below {self.tokenizer.vocab_size}, got {max(ids)}", param="prompt"
            )
        checked = self._checked(ids, "prompt", room=int(wanted.generate))
        return Prompt(checked, text or self.tokenizer.decode(ids[hidden:]), hidden)

    def _checked(self, ids, param: str, room: int) -> np.ndarray:
        context = self.worker.engine.context
        if len(ids) + room > context:
            raise RequestError(
                f"the model's context has {context:,} tokens, and {param} takes {len(ids):,}"
                + (", so that no room for an answer is left" if room else ""),
                param=param,
                code="context_length_exceeded",
            )
        return np.asarray(ids, np.int32)

    async def _answer(
        self, request: Request, answering: Answering, options: Options, form: ChatFormat | CompletionFormat
    ) -> Response:
        """Submit the jobs, and answer with what they deliver."""
        answering.submit()
        if options.stream:
            return EventStream(self, answering, form, options.include_usage)
        with self.giving_up(answering):
            collected = await until_disconnected(request, answering.collect())
        return json_response(form.whole(collected, answering.usage()))

    @contextlib.contextmanager
    def giving_up(self, answering: Answering) -> Iterator[None]:
        """However it is left, nothing goes on for nobody."""
        try:
            yield
        finally:
            self.metrics.cancelled += answering.cancel()

    # ------------------------------------------------------------------------------------------- around all endpoints
    def guarded(self, path: str, endpoint: Callable[[Request], Awaitable[Response]]):
        """The endpoint for who has the key, with errors in OpenAI's form, and counted."""

        async def handle(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await endpoint(request)
            except RequestError as error:
                response = error_response(error)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_GONE)
            self.metrics.requests[path, response.status_code] += 1
            return response

        return handle

    def _check_key(self, request: Request) -> None:
        if self.settings.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self.settings.api_key.encode())
        if scheme.lower() != "bearer" or not right:
            said = "the header must be Authorization: Bearer KEY, with the key that the server was given"
            raise RequestError(said, code="invalid_api_key", status=401)

    async def _read(self, request: Request) -> Body:
        """The JSON of the body, which must be of JSON's type: else pages from elsewhere could send it unasked."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(f"the header must be Content-Type: application/json, got {kind!r:.100}", status=415)
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.settings.body_bytes:
                        raise RequestError(f"a body may have at most {self.settings.body_bytes:,} bytes", status=413)
        except TimeoutError:
            seconds = self.settings.body_seconds
            raise RequestError(f"the body must come within {seconds:g} seconds", status=408) from None
        return read_json(bytes(body))


class EventStream(StreamingResponse):
    """Answers as server-sent events. Who goes away stops them, also before the first."""

    def __init__(self, api: Api, answering: Answering, form: ChatFormat | CompletionFormat, include_usage: bool):
        self._api, self._answering, self._form, self._include_usage = api, answering, form, include_usage
        headers = HEADERS | {"X-Accel-Buffering": "no"}  # which nginx heeds
        super().__init__(self._events(), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._api.giving_up(self._answering):
            await super().__call__(scope, receive, send)

    async def _events(self) -> AsyncIterator[str]:
        def event(body: dict) -> str:
            return f"data: {json.dumps(body)}\n\n"

        form, answering = self._form, self._answering
        try:
            for index in range(answering.count):
                for chunk in form.begin(index):
                    yield event(chunk)
            async for delta in answering.deltas():
                for chunk in form.chunks(delta):
                    yield event(chunk)
            if self._include_usage:
                yield event(form.usage_chunk(answering.usage()))
            yield "data: [DONE]\n\n"
        except RequestError as error:  # too late for a status
            yield event(error.body())


async def until_disconnected[T](request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns. ClientDisconnect: the client has gone away before, and the work was cancelled. The body
    must have been read."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
