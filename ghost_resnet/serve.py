"""An HTTP service: photos in, the report's JSON out; photos of many requests go through the network together.

Needs FastAPI, uvicorn and a Prometheus client: `pip install "ghost-resnet[serve]"`.
"""

import asyncio
import base64
import binascii
import io
import logging
import math
import signal
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import jinja2
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_fastapi_instrumentator import Instrumentator
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import MutableHeaders, UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .classifier import BATCH_SIZE, GarbageClassifier, Prediction
from .data import MAX_PIXELS
from .errors import ConfigError, OverflowedError

logger = logging.getLogger(__name__)

RETRY_AFTER = {"Retry-After": "1"}
JSON_SHAPE = 'expected {"image": base64} or {"images": [base64, ...]}'


@dataclass(frozen=True)
class Limits:
    """What a service takes on.

    Attributes:
        max_batch: Photos that go through the network at once; 1 turns batching off.
        max_wait: Seconds that a photo waits at most for others to share its batch.
        max_queue: Photos, and requests, that are in hand at a time; more are answered with 503.
        max_images: Photos in one request.
        max_bytes: Size of one request's body.
        timeout: Seconds that one request may take, from its first byte to its answer.

    Raises:
        ConfigError: A limit that nothing could keep to.
    """

    max_batch: int = BATCH_SIZE
    max_wait: float = 0.005
    max_queue: int = 64
    max_images: int = 16
    max_bytes: int = 20 * 2**20
    timeout: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf or (value == 0 and field.name != "max_wait"):
                raise ConfigError(f"{field.name} must be above 0 and finite, got {value}")
        if self.max_images > self.max_queue:
            raise ConfigError(f"max_queue must be at least max_images ({self.max_images}), got {self.max_queue}")


class QueueFullError(Exception):
    """More photos are in hand than are taken on."""


class Batcher:
    """Runs a classifier in one thread, on the photos of all requests together.

    The first photo that comes waits for others until `max_batch` are there or `max_wait` has passed. While a batch is
    in the network, the next one fills up.

    Args:
        classifier: What to run.
        limits: `max_batch`, `max_wait` and `max_queue` are kept to.
        on_batch: Told the number of photos of each batch before it is run.
    """

    def __init__(self, classifier: GarbageClassifier, limits: Limits, on_batch: Callable[[int], object]) -> None:
        self.classifier = classifier
        self.limits = limits
        self._on_batch = on_batch
        self._queue: asyncio.Queue[asyncio.Future[Prediction]] = asyncio.Queue()
        self._photos: dict[asyncio.Future[Prediction], BinaryIO] = {}  # those given up are not kept
        self._thread = ThreadPoolExecutor(1)

    @property
    def photos(self) -> int:
        """Photos that are waiting or in the network."""
        return len(self._photos)

    async def predict(self, photos: Sequence[BinaryIO], timeout: float) -> list[Prediction]:
        """Classify photos; `Prediction.error` is set for one that can't be read.

        Raises:
            QueueFullError: No room for all of them; none is taken on.
            TimeoutError: Not done within `timeout` seconds; those not begun are dropped.
        """
        if self.photos + len(photos) > self.limits.max_queue:
            raise QueueFullError
        futures: list[asyncio.Future[Prediction]] = []
        for photo in photos:
            future = asyncio.get_running_loop().create_future()
            self._photos[future] = photo
            future.add_done_callback(self._photos.pop)
            futures.append(future)
            self._queue.put_nowait(future)
        _, late = await asyncio.wait(futures, timeout=timeout)
        for future in late:
            future.cancel()
        if late:
            raise TimeoutError
        return [future.result() for future in futures]

    async def run(self) -> None:
        """Answer what is asked until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [future for future in await self._next_batch() if not future.done()]
            if not batch:
                continue
            self._on_batch(len(batch))
            try:
                answers = await loop.run_in_executor(self._thread, self._answer, [self._photos[it] for it in batch])
            except Exception as error:  # one bad batch must not end the service
                logger.exception("a batch of %d photos failed", len(batch))
                for future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for future, answer in zip(batch, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)

    async def _next_batch(self) -> list[asyncio.Future[Prediction]]:
        batch = [await self._queue.get()]
        end = time.monotonic() + self.limits.max_wait
        while len(batch) < self.limits.max_batch:
            if self._queue.empty():
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), end - time.monotonic()))
                except asyncio.TimeoutError:
                    break
            else:
                batch.append(self._queue.get_nowait())
        return batch

    def _answer(self, photos: list[BinaryIO]) -> list[Prediction]:
        return list(self.classifier.predict_stream(photos, batch_size=len(photos)))


class Answer(BaseModel):
    """What a photo shows, in the JSON shape of the university report's service."""

    predicted_label: str | None = Field(description="The most likely class; null if the photo can't be read.")
    scores: list[tuple[str, str]] = Field(
        description="Classes and their probabilities with three decimals, most likely first, five at most."
    )
    error: str | None = Field(None, description="Why there is no answer; absent if there is one.")


