"""`ApiError`: what is wrong with a request, as OpenAI's clients read it.

{"error": {"message": "...", "type": "invalid_request_error", "param": "max_tokens", "code": null}}
"""

from collections.abc import Mapping
from typing import Any

TYPES = {429: "rate_limit_error"}  # from 500 on: server_error; the others: invalid_request_error
NO_RETRY = {"x-should-retry": "false"}  # the openai client obeys it
HUNG_UP = 499  # the status in the metrics of a client that went away, as in nginx; nobody reads it


class ApiError(Exception):
    """The answer to a request that cannot be served: an HTTP status, a reason with a remedy, and the parameter."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def timed_out(seconds: float) -> ApiError:
    return ApiError(
        504, f"The request took longer than {seconds:g} s, the limit of this server; ask for fewer tokens.", None,
        "timeout", NO_RETRY,
    )  # fmt: skip


def overloaded(open_sequences: int) -> ApiError:
    return ApiError(
        429, f"{open_sequences} sequences are running or waiting, as many as this server takes; try again later.", None,
        "overloaded", {"Retry-After": "1"},
    )  # fmt: skip


def shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", None, "shutting_down", NO_RETRY)


def broken() -> ApiError:
    return ApiError(500, "The server failed on this request; its log has the reason.", None, None, NO_RETRY)
