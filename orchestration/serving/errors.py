"""Errors in the form of OpenAI's API: a status code and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """What a client is told; never a text from the inside."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after = retry_after
        """Seconds after which to try again."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors of replicas reach the ingress pickled."""
        return _restored, (self.status, self.message, self.kind, self.param, self.code, self.retry_after)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}


def _restored(status: int, message: str, kind: str, param: str | None, code: str | None, retry_after: float | None) -> ApiError:
    return ApiError(status, message, kind=kind, param=param, code=code, retry_after=retry_after)


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is not one that can be served."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    return ApiError(400, f"{param}: {why}", param=param, code="unsupported_parameter")


def no_such_model(name: str) -> ApiError:
    return ApiError(404, f"The model {name!r:.80} does not exist or you do not have access to it.", param="model", code="model_not_found")


def missing(what: str) -> ApiError:
    return ApiError(404, f"There is no such {what}.", code="not_found")


def overloaded(retry_after: float = 1.0) -> ApiError:
    """No engine has room."""
    return ApiError(
        503, "The server is busy and its queue is full; try again later.", kind="server_error", code="overloaded",
        retry_after=retry_after,
    )  # fmt: skip


def too_many(message: str, retry_after: float, kind: str = "rate_limit_error", code: str = "rate_limit_exceeded") -> ApiError:
    return ApiError(429, message, kind=kind, code=code, retry_after=retry_after)


def failed() -> ApiError:
    """Something broke; what, stands in the log alone."""
    return ApiError(500, "The server had an error while processing your request.", kind="server_error", code="server_error")


def engine_lost() -> ApiError:
    return ApiError(
        503, "The engine that wrote this reply stopped; try again.", kind="server_error", code="engine_lost", retry_after=1
    )  # fmt: skip


def out_of_time(seconds: float) -> ApiError:
    return ApiError(504, f"The reply was not complete after {seconds:g} seconds.", kind="server_error", code="timeout")


def unmoderated() -> ApiError:
    """Nothing passes that the moderator has not seen."""
    return ApiError(
        503, "The moderation of this server does not answer; try again later.", kind="server_error", code="moderation_unavailable",
        retry_after=2.0,
    )  # fmt: skip
