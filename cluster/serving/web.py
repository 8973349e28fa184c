"""The HTTP interface: routes, streams by server-sent events, and the door before them. Its OpenAPI document says what `schema` says.

app = make_app(service, key=None)          # a FastAPI app over a `Service`, whoever hosts it
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import generate_latest
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oneira.generative.interpolation import slerp
from oneira.multimodal.stages import PictureRequest, State
from oneira.platform.errors import Interrupted, UsageError, did_you_mean
from oneira.platform.logs import in_json, say

from ..scheduling.client import Busy
from .asking import (
    CLIENT_GONE,
    RETRY_READY,
    ApiError,
    ClientGone,
    as_api_error,
    gone,
    read_file,
    read_form,
    read_json,
    while_there,
)
from .engine import Stopping
from .line import Full
from .pacing import Late
from .pictures import Shelf, from_data_url, read_edit, read_picture, write_picture
from .running import is_loopback
from .sampling import SampleRequest
from .schema import (
    DEADLINE,
    MAX_DEADLINE,
    SEEDS,
    Edit,
    Embedding,
    Generation,
    Interpolation,
    Prompt,
    Sample,
    Variation,
    body,
    form,
)
from .service import Service
from .watching import HEADERS, PAGE, metrics_of

log = logging.getLogger(__name__)
MAX_BODY = 1 << 20  # bytes, where no pictures are in it
MAX_BODY_OF = {"edits": 18 << 20, "variations": 10 << 20, "interpolations": 25 << 20}  # by the last part of the path
OPEN_PATHS = ("/healthz", "/v1/images/files/", "/devices")  # without a key: a picture's address is a secret itself
UNTIL = "oneira.until"  # of a request's scope
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


Watch = Callable[[], Awaitable[dict[str, Any] | None]]


async def _nobody() -> None:
    """No scheduler is there to be watched."""


def make_app(service: Service, key: str | None = None, watch: Watch = _nobody) -> FastAPI:
    """The app over a `Service`. `key`: what clients must bear; None asks for none. `watch`: gives the scheduler's report."""
    app = FastAPI(title="Oneira", version="1", docs_url=None, redoc_url=None)
    for kind in (
        ApiError,
        HTTPException,
        Full,
        Late,
        Stopping,
        UsageError,
        Busy,
        Interrupted,
        ClientGone,
        ClientDisconnect,
    ):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(_Door, service=service, key=key)
    _Routes(service, Shelf(), watch).add_to(app)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


# Routes --------------------------------------------------------------------------------------------------------------


