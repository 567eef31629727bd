"""Every failure leaves the server in one shape: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from parlay.server.admission import QueueFull
from parlay.server.worker import EngineFailed, ShuttingDown
from parlay.types import InvalidRequest

CLIENT_GONE = 499  # nobody reads this status; access logs know it


class ApiError(Exception):
    """An answer other than success, as the client will see it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """The client's view of any exception."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(HTTPStatus.BAD_REQUEST, error.message, param=error.param, code=error.code)
        case QueueFull(retry_after=seconds):
            return ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                str(error),
                type="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )
        case ShuttingDown():
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), type="server_error", code="shutting_down")
        case EngineFailed():
            return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), type="server_error", code="engine_failed")
        case HTTPException(status_code=status, detail=detail, headers=headers):
            return ApiError(status, detail, headers=dict(headers) if headers else None)
        case _:
            return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed on this request", type="server_error")


def install_error_handlers(app: FastAPI) -> None:
    """Makes `app` answer every exception in the OpenAI shape."""
    for kind in (ApiError, InvalidRequest, QueueFull, EngineFailed, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(HTTPException, _answer_routing)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)


async def _answer_error(request: Request, error: Exception) -> Response:
    failure = as_api_error(error)
    return JSONResponse(failure.body(), failure.status, failure.headers)


async def _answer_routing(request: Request, error: Exception) -> Response:
    failure = as_api_error(error)
    reason = {404: "no such route", 405: "method not allowed"}.get(failure.status, failure.message)
    failure.message = f"{reason}: {request.method} {request.url.path}"
    return JSONResponse(failure.body(), failure.status, failure.headers)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)
