"""The real huggingface_hub client against a hub on loopback that fails in every way we could think of.

After each fault: either the right verified weights, or one clear typed error; and the next call, with the fault
gone and the same cache, gets the right weights.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_server import Hub
from safetensors.numpy import save

from ghost_resnet import hub as hub_module

TAG = "ghost_resnet50_cifar.report"
REPO = "ghost/report"
DATA = save({"weight": np.random.default_rng(0).standard_normal(30_000, np.float32)})

# What goes wrong, and what a call ends in while it does: the weights, or an error and what its message says.
FAULTS = {
    "cut": ("the connection is cut in the middle of the file, twice", "weights", ""),
    "cut for good": (
        "the connection is cut in the middle of the file each time, and ranges are ignored",
        "DownloadError",
        "not done after",
    ),
    "404": ("there is no such file", "DownloadError", "404"),
    "401": ("the repository is private, and no token was sent", "DownloadError", "401"),
    "403": ("access is forbidden", "DownloadError", "403"),
    "429": ("too many requests, `Retry-After: 1`, twice", "weights", ""),
    "503": ("the service is unavailable, twice, then there again", "weights", ""),
    "500": ("the file server has an internal error", "DownloadError", "500"),
    "short": ("the file is shorter than announced", "DownloadError", "size"),
    "flip": ("one bit of the file is wrong, its size is right", "IntegrityError", "moved aside to"),
    "etag": ("the announced hash is another file's", "weights", ""),
    "html": ("an HTML page comes in place of the file", "DownloadError", "size"),
    "portal": ("a captive portal answers everything with an HTML page", "DownloadError", "Hugging Face Hub"),
    "stall": ("nothing more comes after half of what is left, each time", "DownloadError", "not done after"),
    "drip": ("a byte comes now and then", "DownloadError", "not done after"),
    "nowhere": ("the file is said to be where nobody answers", "DownloadError", "refused"),
    "circle": ("redirects lead in a circle", "DownloadError", "redirect"),
}

CLIENT = """
import json, sys
from pathlib import Path
from ghost_resnet import hub
from ghost_resnet.errors import GhostResNetError
hub.WEIGHTS = Path(sys.argv[1])
for source in sys.argv[2:]:
    try:
        print(json.dumps(["weights", str(hub.resolve(source).weights)]))
    except GhostResNetError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.fixture
def commit(hub: Hub, tmp_path: Path) -> str:
    """A commit with weights; the manifest in `tmp_path/weights` names it, without an embedded file."""
    config = {"architecture": "ghost_resnet50_cifar", "num_classes": 100, "pretrained_cfg": {}}
    commit = hub.put(REPO, {"model.safetensors": DATA, "config.json": json.dumps(config).encode()})
    entry = hub_module.Entry(
        architecture="ghost_resnet50_cifar",
        num_classes=100,
        classes=["glass", "metal"],
        parameters=30_000,
        file="absent.safetensors",
        size=len(DATA),
        sha256=hashlib.sha256(DATA).hexdigest(),
        hf_hub_id=REPO,
        revision=commit,
        preprocessing={},
        temperature=None,
        metrics={},
        license="apache-2.0",
        origin="a test",
        date="2026-01-01",
    )
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "manifest.json").write_text(json.dumps({TAG: vars(entry)}))
    return commit


