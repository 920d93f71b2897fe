"""A bucket on this machine: Google Cloud Storage's JSON API, as far as a run uses it, in memory.

Tensorstore speaks to it with its own client (TENSORSTORE_GCS_HTTP_URL), epath through fsspec and
`BucketFileSystem`, in the place of gcsfs. As in a real bucket, an object appears whole or not at
all, nothing can be appended to, there are no folders, and nothing is renamed at one stroke.
"""

from __future__ import annotations

import http.server
import io
import json
import os
import pathlib
import threading
import urllib.error
import urllib.parse
import urllib.request

import fsspec

URL = "TENSORSTORE_GCS_HTTP_URL"
_HOOK = f"""
import fsspec
for name in ("gs", "gcs"):
    fsspec.register_implementation(name, "{__name__}.BucketFileSystem", clobber=True)
"""


class Bucket:
    """A server of one bucket, `gs://bucket`; `objects` is what it holds."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def put(self, name: str, content: bytes) -> int:
        """Replaces an object; returns its generation."""
        self.objects[name] = content
        self.generations[name] = self.generations.get(name, 0) + 1
        return self.generations[name]

    def close(self) -> None:
        self._server.shutdown()

    def environment(self, folder: pathlib.Path) -> dict[str, str]:
        """Variables under which a process finds the bucket; `folder` gets what they refer to."""
        (folder / "sitecustomize.py").write_text(_HOOK)
        root = pathlib.Path(__file__).resolve().parents[2]
        return {
            "PYTHONPATH": os.pathsep.join([str(folder), str(root)]),
            "EPATH_USE_TF": "false",
            URL: self.url,
            "XDG_CACHE_HOME": str(folder / "home"),
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _parts(self) -> tuple[str, dict[str, str]]:
        """(object name, query) of the request."""
        address = urllib.parse.urlsplit(self.path)
        _, _, name = address.path.partition("/o/")
        return urllib.parse.unquote(name), dict(urllib.parse.parse_qsl(address.query))

    def _answer(self, status: int, content: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _json(self, value) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        name, query = self._parts()
        if not name:
            prefix = query.get("prefix", "")
            names = sorted(n for n in list(self.bucket.objects) if n.startswith(prefix))
            return self._json({"items": [self._about(n) for n in names]})
        content = self.bucket.objects.get(name)
        if content is None:
            return self._answer(404)
        if query.get("alt") != "media":
            return self._json(self._about(name))
        generation = {"x_goog_generation": str(self.bucket.generations[name])}
        if "Range" not in self.headers:
            return self._answer(200, content, **generation)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start = int(first) if first else len(content) - int(last)
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        span = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._answer(206, content[start:stop], Content_Range=span, **generation)

    def do_POST(self):
        _, query = self._parts()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name, wanted = query["name"], query.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != self._generation(name):
            return self._answer(412)
        self.bucket.put(name, content)
        return self._json(self._about(name))

    def do_DELETE(self):
        name, _ = self._parts()
        return self._answer(404 if self.bucket.objects.pop(name, None) is None else 204)

    def _generation(self, name: str) -> int:
        return self.bucket.generations[name] if name in self.bucket.objects else 0

    def _about(self, name: str) -> dict[str, str]:
        size = str(len(self.bucket.objects.get(name, b"")))
        return {"name": name, "size": size, "generation": str(self.bucket.generations[name])}


class BucketFileSystem(fsspec.AbstractFileSystem):
    """The bucket as fsspec sees it."""

    protocol = ("gs", "gcs")
    cachable = False

    def _ask(self, method: str, path: str, query: str = "", content: bytes | None = None) -> bytes:
        request = urllib.request.Request(
            f"{os.environ[URL]}{path}?{query}", data=content, method=method
        )
        try:
            with urllib.request.urlopen(request) as reply:
                return reply.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(path) from error
            raise

    def _split(self, path: str) -> tuple[str, str]:
        bucket, _, name = self._strip_protocol(path).partition("/")
        return bucket, name

    def _object(self, path: str) -> str:
        bucket, name = self._split(path)
        return f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}"

    def _names(self, path: str) -> dict[str, int]:
        """{name: size} of the objects at or under a path."""
        bucket, name = self._split(path)
        query = urllib.parse.urlencode({"prefix": name})
        found = json.loads(self._ask("GET", f"/storage/v1/b/{bucket}/o", query))["items"]
        return {
            item["name"]: int(item["size"])
            for item in found
            if not name or item["name"] == name or item["name"].startswith(f"{name}/")
        }

    def ls(self, path, detail=True, **_):
        bucket, name = self._split(path)
        entries = {}
        for found, size in self._names(path).items():
            rest = found.removeprefix(f"{name}/" if name and found != name else "")
            is_file = found == name or "/" not in rest
            full = f"{bucket}/{found}" if is_file else f"{bucket}/{name}/{rest.split('/')[0]}"
            entries[full] = {
                "name": full, "size": size, "type": "file" if is_file else "directory"
            }  # fmt: skip
        if not entries:
            raise FileNotFoundError(path)
        return [entries[key] if detail else key for key in sorted(entries)]

    def info(self, path, **_):
        stripped, found = self._strip_protocol(path), self._names(path)
        _, name = self._split(path)
        if name in found:
            return {"name": stripped, "size": found[name], "type": "file"}
        if name and not found:
            raise FileNotFoundError(path)
        return {"name": stripped, "size": 0, "type": "directory"}

    def makedirs(self, path, exist_ok=False):
        pass

    def mkdir(self, path, create_parents=True, **_):
        pass

    def _rm(self, path):
        self._ask("DELETE", self._object(path))

    def rm(self, path, recursive=False, **_):
        bucket, name = self._split(path)
        found = self._names(path) if recursive else {name: 0}
        if not found:
            raise FileNotFoundError(path)
        for one in found:
            self._rm(f"{bucket}/{one}")

    def cp_file(self, path1, path2, **_):
        self.pipe_file(path2, self.cat_file(path1))

    def _open(self, path, mode="rb", **_):
        if mode == "rb":
            return io.BytesIO(self._ask("GET", self._object(path), "alt=media"))
        if mode != "wb":
            raise NotImplementedError(f"a bucket has no mode {mode!r}")
        return _Upload(self, path)

    def upload(self, path: str, content: bytes) -> None:
        bucket, name = self._split(path)
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        self._ask("POST", f"/upload/storage/v1/b/{bucket}/o", query, content)


class _Upload(io.BytesIO):
    """What is written becomes an object when it is closed."""

    def __init__(self, system: BucketFileSystem, path: str):
        super().__init__()
        self._system, self._target = system, path

    def close(self):
        if not self.closed:
            self._system.upload(self._target, self.getvalue())
        super().close()
