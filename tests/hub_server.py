"""A stand-in for the hub's HTTP protocol: real huggingface_hub pushes to it and pulls from it."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories in memory: `files[repo][revision][path]`, and uploaded large files by hash."""

    def __init__(self):
        self.files, self.large, self.requests, self.corrupt = {}, {}, [], False

    def commit(self, repo, files):
        digest = hashlib.sha1(b"".join(files[path] for path in sorted(files))).hexdigest()
        self.files[repo].update({"main": files, digest: files})
        return digest

    def head(self, repo, revision):
        revisions = self.files[repo]
        (name,) = (
            n for n, files in revisions.items() if n != "main" and files is revisions[revision]
        )
        return name


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(self.path)
        path = self.path.split("?")[0]
        if path == "/api/validate-yaml":
            return self.answer(dict(errors=[], warnings=[]))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = (
                f"{asked['organization']}/{asked['name']}"
                if asked.get("organization")
                else asked["name"]
            )
            if repo in self.hub.files:
                return self.answer(dict(error="exists"), 409)
            self.hub.files[repo] = {}
            self.hub.commit(repo, {".gitattributes": b""})
            return self.answer(dict(url=f"{self.server.address}/{repo}", name=repo))
        if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            files = [
                dict(
                    path=file["path"],
                    uploadMode="lfs" if file["path"].endswith(".safetensors") else "regular",
                    shouldIgnore=False,
                )
                for file in json.loads(body)["files"]
            ]
            return self.answer(dict(files=files))
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                dict(
                    oid=one["oid"],
                    size=one["size"],
                    actions=dict(upload=dict(href=f"{self.server.address}/lfs/{one['oid']}")),
                )
                for one in json.loads(body)["objects"]
            ]
            return self.answer(dict(transfer="basic", objects=objects))
        if match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            repo = match[1]
            files = dict(self.hub.files[repo]["main"])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
            oid = self.hub.commit(repo, files)
            url = f"{self.server.address}/{repo}/commit/{oid}"
            return self.answer(dict(success=True, commitUrl=url, commitOid=oid, hookOutput=""))
        return self.answer(dict(error=f"unknown: {path}"), 404)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.answer({})

    def do_GET(self):
        self.hub.requests.append(self.path)
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            repo, revision = match[1], match[2] or "main"
            if revision not in self.hub.files.get(repo, {}):
                return self.missing(repo, revision)
            siblings = [dict(rfilename=name) for name in self.hub.files[repo][revision]]
            sha = self.hub.head(repo, revision)
            return self.answer(dict(id=repo, sha=sha, siblings=siblings, tags=[], private=False))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = match.groups()
            if revision not in self.hub.files.get(repo, {}):
                return self.missing(repo, revision)
            files = self.hub.files[repo][revision]
            if name not in files:
                return self.answer(dict(error="no file"), 404, {"X-Error-Code": "EntryNotFound"})
            content = files[name]
            headers = {
                "X-Repo-Commit": self.hub.head(repo, revision),
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            }
            if self.hub.corrupt and self.command == "GET" and name.endswith(".safetensors"):
                content = content[: len(content) // 2]  # the connection breaks
            return self.answer(content, 200, headers, length=len(files[name]))
        return self.answer(dict(error=f"unknown: {path}"), 404)

    do_HEAD = do_GET

    def missing(self, repo, revision):
        known = repo in self.hub.files
        code = "RevisionNotFound" if known else "RepoNotFound"
        self.answer(dict(error=code), 404 if known else 401, {"X-Error-Code": code})

    def answer(self, content, status=200, headers=None, *, length=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
            if length is not None and length != len(data):
                self.close_connection = True


@contextlib.contextmanager
def serve():
    """Run a hub; yields it and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub()
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub, server.address
    finally:
        server.shutdown()
        server.server_close()
