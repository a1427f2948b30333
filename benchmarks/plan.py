"""Planning very many shards: an S3 that has nothing but listings, and a process that plans from them.

Run as `python -m benchmarks.plan plan SETTINGS`. The listings come over HTTP from a second process, page by page
as S3 gives them, so that the client's own work, which is most of the time, is in the figure.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from benchmarks.runs import Settings, print_result
from shard_embedder.pipeline.core.schema import END_LAST
from shard_embedder.pipeline.output.names import EMBEDDINGS, PartName, version_tag
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.shards.find import find_shards

_BUCKET = "bench"
_PAGE = 1000
_SHARD_BYTES = 256 * 2**20
_DONE = 0.9
_ENTRY = (
    "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;{etag}&quot;</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
)


def _etag(number: int) -> str:
    return f"{number:032x}"


def _shard_entry(number: int) -> str:
    return _ENTRY.format(key=f"in/{number // 1000:05d}/{number:08d}.tar", etag=_etag(number), size=_SHARD_BYTES)


def _part_entry(number: int) -> str:
    tag = version_tag(_SHARD_BYTES, _etag(number))
    name = PartName(f"{number // 1000:05d}/{number:08d}", tag, 0, END_LAST)
    return _ENTRY.format(key=f"out/{EMBEDDINGS}/{name}", etag=_etag(number), size=2**20)


def _listing(num_shards: int, query: dict[str, list[str]]) -> bytes:
    """A page of ListObjectsV2: keys in S3's order, up to 1000 of them."""
    prefix = query.get("prefix", [""])[0]
    listings = {"in/": (num_shards, _shard_entry), f"out/{EMBEDDINGS}/": (int(num_shards * _DONE), _part_entry)}
    total, entry = listings.get(prefix, (0, _shard_entry))
    start = int(query.get("continuation-token", ["0"])[0])
    end = min(start + _PAGE, total)
    more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < total else ""
    body = (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{_BUCKET}</Name><Prefix>{prefix}</Prefix><KeyCount>{end - start}</KeyCount><MaxKeys>{_PAGE}</MaxKeys>"
        f"<IsTruncated>{str(end < total).lower()}</IsTruncated>{more}"
        f"{''.join(map(entry, range(start, end)))}</ListBucketResult>"
    )
    return body.encode()


def _serve(num_shards: int, ready: Connection) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = _listing(num_shards, parse_qs(urlsplit(self.path).query))
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ready.send(server.server_port)
    server.serve_forever()


def plan(settings: Settings) -> dict[str, float]:
    """Seconds and peak memory of the process for `find_shards` and `make_plan`, imports included in the memory."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(settings.plan_shards, sender), daemon=True
    )
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{receiver.recv()}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    start = time.perf_counter()
    shards = find_shards([f"s3://{_BUCKET}/in/"]).shards
    listed_s = time.perf_counter() - start
    made = make_plan(shards, f"s3://{_BUCKET}/out")
    plan_s = time.perf_counter() - start
    server.terminate()
    server.join()
    if (len(shards), made.num_done) != (settings.plan_shards, int(settings.plan_shards * _DONE)):
        raise RuntimeError(f"planned {len(shards)} shards with {made.num_done} done, of {settings.plan_shards}")
    return {"plan_s": plan_s, "plan_list_input_s": listed_s, "plan_peak_mib": _peak_mib()}


def _peak_mib() -> float:
    """The most memory this process has had."""
    try:
        # `ru_maxrss` would count that of the process that started this one.
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    print_result(plan(Settings.parse(sys.argv[2])))
