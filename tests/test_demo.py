"""The demo page: tried in a real browser as a person would, asked by many at once, and closed to what is too large."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from drawing import draw
from PIL import Image

from ghost_resnet import GarbageClassifier
from ghost_resnet.export import export

pytestmark = [pytest.mark.ecosystem, pytest.mark.slow]
pytest.importorskip("gradio", reason="needs the extra `demo`")
gradio_client = pytest.importorskip("gradio_client", reason="needs the extra `demo`")

ROOT = Path(__file__).parents[1]
SHOTS = os.environ.get("GHOST_RESNET_SCREENSHOTS")
"""A folder for screenshots to look at."""


@contextmanager
def shown(model: Path, uploads: Path) -> Iterator[str]:
    """The address of `ghost-resnet demo` in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(uploads)}
    command = [sys.executable, "-m", "ghost_resnet", "demo", "--model", str(model), "--port", str(port)]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        lines = iter(process.stderr.readline, "")
        yield next(found[0] for line in lines if (found := re.search(r"http://127.0.0.1:\d+", line)))
    finally:
        process.terminate()  # a background shell's processes would not hear SIGINT
        process.wait(60)


@pytest.fixture(scope="module")
def page(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page of the small network."""
    with shown(run_folder, tmp_path_factory.mktemp("uploads")) as address:
        yield address


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three drawn photos of several kinds."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / name for name in ("first.jpg", "second.png", "third.webp")]
    for seed, path in enumerate(paths):
        draw(640, 480, seed=seed).save(path)
    return paths


# As a program


def ask(client: Any, *paths: Path, heat: bool = False) -> str:
    files = [{"image": gradio_client.handle_file(str(path)), "caption": None} for path in paths]
    return client.predict(files, heat, api_name="/classify")


def bars_of(html: str) -> list[tuple[str, str]]:
    return re.findall(r"<span>(\w+)</span>.*?<span class=\"share\">([\d.]+) %", html, re.S)


def expected_bars(run_folder: Path, path: Path) -> list[tuple[str, str]]:
    scores = GarbageClassifier.from_pretrained(run_folder).predict(path).scores
    return [(label, f"{100 * score:.1f}") for label, score in scores]


def test_twenty_users_at_once_get_their_own_answers(page: str, photos: list[Path], run_folder: Path) -> None:
    expected = [expected_bars(run_folder, path) for path in photos]
    assert len({str(bars) for bars in expected}) == 3

    def user(number: int) -> bool:
        client = gradio_client.Client(page, verbose=False)
        return all(bars_of(ask(client, photos[(number + i) % 3])) == expected[(number + i) % 3] for i in range(3))

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(user, range(20))) == [True] * 20


def test_what_is_no_photo_or_too_large_is_refused_with_a_sentence(
    page: str, photos: list[Path], tmp_path: Path
) -> None:
    client = gradio_client.Client(page, verbose=False)
    (tmp_path / "text.png").write_text("no photo")
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "larger.png")
    html = ask(client, tmp_path / "text.png", photos[0], tmp_path / "bomb.png", tmp_path / "larger.png")
    problems = re.findall(r'<div class="problem">(.*?)</div>', html)
    assert len(problems) == 3 and html.count('class="bars"') == 1
    assert "no image of a kind" in problems[0] and "12000 x 12000" in problems[1] and "pixels" in problems[2]

    assert "At most 16 photos at once, please: there are 17." in ask(client, *photos * 5, *photos[:2])
    (tmp_path / "huge.png").write_bytes(bytes(21 * 2**20))
    with pytest.raises(Exception, match=r"413|Too Large|maximum"):
        ask(client, tmp_path / "huge.png")


def test_only_uploaded_files_are_looked_at(run_folder: Path, photos: list[Path], tmp_path: Path) -> None:
    """Asked without `meta`, gradio does not check where a file is."""
    uploads, beside = tmp_path / "uploads", tmp_path / "uploads2"
    (uploads / "hash").mkdir(parents=True)
    beside.mkdir()
    uploaded = shutil.copy(photos[0], uploads / "hash")
    private = shutil.copy(photos[1], beside)
    (uploads / "link.png").symlink_to(private)
    (uploads / "folder").symlink_to(beside)

    with shown(run_folder, uploads) as page:

        def answer(path: Path | str) -> str:
            data = [[{"image": {"path": str(path)}, "caption": None}], False]
            request = Request(f"{page}/gradio_api/call/classify", json.dumps({"data": data}).encode())
            request.add_header("Content-Type", "application/json")
            event = json.load(urlopen(request))["event_id"]
            return urlopen(f"{page}/gradio_api/call/classify/{event}").read().decode()

        assert "base64" in answer(uploaded)
        others = [private, os.path.relpath(private), f"{uploads}/hash/../../uploads2/second.png"]
        others += [uploads / "link.png", uploads / "folder" / "second.png", beside / "none.png", "http://[::1]/a.png"]
        answers = {answer(path) for path in others}
    assert len(answers) == 1 and "Only photos that were uploaded" in answers.pop()


def test_nobody_outside_this_machine_can_ask(page: str) -> None:
    port = urlsplit(page).port
    others = {address[4][0] for address in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}
    for address in others - {"127.0.0.1"}:
        if not address.startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((address, port), timeout=5)
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


def test_an_exported_network_answers_too_and_no_heat_is_offered(
    run_folder: Path, photos: list[Path], tmp_path: Path
) -> None:
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs the extra `onnx`")
    folder = export(run_folder, tmp_path / "exported", format="onnx")
    with shown(folder, tmp_path / "uploads") as page:
        client = gradio_client.Client(page, verbose=False)
        toggles = [part for part in client.config["components"] if part["type"] == "checkbox"]
        assert [toggle["props"]["visible"] for toggle in toggles] == [False]
        for heat in (False, True):
            html = ask(client, photos[0], heat=heat)
            assert bars_of(html) == expected_bars(folder, photos[0]) and "where the network looks" not in html


# As a person


def shoot(tab: Any, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


@pytest.mark.parametrize("size", [(390, 844), (1280, 800)], ids=["phone", "desktop"])
def test_a_person_uploads_photos_sees_bars_and_heat_and_no_other_machine_is_asked(
    page: str, photos: list[Path], run_folder: Path, browser: Any, size: tuple[int, int], request: Any
) -> None:
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height})
    tab = context.new_page()
    asked: list[str] = []
    errors: list[str] = []
    tab.on("request", lambda sent: asked.append(sent.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page)
    tab.get_by_text("the answer appears here").wait_for(timeout=60_000)
    name = "phone" if width < 500 else "desktop"
    for button in ("Capture from camera", "Paste from clipboard"):  # in sight, not only there
        assert tab.get_by_label(button).evaluate("""button => {
            const {x, y, width, height} = button.getBoundingClientRect();
            return button.contains(document.elementFromPoint(x + width / 2, y + height / 2));
        }""")
    shoot(tab, f"{name}-1-empty")

    with tab.expect_file_chooser() as chooser:
        tab.get_by_text("Click to Upload").click()
    chooser.value.set_files([photos[0]])
    tab.locator(".gr-answers .bars").wait_for(timeout=60_000)
    assert bars_of(tab.locator(".gr-answers").inner_html()) == expected_bars(run_folder, photos[0])
    label = tab.locator(".gr-answers .label").inner_text()
    assert label == expected_bars(run_folder, photos[0])[0][0] and tab.get_by_text(label).first.is_visible()
    lengths = [bar.bounding_box()["width"] for bar in tab.locator(".gr-answers .bar").all()]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > 10
    shoot(tab, f"{name}-2-answer")

    tab.get_by_label("Show where the network looks").check()
    tab.locator('img[alt^="where the network looks on"]').wait_for(timeout=60_000)
    shoot(tab, f"{name}-3-heat")

    tab.get_by_text("About the model").click()
    tab.get_by_text("ghost_resnet50_cifar").first.wait_for(timeout=10_000)
    overflow = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0
    shoot(tab, f"{name}-4-about")
    hosts = {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}, asked
    assert errors == []
    context.close()


def test_several_photos_the_clipboard_and_the_camera(page: str, photos: list[Path], browser: Any) -> None:
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, permissions=["camera", "clipboard-read", "clipboard-write"]
    )
    tab = context.new_page()
    tab.goto(page)
    with tab.expect_file_chooser(timeout=60_000) as chooser:
        tab.get_by_text("Click to Upload").click(timeout=60_000)
    chooser.value.set_files(photos)
    tab.wait_for_function("document.querySelectorAll('.gr-answers .bars').length == 3", timeout=60_000)
    shoot(tab, "several")

    tab.goto(page)
    tab.get_by_text("the answer appears here").wait_for(timeout=60_000)
    tab.evaluate("""async () => {
        const canvas = document.createElement('canvas');
        canvas.width = canvas.height = 64;
        canvas.getContext('2d').fillRect(0, 0, 32, 32);
        const blob = await new Promise(done => canvas.toBlob(done, 'image/png'));
        await navigator.clipboard.write([new ClipboardItem({'image/png': blob})]);
    }""")
    tab.get_by_label("Paste from clipboard").click()
    tab.locator(".gr-answers .bars").wait_for(timeout=60_000)

    tab.goto(page)
    tab.get_by_text("the answer appears here").wait_for(timeout=60_000)
    tab.get_by_label("Capture from camera").click()
    tab.get_by_text("Click to Access Webcam").click(timeout=30_000)
    tab.wait_for_function("document.querySelector('video')?.currentTime > 0", timeout=30_000)
    tab.get_by_label("capture photo").click(timeout=30_000)
    tab.locator(".gr-answers .bars").wait_for(timeout=60_000)
    context.close()


# As a hosted Space


def test_the_example_app_runs_as_it_is(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, ROOT / "examples" / "app.py"], cwd=tmp_path, env=env)
    try:
        end = time.monotonic() + 180
        while True:
            try:
                client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
                break
            except Exception:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(1)
        draw().save(tmp_path / "photo.png")
        assert len(bars_of(ask(client, tmp_path / "photo.png", heat=True))) == 5
    finally:
        process.kill()
        process.wait()
