"""Google Cloud Storage's JSON API in memory: what gcsfs, TensorStore and google-cloud-storage ask of it."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator

import google_crc32c


class Store:
    """Objects by bucket and name. ``refuse`` may answer a request (method, object's name) with a status of its own."""

    def __init__(self, buckets: tuple[str, ...] = ("bucket",)):
        self.buckets, self.objects, self.uploads = buckets, {}, {}
        self.lock, self.generation, self.requests = threading.Lock(), 0, []
        self.refuse = lambda method, name: None

    def names(self, prefix: str = "", bucket: str = "bucket") -> list[str]:
        with self.lock:
            return sorted(name for place, name in self.objects if place == bucket and name.startswith(prefix))

    def read(self, name: str, bucket: str = "bucket") -> bytes:
        return self.objects[bucket, name][0]

    def write(self, bucket: str, name: str, content: bytes, wanted: str | None = None) -> dict | None:
        """What the API says of the new object; None if it is not of the generation that was ``wanted``."""
        with self.lock:
            there = self.objects.get((bucket, name), (b"", 0))[1]
            if wanted is not None and int(wanted) != there:
                return None
            self.generation += 1
            self.objects[bucket, name] = content, self.generation
        return self.describe(bucket, name)

    def describe(self, bucket: str, name: str) -> dict:
        content, generation = self.objects[bucket, name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "etag": str(generation),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "contentType": "application/octet-stream",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode(),
        }

    def delete(self, bucket: str, name: str) -> bool:
        with self.lock:
            return self.objects.pop((bucket, name), None) is not None

    def listed(self, bucket: str, query: dict) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in self.names(prefix, bucket):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            elif query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff"):
                items.append(self.describe(bucket, name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True
    store: Store

    def log_message(self, *_) -> None:
        """Says nothing."""

    def answer(self, status: int, content: dict | bytes = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if content is body else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        with contextlib.suppress(ConnectionError):  # of a process that was killed, or has read enough
            self.end_headers()
            self.wfile.write(body if self.command != "HEAD" else b"")
            self.wfile.flush()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_any(self) -> None:
        url, body = urllib.parse.urlsplit(self.path), self.body()
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        found = re.fullmatch(r"/(?:(?:upload|download)/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", url.path)
        bucket = found and urllib.parse.unquote(found[1])
        if not found or bucket not in self.store.buckets:
            return self.answer(404, {"error": {"code": 404, "message": f"no bucket {bucket}"}})
        name = urllib.parse.unquote(found[2] or query.get("name", ""))
        self.store.requests.append((self.command, name))
        if (status := self.store.refuse(self.command, name)) is not None:
            return self.answer(status, {"error": {"code": status, "message": "refused"}})
        if url.path.startswith("/upload/"):
            return self.upload(bucket, name, query, body)
        if "/o" not in url.path:
            return self.answer(200, {"kind": "storage#bucket", "name": bucket, "locationType": "region"})
        return self.plain(bucket, name, query, found[2])

    def plain(self, bucket: str, name: str, query: dict, raw: str | None) -> None:
        store = self.store
        if not name:
            return self.answer(200, store.listed(bucket, query))
        if self.command == "POST":  # SOURCE/rewriteTo/b/BUCKET/o/NAME or SOURCE/moveTo/o/NAME
            found = re.fullmatch(r"(.*)/(?:rewriteTo/b/([^/]+)|moveTo)/o/(.*)", raw)
            source, place, new = (urllib.parse.unquote(part or "") for part in found.groups())
            if (bucket, source) not in store.objects:
                return self.missing(bucket, source)
            resource = store.write(place or bucket, new, store.objects[bucket, source][0])
            if place:
                return self.answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": resource})
            store.delete(bucket, source)
            return self.answer(200, resource)
        if self.command == "DELETE":
            return self.answer(204 if store.delete(bucket, name) else 404)
        if (bucket, name) not in store.objects:
            return self.missing(bucket, name)
        content, generation = store.objects[bucket, name]
        if query.get("alt") != "media" and not self.path.startswith("/download/"):
            return self.answer(200, store.describe(bucket, name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        digest = store.describe(bucket, name)["crc32c"]
        marks = {"X_Goog_Generation": str(generation), "X_Goog_Hash": f"crc32c={digest}"}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not span:
            return self.answer(200, content, **marks)
        first = int(span[1]) if span[1] else max(0, len(content) - int(span[2]))
        last = min(int(span[2]) if span[1] and span[2] else len(content) - 1, len(content) - 1)
        if first >= len(content):
            return self.answer(416)
        part = content[first : last + 1]
        return self.answer(206, part, Content_Range=f"bytes {first}-{last}/{len(content)}", **marks)

    def missing(self, bucket: str, name: str) -> None:
        self.answer(404, {"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}})

    def upload(self, bucket: str, name: str, query: dict, body: bytes) -> None:
        store, kind = self.store, query.get("uploadType")
        if kind == "multipart":
            marker = self.headers["Content-Type"].partition("boundary=")[2].strip("\"'").encode()
            facts, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in body.split(b"--" + marker)[1:3])
            name, body = json.loads(facts)["name"], re.sub(rb"\r?\n\Z", b"", content)
        if kind == "resumable" and "upload_id" not in query:
            name = json.loads(body or b"{}").get("name", name)
            number = str(len(store.uploads))
            store.uploads[number] = [bucket, name, b"", query.get("ifGenerationMatch")]
            here = (
                f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            )
            return self.answer(200, b"", Location=here)
        if "upload_id" in query:
            bucket, name, before, wanted = store.uploads[query["upload_id"]]
            body = before + body
            total = self.headers.get("Content-Range", "").rpartition("/")[2]
            if total == "*" or (total and len(body) < int(total)):
                store.uploads[query["upload_id"]][2] = body
                return self.answer(308, b"", Range=f"bytes=0-{len(body) - 1}")
            query = {"ifGenerationMatch": wanted}
        resource = store.write(bucket, name, body, query.get("ifGenerationMatch"))
        return self.answer(200, resource) if resource else self.answer(412, {"error": {"code": 412, "message": "no"}})

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any


@contextlib.contextmanager
def serving(store: Store) -> Iterator[dict[str, str]]:
    """Serves a store; gives the environment in which a process takes it for Google's."""
    handler = type("Handler", (_Handler,), {"store": store})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks by gRPC
        }
    finally:
        server.shutdown()
        server.server_close()
