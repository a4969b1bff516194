"""Errors as answers: a status, a short code for programs, one sentence for people, and nothing else."""

from __future__ import annotations

import logging

from starlette.responses import JSONResponse

from vlm.errors import (
    BusyError,
    CapabilityError,
    DataError,
    IntegrityError,
    InvalidInput,
    StoreError,
    VlmError,
)

_LOG = logging.getLogger("vlm.serving")
_RETRY_AFTER_S = 1
_STORE_RETRY_AFTER_S = 5


class Problem(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


class NotFound(Problem):
    """Nothing has that identifier."""

    def __init__(self, what: str) -> None:
        super().__init__(404, "not_found", f"no such {what}")


class TooLarge(Problem):
    """More than a request may cost."""

    def __init__(self, message: str) -> None:
        # the rest of the body stays unread, so the connection cannot be used again
        super().__init__(413, "too_large", message, {"Connection": "close"})


def to_problem(error: Exception) -> Problem:
    """Return how an error is answered; what nobody foresaw is logged, and its message kept from clients."""
    if isinstance(error, Problem):
        return error
    message = str(error)
    match error:
        case BusyError():
            return Problem(503, "overloaded", message, {"Retry-After": str(_RETRY_AFTER_S)})
        case CapabilityError():
            return Problem(422, "capability", message)
        case DataError():
            return Problem(422, error.reason, message)
        case InvalidInput() | ValueError():
            return Problem(400, "invalid_input", message)
        case StoreError():
            _LOG.error("%s", message)
            headers = {"Retry-After": str(_STORE_RETRY_AFTER_S)}
            return Problem(503, "store", "the published store cannot be read now; try again", headers)
        case IntegrityError():
            _LOG.error("%s", message)
            return Problem(500, "damaged", "the index is damaged; its owner should run vlm index verify")
        case VlmError():
            _LOG.error("%s", message)
            return Problem(500, "failed", "the server could not do this; its log says why")
    _LOG.error("unexpected error", exc_info=error)
    return Problem(500, "unexpected", "the server failed unexpectedly; its log says why")


def answer(problem: Problem) -> JSONResponse:
    """Return the response that says what was wrong."""
    content = {"error": {"code": problem.code, "message": problem.message}}
    return JSONResponse(content, problem.status, {"Cache-Control": "no-store", **problem.headers})