class _Routes:
    def __init__(self, service: Service, shelf: Shelf, watch: Watch) -> None:
        self.service, self.shelf, self.watch = service, shelf, watch
        self.born = int(time.time())

    def add_to(self, app: FastAPI) -> None:
        image = {"image": True}
        posts = (
            ("/v1/images/generations", self.generations, body(Generation)),
            ("/v1/images/edits", self.edits, form(Edit, {**image, "mask": False})),
            ("/v1/images/variations", self.variations, form(Variation, image)),
            ("/v1/images/interpolations", self.interpolations, body(Interpolation)),
            ("/v1/embeddings", self.embeddings, body(Embedding)),
            ("/v1/samples", self.samples, body(Sample)),
        )
        wrong: dict[int | str, dict[str, Any]] = {"default": {"description": "What is wrong, in OpenAI's shape"}}
        for path, function, asked in posts:
            app.add_api_route(path, function, methods=["POST"], openapi_extra=asked, responses=wrong)
        gets: tuple[tuple[str, Callable[..., Any]], ...] = (
            ("/v1/models", self.models),
            ("/v1/models/{model:path}", self.one_model),
            ("/v1/images/files/{name}", self.file),
            ("/v1/devices", self.devices),
            ("/devices", self.page),
            ("/healthz", self.health),
            ("/metrics", self.metrics),
        )
        for path, function in gets:
            app.add_api_route(path, function, methods=["GET"], responses=wrong)

    async def generations(self, request: Request) -> Response:
        """Pictures of a prompt."""
        asked = await read_json(request, Generation)
        model, size = self._model(asked.model), self._size(asked)
        pictures = self._requests(asked, task="generate", prompt=asked.prompt)
        return await self._pictures(request, asked, model, size, pictures, "image_generation")

    async def edits(self, request: Request) -> Response:
        """A picture drawn anew where a mask is transparent, to fit the prompt."""
        self.service.line.check(1)  # before megabytes are read
        asked, files = await read_form(request, Edit, ("image", "mask"))
        model, size = self._model(asked.model), self._size(asked)
        largest = self.service.sizes[model][-1]
        self.service.line.check(asked.n or 1)
        picture, mask = await read_file("image", read_edit, files["image"], files.get("mask"), largest)
        pictures = self._requests(asked, task="edit", prompt=asked.prompt, picture=picture, mask=mask)
        return await self._pictures(request, asked, model, size, pictures, "image_edit")

    async def variations(self, request: Request) -> Response:
        """Pictures that mean what a picture means."""
        self.service.line.check(1)
        asked, files = await read_form(request, Variation, ("image",))
        model, size = self._model(asked.model), self._size(asked)
        self.service.line.check(asked.n or 1)
        picture, _ = await read_file("image", read_picture, files["image"], self.service.sizes[model][-1])
        pictures = self._requests(asked, task="variation", picture=picture)
        return await self._pictures(request, asked, model, size, pictures, "image_variation")

    async def interpolations(self, request: Request) -> Response:
        """Pictures on the way from one prompt or picture to another."""
        self.service.line.check(1)
        asked = await read_json(request, Interpolation)
        model, size = self._model(asked.model), self._size(asked)
        seed = _seed(asked)
        settings: dict[str, Any] = {"seed": seed, "steps": asked.steps, "guidance": asked.guidance}
        self.service.line.check(asked.frames)
        ends = [await self._end(name, text, model) for name, text in (("from", asked.start), ("to", asked.end))]
        wanted = [PictureRequest(**settings, **end) for end in ends]
        states = await while_there(request, self.service.embed(model, wanted, "image_embedding", until=_until(request)))
        start, end = (state["image_embedding"] for state in states)
        way = [slerp(start, end, share) for share in np.linspace(0, 1, asked.frames)]
        pictures = [PictureRequest(task="embedding", embedding=point, **settings) for point in way]
        return await self._pictures(request, asked, model, size, pictures, "image_interpolation")

    async def _end(self, name: str, text: str, model: str) -> dict[str, Any]:
        if text.startswith("data:"):
            data = await read_file(name, from_data_url, text)
            picture, _ = await read_file(name, read_picture, data, self.service.sizes[model][-1])
            return {"task": "variation", "picture": picture}
        try:
            return {"task": "generate", "prompt": TypeAdapter(Prompt).validate_python(text)}
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise ApiError(400, f"'{name}': {problem}.", param=name, code="invalid_value") from error

    async def embeddings(self, request: Request) -> Response:
        """CLIP embeddings of texts."""
        asked = await read_json(request, Embedding)
        model = self._model(asked.model)
        if asked.dimensions not in (None, self.service.embedding[model]):
            raise ApiError(400, f"'dimensions' must be {self.service.embedding[model]}.", param="dimensions")
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        wanted = [PictureRequest(prompt=text) for text in texts]
        states = await while_there(request, self._embed(model, wanted, _until(request)))
        data = [
            {"object": "embedding", "index": i, "embedding": _vector(state["text_embedding"], asked.encoding_format)}
            for i, state in enumerate(states)
        ]
        tokens = sum(map(_tokens, states))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})

    async def samples(self, request: Request) -> Response:
        """Samples of a generative model: points, pictures or texts."""
        asked = await read_json(request, Sample)
        model, seed = self._model(asked.model, sampled=True), _seed(asked)
        params = asked.params.model_dump(exclude_none=True) if asked.params else {}
        wanted = SampleRequest(n=asked.n or 1, seed=seed, params=params)
        try:
            state = await while_there(request, self.service.sample(model, wanted, until=_until(request)))
        except UsageError as error:
            raise ApiError(400, str(error), param="params", code="invalid_value") from error
        kind, rows = str(state["kind"]), state["samples"]
        if kind == "pictures":
            written = await asyncio.to_thread(lambda: [base64.b64encode(write_picture(row)).decode() for row in rows])
            data = [{"b64_json": picture} for picture in written]
        else:
            data = [{"text" if kind == "text" else "point": row} for row in rows.tolist()]
        about = {"created": int(time.time()), "model": model, "kind": kind, "seed": seed}
        return JSONResponse({"object": "list", **about, "data": data})

    async def _embed(self, model: str, wanted: list[PictureRequest], until: float | None) -> list[State]:
        """In parts that fit into an empty line, one after the other."""
        part, found = self.service.line.places, []
        for start in range(0, len(wanted), part):
            found += await self.service.embed(model, wanted[start : start + part], "text_embedding", until=until)
        return found

    async def models(self) -> Response:
        """The models that are served."""
        states = await self.service.states()
        return JSONResponse({"object": "list", "data": [self._describe(name, states) for name in self.service.models]})

    async def one_model(self, model: str) -> Response:
        """One model."""
        known = model if model in self.service.samples else self._model(model)
        return JSONResponse(self._describe(known, await self.service.states()))

    async def file(self, name: str) -> Response:
        """A picture that was asked for with response_format=url, for an hour."""
        found = self.shelf.get(name)
        if found is None:
            raise ApiError(404, "There is no such picture, or no longer: an address lives for an hour.", param="name")
        return Response(found[0], media_type=MEDIA[found[1]])

    async def health(self) -> Response:
        """Whether a picture can be made now."""
        if not self.service.ready:
            raise Stopping
        return JSONResponse({"status": "ready"})

    async def metrics(self) -> Response:
        """Prometheus."""
        seen = await self.watch()
        rows = generate_latest(self.service.measures.registry) + (b"" if seen is None else metrics_of(seen))
        return Response(rows, media_type="text/plain; version=0.0.4")

    async def devices(self) -> Response:
        """What the device scheduler sees: ledger, residents, leases, queues, waits, evictions."""
        seen = await self.watch()
        if seen is None:
            raise ApiError(503, "The device scheduler does not answer.", code="no_scheduler", retry=RETRY_READY)
        return JSONResponse(seen)

    async def page(self) -> Response:
        """The same as a page that keeps itself up to date."""
        return Response(PAGE, media_type="text/html; charset=utf-8", headers=HEADERS)

    # What routes share

    def _describe(self, name: str, states: Mapping[str, str]) -> dict[str, Any]:
        sizes = [f"{size}x{size}" for size in self.service.sizes.get(name, [])]
        of = {"samples": self.service.samples[name]} if name in self.service.samples else {"sizes": sizes}
        return {"id": name, "object": "model", "created": self.born, "owned_by": "oneira", "state": states[name], **of}

    def _model(self, name: str | None, sampled: bool = False) -> str:
        """The model that is asked for, or the first; of those that give samples, or of those that draw what a prompt says."""
        if not self.service.ready:
            raise Stopping
        models = [model for model in self.service.models if (model in self.service.samples) == sampled]
        if not models or (name not in models and name in self.service.models):
            where = "/v1/samples" if not sampled else "/v1/images/generations"
            message = (
                f"{f'Model {name!r} is' if name in self.service.models else 'All models here are'} asked at {where}."
            )
            raise ApiError(400, message, param="model", code="model_not_supported")
        if name is None:
            return models[0]
        if name not in models:
            message = f"Unknown model '{name[:200]}'. {did_you_mean(name[:200], models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def _size(self, asked: Any) -> int:
        sizes = {f"{size}x{size}": size for size in self.service.sizes[self._model(asked.model)]}
        if asked.size in (None, "auto"):
            return max(sizes.values())
        if asked.size not in sizes:
            message = f"The size is '{asked.size}'. {did_you_mean(asked.size, [*sizes, 'auto'])}"
            raise ApiError(400, message, param="size", code="invalid_size")
        return sizes[asked.size]

    def _requests(self, asked: Any, **fields: Any) -> list[PictureRequest]:
        seed = _seed(asked)
        settings = {"steps": asked.steps, "guidance": asked.guidance, **fields}
        return [PictureRequest(seed=(seed + i) % SEEDS, **settings) for i in range(asked.n or 1)]

    async def _pictures(
        self, request: Request, asked: Any, model: str, size: int, wanted: list[PictureRequest], event: str
    ) -> Response:
        kind = asked.output_format or "png"
        if getattr(asked, "stream", None):
            if asked.response_format == "url":
                raise ApiError(
                    400, "A stream has its pictures in it: response_format must be b64_json.", param="stream"
                )
            return await self._stream(request, asked, model, size, wanted, event)
        if getattr(asked, "partial_images", None):
            raise ApiError(400, "'partial_images' is for a stream: set stream to true.", param="partial_images")
        states = await while_there(request, self.service.draw(model, wanted, size=size, until=_until(request)))
        data = []
        for state in states:
            written = await asyncio.to_thread(write_picture, state["picture"], kind, asked.output_compression)
            if asked.response_format == "url":
                data.append({"url": f"{request.base_url}v1/images/files/{self.shelf.put(written, kind)}"})
            else:
                data.append({"b64_json": base64.b64encode(written).decode()})
        return JSONResponse(
            {"created": int(time.time()), "data": data, "output_format": kind, "size": f"{size}x{size}"}
        )

    async def _stream(
        self, request: Request, asked: Any, model: str, size: int, wanted: list[PictureRequest], event: str
    ) -> Response:
        events = self._events(request, asked, model, size, wanted, event)
        first = await anext(events)  # what is wrong with the request shows until then, and still has a status

        async def lines() -> AsyncIterator[str]:
            async with aclosing(events):
                yield first
                try:
                    async for text in events:
                        yield text
                except ClientGone:
                    return
                except Exception as error:  # the status is sent: OpenAI's own streams tell it as an event
                    yield _event("error", {"type": "error", **as_api_error(error).document})

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _events(
        self, request: Request, asked: Any, model: str, size: int, wanted: list[PictureRequest], event: str
    ) -> AsyncGenerator[str]:
        """Partial pictures as they come, then the whole ones, as events. Ends the work when it is closed."""
        pictures: asyncio.Queue[tuple[int, np.ndarray]] = asyncio.Queue()
        work = asyncio.ensure_future(
            self.service.draw(
                model, wanted, size=size, until=_until(request),
                on_picture=lambda i, picture: pictures.put_nowait((i, picture)),
            )
        )  # fmt: skip
        kind, partial = asked.output_format or "png", [0] * len(wanted)
        about = {"background": "opaque", "output_format": kind, "quality": "auto"}
        watch = asyncio.ensure_future(gone(request))
        coming: asyncio.Future[tuple[int, np.ndarray]] = asyncio.get_running_loop().create_future()
        try:
            left = len(wanted)
            while left:
                coming = asyncio.ensure_future(pictures.get())
                await asyncio.wait((coming, work, watch), return_when=asyncio.FIRST_COMPLETED)
                if watch.done() and not coming.done():
                    raise ClientGone
                if not coming.done() and pictures.empty():
                    coming.cancel()
                    work.result()  # raises what went wrong
                i, picture = await coming
                whole = picture.shape[1] == size
                if not whole and partial[i] >= (asked.partial_images or 0):
                    continue
                written = await asyncio.to_thread(write_picture, picture, kind, asked.output_compression)
                side = f"{picture.shape[1]}x{picture.shape[0]}"
                answer = {
                    "b64_json": base64.b64encode(written).decode(),
                    "created_at": int(time.time()),
                    "size": side,
                    **about,
                }
                if whole:
                    left -= 1
                    name = f"{event}.completed"
                    answer["usage"] = _usage(await work if left == 0 else [])
                else:
                    name = f"{event}.partial_image"
                    answer["partial_image_index"] = partial[i]
                    partial[i] += 1
                yield _event(name, {"type": name, **answer})
        finally:
            for task in (work, watch, coming):
                task.cancel()
                with suppress(BaseException):
                    await task


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _usage(states: list[State]) -> dict[str, Any]:
    """Tokens of the prompts; pictures are not made of tokens here."""
    tokens = sum(map(_tokens, states))
    details = {"image_tokens": 0, "text_tokens": tokens}
    return {"input_tokens": tokens, "input_tokens_details": details, "output_tokens": 0, "total_tokens": tokens}


