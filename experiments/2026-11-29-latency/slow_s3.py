#!/usr/bin/env python3
"""A directory as an S3 bucket in which every request takes 50 ms before its first byte. `slow_s3.py DIR PORT [SECONDS]`."""

import os
import sys
import time
import xml.sax.saxutils
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

root, port = sys.argv[1], int(sys.argv[2])
latency = float(sys.argv[3]) if len(sys.argv) > 3 else 0.05


class Bucket(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if "Content-Length" not in dict(headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        time.sleep(latency)
        url = urlparse(self.path)
        parts = url.path.lstrip("/").split("/", 1)
        if len(parts) == 1 or not parts[1]:
            return self.list(parse_qs(url.query).get("prefix", [""])[0])
        path = os.path.join(root, parts[1])
        if not os.path.isfile(path):
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>", [("Content-Type", "application/xml")])
        size = os.path.getsize(path)
        common = [("ETag", '"%x"' % size), ("Last-Modified", "Sun, 29 Nov 2026 00:00:00 GMT"), ("Accept-Ranges", "bytes")]
        wanted = self.headers.get("Range")
        first, last, status = 0, size - 1, 200
        if wanted:
            begin, end = wanted.removeprefix("bytes=").split("-")
            first, last = int(begin), min(int(end) if end else size - 1, size - 1)
            status = 206
            common.append(("Content-Range", f"bytes {first}-{last}/{size}"))
        if self.command == "HEAD":
            return self.answer(200, b"", [*common, ("Content-Length", str(size))])
        with open(path, "rb") as file:
            file.seek(first)
            self.answer(status, file.read(last - first + 1), common)

    do_HEAD = do_GET

    def list(self, prefix):
        names = sorted(os.listdir(root))
        contents = "".join(
            f"<Contents><Key>{xml.sax.saxutils.escape(name)}</Key><LastModified>2026-11-29T00:00:00.000Z</LastModified>"
            f'<ETag>"{os.path.getsize(os.path.join(root, name)):x}"</ETag>'
            f"<Size>{os.path.getsize(os.path.join(root, name))}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for name in names
            if name.startswith(prefix)
        )
        body = f"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        self.answer(200, body.encode(), [("Content-Type", "application/xml")])

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", port), Bucket).serve_forever()
