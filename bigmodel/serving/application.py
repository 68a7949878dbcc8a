"""The HTTP endpoints, on starlette.

    POST /v1/completions  POST /v1/chat/completions  GET /v1/models  GET /health  GET /metrics

Guarantees: every error has OpenAI's shape; a body is read up to its limit and no further; the sequences of a client
that goes away end, streamed or not; no request takes longer than its time.
"""

import asyncio
import contextlib
import json
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from bigmodel.generation import engine
from bigmodel.generation.served import Served
from bigmodel.metrics.exporter import Serving, page_of
from bigmodel.serving.answers import Answer, ChatAnswer
from bigmodel.serving.batcher import Batcher, Group
from bigmodel.serving.bodies import ChatBody, CompletionBody, read_body
from bigmodel.serving.errors import HUNG_UP, ApiError, broken, timed_out
from bigmodel.serving.gate import HEALTH, STATUS, Gate, error_response
from bigmodel.serving.options import Options
from bigmodel.serving.prompts import Prompt, prompts_of, requests_of

Body = CompletionBody | ChatBody
SENDING_SECONDS = 30.0  # beyond the time of a request, for a client that reads slowly
END = b"data: [DONE]\n\n"


def application(served: Served, batcher: Batcher, options: Options, token: str) -> Starlette:
    api = Api(served, batcher, options)
    routes = [
        Route("/v1/completions", api.complete, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/models", api.list_models),
        Route("/v1/models/{name:path}", api.show_model),
        Route(HEALTH, api.tell_health),
        Route("/metrics", api.show_metrics),
    ]
    endpoints = tuple(route.path for route in routes)

    @contextlib.asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        batcher.start()
        yield
        batcher.close()

    return Starlette(
        lifespan=life,
        routes=routes,
        middleware=[Middleware(Gate, token=token, endpoints=endpoints, measures=batcher.measures)],
        exception_handlers={ApiError: _answer_error, HTTPException: _answer_http_error, Exception: _answer_bug},
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """An unknown path (404) or method (405)."""
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path}: {error.detail}."
    return error_response(ApiError(error.status_code, said, headers=error.headers))


async def _answer_bug(request: Request, error: Exception) -> Response:
    return error_response(broken())


class Api:
    """The endpoints of one model."""

    def __init__(self, served: Served, batcher: Batcher, options: Options) -> None:
        self._served, self._batcher, self._options = served, batcher, options
        self._limit = options.max_tokens or served.context
        self._started = int(time.time())

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, CompletionBody)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatBody)

    async def _answer(self, request: Request, kind: type[CompletionBody] | type[ChatBody]) -> Response:
        deadline = asyncio.get_running_loop().time() + self._options.timeout_seconds
        try:
            async with asyncio.timeout_at(deadline):
                content = await self._read(request)
        except TimeoutError:
            raise timed_out(self._options.timeout_seconds) from None
        except ClientDisconnect:
            return Response(status_code=HUNG_UP)
        body: Body = read_body(content, kind)
        self._require_model(body.model)
        prompts, requests = await asyncio.to_thread(self._prepare, body)
        answer = self._begun(body, prompts)
        group = self._batcher.submit(requests)
        if body.stream:
            return EventStream(
                self._events(body, answer, group, deadline), lambda: self._batcher.cancel(group), deadline
            )
        try:
            return JSONResponse(await while_connected(request.receive, self._whole(answer, group, deadline)))
        except ClientDisconnect:
            return Response(status_code=HUNG_UP)
        finally:
            self._batcher.cancel(group)

    async def _read(self, request: Request) -> bytes:
        """The body. Raises `ApiError` 413, 415."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "The header Content-Type must be application/json.")
        limit = self._options.max_body_bytes
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limit:
                raise ApiError(413, f"The body is larger than {limit} bytes, the limit of this server.")
        return b"".join(parts)

    def _require_model(self, name: str) -> None:
        if name != self._served.name:
            said = f"The model {name!r} does not exist; this server has {self._served.name!r}."
            raise ApiError(404, said, "model", "model_not_found")

    def _prepare(self, body: Body) -> tuple[list[Prompt], list[engine.Request]]:
        prompts = prompts_of(body, self._served)
        most = self._options.max_sequences + self._options.max_queue
        if len(prompts) * body.n > most:
            said = f"{len(prompts)} prompts with n = {body.n}: this server takes {most} sequences at once."
            raise ApiError(400, said, "n")
        return prompts, requests_of(body, prompts, self._served, self._limit)

    def _begun(self, body: Body, prompts: list[Prompt]) -> Answer:
        texts = [prompt.text if body.echo else "" for prompt in prompts for _ in range(body.n)]
        make = ChatAnswer if isinstance(body, ChatBody) else Answer
        num_tokens = sum(prompt.num_tokens for prompt in prompts)
        return make(self._served.name, self._served.tokenizer, texts, num_tokens, body.num_top)

    async def _whole(self, answer: Answer, group: Group, deadline: float) -> dict[str, Any]:
        async for place, step in self._batcher.steps(group, deadline, self._options.timeout_seconds):
            answer.take(place, step)
        return answer.whole()

    async def _events(self, body: Body, answer: Answer, group: Group, deadline: float) -> AsyncIterator[dict[str, Any]]:
        usage = {"usage": None} if body.include_usage else {}
        for chunk in answer.first_chunks():
            yield chunk | usage
        async for place, step in self._batcher.steps(group, deadline, self._options.timeout_seconds):
            if (new := answer.take(place, step)) is not None:
                yield new | usage
        if body.include_usage:
            yield answer.usage_chunk()

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def show_model(self, request: Request) -> Response:
        self._require_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": self._started,
            "owned_by": "bigmodel",
            "max_model_len": self._served.context,
        }

    async def tell_health(self, request: Request) -> Response:
        alive = self._batcher.alive
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    async def show_metrics(self, request: Request) -> Response:
        batcher = self._batcher
        capacity = self._options.max_sequences * self._served.positions
        numbers = batcher.num_running, batcher.num_waiting, batcher.positions, capacity
        collector = Serving(lambda: batcher.measures.samples(*numbers))
        page, content_type = page_of(collector, request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": content_type})


class EventStream(Response):
    """Chunks as server-sent events. `release` is called once, however the stream ends."""

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], release: Callable[[], None], deadline: float) -> None:
        self.status_code, self.background = 200, None
        self.media_type = "text/event-stream"
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._release, self._deadline = chunks, release, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self._deadline + SENDING_SECONDS):
                await while_connected(receive, self._send_all(scope, send))
        except ClientDisconnect:
            scope[STATUS] = HUNG_UP
        except TimeoutError:  # of a client that does not read; the server closes the connection
            scope[STATUS] = 504
        finally:
            self._release()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await send(_part(_event(chunk)))
            await send(_part(END))
        except ApiError as error:
            scope[STATUS] = error.status
            await send(_part(_event(error.content)))
        except Exception:
            traceback.print_exc()
            scope[STATUS] = 500
            await send(_part(_event(broken().content)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n".encode()


def _part(content: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": True}


async def while_connected(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`. Raises `ClientDisconnect` and cancels it if the client goes away first."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
