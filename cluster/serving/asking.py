"""What a request says, read and checked; and what a client is told when something is wrong, in OpenAI's shape.

A request is read by hand rather than by FastAPI, so that every mistake gets that shape, names its field and the nearest right
one. Nothing is allocated for a request before it is checked.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from oneira.platform.errors import Interrupted, UsageError, did_you_mean

from ..scheduling.client import Busy
from .engine import Stopping
from .line import Full
from .pacing import Late
from .pictures import NoPicture

T = TypeVar("T", bound=BaseModel)

RETRY_READY = 2  # seconds until a replica that stops or begins is likely followed by one that works
CLIENT_GONE = 499  # never seen by anybody but the metrics


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry

    @property
    def document(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        return JSONResponse(self.document, self.status, headers)


class ClientGone(Exception):
    """The client has closed its connection."""


def as_api_error(error: BaseException) -> ApiError:
    """Whatever went wrong, as what the client is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, Full):
        return ApiError(429, str(error), code="queue_full", retry=error.retry_after)
    if isinstance(error, Late):
        return ApiError(429, str(error), code="deadline", retry=error.retry_after)
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="device_busy", retry=max(1, math.ceil(error.retry_after)))
    if isinstance(error, (Stopping, Interrupted)):
        return ApiError(503, "The server is not ready, or stops just now.", code="not_ready", retry=RETRY_READY)
    if isinstance(error, UsageError):
        return ApiError(400, str(error))
    if isinstance(error, (ClientGone, ClientDisconnect)):
        return ApiError(CLIENT_GONE, "The client is gone.")
    return ApiError(500, f"The server failed: {type(error).__name__}.", code="internal_error")


# Reading -------------------------------------------------------------------------------------------------------


def check(model: type[T], fields: dict[str, Any] | bytes, *, strict: bool) -> T:
    """The fields as the model, or ApiError 400 about the first that is wrong."""
    try:
        if isinstance(fields, bytes):
            return model.model_validate_json(fields, strict=strict)
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    names = [str(part) for part in first["loc"]]
    param = names[0] if names else None
    allowed = [field.alias or name for name, field in model.model_fields.items()]
    if first["type"] == "extra_forbidden":
        raise ApiError(400, f"Unknown field '{param}'. {did_you_mean(str(param), allowed)}", param=param)
    if first["type"] == "missing":
        raise ApiError(400, f"'{param}' is missing.", param=param, code="missing_required_parameter")
    text = first["msg"].removeprefix("Value error, ")
    raise ApiError(400, f"'{param}': {text}." if param else f"The body: {text}.", param=param, code="invalid_value")


async def read_json(request: Request, model: type[T]) -> T:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"The content type is '{kind[:100]}'; it must be application/json.")
    return check(model, await request.body(), strict=True)


async def read_form(request: Request, model: type[T], files: tuple[str, ...]) -> tuple[T, dict[str, bytes]]:
    """The fields of a form, and its files by name ("image[]", as the client writes a list, is "image")."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(415, f"The content type is '{kind[:100]}'; it must be multipart/form-data.")
    try:
        parts = await request.form(max_files=4, max_fields=32, max_part_size=16 << 10)
    except (ApiError, HTTPException):
        raise
    except (ValueError, KeyError, AssertionError, TypeError) as error:
        raise ApiError(400, "The body is no form: its parts or their boundary are damaged.") from error
    try:
        texts, found = await _sort(parts, files)
    finally:
        await parts.close()
    if "image" not in found:
        raise ApiError(400, "'image' is missing.", param="image", code="missing_required_parameter")
    return check(model, texts, strict=False), found


async def _sort(parts: FormData, files: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The fields, and the files' bytes."""
    texts: dict[str, Any] = {}
    found: dict[str, bytes] = {}
    for name, value in parts.multi_items():
        name = name.removesuffix("[]") if name.removesuffix("[]") in files else name
        if name in texts or name in found:
            raise ApiError(400, f"'{name}' is given more than once; one is taken.", param=name)
        if isinstance(value, UploadFile):
            if name not in files:
                raise ApiError(400, f"'{name}' is a file. Files are: {', '.join(files)}.", param=name)
            found[name] = await value.read()
        elif name in files:
            raise ApiError(400, f"'{name}' must be a file.", param=name, code="invalid_image")
        else:
            texts[name] = value
    return texts, found


READERS = ThreadPoolExecutor(2, "oneira-pictures")  # a large picture takes a second and a hundred MB


async def read_file(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """A picture read in one of a few threads; what is wrong with it as ApiError about the field."""
    try:
        return await asyncio.get_running_loop().run_in_executor(READERS, function, *arguments)
    except NoPicture as error:
        raise ApiError(400, str(error), param=name, code="invalid_image") from error


# Clients who go ------------------------------------------------------------------------------------------------------


async def gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def while_there(request: Request, work: Awaitable[Any]) -> Any:
    """The work's result. It is cancelled, and `ClientGone` raised, as soon as the client goes."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for left in (task, watch):
            left.cancel()
            with suppress(BaseException):
                await left
