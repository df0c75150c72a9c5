"""A small Hugging Face Hub on loopback, with faults to order.

Speaks what `huggingface_hub`'s client needs to download (resolve with its headers, a redirect of large files
to another origin, byte ranges), to look around (repository info, tree) and to upload (create, preupload, LFS
batch, commit).
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

STATUSES = {"401": {"X_Error_Code": "RepoNotFound"}, "403": {}, "429": {"Retry_After": "1"}, "503": {}}
PAGE = b"<!doctype html><title>Sign in</title><p>Please accept our terms to use this network."


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """Repositories (each a list of commits, newest last), tokens of the private ones, and today's fault."""

    repos: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    fault: str | None = None
    only: str = ""  # the fault strikes paths that end with this
    left: int = 0  # how often a passing fault still strikes

    def __post_init__(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.endpoint, self.cdn = (f"http://127.0.0.1:{s.server_address[1]}" for s in self._servers)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def put(self, repo: str, files: dict[str, bytes]) -> str:
        """Add a commit; return its hash."""
        commits = self.repos.setdefault(repo, [])
        tree = {**(commits[-1][1] if commits else {}), **files}
        listing = "".join(f"{name} {git_hash(data)}" for name, data in sorted(tree.items()))
        commits.append((git_hash(f"{len(commits)} {listing}".encode()), tree))
        return commits[-1][0]

    def break_down(self, fault: str | None, only: str = "") -> None:
        """From now on, `fault` strikes requests for paths that end with `only`."""
        self.fault, self.only, self.left = fault, only, 2

    def strikes(self, fault: str, path: str, passing: bool = False) -> bool:
        if self.fault != fault or not path.endswith(self.only):
            return False
        self.left -= passing
        return not passing or self.left >= 0


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client went away
            self.close_connection = True

    def answer(self, status: int, body: bytes = b"", **headers: Any) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        sent = [self.headers[name] for name in ("Authorization", "Range") if name in self.headers]
        hub.log.append(" ".join([self.command, path, *sent]))
        if hub.strikes("portal", path):
            self.answer(200, PAGE, Content_Type="text/html", ETag='"0"')
        elif match := re.fullmatch(r"/cdn/(\w+)/(.+)", path):
            self.serve(hub.uploads[match[1]], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*match.groups())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(/revision/[^/]+|/tree/[^/]+)?/?", path):
            self.info(match[1], (match[2] or "").split("/"))
        else:
            self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def commit(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that is asked for; None after an answer that there is none, or none for this client."""
        token = self.hub.tokens.get(repo)
        if repo not in self.hub.repos or (token and self.headers.get("Authorization") != f"Bearer {token}"):
            status = 401 if not self.headers.get("Authorization") else 404
            return self.answer(status, X_Error_Code="RepoNotFound")
        commits = self.hub.repos[repo]
        for commit in commits:
            if commit[0] == revision:
                return commit
        if revision != "main":
            return self.answer(404, X_Error_Code="RevisionNotFound")
        return commits[-1]

    def resolve(self, repo: str, revision: str, name: str) -> None:
        hub = self.hub
        for fault, headers in STATUSES.items():
            if hub.strikes(fault, name, passing=fault in ("429", "503")):
                return self.answer(int(fault), **headers)
        if hub.strikes("circle", name):
            return self.answer(302, Location=self.path)
        commit = self.commit(repo, revision)
        if commit is None:
            return None
        sha, tree = commit
        if name not in tree or hub.strikes("404", name):
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        data = tree[name]
        if not name.endswith(".safetensors"):
            return self.serve(data, name, X_Repo_Commit=sha, ETag=f'"{git_hash(data)}"')
        oid = hashlib.sha256(data).hexdigest()
        hub.uploads[oid] = data
        location = f"{hub.cdn}/cdn/{oid}/{name}"
        if hub.strikes("nowhere", name):
            location = "http://127.0.0.1:9/nowhere"
        etag = hashlib.sha256(b"another").hexdigest() if hub.strikes("etag", name) else oid
        return self.answer(
            302,
            Location=location,
            X_Repo_Commit=sha,
            X_Linked_ETag=f'"{etag}"',
            X_Linked_Size=len(data),
            ETag='"not this one"',
        )

    def serve(self, data: bytes, name: str, **headers: Any) -> None:
        hub = self.hub
        if self.command == "HEAD":
            return self.answer(200, data, **headers)
        if hub.strikes("500", name):
            return self.answer(500)
        if hub.strikes("html", name):
            return self.answer(200, PAGE, Content_Type="text/html")
        if hub.strikes("short", name):
            return self.answer(200, data[: len(data) // 2], **headers)
        if hub.strikes("flip", name):
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        start, status = 0, 200
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if ranged and not hub.strikes("cut for good", name):
            start, status = int(ranged[1]), 206
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        half = rest[: len(rest) // 2]
        if hub.strikes("cut", name, passing=True) or hub.strikes("cut for good", name):
            self.answer(status, half, **{**headers, "Content_Length": len(rest)})
            self.close_connection = True
        elif hub.strikes("stall", name):
            self.answer(status, half, **{**headers, "Content_Length": len(rest)})
            time.sleep(30)
        elif hub.strikes("drip", name):
            self.answer(status, b"", **{**headers, "Content_Length": len(rest)})
            for byte in rest:
                self.wfile.write(bytes([byte]))
                time.sleep(0.2)
        else:
            self.answer(status, rest, **headers)
        return None

    def info(self, repo: str, what: list[str]) -> None:
        commit = self.commit(repo, what[2] if len(what) > 2 else "main")
        if commit is None:
            return
        sha, tree = commit
        if "tree" in what:
            entries = [{"type": "file", "path": n, "size": len(d), "oid": git_hash(d)} for n, d in tree.items()]
            return self.json(entries)
        return self.json({"id": repo, "modelId": repo, "sha": sha, "siblings": [{"rfilename": n} for n in tree]})

    def do_PUT(self) -> None:
        data = self.body()
        self.hub.uploads[hashlib.sha256(data).hexdigest()] = data
        self.answer(200)

    def do_POST(self) -> None:
        hub, path, body = self.hub, unquote(urlsplit(self.path).path), self.body()
        hub.log.append(f"POST {path}")
        if not self.headers.get("Authorization"):
            return self.answer(401, b'{"error": "no token"}', Content_Type="application/json")
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization'] or 'me'}/{wanted['name']}"
            if repo in hub.repos:
                return self.answer(409, b"{}")
            hub.put(repo, {})
            if wanted.get("visibility") == "private" or wanted.get("private"):
                hub.tokens[repo] = self.headers["Authorization"].removeprefix("Bearer ")
            return self.json({"url": f"{hub.endpoint}/{repo}", "name": repo})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.+", path):
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.json({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.cdn}/lfs/{o['oid']}"}}} for o in json.loads(body)["objects"]
            ]
            return self.json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.+", path):
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.uploads[value["oid"]]
            sha = hub.put(match[1], files)
            return self.json({"commitUrl": f"{hub.endpoint}/{match[1]}/commit/{sha}", "commitOid": sha})
        return self.answer(404)
