"""A local stand-in of Google Cloud Storage: the part of its JSON API that gcsfs, TensorStore and Orbax call.

It keeps objects in memory and does what the real one promises: an object appears whole when its upload ends, every
write gets a new generation, and preconditions on generations hold (TensorStore's OCDBT builds on them). There are
no folders. Behaviour as documented at https://cloud.google.com/storage/docs/json_api/v1/objects.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass(frozen=True)
class StoredObject:
    """One object: its bytes and the number of the write that made it."""

    data: bytes
    generation: int


class StatusError(Exception):
    """A request that ends with another status than 200."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message or str(status))
        self.status = status


class ObjectStore:
    """Buckets in memory, and the server in front of them.

    Attributes:
      buckets: bucket -> object name -> object.
      requests: (method, path) of everything that was asked for.
      fault: called with (method, object name or "") before a request is served; what it raises is the answer.
    """

    def __init__(self, *buckets: str) -> None:
        self.buckets: dict[str, dict[str, StoredObject]] = {name: {} for name in buckets}
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], None] = lambda method, name: None
        self.lock = threading.RLock()
        self._generations = itertools.count(1_700_000_000_000_000)
        self._uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        store = self

        class Handler(_Handler):
            objects = store

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def when_uploaded(self, name: str, then: Callable[[], None]) -> None:
        """Calls `then` in place of taking the object of that name, whose upload fails."""

        def fault(method: str, asked: str) -> None:
            if method == "POST" and asked == name:
                then()
                raise StatusError(503)

        self.fault = fault

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ObjectStore:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Names of the objects there, sorted."""
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def bucket(self, name: str) -> dict[str, StoredObject]:
        if name not in self.buckets:
            raise StatusError(404, f"no bucket {name}")
        return self.buckets[name]

    def get(self, bucket: str, name: str, query: dict[str, str]) -> StoredObject:
        with self.lock:
            found = self.bucket(bucket).get(name)
        _check(found, query)
        if found is None or query.get("generation", str(found.generation)) != str(found.generation):
            raise StatusError(404, f"no object {name}")
        return found

    def put(self, bucket: str, name: str, data: bytes, query: dict[str, str]) -> dict[str, Any]:
        with self.lock:
            _check(self.bucket(bucket).get(name), query)
            self.buckets[bucket][name] = StoredObject(data, next(self._generations))
            return self.describe(bucket, name)

    def delete(self, bucket: str, name: str, query: dict[str, str]) -> None:
        with self.lock:
            self.get(bucket, name, query)
            del self.buckets[bucket][name]

    def describe(self, bucket: str, name: str) -> dict[str, Any]:
        found = self.buckets[bucket][name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(found.data)),
            "generation": str(found.generation),
            "metageneration": "1",
            "etag": str(found.generation),
            "md5Hash": base64.b64encode(hashlib.md5(found.data).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "contentType": "application/octet-stream",
        }

    def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        with self.lock:
            names = [name for name in sorted(self.bucket(bucket)) if name.startswith(prefix)]
            names = [name for name in names if name >= query.get("startOffset", "")]
            if "endOffset" in query:
                names = [name for name in names if name < query["endOffset"]]
            entries: dict[str, None] = {}  # an object's name, or a prefix that ends with the delimiter
            for name in names:
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                entries.setdefault(prefix + head + found if found else name)
            page = [entry for entry in entries if entry > query.get("pageToken", "")]
            limit = int(query.get("maxResults", 1000))
            answer: dict[str, Any] = {"kind": "storage#objects"}
            folders = [e for e in page[:limit] if delimiter and e.endswith(delimiter) and e not in names]
            if folders:
                answer["prefixes"] = folders
            answer["items"] = [self.describe(bucket, entry) for entry in page[:limit] if entry not in folders]
            if len(page) > limit:
                answer["nextPageToken"] = page[limit - 1]
        return answer

    def start_upload(self, bucket: str, name: str, query: dict[str, str]) -> str:
        key = f"upload-{next(self._generations)}"
        self._uploads[key] = (bucket, name, query, bytearray())
        return f"{self.url}/resumable/{key}"

    def continue_upload(self, key: str, span: str, data: bytes) -> dict[str, Any] | int:
        """Takes a chunk; the description of the object when it was the last, else how many bytes are there."""
        bucket, name, query, buffer = self._uploads[key]
        first, total = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", span or "bytes 0-0/*").groups()  # type: ignore[union-attr]
        if first is not None:
            buffer[int(first) :] = data
        if not span or (total.isdigit() and len(buffer) == int(total)):
            del self._uploads[key]
            return self.put(bucket, name, bytes(buffer), query)
        return len(buffer)


def _check(found: StoredObject | None, query: dict[str, str]) -> None:
    generation = found.generation if found else 0
    if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
        raise StatusError(412, "ifGenerationMatch does not hold")
    if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
        raise StatusError(304)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A folder is uploaded over a hundred connections at a time; of those beyond the queue some were never answered.
    request_queue_size = 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed leave broken connections, which is no error of the store."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    objects: ObjectStore
    protocol_version = "HTTP/1.1"
    # Head and body leave together: in two pieces the second waits for the first one's acknowledgement.
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: `ObjectStore.requests` is the log."""

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        body = self._body()
        parts = urllib.parse.urlsplit(self.path)
        query = {key: values[-1] for key, values in urllib.parse.parse_qs(parts.query).items()}
        self.objects.requests.append((method, self.path))
        try:
            self._dispatch(method, parts.path, query, body)
        except StatusError as error:
            text = (
                ""
                if error.status == 304
                else json.dumps({"error": {"code": error.status, "message": str(error)}})
            )
            self._answer(error.status, text.encode())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _dispatch(self, method: str, path: str, query: dict[str, str], body: bytes) -> None:
        store = self.objects
        if method == "POST" and path == "/batch/storage/v1":
            return self._batch(body)
        if found := re.fullmatch(r"/resumable/(.+)", path):
            result = store.continue_upload(found[1], self.headers.get("Content-Range", ""), body)
            if isinstance(result, int):
                return self._answer(308, b"", {"Range": f"bytes=0-{result - 1}"} if result else {})
            return self._json(result)
        if found := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
            return self._upload(found[1], query, body)
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        if found is None:
            raise StatusError(404, f"no such method: {path}")
        bucket, name = found[1], found[2]
        if name is None:
            store.bucket(bucket)
            return self._json(
                store.list(bucket, query) if path.endswith("/o") else {"name": bucket, "location": "US"}
            )
        if copied := re.fullmatch(r"(.+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)", name):
            source, target_bucket, target = (urllib.parse.unquote(part) for part in copied.groups())
            made = store.put(target_bucket, target, store.get(bucket, source, {}).data, {})
            return self._json({"kind": "storage#rewriteResponse", "done": True, "resource": made})
        if moved := re.fullmatch(r"(.+)/moveTo/o/(.+)", name):
            source, target = (urllib.parse.unquote(part) for part in moved.groups())
            made = store.put(bucket, target, store.get(bucket, source, {}).data, {})
            store.delete(bucket, source, {})
            return self._json(made)
        name = urllib.parse.unquote(name)
        store.fault(method, name)
        if method == "DELETE":
            store.delete(bucket, name, query)
            return self._answer(204, b"")
        stored = store.get(bucket, name, query)
        if query.get("alt") != "media":
            return self._json(store.describe(bucket, name))
        return self._media(stored)

    def _media(self, stored: StoredObject) -> None:
        data, headers = stored.data, {"x-goog-generation": str(stored.generation)}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not span or span[0] == "bytes=-":
            return self._answer(200, data, headers)
        size = len(data)
        first = int(span[1]) if span[1] else max(0, size - int(span[2]))
        last = min(int(span[2]), size - 1) if span[1] and span[2] else size - 1
        if first >= size:
            raise StatusError(416, "the range begins behind the end")
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self._answer(206, data[first : last + 1], headers)

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        name, kind, data = query.get("name", ""), query.get("uploadType", "media"), body
        if kind == "resumable":
            name = name or json.loads(body or b"{}").get("name", "")
            self.objects.fault("POST", name)
            return self._answer(200, b"", {"Location": self.objects.start_upload(bucket, name, query)})
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])[1].encode()  # type: ignore[index]
            _, described, content, _ = body.split(b"--" + boundary)
            name = json.loads(re.split(rb"\r?\n\r?\n", described, maxsplit=1)[1])["name"]
            data = re.sub(rb"\r?\n\Z", b"", re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1])
        self.objects.fault("POST", name)
        return self._json(self.objects.put(bucket, name, data, query))

    def _batch(self, body: bytes) -> None:
        answers = []
        for bucket, name in re.findall(rb"DELETE /storage/v1/b/([^/]+)/o/([^ ?]+)\S* HTTP", body):
            status = 204
            try:
                decoded = urllib.parse.unquote(name.decode())
                self.objects.fault("DELETE", decoded)
                self.objects.delete(bucket.decode(), decoded, {})
            except StatusError as error:
                status = error.status
            answers.append(f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} X\r\n\r\n")
        text = "".join(answers) + "--part--"
        self._answer(200, text.encode(), {"Content-Type": "multipart/mixed; boundary=part"})

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)
