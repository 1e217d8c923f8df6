"""Errors as OpenAI's clients expect them: a status, and an object that names the field.

One difference: what does not fit the model's context is 413 here (OpenAI answers 400), so that a
client can tell "send less" from "send something else"; ``code`` is OpenAI's.
"""

import math

import msgspec

from shared.messages.requests import FailureCode

_RETRY_AFTER_S = 1.0  # where nobody said how long


class ApiError(Exception):
    """An answer to the client that is not the one it wanted."""

    def __init__(
        self,
        *,
        status: int,
        type: str,  # noqa: A002  # OpenAI's name
        code: str | None,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.status, self.type, self.code = status, type, code
        self.message, self.param, self.retry_after_s = message, param, retry_after_s
        super().__init__(message)

    def body(self) -> bytes:
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})

    def event(self) -> bytes:
        """The same as a server-sent event, for a stream that has already begun."""
        return b"data: " + self.body() + b"\n\n"

    def headers(self) -> dict[str, str]:
        """Retry-After where waiting helps: whole seconds, rounded up, as HTTP has it."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


def invalid_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(
        status=400, type="invalid_request_error", code=code, message=message, param=param
    )


def invalid_api_key(message: str) -> ApiError:
    return ApiError(
        status=401, type="authentication_error", code="invalid_api_key", message=message
    )


def model_not_found(model: str, served: tuple[str, ...]) -> ApiError:
    names = ", ".join(served) or "none yet"
    return ApiError(
        status=404,
        type="invalid_request_error",
        code="model_not_found",
        message=f"The model {model[:100]!r} is not served here. Served: {names}.",
        param="model",
    )


def unknown_url(method: str, path: str) -> ApiError:
    message = f"Unknown request URL: {method} {path[:200]}. See GET /v1/models for what is served."
    return ApiError(status=404, type="invalid_request_error", code="unknown_url", message=message)


def method_not_allowed(method: str, path: str, allowed: str) -> ApiError:
    message = f"Not allowed to {method} on {path[:200]}: use {allowed}."
    return ApiError(
        status=405, type="invalid_request_error", code="method_not_supported", message=message
    )


def body_too_large(size_bytes_max: int) -> ApiError:
    message = f"The request body exceeds {size_bytes_max} bytes: send a shorter prompt."
    return ApiError(
        status=413, type="invalid_request_error", code="request_too_large", message=message
    )


def context_length_exceeded(message: str, *, param: str | None = None) -> ApiError:
    return ApiError(
        status=413,
        type="invalid_request_error",
        code="context_length_exceeded",
        message=message,
        param=param,
    )


def rate_limit_exceeded(message: str, *, retry_after_s: float) -> ApiError:
    return ApiError(
        status=429,
        type="rate_limit_error",
        code="rate_limit_exceeded",
        message=message,
        retry_after_s=retry_after_s,
    )


def overloaded(message: str, *, retry_after_s: float = _RETRY_AFTER_S) -> ApiError:
    return ApiError(
        status=503,
        type="service_unavailable",
        code="overloaded",
        message=message,
        retry_after_s=retry_after_s,
    )


def no_replica(message: str, *, retry_after_s: float = _RETRY_AFTER_S) -> ApiError:
    return ApiError(
        status=503,
        type="service_unavailable",
        code="no_replica",
        message=message,
        retry_after_s=retry_after_s,
    )


def internal_error(message: str) -> ApiError:
    return ApiError(status=500, type="server_error", code="internal_error", message=message)


def deadline_exceeded(message: str) -> ApiError:
    return ApiError(status=504, type="server_error", code="deadline_exceeded", message=message)


def from_failure(
    code: FailureCode, detail: str, *, model: str = "", retry_after_s: float = 0.0
) -> ApiError:
    """The answer to a request that the mesh gave up on."""
    wait_s = retry_after_s or _RETRY_AFTER_S
    match code:
        case "invalid":
            error = invalid_request(detail)
        case "too_long":
            error = context_length_exceeded(detail)
        case "unknown_model":
            error = model_not_found(model, ())
        case "overloaded":
            error = overloaded(detail, retry_after_s=wait_s)
        case "no_replica" | "stale_epoch" | "draining" | "bus":
            error = no_replica(detail, retry_after_s=wait_s)
        case "deadline":
            error = deadline_exceeded(detail)
        case "engine":
            error = internal_error(detail)
    return error
