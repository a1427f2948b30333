"""Every stored file that is read back is untrusted: bits that flipped, and JSON of any kind, are one clear error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.pipeline.core.errors import PipelineError, StoredDataError
from shard_embedder.pipeline.output.fingerprint import read_fingerprint, write_fingerprint
from shard_embedder.pipeline.output.lease import LeaseTimes, hold
from shard_embedder.pipeline.output.names import EMBEDDINGS, LEASE_FOLDER, REPORT_FILE, RUN_FILE
from shard_embedder.pipeline.output.parts import read_facts
from shard_embedder.pipeline.retrieval.index import INDEX_FILE, read_index_facts
from shard_embedder.pipeline.run.report import estimate, last_counts, tells_of_work
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.keys import Naming
from tests.output.test_fingerprint import made
from tests.output.test_parts import NAME, embedded, writer

NUM_FLIPS = 400
WILD: list[Any] = [
    None, True, -1, 0, 1e308, 1e-300, float("inf"), float("-inf"), float("nan"), 10**400, "", "x", "../../etc/passwd",
    "\udcff", [], [[]], {}, {"a": {}}, [1, 2, 3], "9" * 5000,
]  # fmt: skip
REPORT = {
    "balanced": True, "samples": 3, "embedded": 3, "errors": 0, "samples_now": 3, "read_bytes": 1000, "wall_s": 2.0,
    "unused_images": 1, "unused_example": "a: b.png, beside b.jpg",
    "first_part_s": 1.0, "stage_s": {"read": 1, "decode": 1, "embed": 1, "write": 1},
    "stage_workers": {"read": 1, "decode": 1, "embed": 1, "write": 1},
}  # fmt: skip
LEASE = {
    "token": "0" * 32, "holder": "x", "host": "h", "machine": "m", "pid": 7, "started": "1", "since": "2026-01-01",
}  # fmt: skip
INDEX = {
    "format": 2, "output": "out", "metric": "cosine", "kind": "flat", "kind_given": True, "num_rows": 1,
    "num_features": 4, "lists": 0, "laid_out_rows": 0, "width": 0, "recall": 1.0, "recall_queries": 1,
    "data": "data-00001", "files": {name: [1, "ab"] for name in ("vectors.faiss", "rows.parquet", "parts.parquet")},
    "made_with": {"faiss": "1"},
}  # fmt: skip


def flipped(data: bytes, seed: int) -> Iterator[bytes]:
    """`data` with a bit flipped, or a few, or cut."""
    rng = random.Random(seed)
    for _ in range(NUM_FLIPS):
        spoiled = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 4])):
            spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
        yield bytes(spoiled[: rng.randrange(len(spoiled))] if rng.random() < 0.05 else spoiled)


def wild(values: Any) -> Iterator[bytes]:
    """JSON like `values`, with a wild value in each place, or a place less; and none at all."""
    for text in ("", "{", "[" * 100_000, "\x00", "5", "null", "[]", '"x"', "NaN"):
        yield text.encode()

    def places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        yield path
        for key, item in value.items() if isinstance(value, dict) else ():
            yield from places(item, (*path, key))

    for path in places(values, ()):
        for other in [*WILD, "remove"]:
            copy = json.loads(json.dumps(values))
            inner = copy
            for key in path[:-1]:
                inner = inner[key]
            if path and other == "remove":
                del inner[path[-1]]
            elif path:
                inner[path[-1]] = other
            else:
                copy = other
            yield json.dumps(copy).encode()


def only_ours(call: Callable[[], Any], told: str) -> int:
    """Whether `call` raised: nothing but an error of ours that says `told`."""
    try:
        call()
    except PipelineError as error:
        said = str(error)
    else:
        return 0
    assert told in said
    return 1


def test_a_part_with_a_flipped_bit_is_named_with_what_to_do(tmp_path: Path) -> None:
    writer(tmp_path)(embedded([f"{number}" for number in range(5)]))
    path = tmp_path / EMBEDDINGS / NAME
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    raised = 0

    def look() -> None:
        facts = read_facts(str(tmp_path), f"{EMBEDDINGS}/{NAME}")
        facts.number("num_samples")
        facts.fingerprint()

    for spoiled in flipped(whole[-footer:], 1):
        path.write_bytes(whole[:-footer] + spoiled)
        raised += only_ours(look, f"{EMBEDDINGS}/{NAME}")
    assert raised > NUM_FLIPS / 4
    path.write_bytes(whole.replace(b"embed.part", b"embed.p\xffrt"))
    with pytest.raises(StoredDataError, match=r"is not whole Parquet: .*; delete it, and run the job again"):
        look()


@pytest.mark.slow
def test_a_run_file_of_any_content_is_named(tmp_path: Path) -> None:
    write_fingerprint(str(tmp_path), made())
    path = tmp_path / RUN_FILE
    whole = path.read_bytes()
    for spoiled in [*flipped(whole, 2), *wild(json.loads(whole))]:
        path.write_bytes(spoiled)
        only_ours(lambda: read_fingerprint(str(tmp_path)), str(path))


@pytest.mark.slow
def test_a_report_of_any_content_tells_nothing_or_numbers(tmp_path: Path) -> None:
    pending = [Pending("a", f"{tmp_path}/a.tar", 1000, "")]
    whole = json.dumps(REPORT).encode()
    for spoiled in [whole, *flipped(whole, 3), *wild(REPORT)]:
        (tmp_path / REPORT_FILE).write_bytes(spoiled)
        counts = last_counts(str(tmp_path))
        assert counts is None or min(counts.num_samples, counts.num_embedded, counts.num_errors) >= 0
        tells_of_work(str(tmp_path))
        if spoiled is whole:
            assert counts is not None
            assert estimate(str(tmp_path), pending, Naming()) is not None
        elif tells_of_work(str(tmp_path)):
            estimate(str(tmp_path), pending, Naming())


@pytest.mark.slow
def test_a_lease_of_any_content_is_watched_or_named(tmp_path: Path) -> None:
    path = tmp_path / LEASE_FOLDER / "00000001.json"
    path.parent.mkdir()
    whole = json.dumps(LEASE).encode()
    times = LeaseTimes(renew_s=5.0, expire_s=0.0, look_s=0.0)
    for spoiled in [*flipped(whole, 4), *wild(LEASE)]:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(spoiled)
        only_ours(
            lambda: hold(str(tmp_path), lambda why: None, times=times).__enter__().release(), f"{path} is no lease"
        )


@pytest.mark.slow
def test_an_index_file_of_any_content_is_named(tmp_path: Path) -> None:
    values = {**INDEX, "made": made().to_json()}
    whole = json.dumps(values).encode()
    path = tmp_path / INDEX_FILE
    path.write_bytes(whole)
    assert read_index_facts(tmp_path) is not None
    for spoiled in [*flipped(whole, 5), *wild(values)]:
        path.write_bytes(spoiled)
        only_ours(lambda: read_index_facts(tmp_path), str(path))
