"""The HTTP service: every good photo is answered as the classifier answers it, every bad request with a sentence."""

import asyncio
import base64
import gc
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import draw, encode
from PIL import Image

from ghost_resnet import GarbageClassifier
from ghost_resnet.data import Preprocessing
from ghost_resnet.errors import ConfigError

pytestmark = pytest.mark.ecosystem
pytest.importorskip("fastapi", reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `serve`")

from starlette.testclient import TestClient  # noqa: E402

from ghost_resnet.serve import Batcher, Limits, create_app, serve  # noqa: E402

LABELS = ("cardboard", "glass", "metal", "paper", "plastic", "trash")


class Runtime:
    """Answers from the mean colour, notes the sizes of batches, and waits for `go` if told to."""

    parameters = 0

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.broken = False

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.batches.append(len(batch))
        assert self.go.wait(30)
        if self.broken:
            raise RuntimeError("the GPU fell off")
        return batch.mean((2, 3)) @ np.random.default_rng(0).normal(0, 9, (3, len(LABELS)))


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


@pytest.fixture
def classifier(runtime: Runtime) -> GarbageClassifier:
    return GarbageClassifier(runtime, LABELS, Preprocessing(input_size=(3, 32, 32)))


@contextmanager
def client_of(classifier: GarbageClassifier, **limits: Any) -> Iterator[TestClient]:
    """A client of a service that is ready."""
    with TestClient(create_app(classifier, model="test", limits=Limits(**limits)), raise_server_exceptions=False) as it:
        yield it


@pytest.fixture
def client(classifier: GarbageClassifier) -> Iterator[TestClient]:
    with client_of(classifier, max_images=4, max_bytes=50_000) as it:
        yield it


PHOTOS = [encode(draw(seed=seed), kind) for seed, kind in enumerate(("JPEG", "PNG", "WEBP"))]
TEXTS = [base64.b64encode(photo).decode() for photo in PHOTOS]


def files(*contents: bytes, field: str = "images") -> list[tuple[str, tuple[str, bytes]]]:
    return [(field, (f"photo{number}.jpg", content)) for number, content in enumerate(contents)]


# Answers


def test_outputs_that_overflow_are_the_service_s_fault(classifier: GarbageClassifier) -> None:
    classifier.runtime = lambda batch: np.full((len(batch), len(LABELS)), np.nan)  # type: ignore[assignment]
    with client_of(classifier) as client:
        response = client.post("/predict", files=files(PHOTOS[0]))
    assert response.status_code == 500 and "no finite numbers" in response.json()["error"]


def test_forms_and_json_are_answered_in_the_report_s_shape(client: TestClient, classifier: GarbageClassifier) -> None:
    expected = [prediction.to_report() for prediction in classifier.predict(PHOTOS)]
    assert len({answer["predicted_label"] for answer in expected}) > 1
    for response, answer in [
        (client.post("/predict", files=files(PHOTOS[0])), expected[0]),
        (client.post("/predict", files=files(PHOTOS[1], field="any")), expected[1]),
        (client.post("/predict", files=files(*PHOTOS)), expected),
        (client.post("/predict", json={"image": TEXTS[2]}), expected[2]),
        (client.post("/predict", json={"images": TEXTS}), expected),
        (client.post("/predict", json={"images": TEXTS[:1]}), expected[:1]),
        (client.post("/predict", json={"image": re.sub("(.{76})", r"\1\n", TEXTS[0])}), expected[0]),
    ]:
        assert (response.status_code, response.json()) == (200, answer)


def test_a_bad_photo_among_several_is_named_and_the_others_are_answered(client: TestClient) -> None:
    response = client.post("/predict", files=files(PHOTOS[0], b"no photo", PHOTOS[1]))
    good, bad, also_good = response.json()
    assert response.status_code == 200 and good["predicted_label"] and also_good["predicted_label"]
    assert bad["predicted_label"] is None and bad["scores"] == [] and bad["error"].startswith("photo1.jpg: no image")


def form(name: str, charset: str) -> dict[str, Any]:
    """A request with a file of that name, which is no photo."""
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
    headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
    return {"content": f"{head}no photo\r\n--x--\r\n".encode(), "headers": headers}


BOMB = encode(Image.new("1", (12_000, 12_000)), "PNG")
JSON = {"content-type": "application/json"}
BAD = {
    "one that is no photo": ({"files": files(b"no photo")}, 422, "photo0.jpg: no image of a kind"),
    "an empty file": ({"files": files(b"")}, 422, "photo0.jpg: no image"),
    "one cut short": ({"files": files(PHOTOS[1][:-300])}, 422, "photo0.jpg: damaged"),
    "a decompression bomb": ({"files": files(BOMB)}, 422, "photo0.jpg: expected 1 to 100,000,000 pixels"),
    "several that are no photos": ({"json": {"images": ["YQ==", "YQ=="]}}, 422, "image 1: no image"),
    "no base64": ({"json": {"image": "é!"}}, 400, "image 1: expected base64"),
    "no JSON": ({"content": b"{", "headers": JSON}, 400, "Invalid JSON"),
    "no UTF-8": ({"content": b'{"image": "\xff"}', "headers": JSON}, 400, "Invalid JSON"),
    "JSON as deep as a well": ({"content": b"[" * 20000, "headers": JSON}, 400, "Invalid JSON"),
    "another type": ({"json": {"image": 5}}, 400, "image: Input should be a valid string"),
    "another name": ({"json": {"picture": TEXTS[0]}}, 400, "picture: Extra inputs"),
    "neither": ({"json": {}}, 400, "got neither"),
    "both": ({"json": {"image": TEXTS[0], "images": TEXTS}}, 400, "got both"),
    "an empty list": ({"json": {"images": []}}, 400, "at least one photo"),
    "a form without files": ({"files": {"images": (None, "text")}}, 400, "expected files only"),
    "a form without a boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "form"),
    "a form in no charset": (form("images", "undefined"), 400, "names in UTF-8"),
    "a form in a charset that its names are not in": (form(".", "punycode"), 400, "names in UTF-8"),
    "a name with half a character": (form(r"\ud800.jpg", "unicode_escape"), 422, "[?].jpg: no image"),
    "too many files": ({"files": files(*PHOTOS[:1] * 5)}, 413, "at most 4 photos"),
    "far too many files": ({"files": files(*PHOTOS[:1] * 9)}, 413, "at most 4 photos"),
    "too many in JSON": ({"json": {"images": TEXTS[:1] * 5}}, 413, "at most 4 photos"),
    "too many bytes": ({"files": files(bytes(60_000))}, 413, "at most 50,000 bytes"),
    "too many bytes of JSON": ({"json": {"image": "A" * 60_000}}, 413, "at most 50,000 bytes"),
    "another kind": ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "got text/plain"),
    "no kind": ({"content": b"x"}, 415, "got no content type"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_answered_with_a_sentence(client: TestClient, name: str) -> None:
    request, status, sentence = BAD[name]
    response = client.post("/predict", **request)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"] and re.search(sentence, response.json()["error"])


def test_a_body_that_does_not_say_its_size_is_limited_too(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    response = client.post("/predict", content=chunks(), headers=JSON)
    assert response.status_code == 413 and "at most 50,000 bytes" in response.json()["error"]


def test_other_addresses_and_methods_are_answered_with_a_sentence(client: TestClient) -> None:
    assert client.get("/nothing").json() == {"error": "nothing at /nothing: see /docs for what there is"}
    response = client.get("/predict")
    assert response.status_code == 405 and "GET is no way" in response.json()["error"]


# Batches, queue, time


def together(client: TestClient, count: int) -> list[Any]:
    """Responses to as many requests sent at once."""
    responses: list[Any] = []
    threads = [
        threading.Thread(target=lambda: responses.append(client.post("/predict", files=files(PHOTOS[0]))))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return responses


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def in_hand(client: TestClient) -> int:
    return int(float(re.search(r"^photos_in_hand (\S+)", client.get("/metrics").text, re.M)[1]))


def test_photos_of_many_requests_share_batches(classifier: GarbageClassifier, runtime: Runtime) -> None:
    for max_batch, most in ((4, 4), (1, 1)):
        with client_of(classifier, max_batch=max_batch) as client:
            runtime.batches.clear()
            runtime.go.clear()
            threading.Thread(target=lambda: wait_for(lambda c=client: in_hand(c) == 9) or runtime.go.set()).start()
            assert [response.status_code for response in together(client, 9)] == [200] * 9
        assert max(runtime.batches) == most and sum(runtime.batches) == 9


def test_what_does_not_fit_the_queue_is_refused_at_once_and_the_rest_is_answered(
    classifier: GarbageClassifier, runtime: Runtime
) -> None:
    with client_of(classifier, max_queue=3, max_images=3) as client:
        runtime.go.clear()
        answered: list[Any] = []
        first = threading.Thread(target=lambda: answered.extend(together(client, 2)))
        first.start()
        wait_for(lambda: in_hand(client) == 2)
        refused = client.post("/predict", files=files(*PHOTOS[:2]))
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json() == {"error": "too many photos are waiting: ask again later"}
        runtime.go.set()
        first.join()
        assert [response.status_code for response in answered] == [200, 200] and in_hand(client) == 0


def test_a_request_that_takes_too_long_is_given_up(classifier: GarbageClassifier, runtime: Runtime) -> None:
    with client_of(classifier, timeout=0.3) as client:
        runtime.go.clear()
        late = client.post("/predict", files=files(PHOTOS[0]))
        assert late.status_code == 503 and "no answer within 0.3 s" in late.json()["error"]
        assert client.get("/health").status_code == 200  # the event loop is free
        runtime.go.set()
        assert client.post("/predict", files=files(PHOTOS[0])).status_code == 200


def test_photos_given_up_do_not_stay_in_memory(classifier: GarbageClassifier, runtime: Runtime) -> None:
    async def ask() -> None:
        batcher = Batcher(classifier, Limits(max_batch=1), lambda size: None)
        running = asyncio.create_task(batcher.run())
        runtime.go.clear()
        first = asyncio.create_task(batcher.predict([io.BytesIO(PHOTOS[0])], 30))
        await asyncio.to_thread(wait_for, lambda: runtime.batches)
        late = io.BytesIO(PHOTOS[1])
        kept = weakref.ref(late)
        with pytest.raises(TimeoutError):
            await batcher.predict([late], 0.1)
        del late
        await asyncio.sleep(0)  # for what a cancelled future calls
        gc.collect()
        assert kept() is None and batcher.photos == 1
        runtime.go.set()
        assert (await first)[0].label
        running.cancel()

    asyncio.run(ask())


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_client_that_hangs_up_is_no_fault_of_the_service(
    classifier: GarbageClassifier, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    app = create_app(classifier)
    received = iter([{"type": "http.request", "body": b"--x", "more_body": True}, {"type": "http.disconnect"}])
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b""}
    scope["headers"] = [(b"content-type", kind.encode())]

    async def ask() -> None:
        await app(scope, lambda: asyncio.sleep(0, next(received)), lambda message: asyncio.sleep(0))

    asyncio.run(ask())
    assert 'handler="/predict",method="POST",status="4xx"} 1.0' in TestClient(app).get("/metrics").text
    assert not [record for record in caplog.records if record.name.startswith("ghost_resnet")]


def test_a_body_that_takes_too_long_is_given_up(classifier: GarbageClassifier) -> None:
    app = create_app(classifier, limits=Limits(timeout=0.2))
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.sleep(60)

    async def ask() -> None:
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers, "query_string": b""}
        await app(scope, never, lambda message: asyncio.sleep(0, sent.append(message)))

    asyncio.run(ask())
    assert sent[0]["status"] == 408 and b"expected the request within 0.2 s" in sent[1]["body"]


def test_a_batch_that_fails_is_the_services_fault_and_not_its_end(
    classifier: GarbageClassifier, runtime: Runtime
) -> None:
    with client_of(classifier) as client:
        runtime.broken = True
        response = client.post("/predict", files=files(PHOTOS[0]))
        assert response.status_code == 500 and "GPU" not in response.text and "in its log" in response.json()["error"]
        runtime.broken = False
        assert client.post("/predict", files=files(PHOTOS[0])).status_code == 200


def test_limits_that_nothing_could_keep_to_are_refused() -> None:
    nan, endless = float("nan"), float("inf")
    for limits in (
        {"max_batch": 0},
        {"timeout": nan},
        {"timeout": endless},
        {"max_wait": endless},
        {"max_images": 9, "max_queue": 8},
    ):
        with pytest.raises(ConfigError, match="must be"):
            Limits(**limits)
    for drain in (-1.0, nan, endless):
        with pytest.raises(ConfigError, match="drain must be"):
            serve("no model", drain=drain)


# Health, metrics, documentation


def test_health_is_good_only_between_start_and_stop(classifier: GarbageClassifier, runtime: Runtime) -> None:
    app = create_app(classifier, model="test")
    with TestClient(app) as client:
        assert runtime.batches == [1]  # the network has run before anybody asks
        ready = client.get("/health").json()
        assert ready == {"status": "ready", "model": "test", "labels": list(LABELS)}
        app.state.draining = True
        stopping = client.get("/health")
        assert (stopping.status_code, stopping.json()["status"]) == (503, "stopping")
        answer = client.post("/predict", files=files(PHOTOS[0]))
        assert answer.status_code == 200 and answer.headers["connection"] == "close"


def test_a_network_that_fails_at_first_ends_the_start(
    classifier: GarbageClassifier, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.broken = True
    monkeypatch.setattr(GarbageClassifier, "from_pretrained", lambda model: classifier)
    with pytest.raises(SystemExit) as end:
        serve(port=0)
    assert end.value.code not in (0, None) and "the GPU fell off" in caplog.text


def test_metrics_count_what_was_done(client: TestClient) -> None:
    client.post("/predict", files=files(PHOTOS[0], b"no photo"))
    client.post("/predict", json={})
    text = client.get("/metrics").text
    assert 'photos_total{outcome="answered"} 1.0' in text and 'photos_total{outcome="unreadable"} 1.0' in text
    assert 'http_requests_total{handler="/predict",method="POST",status="4xx"} 1.0' in text
    assert "batch_photos_count 2.0" in text  # with the one of the start
    assert 'http_request_duration_seconds_count{handler="/predict",method="POST"}' in text


def test_the_page_tells_of_everything_and_loads_nothing(client: TestClient) -> None:
    text = client.get("/docs").text
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/predict", "/health"}
    for path, methods in paths.items():
        for method, about in methods.items():
            assert f"{method.upper()} {path}" in text and set(about["responses"]) <= set(re.findall(r"<b>(\d+)", text))
    assert "50,000 bytes" in text and not re.search(r"<script|<link|@import|src=|href=.(https?:)?//", text)


# The real thing


@pytest.fixture
def server(run_folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`ghost-resnet serve` in a process of its own, and its address."""
    command = [sys.executable, "-m", "ghost_resnet", "serve", "--model", str(run_folder), "--port", "0"]
    command += getattr(request, "param", [])
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stderr
        url = re.search(r"http://[\d.]+:\d+", process.stderr.readline())[0]
        end = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < end
            time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("server", [["--drain", "2"]], indirect=True)
def test_sigterm_under_load_loses_no_request(server: tuple[subprocess.Popen[str], str], run_folder: Path) -> None:
    """As behind a load balancer: clients keep asking until /health says no; whatever they have asked is answered."""
    process, url = server
    expected = GarbageClassifier.from_pretrained(run_folder).predict(PHOTOS[0]).to_report()
    outcomes: Counter[str] = Counter()
    stopping = threading.Event()
    late: list[float] = []

    def ask() -> None:
        with httpx.Client(timeout=60) as client:
            while not stopping.is_set():
                try:
                    response = client.post(f"{url}/predict", files=files(PHOTOS[0]))
                    good = response.status_code == 200 and response.json() == expected
                    outcomes["answered" if good else f"{response.status_code} {response.text}"] += 1
                    late.append(time.monotonic())
                except httpx.TransportError as error:
                    outcomes[f"lost: {error!r}"] += 1

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    wait_for(lambda: outcomes["answered"] > 50)
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(f"{url}/health").status_code == 503)
    stopping.set()
    for thread in threads:
        thread.join()
    assert process.wait(60) == 0
    assert set(outcomes) == {"answered"}, outcomes
    assert max(late) > told
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))


FILLING = ["--max-wait", "2", "--max-batch", "64", "--drain"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "signals"), [([*FILLING, "0"], 1), ([*FILLING, "600"], 2), ([*FILLING, "0"], 3)], indirect=["server"]
)
def test_what_is_in_hand_when_the_service_stops_is_answered(
    server: tuple[subprocess.Popen[str], str], signals: int
) -> None:
    """Twenty requests wait for their batch to fill when SIGTERM comes, with no time to drain or more than once."""
    process, url = server
    statuses: list[int] = []
    ask = lambda: statuses.append(httpx.post(f"{url}/predict", files=files(PHOTOS[0]), timeout=60).status_code)  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    wait_for(lambda: "photos_in_hand 20.0" in httpx.get(f"{url}/metrics").text)
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # the same signal twice at once is one
    for thread in threads:
        thread.join()
    assert statuses == [200] * 20 and process.wait(60) == 0


@pytest.mark.slow
def test_schemathesis_finds_no_input_that_breaks_the_service(
    server: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    pytest.importorskip("schemathesis")
    _, url = server
    log = tmp_path / "requests.ndjson"
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = ["run", f"{url}/openapi.json", "--checks", checks, "--max-examples", "400", "--seed", "1", "--no-color"]
    command += ["--report", "ndjson", "--report-ndjson-path", str(log), "--include-path", "/predict"]
    scripts = Path(sys.executable).parent
    done = subprocess.run([scripts / "schemathesis", *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    statuses = Counter(statuses_in(log))
    print(dict(statuses))
    assert sum(count for status, count in statuses.items() if 400 <= status < 500) >= 200, statuses
    assert not any(status >= 500 for status in statuses), statuses


def statuses_in(log: Path) -> Iterator[int]:
    """The status codes of all responses in schemathesis's event log."""

    def walk(item: Any) -> Iterator[int]:
        if isinstance(item, dict):
            if isinstance(item.get("status_code"), int):
                yield item["status_code"]
            for value in item.values():
                yield from walk(value)
        elif isinstance(item, list):
            for value in item:
                yield from walk(value)

    for line in log.read_text().splitlines():
        yield from walk(json.loads(line))
