"""A stand-in for the hub's HTTP protocol: real huggingface_hub pushes to it and pulls from it.

A repository goes by `ORG/NAME`, one of a dataset by `datasets/ORG/NAME`.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

LARGE = (".safetensors", ".parquet", ".onnx")


def repo_name(match):
    """Return a repository's name of the kind and the ORG/NAME in an address."""
    return match[2] if match[1] == "models" else f"datasets/{match[2]}"


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
        for pattern, method in (
            ("/api/validate-yaml", self.validate),
            ("/api/repos/create", self.create),
            (r"/api/(models|datasets)/.+/preupload/.+", self.preupload),
            (r"/.+\.git/info/lfs/objects/batch", self.upload_large),
            (r"/api/(models|datasets)/(.+)/paths-info/(.+)", self.paths_info),
            (r"/api/(models|datasets)/(.+)/commit/(.+)", self.commit),
        ):
            if match := re.fullmatch(pattern, path):
                return method(body, match)
        return self.answer(dict(error=f"unknown: {path}"), 404)

    def validate(self, body, match):
        self.answer(dict(errors=[], warnings=[]))

    def create(self, body, match):
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if asked.get("type") == "dataset":
            repo = f"datasets/{repo}"
        url = f"{self.server.address}/{repo}"
        if repo in self.hub.files:
            return self.answer(dict(error="exists", url=url), 409)
        self.hub.files[repo] = {}
        self.hub.commit(repo, {".gitattributes": b""})
        return self.answer(dict(url=url, name=repo))

    def preupload(self, body, match):
        files = [
            dict(
                path=file["path"],
                uploadMode="lfs" if file["path"].endswith(LARGE) else "regular",
                shouldIgnore=False,
            )
            for file in json.loads(body)["files"]
        ]
        self.answer(dict(files=files))

    def upload_large(self, body, match):
        objects = [
            dict(
                oid=one["oid"],
                size=one["size"],
                actions=dict(upload=dict(href=f"{self.server.address}/lfs/{one['oid']}")),
            )
            for one in json.loads(body)["objects"]
        ]
        self.answer(dict(transfer="basic", objects=objects))

    def paths_info(self, body, match):
        asked = dict(parse_qsl(body.decode(), keep_blank_values=True)).get("paths", "")
        found = self.tree(repo_name(match), match[3])
        self.answer([one for one in found if one["path"] == asked])

    def commit(self, body, match):
        repo = repo_name(match)
        files = dict(self.hub.files[repo]["main"])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        oid = self.hub.commit(repo, files)
        url = f"{self.server.address}/{repo}/commit/{oid}"
        self.answer(dict(success=True, commitUrl=url, commitOid=oid, hookOutput=""))

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.answer({})

    def do_GET(self):
        self.hub.requests.append(self.path)
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(.*)", path):
            repo, revision = repo_name(match), match[3]
            if revision not in self.hub.files.get(repo, {}):
                return self.missing(repo, revision)
            found = self.tree(repo, revision, match[4].strip("/"), "recursive=true" in self.path)
            return self.answer(found) if found else self.answer(dict(error="no folder"), 404)
        if match := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path
        ):
            repo, revision = repo_name(match), match[3] or "main"
            if revision not in self.hub.files.get(repo, {}):
                return self.missing(repo, revision)
            siblings = [dict(rfilename=name) for name in self.hub.files[repo][revision]]
            sha = self.hub.head(repo, revision)
            return self.answer(dict(id=repo, sha=sha, siblings=siblings, tags=[], private=False))
        if match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
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
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(match[1]), int(match[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                return self.answer(content[first : last + 1], 206, headers)
            if self.hub.corrupt and self.command == "GET" and name.endswith(".safetensors"):
                content = content[: len(content) // 2]  # the connection breaks
            return self.answer(content, 200, headers, length=len(files[name]))
        return self.answer(dict(error=f"unknown: {path}"), 404)

    do_HEAD = do_GET

    def tree(self, repo, revision, folder="", recursive=True):
        """List a folder's files, and without `recursive` the folders in it instead of theirs."""
        start = f"{folder}/" if folder else ""
        found = {}
        for path, data in self.hub.files[repo][revision].items():
            if not path.startswith(start):
                continue
            child, inner, _ = path.removeprefix(start).partition("/")
            if inner and not recursive:
                path = start + child
                found[path] = dict(type="directory", path=path, size=0, oid="0" * 40)
            else:
                digest = hashlib.sha1(data).hexdigest()
                found[path] = dict(type="file", path=path, size=len(data), oid=digest)
        return list(found.values())

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
