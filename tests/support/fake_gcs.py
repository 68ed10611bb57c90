"""A Google Cloud Storage on loopback: as much of the JSON API as gcsfs and tensorstore speak, with failures on request.

What has "composed" in its name has no MD5 hash, as the service has none of objects that were composed of others.
Objects live in memory. `env` is what a process needs to take it for the real one.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

NOT_FOUND, CONFLICT, CHANGED, UNCHANGED, BUSY = 404, 409, 412, 304, 503


class Refused(Exception):
    """An answer that is no success: its HTTP status."""


class FakeGCS:
    """buckets: those that exist. fail_every: every so many requests one is answered 503, as a busy service does.
    refuse: a status that every request gets, such as 401. writes: names of the objects in the order they were put."""

    def __init__(self, *buckets, fail_every=0):
        self.objects, self.writes, self.requests = {bucket: {} for bucket in buckets}, [], []
        self.fail_every, self.refuse, self.on_write = fail_every, None, lambda name: None
        self._lock, self._generations, self._uploads = threading.RLock(), itertools.count(1), {}
        self._counted = itertools.count(1)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits for the client's acknowledgement

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                status, headers, content = outer.handle(self.command, self.path, self.headers, body)
                with contextlib.suppress(OSError):  # the client may have been killed
                    self.send_response(status)
                    for name, value in {"Content-Length": len(content), **headers}.items():
                        self.send_header(name, str(value))
                    self.end_headers()
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request, client_address):
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def env(self):
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "a-token",
            "GCE_METADATA_ROOT": "127.0.0.1:9",  # nobody is asked whether this machine is Google's
            "NO_GCE_CHECK": "true",
        }

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def names(self, bucket, prefix=""):
        with self._lock:
            return sorted(name for name in self.objects[bucket] if name.startswith(prefix))

    def put(self, bucket, name, data):
        self._put(bucket, name, data, {})

    def read(self, bucket, name):
        return self.objects[bucket][name]["data"]

    # ---------------------------------------------------------------------------------------------------- requests
    def handle(self, method, path, headers, body):
        """-> (status, headers, content)"""
        with self._lock:
            self.requests.append((method, path))
        if self.refuse:
            return self._error(self.refuse)
        if self.fail_every and next(self._counted) % self.fail_every == 0:
            return self._error(BUSY)
        try:
            if path.startswith("/batch/"):
                return self._batch(headers, body)
            return self._one(method, urlsplit(path), headers, body)
        except Refused as refused:
            return self._error(refused.args[0])

    def _one(self, method, url, headers, body):
        given = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        if method in ("POST", "PUT") and url.path.startswith("/upload/"):
            return self._upload(url, given, headers, body)
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", url.path)
        if not found:
            raise Refused(NOT_FOUND)
        bucket, name = found[1], unquote(found[2]) if found[2] else None
        self._bucket(bucket)
        if name is None:
            if not url.path.endswith("/o"):
                return self._json({"kind": "storage#bucket", "name": bucket, "locationType": "region"})
            return self._list(bucket, given)
        if copied := re.fullmatch(r"(.+?)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)", found[2]):
            source, target = self._object(bucket, unquote(copied[1])), unquote(copied[3])
            stored = self._put(copied[2], target, source["data"], given)
            size = len(source["data"])
            told = {"kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size}
            return self._json(told | {"resource": stored} if "/rewriteTo/" in url.path else stored)
        with self._lock:
            entry = self._object(bucket, name)
            self._precondition(entry, given)
            if method == "DELETE":
                del self.objects[bucket][name]
                return 204, {}, b""
        if method != "GET":
            return self._json(self._resource(bucket, name))
        if given.get("alt") == "media" or url.path.startswith("/download"):
            return self._media(entry, headers)
        return self._json(self._resource(bucket, name))

    def _media(self, entry, headers):
        data, told = entry["data"], {"Content-Type": "application/octet-stream"}
        told |= {"x-goog-generation": entry["generation"], "x-goog-hash": f"md5={_md5(data)}"}
        ranged = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range") or "")
        if not ranged:
            return 200, told, data
        first = int(ranged[1]) if ranged[1] else max(0, len(data) - int(ranged[2]))
        last = min(int(ranged[2]) if ranged[1] and ranged[2] else len(data) - 1, len(data) - 1)
        if first > last:
            return 416, told | {"Content-Range": f"bytes */{len(data)}"}, b""
        return 206, told | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]

    def _list(self, bucket, given):
        """Pages of at most five where the client does not ask for fewer, so that every listing has to go on."""
        prefix, delimiter = given.get("prefix", ""), given.get("delimiter")
        low, high = given.get("startOffset", ""), given.get("endOffset")
        items, prefixes = [], []
        for name in self.names(bucket, prefix):
            if name < low or (high and name >= high):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folder = prefix + rest[: rest.index(delimiter) + 1]
                if not prefixes or prefixes[-1] != folder:
                    prefixes.append(folder)
            else:
                items.append(name)
        both = sorted([(name, "items") for name in items] + [(name, "prefixes") for name in prefixes])
        start, most = int(given.get("pageToken") or 0), min(int(given.get("maxResults") or 5), 5)
        page, answer = both[start : start + most], {"kind": "storage#objects"}
        with self._lock:
            for name, kind in page:
                if kind == "prefixes" or name in self.objects[bucket]:
                    answer.setdefault(kind, []).append(name if kind == "prefixes" else self._resource(bucket, name))
        if start + most < len(both):
            answer["nextPageToken"] = str(start + most)
        return self._json(answer)

    def _upload(self, url, given, headers, body):
        bucket = re.fullmatch(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", url.path)[1]
        self._bucket(bucket)
        kind = given.get("uploadType")
        if "upload_id" in given:
            upload = self._uploads[given["upload_id"]]
            upload["data"] += body
            total = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+|\*)", headers.get("Content-Range") or "bytes */*")[1]
            if total == "*" or len(upload["data"]) < int(total):
                received = {"Range": f"bytes=0-{len(upload['data']) - 1}"} if upload["data"] else {}
                return 308, received, b""
            return self._json(self._put(bucket, upload["name"], bytes(upload["data"]), upload["given"]))
        if kind == "resumable":
            told = json.loads(body or b"{}")
            number = str(next(self._generations))
            self._uploads[number] = {"name": given.get("name") or told["name"], "data": bytearray(), "given": given}
            return 200, {"Location": f"{self.url}{url.path}?uploadType=resumable&upload_id={number}"}, b""
        if kind == "multipart":
            message = message_from_bytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
            boundary = b"--" + message.get_boundary().encode()
            parts = body.split(boundary)[1:3]  # not the email parser's, which alters bytes
            told, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
            return self._json(self._put(bucket, json.loads(told)["name"], re.sub(rb"\r?\n\Z", b"", data), given))
        return self._json(self._put(bucket, given["name"], body, given))

    def _batch(self, headers, body):
        message = message_from_bytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
        answers = []
        for part in message.get_payload():
            method, path = part.get_payload().strip().split(" ", 2)[:2]
            try:
                status, _, content = self._one(method, urlsplit(path.removeprefix(self.url)), {}, b"")
            except Refused as refused:
                status, _, content = self._error(refused.args[0])
            said = f"Content-Type: application/http\r\nContent-ID: <response-{(part['Content-ID'] or '').strip('<>')}>"
            answer = f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n\r\n{content.decode()}"
            answers.append(f"--batch\r\n{said}\r\n\r\n{answer}\r\n")
        return 200, {"Content-Type": "multipart/mixed; boundary=batch"}, ("".join(answers) + "--batch--\r\n").encode()

    # ----------------------------------------------------------------------------------------------------- objects
    def _bucket(self, bucket):
        if bucket not in self.objects:
            raise Refused(NOT_FOUND)

    def _object(self, bucket, name):
        self._bucket(bucket)
        if name not in self.objects[bucket]:
            raise Refused(NOT_FOUND)
        return self.objects[bucket][name]

    def _precondition(self, entry, given):
        generation = entry["generation"] if entry else 0
        if "ifGenerationMatch" in given and int(given["ifGenerationMatch"]) != generation:
            raise Refused(CHANGED)
        if "ifGenerationNotMatch" in given and int(given["ifGenerationNotMatch"]) == generation:
            raise Refused(UNCHANGED)

    def _put(self, bucket, name, data, given):
        self.on_write(name)
        with self._lock:
            self._bucket(bucket)
            self._precondition(self.objects[bucket].get(name), given)
            generation = next(self._generations)
            updated = f"2026-01-01T00:{generation // 60 % 60:02}:{generation % 60:02}.{generation % 1000:03}Z"
            self.objects[bucket][name] = {"data": bytes(data), "generation": generation, "updated": updated}
            self.writes.append(name)
            return self._resource(bucket, name)

    def _resource(self, bucket, name):
        entry = self.objects[bucket][name]
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{entry['generation']}",
            "bucket": bucket,
            "name": name,
            "size": str(len(entry["data"])),
            "generation": str(entry["generation"]),
            "metageneration": "1",
            **({} if "composed" in name else {"md5Hash": _md5(entry["data"])}),
            "contentType": "application/octet-stream",
            "timeCreated": entry["updated"],
            "updated": entry["updated"],
        }

    def _json(self, value):
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    def _error(self, status):
        told = {"message": f"answered {status}"}
        content = json.dumps({"error": {"code": status, "errors": [told], **told}}).encode()
        return status, {"Content-Type": "application/json"}, b"" if status == UNCHANGED else content


def _md5(data):
    return base64.b64encode(hashlib.md5(data).digest()).decode()