def start(hub: Hub, folder: Path, *sources: str, **environment: str) -> subprocess.Popen[str]:
    """Start a client process with its cache in `folder`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment = {
        **clean,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",  # the loopback hub has plain storage
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "GHOST_RESNET_DOWNLOAD_TIMEOUT": "30",
        "NO_PROXY": "127.0.0.1",
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(folder / "weights"), *sources],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> list[list[str]]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def resolve(hub: Hub, folder: Path, source: str = TAG, **environment: str) -> list[str]:
    return finish(start(hub, folder, source, **environment))[0]


def assert_right(outcome: list[str]) -> None:
    assert outcome[0] == "weights", outcome
    assert Path(outcome[1]).read_bytes() == DATA


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_ends_in_verified_weights_or_one_clear_error(fault: str, hub: Hub, commit: str, tmp_path: Path) -> None:
    hub.break_down(fault, only="model.safetensors" if fault != "portal" else "")
    hopeless = fault in ("cut for good", "stall", "drip")
    outcome = resolve(hub, tmp_path, GHOST_RESNET_DOWNLOAD_TIMEOUT="2.5" if hopeless else "30")
    _, kind, says = FAULTS[fault]
    assert outcome[0] == kind, outcome
    if kind == "weights":
        assert_right(outcome)
    else:
        assert says.lower() in outcome[1].lower()
        assert "\n" not in outcome[1]
    hub.break_down(None)
    assert_right(resolve(hub, tmp_path))


@pytest.mark.parametrize(("fault", "kind"), [("flip", "IntegrityError"), ("etag", "IntegrityError")])
def test_repository_without_a_tag_is_checked_against_the_hash_that_the_hub_announced(
    fault: str, kind: str, hub: Hub, commit: str, tmp_path: Path
) -> None:
    hub.break_down(fault, only="model.safetensors")
    outcome = resolve(hub, tmp_path, f"hf-hub:{REPO}")
    assert outcome[0] == kind and f"ghost-resnet hub download hf-hub:{REPO}" in outcome[1]
    hub.break_down(None)
    assert_right(resolve(hub, tmp_path, f"hf-hub:{REPO}@{commit}"))
    assert_right(resolve(hub, tmp_path, f"hf-hub:{REPO}"))


def test_cut_download_of_a_large_file_is_resumed_by_range(hub: Hub, commit: str, tmp_path: Path) -> None:
    large = save({"weight": np.zeros(25 * 2**20, np.uint8)})
    hub.put(REPO, {"model.safetensors": large})
    hub.break_down("cut", only="model.safetensors")
    kind, path = resolve(hub, tmp_path, f"hf-hub:{REPO}")
    assert kind == "weights" and Path(path).read_bytes() == large
    downloads = [line for line in hub.log if "/cdn/" in line]
    # the client writes, and so can resume after, every 10 MiB
    assert [line.partition("bytes=")[2] for line in downloads] == ["", f"{10 * 2**20}-", f"{10 * 2**20}-"]


@pytest.mark.parametrize("processes", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_that_download_at_once_all_get_the_right_weights(
    processes: int, hub: Hub, commit: str, tmp_path: Path
) -> None:
    for outcome in map(finish, [start(hub, tmp_path, TAG) for _ in range(processes)]):
        assert_right(outcome[0])


@pytest.mark.parametrize("fault", ["stall", "drip"])
def test_process_killed_in_mid_download_leaves_a_cache_that_the_next_call_can_use(
    fault: str, hub: Hub, commit: str, tmp_path: Path
) -> None:
    hub.break_down(fault, only="model.safetensors")
    process = start(hub, tmp_path, TAG)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "home").rglob("*.incomplete")):
        assert time.monotonic() < deadline and process.poll() is None, "the download never began"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.break_down(None)
    assert_right(resolve(hub, tmp_path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, half of what the weights need."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_full_disk_is_said_and_leaves_a_cache_that_the_next_call_can_use(
    hub: Hub, commit: str, tmp_path: Path, small_disk: Path
) -> None:
    outcome = resolve(hub, tmp_path, HF_HOME=str(small_disk))
    assert outcome[0] == "DownloadError" and "No space left on device" in outcome[1]
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert_right(resolve(hub, tmp_path, HF_HOME=str(small_disk)))


def test_file_size_limit_is_said_and_leaves_a_cache_that_the_next_call_can_use(
    hub: Hub, commit: str, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("limits of another process are Linux's")
    process = start(hub, tmp_path, TAG)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**16, 2**16))
    outcome = finish(process)[0]
    assert outcome[0] == "DownloadError" and "File too large" in outcome[1]
    assert_right(resolve(hub, tmp_path))


def test_read_only_cache_is_used_as_it_is(hub: Hub, commit: str, tmp_path: Path, small_disk: Path) -> None:
    home = {"HF_HOME": str(small_disk)}
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert_right(resolve(hub, tmp_path, **home))
    assert_right(resolve(hub, tmp_path, f"hf-hub:{REPO}", **home))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_right(resolve(hub, tmp_path, **home))
    assert_right(resolve(hub, tmp_path, f"hf-hub:{REPO}", **home))
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    flip_a_bit(next(small_disk.rglob(f"blobs/{hashlib.sha256(DATA).hexdigest()}")))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    outcome = resolve(hub, tmp_path, **home)
    assert outcome[0] == "IntegrityError" and "could not be moved aside" in outcome[1]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_cache_is_moved_aside_and_the_named_command_repairs_it(hub: Hub, commit: str, tmp_path: Path) -> None:
    path = Path(resolve(hub, tmp_path)[1])
    flip_a_bit(path)
    damaged = path.read_bytes()
    kind, message = resolve(hub, tmp_path)
    digest = hashlib.sha256(damaged).hexdigest()
    aside = path.resolve().with_name(f"{hashlib.sha256(DATA).hexdigest()}.bad-{digest[:8]}")
    assert kind == "IntegrityError"
    for part in (str(path), hashlib.sha256(DATA).hexdigest(), digest, str(aside)):
        assert part in message
    assert aside.read_bytes() == damaged
    assert message.endswith(f"repair: ghost-resnet hub download {TAG}")
    assert_right(resolve(hub, tmp_path))  # what that command calls


def test_cached_weights_need_no_hub(hub: Hub, commit: str, tmp_path: Path) -> None:
    assert_right(resolve(hub, tmp_path))
    hub.log.clear()
    assert_right(resolve(hub, tmp_path))
    assert hub.log == []
    assert_right(resolve(hub, tmp_path, HF_HUB_OFFLINE="1"))


def test_offline_without_a_cache_says_so(hub: Hub, commit: str, tmp_path: Path) -> None:
    outcome = resolve(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert outcome[0] == "DownloadError" and "HF_HUB_OFFLINE" in outcome[1]
    assert hub.log == []


def test_offline_repository_is_read_from_the_cache(hub: Hub, commit: str, tmp_path: Path) -> None:
    source = f"hf-hub:{REPO}"
    assert_right(resolve(hub, tmp_path, source))
    assert_right(resolve(hub, tmp_path, source, HF_HUB_OFFLINE="1"))


def test_cache_without_links_verifies_tags_and_says_that_it_can_not_verify_repositories(
    hub: Hub, commit: str, tmp_path: Path
) -> None:
    no_links = {"HF_HUB_DISABLE_SYMLINKS": "1"}
    source = f"hf-hub:{REPO}"
    process = start(hub, tmp_path, source, TAG, **no_links)
    out, err = process.communicate(timeout=300)
    assert_right(json.loads(out.splitlines()[0]))
    assert "can't be verified" in err
    path = Path(json.loads(out.splitlines()[1])[1])
    flip_a_bit(path)
    assert resolve(hub, tmp_path, **no_links)[0] == "IntegrityError"
    assert_right(resolve(hub, tmp_path, **no_links))


def test_weights_and_configuration_come_from_one_commit(hub: Hub, commit: str, tmp_path: Path) -> None:
    """Even if the branch moves between the two downloads."""
    answer = hub.put

    class Moving(list):  # type: ignore[type-arg]
        def append(self, line: str) -> None:
            super().append(line)
            if line.startswith("GET") and "config.json" in line and len(hub.repos[REPO]) == 1:
                answer(REPO, {"model.safetensors": save({"weight": np.ones(3, np.float32)})})

    hub.log = Moving()
    assert_right(resolve(hub, tmp_path, f"hf-hub:{REPO}"))
    assert len(hub.repos[REPO]) == 2


def test_private_repository_needs_its_token(hub: Hub, commit: str, tmp_path: Path) -> None:
    hub.tokens[REPO] = "hf_secret"
    assert resolve(hub, tmp_path)[0] == "DownloadError"
    assert resolve(hub, tmp_path, HF_TOKEN="hf_wrong")[0] == "DownloadError"
    assert_right(resolve(hub, tmp_path, HF_TOKEN="hf_secret"))
    assert not any("/cdn/" in line and "hf_" in line for line in hub.log), "the token stays with the hub"


def test_proxy_is_used(hub: Hub, commit: str, tmp_path: Path) -> None:
    outcome = resolve(hub, tmp_path, HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=hub.endpoint, http_proxy=hub.endpoint)
    assert_right(outcome)


def test_embedded_file_comes_before_cache_and_hub(hub: Hub, commit: str, tmp_path: Path) -> None:
    embedded = tmp_path / "weights" / "absent.safetensors"
    embedded.write_bytes(DATA)
    assert resolve(hub, tmp_path) == ["weights", str(embedded)]
    assert hub.log == []
    flip_a_bit(embedded)
    assert resolve(hub, tmp_path)[0] == "IntegrityError"
    assert not embedded.exists()
    assert_right(resolve(hub, tmp_path))
    assert hub.log != []


def test_repository_without_safetensors_gets_no_pickle_instead(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "manifest.json").write_text("{}")
    config = {"architecture": "ghost_resnet50_cifar", "num_classes": 100, "pretrained_cfg": {}}
    hub.put(REPO, {"pytorch_model.bin": b"a pickle", "config.json": json.dumps(config).encode()})
    outcome = resolve(hub, tmp_path, f"hf-hub:{REPO}")
    assert outcome[0] == "DownloadError" and "model.safetensors" in outcome[1]
    assert not any("pytorch_model" in line for line in hub.log)


def test_the_documents_give_this_table() -> None:
    assert table() in (Path(__file__).parents[1] / "docs" / "hub.md").read_text(encoding="utf-8")


def table() -> str:
    """What `docs/hub.md` says of faults, from what the tests above expect."""
    rows = ["| Fault | While it lasts | Next call, fault gone |", "|---|---|---|"]
    for does, kind, says in FAULTS.values():
        ends = "the right weights" if kind == "weights" else f'`{kind}`: "… {says} …"'
        rows.append(f"| {does} | {ends} | the right weights |")
    rows += [
        '| the disk is full | `DownloadError`: "… No space left on device …" | the right weights |',
        '| a limit on the size of files is hit | `DownloadError`: "… File too large …" | the right weights |',
        "| two to eight processes download at once | the right weights in each | the right weights |",
        "| the process is killed in mid-download (`kill -9`) | | the right weights |",
        '| a bit of the cached file flips | `IntegrityError`: "… moved aside to …" | the right weights |',
        '| a bit flips in a cache that is read-only | `IntegrityError`: "… could not be moved aside …" | the same |',
        '| offline, and the cache is empty | `DownloadError`: "… HF_HUB_OFFLINE" | the right weights |',
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
