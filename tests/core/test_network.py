"""A slow, lying, refusing network between the pipeline and its store: retried, or one clear error."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from shard_embedder.pipeline.core import retries, storage
from shard_embedder.pipeline.core.errors import InputError, ShardChangedError, ShardError, StoreError
from shard_embedder.pipeline.core.retries import StoreLimits
from shard_embedder.pipeline.core.storage import list_files, locate, read_bytes
from shard_embedder.pipeline.core.writing import delete, write_bytes
from shard_embedder.pipeline.output.fingerprint import read_fingerprint
from shard_embedder.pipeline.output.ledger import list_parts
from shard_embedder.pipeline.output.parts import read_facts
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.shards.find import Shard, find_shards
from shard_embedder.pipeline.shards.stream import ShardStream
from tests.conftest import S3Server
from tests.faults.proxy import FaultProxy

# In place of 20 s and 60 s, so that the tests need not wait; the rules are the same.
SHORT = StoreLimits(request_timeout_s=0.5, retry_s=15.0, max_pause_s=0.1, chunk_bytes=30_000)
# For faults that do not pass: with even less patience.
ENDLESS = replace(SHORT, retry_s=0.3)
# What a call may take then: that, one attempt more, and a busy machine.
BOUND_S = ENDLESS.retry_s + 2 * ENDLESS.request_timeout_s + 4
DATA = bytes(range(256)) * 400


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.environment["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage._filesystem.cache_clear()
        yield proxy
    storage._filesystem.cache_clear()


@pytest.fixture
def network(proxy: FaultProxy) -> FaultProxy:
    """The store behind a proxy that fails as told."""
    retries._given_up.clear()
    proxy.rules.clear()
    proxy.requests.clear()
    return proxy


@pytest.fixture(scope="module")
def direct(s3_server: S3Server) -> Any:
    """The store without the proxy."""
    return s3_server.filesystem()


@pytest.fixture
def shard(network: FaultProxy, s3_url: str, direct: Any) -> Shard:
    """A stored object of several chunks, found by listing."""
    direct.pipe_file(f"{s3_url}/a.tar", DATA)
    return find_shards([s3_url], SHORT).shards[0]


def opened(shard: Shard, limits: StoreLimits = SHORT) -> ShardStream:
    return ShardStream(shard.url, shard.num_bytes, shard.version, limits)


def read_all(shard: Shard, limits: StoreLimits = SHORT) -> bytes:
    with opened(shard, limits) as stream:
        data = stream.read(1) + stream.read(2**30)
        stream.check_unchanged()
    return data


@pytest.mark.parametrize(
    "fault", ["slow_down", "error", "reset", "cut", "short", "silent", "stall", "hang_up", "empty"]
)
def test_a_read_survives_a_burst_of(fault: str, network: FaultProxy, shard: Shard) -> None:
    network.add(fault, r"a\.tar", "GET", times=2)
    assert read_all(shard) == DATA
    assert network.count(fault=fault) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["slow_down", "error", "reset", "cut", "short", "silent", "stall", "hang_up", "empty"]
)
def test_a_read_that_fails_without_end_is_a_transient_error_in_bounded_time(
    fault: str, network: FaultProxy, shard: Shard
) -> None:
    network.add(fault, r"a\.tar", "GET", times=10_000)
    start = time.monotonic()
    with pytest.raises(ShardError, match=r"failed \d+ times in \d+ s, at last with") as caught:
        read_all(shard, ENDLESS)
    assert caught.value.transient
    assert not isinstance(caught.value, ShardChangedError)
    assert time.monotonic() - start < BOUND_S
    # One layer of retries: three on top of each other would be some hundred requests.
    assert network.count("GET", r"a\.tar") <= 2 * 12


@pytest.mark.slow
def test_after_a_call_was_given_up_the_next_ones_get_one_attempt_until_one_succeeds(
    network: FaultProxy, shard: Shard
) -> None:
    # Long enough for a second attempt on a busy machine.
    whole = replace(SHORT, chunk_bytes=len(DATA), retry_s=4.0, max_pause_s=8.0)
    fault = network.add("slow_down", r"a\.tar", "GET", times=10_000)
    for attempts in (2, 1, 1):
        before = network.count("GET", r"a\.tar")
        with pytest.raises(ShardError, match=r"failed \d+ times"):
            read_all(shard, whole)
        seen = network.count("GET", r"a\.tar") - before
        assert seen >= 2 if attempts == 2 else seen == 1
    fault.times = 0
    assert read_all(shard, whole) == DATA
    fault.times = 2
    assert read_all(shard, replace(whole, retry_s=SHORT.retry_s)) == DATA


def test_a_retry_goes_on_from_the_chunk_reached(network: FaultProxy, shard: Shard) -> None:
    with opened(shard) as stream:
        first = stream.read(40_000)
        time.sleep(0.2)
        network.add("reset", r"a\.tar", "GET", times=2)
        assert first + stream.read(2**30) == DATA
    chunks = -(-len(DATA) // 30_000)
    assert network.count("GET", r"a\.tar", fault="") == chunks


@pytest.mark.slow
def test_an_answer_that_drips_is_given_up(network: FaultProxy, shard: Shard) -> None:
    # Each byte comes within the timeout, all of them not before next year.
    network.add("drip", r"a\.tar", "GET", seconds=0.1)
    assert read_all(shard, replace(SHORT, slowest_bytes_per_s=60_000)) == DATA


def test_a_dead_endpoint_is_given_up_in_bounded_time(
    network: FaultProxy, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage._filesystem.cache_clear()
    start = time.monotonic()
    with pytest.raises(ShardError) as caught:
        read_all(shard, ENDLESS)
    assert caught.value.transient
    assert time.monotonic() - start < BOUND_S
    storage._filesystem.cache_clear()


@pytest.mark.parametrize("quiet_s", [0.0, 60.0])
def test_what_fails_for_some_seconds_is_said_once_to_be_tried_again(
    quiet_s: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Libraries that other tests have used may have turned loggers off, or kept their messages from the root's.
    logger = logging.getLogger(retries.__name__)
    monkeypatch.setattr(logger, "disabled", False)
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.WARNING, logger.name)
    errors = [OSError("nobody answers")] * 3

    def call() -> str:
        if errors:
            raise errors.pop()
        return "an answer"

    retries._given_up.clear()
    assert retries.with_retries("looking", call, StoreLimits(quiet_s=quiet_s, max_pause_s=0.01)) == "an answer"
    told = "looking failed, and is tried again for up to 60 s: OSError: nobody answers"
    assert caplog.messages == ([told] if not quiet_s else [])


def test_an_object_that_is_denied_is_a_lasting_error_after_one_request(network: FaultProxy, shard: Shard) -> None:
    network.add("denied", r"a\.tar", times=100)
    with pytest.raises(ShardError, match="not permitted to read it") as caught:
        read_all(shard)
    assert not caught.value.transient
    assert network.count("GET", r"a\.tar") == 1
    stream = opened(shard)
    with stream, pytest.raises(ShardChangedError, match="not permitted to read it") as changed:
        stream.check_unchanged()
    assert not changed.value.transient


def test_a_listed_object_that_is_not_there_is_a_transient_error_after_one_request(
    network: FaultProxy, shard: Shard, direct: Any
) -> None:
    network.add("missing", r"a\.tar", times=1)
    with pytest.raises(ShardError, match="listed, but not found") as caught:
        read_all(shard)
    assert caught.value.transient
    assert network.count("GET", r"a\.tar") == 1
    direct.rm_file(shard.url)
    stream = opened(shard)
    with stream, pytest.raises(ShardChangedError, match="listed, but not found"):
        stream.check_unchanged()


@pytest.mark.parametrize("size", [len(DATA), len(DATA) // 2, 2 * len(DATA), 0])
def test_an_object_replaced_between_listing_and_reading_is_told(size: int, shard: Shard, direct: Any) -> None:
    direct.pipe_file(shard.url, b"x" * size)
    start = time.monotonic()
    stream = opened(shard)
    with stream, contextlib.suppress(ShardError):
        stream.read(2**30)
    with pytest.raises(ShardChangedError, match="changed while it was read: planned"):
        stream.check_unchanged()
    assert time.monotonic() - start < 1


def test_an_object_replaced_in_the_middle_of_reading_is_told(shard: Shard, direct: Any) -> None:
    with opened(shard) as stream:
        stream.read(40_000)
        direct.pipe_file(shard.url, DATA[::-1])
        stream.read(2**30)
        with pytest.raises(ShardChangedError):
            stream.check_unchanged()


def test_a_version_that_cannot_be_asked_for_is_told_and_not_taken_for_unchanged(
    network: FaultProxy, shard: Shard
) -> None:
    network.add("slow_down", r"a\.tar", "HEAD", times=1)
    with opened(shard) as stream:
        stream.check_unchanged()
    network.add("slow_down", r"a\.tar", "HEAD", times=1000)
    stream = opened(shard, ENDLESS)
    with stream, pytest.raises(ShardChangedError, match="cannot tell whether it changed") as caught:
        stream.check_unchanged()
    assert caught.value.transient


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["slow_down", "error", "hang_up", "silent", "lost"])
def test_a_write_survives_a_burst_of(fault: str, network: FaultProxy, s3_url: str, direct: Any) -> None:
    network.add(fault, "part", "PUT", times=2)
    write_bytes(s3_url, "part", DATA, SHORT)
    assert network.count("PUT", "part") == 3
    assert direct.cat_file(f"{s3_url}/part") == DATA
    assert direct.find(s3_url) == [f"{s3_url}/part".removeprefix("s3://")]


@pytest.mark.slow
def test_a_write_into_a_connection_that_nobody_reads_is_given_up(
    network: FaultProxy, s3_url: str, direct: Any
) -> None:
    data = bytes(8_000_000)
    network.add("unread", "part", "PUT")
    write_bytes(s3_url, "part", data, replace(SHORT, slowest_bytes_per_s=len(data)))
    assert network.count("PUT", "part", fault="unread") == 1
    assert direct.info(f"{s3_url}/part")["size"] == len(data)


@pytest.mark.slow
def test_a_large_write_is_one_put(network: FaultProxy, s3_url: str) -> None:
    # s3fs would cut it into a multipart upload, of which a death leaves pieces behind.
    write_bytes(s3_url, "part", bytes(110 * 2**20))
    assert [request.method for request in network.requests if "part" in request.path] == ["PUT"]


@pytest.mark.parametrize("fault", ["slow_down", "hang_up", "silent", "denied"])
def test_a_write_that_fails_without_end_raises_and_leaves_nothing(
    fault: str, network: FaultProxy, s3_url: str, direct: Any
) -> None:
    network.add(fault, "part", "PUT", times=1000)
    start = time.monotonic()
    with pytest.raises(PermissionError if fault == "denied" else StoreError):
        write_bytes(s3_url, "part", DATA, ENDLESS)
    assert time.monotonic() - start < BOUND_S
    assert not direct.exists(f"{s3_url}/part")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["slow_down", "reset", "short", "stall", "empty"])
def test_a_listing_survives_a_burst_of(fault: str, network: FaultProxy, s3_url: str, direct: Any) -> None:
    for number in range(5):
        direct.pipe_file(f"{s3_url}/{number}.tar", b"x")
    network.add(fault, "list-type", "GET", times=2)
    assert [shard.name for shard in find_shards([s3_url], SHORT).shards] == list("01234")
    assert network.count(fault=fault) == 2


@pytest.mark.parametrize("fault", ["slow_down", "denied", "empty", "short"])
def test_a_listing_that_fails_without_end_is_an_error_and_never_an_empty_listing(
    fault: str, network: FaultProxy, s3_url: str, direct: Any
) -> None:
    direct.pipe_file(f"{s3_url}/a.tar", b"x")
    network.add(fault, "list-type", "GET", times=1000)
    with pytest.raises(InputError, match=f"cannot list {s3_url}"):
        find_shards([s3_url], ENDLESS)
    with pytest.raises(StoreError, match=f"cannot list {s3_url}"):
        make_plan([], s3_url, ENDLESS)
    with pytest.raises(StoreError):
        list(list_parts(s3_url, "errors", ENDLESS))


def test_a_named_shard_behind_a_burst_is_not_taken_for_missing(network: FaultProxy, shard: Shard) -> None:
    network.add("slow_down", r"a\.tar", "HEAD", times=2)
    assert find_shards([shard.url], SHORT).shards == [shard]
    network.add("denied", r"a\.tar", "HEAD", times=2)
    with pytest.raises(InputError, match=r"cannot look at .*PermissionError"):
        find_shards([shard.url], SHORT)


@pytest.mark.parametrize("fault", ["cut", "short"])
def test_a_list_file_is_read_whole_or_not_at_all(
    fault: str, network: FaultProxy, shard: Shard, s3_url: str, direct: Any
) -> None:
    text = f"# shards\n{shard.url}\n".encode()
    direct.pipe_file(f"{s3_url}/list.txt", text)
    network.add(fault, r"list\.txt", "GET", times=1)
    assert find_shards([f"{s3_url}/list.txt"], SHORT).shards == [shard]
    network.add(fault, r"list\.txt", "GET", times=1000)
    with pytest.raises(InputError, match=r"list file .* cannot be read"):
        find_shards([f"{s3_url}/list.txt"], ENDLESS)


def test_what_an_output_was_made_with_is_never_guessed(network: FaultProxy, s3_url: str) -> None:
    network.add("slow_down", r"run\.json", times=1000)
    with pytest.raises(StoreError, match=r"run\.json cannot be read"):
        read_fingerprint(s3_url, ENDLESS)


@pytest.mark.parametrize("fault", ["slow_down", "denied", "short"])
def test_a_footer_that_cannot_be_read_is_an_output_error(
    fault: str, network: FaultProxy, s3_url: str, direct: Any
) -> None:
    direct.pipe_file(f"{s3_url}/embeddings/a.parquet", DATA)
    network.add(fault, r"a\.parquet", "GET", times=1000)
    with pytest.raises(StoreError, match="cannot be read"):
        read_facts(s3_url, "embeddings/a.parquet", limits=ENDLESS)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["slow_down", "hang_up", "lost", "silent"])
def test_old_parts_are_deleted_through_a_burst_of(fault: str, network: FaultProxy, s3_url: str, direct: Any) -> None:
    direct.pipe_file(f"{s3_url}/old", b"x")
    network.add(fault, "delete", "POST", times=2)
    delete(s3_url, ["old", "gone"], SHORT)
    assert not direct.exists(f"{s3_url}/old")


def test_old_parts_that_may_not_be_deleted_are_told(network: FaultProxy, s3_url: str) -> None:
    network.add("denied", "delete", "POST", times=2)
    with pytest.raises(PermissionError):
        delete(s3_url, ["old"], SHORT)


@pytest.mark.slow
def test_no_error_tells_a_secret(
    network: FaultProxy, shard: Shard, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server
) -> None:
    secret = "not/the+secret0123456789"
    told = []
    for name, value in {
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": f"http://user:{secret.replace('/', '')}@127.0.0.1:9",
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            storage._filesystem.cache_clear()
            for call in (
                lambda: read_all(shard, ENDLESS),
                lambda: read_bytes(shard.url, ENDLESS),
                lambda: write_bytes("s3://bkt/x", "y", b"", ENDLESS),
                lambda: find_shards([shard.url], ENDLESS),
                lambda: find_shards(["s3://bkt/x/"], ENDLESS),
            ):
                with pytest.raises(Exception) as caught:  # noqa: PT011
                    call()
                told.append(str(caught.value))
    assert len(told) == 10
    assert not [text for text in told if "secret" in text.replace("AWS_SECRET_ACCESS_KEY", "")]
    storage._filesystem.cache_clear()


@pytest.mark.slow
def test_files_are_listed_over_many_pages(network: FaultProxy, s3_url: str, direct: Any) -> None:
    names = [f"{number:04d}.tar" for number in range(1001)]
    direct.pipe({f"{s3_url}/{name}": b"" for name in names})
    network.add("slow_down", "continuation-token", times=2)
    fs, path = locate(s3_url, SHORT)
    assert [info.path.rpartition("/")[2] for info in list_files(fs, path, limits=SHORT)] == names
    assert network.count("GET", "list-type=2", fault="") == 2
