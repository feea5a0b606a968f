"""Make the container `bkt` in an Azurite and put the shards of a directory there, under digits/. Standard library only.

    python3 azurite.py http://127.0.0.1:PORT DIRECTORY

The account and its key are those that every emulator of Azure's storage accepts; the signature is that of Shared Key
(Microsoft, "Authorize with Shared Key").
"""

import base64
import datetime
import hashlib
import hmac
import pathlib
import sys
import urllib.request

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def put(base, path, body, query="", **headers):
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")
    ours = {"x-ms-date": now, "x-ms-version": "2021-08-06", **headers}
    canonical = "".join(f"{name}:{value}\n" for name, value in sorted(ours.items()))
    resource = f"/{ACCOUNT}/{ACCOUNT}/{path}" + (f"\n{query.replace('=', ':')}" if query else "")
    length = str(len(body)) if body else ""
    kind = "application/octet-stream"
    text = f"PUT\n\n\n{length}\n\n{kind}\n\n\n\n\n\n\n{canonical}{resource}"
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    ours["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    ours["Content-Type"] = kind
    url = f"{base}/{ACCOUNT}/{path}" + (f"?{query}" if query else "")
    with urllib.request.urlopen(urllib.request.Request(url, body, ours, method="PUT")) as answer:
        assert answer.status == 201, answer.status


def main():
    base, directory = sys.argv[1:]
    put(base, "bkt", b"", "restype=container")
    for shard in sorted(pathlib.Path(directory).glob("*-of-*")):
        put(base, f"bkt/digits/{shard.name}", shard.read_bytes(), **{"x-ms-blob-type": "BlockBlob"})


main()
