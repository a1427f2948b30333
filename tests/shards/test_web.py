"""Shards on web servers: hubs without listings, servers with index pages, and what each does not tell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest

from shard_embedder.pipeline.core.errors import InputError, ShardChangedError
from shard_embedder.pipeline.core.retries import StoreLimits
from shard_embedder.pipeline.shards.find import Refused, Shard, find_shards
from shard_embedder.pipeline.shards.stream import ShardStream
from tests.faults.web_server import Kind, WebServer

LIMITS = StoreLimits(request_timeout_s=5.0, retry_s=1.0, chunk_bytes=1000)
DATA = bytes(range(256)) * 20
NAMES = [f"{number:05d}" for number in range(20)]
HUB = Kind(redirects=True)
INDEX = Kind(index=True)


@contextlib.contextmanager
def served(kind: Kind, data: bytes = DATA) -> Iterator[WebServer]:
    with WebServer(kind, {f"/in/{name}.tar": data for name in NAMES}) as server:
        yield server


def read(shard: Shard, limits: StoreLimits = LIMITS) -> bytes:
    with ShardStream(shard.url, shard.num_bytes, shard.version, limits) as stream:
        data = stream.read(2**30)
        stream.check_unchanged()
    return data


@pytest.mark.parametrize("kind", [HUB, INDEX, Kind(head=False), Kind(lengths=False), Kind(etags=False)])
@pytest.mark.parametrize("last", [2, 19])
def test_shards_that_are_named_are_found_on_any_server(kind: Kind, last: int) -> None:
    with served(kind) as server:
        found = find_shards([f"{server.url}/in/{{00000..{last:05d}}}.tar"], LIMITS)
        assert (found.prefix, found.refused) == (f"{server.url}/in", [])
        assert [shard.name for shard in found.shards] == NAMES[: last + 1]
        assert {shard.num_bytes for shard in found.shards} == {len(DATA)}
        assert {read(shard) for shard in found.shards[:2]} == {DATA}
        assert not [path for _, path in server.requests if path.endswith("/in/")], "it was asked for a listing"


@pytest.mark.parametrize("spec", ["/in/", "/in", "/in/*.tar", "/**/*.tar"])
def test_shards_of_an_index_page_have_their_size(spec: str) -> None:
    with served(INDEX) as server:
        found = find_shards([server.url + spec], LIMITS)
        assert [shard.name.removeprefix("in/") for shard in found.shards] == NAMES
        assert {shard.num_bytes for shard in found.shards} == {len(DATA)}
        assert read(found.shards[0]) == DATA


def test_what_an_index_page_lists_and_is_not_there_is_refused_alone() -> None:
    with served(INDEX) as server:
        server.statuses["/in/00007.tar"] = 404
        found = find_shards([f"{server.url}/in/"], LIMITS)
        assert [shard.name for shard in found.shards] == [name for name in NAMES if name != "00007"]
        assert found.refused == [Refused("00007", "it is listed, and not there")]


def test_a_query_is_no_wildcard_and_part_of_no_name() -> None:
    with served(HUB) as server:
        found = find_shards([f"{server.url}/in/{{00000..00001}}.tar?download=true&x=a/b"], LIMITS)
        assert [shard.name for shard in found.shards] == NAMES[:2]
        assert [shard.url for shard in found.shards] == [
            f"{server.url}/in/{name}.tar?download=true&x=a/b" for name in NAMES[:2]
        ]
        assert read(found.shards[0]) == DATA
        with pytest.raises(InputError, match="differ in their query alone"):
            find_shards([f"{server.url}/in/00000.tar?v={{1,2}}"], LIMITS)


def test_a_list_file_of_a_hub_names_shards_of_several_folders() -> None:
    with served(HUB) as server:
        server.files["/other/x.tar"] = b"x"
        server.files["/list.txt"] = f"{server.url}/in/00000.tar?a=1\n{server.url}/other/x.tar\n".encode()
        found = find_shards([f"{server.url}/list.txt?raw=1"], LIMITS)
        assert (found.prefix, [shard.name for shard in found.shards]) == (server.url, ["in/00000", "other/x"])


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        (Kind(), "ca8e8b2bfe2f6e13c8f1a36c4a52b1ae"),
        (Kind(etags=False), "modified Thu, 01 Jan 2026 10:00:00 GMT"),
        (Kind(etags=False, dates=False), "by size"),
    ],
)
def test_the_version_says_by_what_a_change_is_seen(kind: Kind, version: str) -> None:
    with served(kind) as server:
        (shard,) = find_shards([f"{server.url}/in/00000.tar"], LIMITS).shards
        assert shard.version == version or (kind.etags and len(shard.version) == 32)
        assert read(shard) == DATA
        server.files["/in/00000.tar"] = DATA + b"x"
        with pytest.raises(ShardChangedError, match=f"planned {len(DATA)} bytes .*, now {len(DATA) + 1} bytes"):
            read(shard)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Kind(ranges=False), f"its server answers no byte ranges, which reading its {len(DATA)} bytes takes"),
        (Kind(ranges=False, lengths=False), "its server does not tell its size"),
    ],
)
def test_what_cannot_be_read_from_the_middle_is_refused_and_not_taken_for_empty(kind: Kind, reason: str) -> None:
    with served(kind) as server:
        found = find_shards([f"{server.url}/in/{{00000..00001}}.tar"], LIMITS)
        assert found.shards == []
        assert found.refused == [Refused(name, f"it cannot be read: {reason}") for name in NAMES[:2]]


def test_without_byte_ranges_what_is_read_at_once_is_read() -> None:
    with served(Kind(ranges=False)) as server:
        whole = replace(LIMITS, chunk_bytes=len(DATA))
        (shard,) = find_shards([f"{server.url}/in/00000.tar"], whole).shards
        assert read(shard, whole) == DATA


def test_an_empty_file_has_no_bytes() -> None:
    with served(HUB, b"") as server:
        (shard,) = find_shards([f"{server.url}/in/00000.tar"], LIMITS).shards
        assert shard.num_bytes == 0
        assert read(shard) == b""


def test_missing_and_closed_shards_are_told_apart_and_a_fault_is_neither() -> None:
    with served(HUB) as server:
        url = f"{server.url}/in/{{00000..00001}}.tar"
        server.statuses["/in/00001.tar"] = 404
        with pytest.raises(InputError, match=r"1 of 2 shards named in the input not found: .*00001\.tar"):
            find_shards([url], LIMITS)
        server.statuses["/in/00001.tar"] = 403
        with pytest.raises(InputError, match=r"cannot look at .*00001\.tar: PermissionError: .*is not public"):
            find_shards([url], LIMITS)
        server.statuses["/in/00001.tar"] = 503
        with pytest.raises(InputError, match=r"cannot look at .*00001\.tar: StoreError: .*failed \d+ times"):
            find_shards([url], LIMITS)
