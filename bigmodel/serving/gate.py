"""What every request passes first: who asks, and how it ended.

Guarantees: with a token, only /health is answered without it, and tokens are compared in constant time. Without one,
only requests to a name of this machine are answered: a web page whose name was made to lead here gets nothing.
"""

import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bigmodel.serving.errors import ApiError
from bigmodel.serving.measures import Measures

HEALTH = "/health"
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
STATUS = "bigmodel.status"  # key of a scope: the status that counts, if another one was sent


class Gate:
    """An ASGI middleware; `endpoints` are the paths that the metrics name."""

    def __init__(self, app: ASGIApp, token: str, endpoints: tuple[str, ...], measures: Measures) -> None:
        self._app, self._token, self._endpoints, self._measures = app, token.encode(), endpoints, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = 500

        async def noted(message: Message) -> None:
            nonlocal sent
            sent = message.get("status", sent)
            await send(message)

        try:
            refused = self._refusal(scope)
            await (error_response(refused) if refused else self._app)(scope, receive, noted)
        finally:
            endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
            self._measures.count_request(endpoint, scope.get(STATUS, sent))

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if scope["path"] == HEALTH:
            return None
        if not self._token:
            host = headers.get("host", "").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in LOCAL_NAMES:
                return ApiError(
                    403, f"The header Host is {host!r}; this server answers to localhost.", None, "wrong_host"
                )
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token):
            return None
        return ApiError(
            401, "The header Authorization must be `Bearer` with the token of this server.", None, "invalid_api_key",
            {"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.content, error.status, error.headers)