def _tokens(state: State) -> int:
    return int(np.sum(state["text_mask"])) if "text_mask" in state else 0


def _vector(embedding: np.ndarray, encoding: str | None) -> Any:
    vector = np.asarray(embedding, "<f4")
    return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()


def _until(request: Request) -> float | None:
    """The loop's time by which the client wants its answer."""
    return request.scope[UNTIL]


def _seed(asked: Any) -> int:
    return secrets.randbelow(SEEDS) if asked.seed is None else asked.seed


# The door ------------------------------------------------------------------------------------------------------------


class _Door:
    """Around all routes: asks for the key, counts bytes that come in, notes the deadline, names each request, measures and logs it.

    A request's id is the one that the client gave in X-Request-ID, else one of our own (Ray Serve's proxy gives it, where there
    is one, and also tells the client).
    """

    def __init__(self, app: ASGIApp, service: Service, key: str | None) -> None:
        self.app, self.service, self.key = app, service, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, began, status = Headers(scope=scope), time.perf_counter(), CLIENT_GONE
        given = REQUEST_ID.fullmatch(headers.get("x-request-id", ""))
        name = given[0] if given else uuid.uuid4().hex

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if "x-request-id" not in headers:
                    MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers) or self._note_deadline(scope, headers)
            if refusal is not None:
                await refusal.response()(scope, receive, sending)
            else:
                await self.app(scope, _counting(receive, _limit(scope["path"])), sending)
        except Exception as error:
            log.exception("Request %s: %s %s failed.", name, scope["method"], scope["path"])
            if status != CLIENT_GONE:  # half of an answer is sent: the connection must break
                raise
            await as_api_error(error).response()(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.service.measures.requests.labels(route, str(status)).inc()
            seconds = time.perf_counter() - began
            self.service.measures.latency.labels(route).observe(seconds)
            if in_json():
                about = {"request": name, "method": scope["method"], "route": route, "status": status}
                say("request", f"{scope['method']} {route} {status}", **about, seconds=round(seconds, 4))

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self.key is not None and not path.startswith(OPEN_PATHS):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = secrets.compare_digest(given.strip().encode(), self.key.encode())
            if scheme.lower() != "bearer" or not right:
                return ApiError(
                    401, "The API key is missing or wrong: Authorization: Bearer KEY.", code="invalid_api_key"
                )
        if self.key is None and not _from_here(headers):
            return ApiError(
                403, "Without a key the server answers by a loopback name only, and not to other sites' pages.",
                code="not_from_here",
            )  # fmt: skip
        length, limit = headers.get("content-length", "0"), _limit(path)
        if length.isdigit() and int(length[:20]) > limit:
            return _too_large(limit)
        return None

    @staticmethod
    def _note_deadline(scope: Scope, headers: Headers) -> ApiError | None:
        given, scope[UNTIL] = headers.get(DEADLINE), None
        if given is None:
            return None
        if not (given.isascii() and given.isdigit() and len(given) <= 10 and 1 <= int(given) <= MAX_DEADLINE):
            message = f"{DEADLINE} is '{given[:100]}'. Allowed are whole numbers of milliseconds, 1 to {MAX_DEADLINE}."
            return ApiError(400, message, code="invalid_deadline")
        scope[UNTIL] = asyncio.get_running_loop().time() + int(given) / 1000
        return None


def _from_here(headers: Headers) -> bool:
    """Whether a request names a loopback host, and comes from no page of another site.

    A page can make its own name lead to 127.0.0.1 (DNS rebinding), or post a form across sites; it cannot choose the
    headers Host and Origin.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return is_loopback(name.strip("[]").lower()) and origin in (None, f"http://{host}", f"https://{host}")


def _limit(path: str) -> int:
    return MAX_BODY_OF.get(path.rpartition("/")[2], MAX_BODY)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is too large; at most {limit} bytes are taken.", code="body_too_large")


def _counting(receive: Receive, limit: int) -> Receive:
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit)
        return message

    return counted