class Problem(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="One sentence.")


class Health(BaseModel):
    """Whether the service takes photos."""

    status: str = Field(description="ready or stopping")
    model: str
    labels: list[str]


class _Json(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    image: str | None = None
    images: list[str] | None = None


def create_app(classifier: GarbageClassifier, *, model: str = "", limits: Limits | None = None) -> FastAPI:
    """Make the service as an ASGI application.

    Its start answers a grey photo first, and fails if that can't be done. `app.state.draining = True` makes `/health`
    say 503 and every answer close its connection, while photos are still answered.

    Args:
        classifier: What answers.
        model: Its name, which `/health` tells.
        limits: What is taken on; None takes the defaults.

    Raises:
        ConfigError: As `Limits`.
    """
    limits = limits or Limits()
    registry = CollectorRegistry()
    batches = Histogram("batch_photos", "Photos in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry)
    photos_total = Counter("photos", "Photos answered", ["outcome"], registry=registry)
    batcher = Batcher(classifier, limits, batches.observe)
    Gauge("photos_in_hand", "Photos waiting or in the network", registry=registry).set_function(lambda: batcher.photos)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        grey = io.BytesIO()
        Image.new("RGB", (64, 64), "grey").save(grey, "PNG")
        running = asyncio.create_task(batcher.run())
        try:
            await batcher.predict([grey], timeout=600)
            yield
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    app = FastAPI(
        title="ghost-resnet",
        version=version("ghost-resnet"),
        description=f"Says which of {', '.join(classifier.labels)} a photo shows.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.draining = False
    app.state.requests = 0
    app.add_middleware(_CloseWhileDraining, app=app)
    Instrumentator(registry=registry, excluded_handlers=["/metrics", "/health"]).instrument(app).expose(
        app, include_in_schema=False
    )

    @app.exception_handler(StarletteHTTPException)
    async def say_why(request: Request, error: StarletteHTTPException) -> JSONResponse:
        sentence = error.detail
        if error.status_code == 404:
            sentence = f"nothing at {request.url.path}: see /docs for what there is"
        elif error.status_code == 405:
            sentence = f"{request.method} is no way to ask {request.url.path}: see /docs"
        return JSONResponse({"error": sentence}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def own_fault(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "the service failed, which is its own fault and is in its log"}, 500)

    @app.get("/health", responses={200: {"model": Health}, 503: {"model": Health}}, response_model=None)
    async def health() -> JSONResponse:
        """200 if the service takes photos, 503 while it stops."""
        state, status = ("stopping", 503) if app.state.draining else ("ready", 200)
        return JSONResponse(Health(status=state, model=model, labels=list(classifier.labels)).model_dump(), status)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page)

    @app.post(
        "/predict",
        openapi_extra={"requestBody": _request_body(limits)},
        responses={
            200: {"model": Answer | list[Answer], "description": "One answer, or a list if the request has several."},
            400: {"model": Problem, "description": "The request is not what is expected."},
            408: {"model": Problem, "description": f"The request did not arrive within {limits.timeout:g} s."},
            413: {"model": Problem, "description": "Too many bytes or too many photos."},
            415: {"model": Problem, "description": "Neither JSON nor a form."},
            422: {"model": Problem, "description": "None of the photos can be read."},
            503: {"model": Problem, "description": "Too busy; ask again after Retry-After seconds."},
        },
        response_model=None,
    )
    async def predict(request: Request) -> JSONResponse:
        """Say what one or several photos show.

        A form with one file, or JSON with `image`, gets one answer. Several files, or JSON with `images`, get a list
        in the same order, in which a photo that can't be read has `error` set; only if none of them can be read is
        the answer 422.
        """
        if app.state.requests >= limits.max_queue:
            raise _busy()
        app.state.requests += 1
        try:
            end = time.monotonic() + limits.timeout
            try:
                photos, several = await asyncio.wait_for(_photos(request, limits), limits.timeout)
            except asyncio.TimeoutError:
                raise HTTPException(
                    408, f"expected the request within {limits.timeout:g} s, and it did not end"
                ) from None
            try:
                predictions = await batcher.predict(photos, end - time.monotonic())
            except QueueFullError:
                raise _busy() from None
            except TimeoutError:
                raise HTTPException(
                    503, f"no answer within {limits.timeout:g} s: ask again later", RETRY_AFTER
                ) from None
        finally:
            app.state.requests -= 1
        for prediction in predictions:
            photos_total.labels("unreadable" if prediction.error else "answered").inc()
        if any(isinstance(prediction.error, OverflowedError) for prediction in predictions):
            raise HTTPException(500, "the network's outputs are no finite numbers, which is the service's own fault")
        if all(prediction.error for prediction in predictions):
            raise HTTPException(422, str(predictions[0].error))
        answers = [prediction.to_report() for prediction in predictions]
        return JSONResponse(answers if several else answers[0])

    templates = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    page = (
        jinja2.Environment(loader=templates, autoescape=True)
        .get_template("service.html")
        .render(api=app.openapi(), limits=limits, max_pixels=MAX_PIXELS, model=model)
    )
    return app


async def _photos(request: Request, limits: Limits) -> tuple[list[BinaryIO], bool]:
    """The photos of a request, and whether its answer is a list."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        photos = await _photos_of_form(request, limits)
        several = len(photos) > 1
    elif kind == "application/json":
        body = b"".join([chunk async for chunk in _limited(request, limits)])
        photos, several = await asyncio.to_thread(_photos_of_json, body, limits)  # takes long for large ones
    else:
        raise HTTPException(415, f"expected multipart/form-data or application/json, got {kind or 'no content type'}")
    if not photos:
        raise HTTPException(400, "expected at least one photo, got none")
    return photos, several


async def _limited(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    too_large = HTTPException(413, f"expected at most {limits.max_bytes:,} bytes, and more came")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.max_bytes:
        raise too_large
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limits.max_bytes:
                raise too_large
            yield chunk
    except ClientDisconnect:
        raise HTTPException(400, "the request was broken off") from None  # nobody reads it, but it is counted


async def _photos_of_form(request: Request, limits: Limits) -> list[BinaryIO]:
    parser = MultiPartParser(request.headers, _limited(request, limits), max_files=limits.max_images + 1)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise _too_many(limits) from None
        raise HTTPException(400, f"expected a form with files: {error.message}") from None
    except (UnicodeError, LookupError) as error:  # of the charset that the request names
        raise HTTPException(400, f"expected a form with names in UTF-8: {error}") from None
    try:
        photos = []
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                raise HTTPException(400, f"expected files only, got text in the field {name!r}")
            photos.append(_named(await value.read(), value.filename or name))
    finally:
        await form.close()
    if len(photos) > limits.max_images:
        raise _too_many(limits)
    return photos


def _photos_of_json(body: bytes, limits: Limits) -> tuple[list[BinaryIO], bool]:
    try:
        asked = _Json.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise HTTPException(400, f"{JSON_SHAPE}: {where + ': ' if where else ''}{problem['msg']}") from None
    if (asked.image is None) == (asked.images is None):
        raise HTTPException(400, f"{JSON_SHAPE}, got {'neither' if asked.image is None else 'both'}")
    texts = asked.images if asked.image is None else [asked.image]
    if len(texts or ()) > limits.max_images:
        raise _too_many(limits)
    photos = []
    for number, text in enumerate(texts or (), 1):
        try:
            content = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise HTTPException(400, f"image {number}: expected base64 of an image file ({error})") from None
        photos.append(_named(content, f"image {number}"))
    return photos, asked.image is None


def _named(content: bytes, name: str) -> BinaryIO:
    photo = io.BytesIO(content)
    photo.name = name.encode(errors="replace").decode()  # what messages call it
    return photo


def _too_many(limits: Limits) -> HTTPException:
    return HTTPException(413, f"expected at most {limits.max_images} photos in a request, and more came")


def _busy() -> HTTPException:
    return HTTPException(503, "too many photos are waiting: ask again later", RETRY_AFTER)


def _request_body(limits: Limits) -> dict[str, Any]:
    text = {"type": "string", "contentEncoding": "base64", "description": "An image file in base64."}
    several = {"minItems": 1, "maxItems": limits.max_images}

    def with_one(name: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "properties": {name: schema}, "required": [name], "additionalProperties": False}

    file = {"type": "string", "format": "binary"}
    return {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "oneOf": [with_one("image", text), with_one("images", {"type": "array", "items": text, **several})]
                }
            },
            "multipart/form-data": {"schema": with_one("images", {"type": "array", "items": file, **several})},
        },
    }


class _CloseWhileDraining:
    """Tells clients, while the service stops, to open a new connection for the next request."""

    def __init__(self, wrapped: ASGIApp, app: FastAPI) -> None:
        self.wrapped = wrapped
        self.service = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and self.service.state.draining:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self.wrapped(scope, receive, send_and_close)


class _Server(uvicorn.Server):
    """On SIGTERM, first tells by `/health` that it is about to stop, then stops when all is answered."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain: float) -> None:
        super().__init__(config)
        self.service = app
        self.drain = drain
        self.stop_at = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM:  # uvicorn would raise it again in the end
            self.stop_at = time.monotonic() + (0 if self.service.state.draining else self.drain)
        else:
            super().handle_exit(sig, frame)
        self.service.state.draining = True

    async def on_tick(self, counter: int) -> bool:
        if time.monotonic() >= self.stop_at:
            self.should_exit = True
        return await super().on_tick(counter)


def serve(
    model: str | Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    limits: Limits | None = None,
    drain: float = 5.0,
    on_start: Callable[[str], object] = logger.info,
) -> None:
    """Serve a classifier until SIGTERM or SIGINT; every request that has been taken on is answered.

    Args:
        model: As for `GarbageClassifier.from_pretrained`.
        host: Address to listen at; "0.0.0.0" lets other machines in.
        port: 0 takes any that is free.
        limits: What is taken on; None takes the defaults.
        drain: Seconds after SIGTERM in which `/health` says 503 and photos are still taken, so that a load balancer can
            turn elsewhere.
        on_start: Told the address when the service listens.

    Raises:
        OSError: The address can't be listened at.
        ConfigError: `drain` is below 0 or not finite.
        GhostResNetError: What `GarbageClassifier.from_pretrained` raises.
        SystemExit: The first photo could not be answered; why is in the log.
    """
    if not 0 <= drain < math.inf:
        raise ConfigError(f"drain must be at least 0 and finite, got {drain}")
    limits = limits or Limits()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=2048) as listener:
        app = create_app(GarbageClassifier.from_pretrained(model), model=str(model or "default"), limits=limits)
        config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=int(limits.timeout) + 10)
        on_start(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")
        _Server(config, app, drain).run(sockets=[listener])
