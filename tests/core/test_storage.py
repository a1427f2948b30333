"""Storage on disk and on S3."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shard_embedder.jobs import verify
from shard_embedder.jobs.support.exit_codes import EXIT_FAILED
from shard_embedder.pipeline.core import storage
from shard_embedder.pipeline.core.errors import SettingsError, ShardChangedError, ShardError, StoreError
from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits, with_retries
from shard_embedder.pipeline.core.storage import (
    FileInfo,
    join,
    list_files,
    locate,
    read_bytes,
    read_tail,
    stat,
    to_url,
)
from shard_embedder.pipeline.core.writing import delete, write_bytes
from shard_embedder.pipeline.shards.stream import ShardStream
from tests.conftest import ROOT

SMALL_CHUNKS = StoreLimits(chunk_bytes=100)
NAMES = [
    "plain.bin",
    "two words.bin",
    "ünï-코드.bin",
    "a#b.bin",
    "a?b=c.bin",
    "100%25.bin",
    "a+b&c.bin",
    "[x]{y}*.bin",
]


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine that has no credentials of S3, and has not spoken with it before."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    storage._filesystem.cache_clear()
    yield
    storage._filesystem.cache_clear()


def listed(url: str, *, recursive: bool = True) -> list[str]:
    fs, path = locate(url)
    return sorted(info.path[len(path) + 1 :] for info in list_files(fs, path, recursive=recursive))


def opened(url: str, limits: StoreLimits = LIMITS) -> ShardStream:
    info = stat(*locate(url))
    return ShardStream(url, info.num_bytes, info.version, limits)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_as_it_is(place: str, name: str) -> None:
    write_bytes(place, f"folder/{name}", b"content")
    write_bytes(place, "folder/x", b"another")
    url = join(place, "folder", name)
    fs, path = locate(url)
    assert to_url(fs, path) == url
    assert listed(place) == sorted([f"folder/{name}", "folder/x"])
    assert read_bytes(url) == b"content"
    assert read_tail(url, 3) == b"ent"
    with opened(url) as stream:
        assert stream.read(100) == b"content"
    delete(place, [f"folder/{name}", "folder/not there"])
    assert listed(place) == ["folder/x"]


def test_listing_tells_what_stat_tells(place: str) -> None:
    write_bytes(place, "a/b", b"12345")
    fs, path = locate(place)
    (info,) = list_files(fs, path)
    assert info == stat(fs, f"{path}/a/b")
    assert info.num_bytes == 5
    assert info.version


def test_listing_one_level_leaves_out_what_is_deeper_and_what_only_begins_alike(place: str) -> None:
    for name in ("in/a", "in/deep/b", "in-another/c"):
        write_bytes(place, name, b"x")
    assert listed(f"{place}/in") == ["a", "deep/b"]
    assert listed(f"{place}/in", recursive=False) == ["a"]
    assert listed(f"{place}/in/") == ["a", "deep/b"]
    assert listed(f"{place}/nowhere") == []


def test_a_folder_has_no_stat(place: str) -> None:
    write_bytes(place, "folder.tar/a", b"x")
    with pytest.raises(FileNotFoundError):
        stat(*locate(f"{place}/folder.tar"))


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 200, 1000])
def test_a_file_is_read_whole_whatever_its_size(place: str, size: int) -> None:
    data = random.Random(size).randbytes(size)
    write_bytes(place, "f", data)
    assert read_bytes(f"{place}/f", SMALL_CHUNKS) == data
    assert read_tail(f"{place}/f", 150, limits=SMALL_CHUNKS) == data[-150:]
    assert read_tail(f"{place}/f", 150, size, SMALL_CHUNKS) == data[-150:]
    with opened(f"{place}/f", SMALL_CHUNKS) as stream:
        assert stream.read(10**9) == data
        assert stream.read(1) == b""
        stream.check_unchanged()


@pytest.mark.parametrize("seed", range(4))
def test_reads_and_skips_across_chunk_borders_are_exact(place: str, seed: int) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(3000)
    write_bytes(place, "f", data)
    position = 0
    with opened(f"{place}/f", SMALL_CHUNKS) as stream:
        while position < len(data):
            length = rng.choice([0, 1, 10, 99, 100, 101, 250])
            if rng.random() < 0.5:
                assert stream.read(length) == data[position : position + length]
            else:
                assert stream.skip(length) == (position + length <= len(data))
            position = min(position + length, len(data))
            assert stream.position == position
        assert stream.skip(0)
        assert not stream.skip(1)


def test_a_skip_into_the_chunk_read_ahead_does_not_fetch_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(str(tmp_path), "f", bytes(1000))
    fetched: list[int] = []
    with opened(f"{tmp_path}/f", SMALL_CHUNKS) as stream:
        fetch = stream._fetch
        monkeypatch.setattr(stream, "_fetch", lambda start: fetched.append(start) or fetch(start))
        while stream.position < 1000:
            stream.read(40)
            stream.skip(30)
    assert fetched == list(range(0, 1000, 100))


@pytest.mark.parametrize("length", [3, 5, 7])
def test_a_file_replaced_while_it_is_read_is_told(place: str, length: int) -> None:
    write_bytes(place, "f", b"first")
    with opened(f"{place}/f") as stream:
        stream.check_unchanged()
        write_bytes(place, "f", b"another"[:length])
        with pytest.raises(ShardChangedError, match=f"planned 5 bytes .*, now {length} bytes") as caught:
            stream.check_unchanged()
    assert caught.value.transient


def test_a_file_removed_while_it_is_read_is_told(place: str) -> None:
    write_bytes(place, "f", b"first")
    with opened(f"{place}/f") as stream:
        delete(place, ["f"])
        with pytest.raises(ShardChangedError, match="listed, but not found"):
            stream.check_unchanged()
        with pytest.raises(ShardError, match="listed, but not found") as caught:
            stream.read(5)
    assert caught.value.transient


def test_a_file_that_was_cut_is_told_at_once(tmp_path: Path) -> None:
    write_bytes(str(tmp_path), "f", b"first")
    with opened(f"{tmp_path}/f") as stream:
        os.truncate(tmp_path / "f", 3)
        start = time.monotonic()
        with pytest.raises(ShardChangedError):
            stream.read(5)
    assert time.monotonic() - start < 1


def test_a_relative_path_is_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for spelled in ("a/b", "./a/b/", "a//b", "x/../a/b", f"file://{tmp_path}/a/b", f"file://{tmp_path}/a/b/"):
        assert to_url(*locate(spelled)) == f"{tmp_path}/a/b"


def test_s3_urls_lose_only_their_trailing_slash() -> None:
    assert to_url(*locate("s3://bkt/a/b/")) == "s3://bkt/a/b"
    assert to_url(*locate("s3a://bkt/a/b")) == "s3://bkt/a/b"
    assert to_url(*locate("s3://bkt/")) == "s3://bkt"
    assert join("s3://bkt/a/", "b", "c") == "s3://bkt/a/b/c"
    assert join("/", "b") == "/b"


@pytest.mark.parametrize(
    "url",
    [
        "s3://hunter:hunter2@bkt/a.tar",
        "s3://hunter:hun/ter2@bkt/a.tar",
        "s3://hunter2@bkt/a.tar",
        "https://user:hunter2@host/a.tar",
        "https://host/a.tar?X-Amz-Credential=hunter&X-Amz-Signature=hunter2",
        "https://host/a.tar?sv=1&sig=hunter2",
    ],
)
@pytest.mark.parametrize(
    "use", [locate, read_bytes, lambda url: write_bytes(url, "x", b"")], ids=["locate", "read", "write"]
)
def test_credentials_in_a_url_are_refused_and_not_echoed(url: str, use: Callable[[str], object]) -> None:
    with pytest.raises(SettingsError, match="must not carry credentials") as caught:
        use(url)
    assert "hun" not in str(caught.value)


@pytest.mark.parametrize("url", ["pipe://rm -rf x", "simplecache::s3://bkt/a", "nosuch://a/b"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=url.partition("://")[0]):
        locate(url)


def test_a_fault_that_passes_is_tried_again_and_one_that_lasts_is_not() -> None:
    faults: list[Exception] = [TimeoutError(), OSError("reset"), ConnectionError()]

    def sometimes() -> str:
        if faults:
            raise faults.pop()
        return "done"

    assert with_retries("trying", sometimes) == "done"
    for kind in (FileNotFoundError, PermissionError, IsADirectoryError, ShardChangedError):
        faults[:] = [OSError("never reached"), kind("no")]
        with pytest.raises(kind):
            with_retries("trying", sometimes)
        assert len(faults) == 1


def test_a_link_is_what_it_leads_to_and_a_loop_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/f").write_bytes(b"x")
    (tmp_path / "place").mkdir()
    (tmp_path / "place/linked").symlink_to(tmp_path / "real")
    (tmp_path / "place/again").symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(tmp_path / "place")
    (tmp_path / "place/f").symlink_to(tmp_path / "real/f")
    assert listed(f"{tmp_path}/place") == ["again/f", "f", "linked/f"]


def test_links_in_linked_folders_do_not_double_the_listing_without_end(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"d{number}").mkdir()
        for name in ("x", "y"):
            (tmp_path / f"d{number}" / name).symlink_to(f"../d{number + 1}")
    write_bytes(str(tmp_path / "d40"), "b.tar", b"")
    with pytest.raises(StoreError, match="links lead in more than 1000 ways to"):
        listed(str(tmp_path / "d0"))


def test_a_file_that_became_a_pipe_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    write_bytes(str(tmp_path), "f.tar", b"content")
    with opened(f"{tmp_path}/f.tar") as stream:
        (tmp_path / "f.tar").unlink()
        os.mkfifo(tmp_path / "f.tar")
        with pytest.raises(ShardError, match="no file, but a pipe"):
            stream.read(7)
        with pytest.raises(ShardChangedError, match="no file, but a pipe"):
            stream.check_unchanged()
    for call in (read_bytes, read_tail):
        with pytest.raises(StoreError, match="no file, but a pipe"):
            call(f"{tmp_path}/f.tar", *([5] if call is read_tail else []))  # type: ignore[operator]
    assert listed(str(tmp_path)) == []


_HUNG = """
import os, sys, threading
from shard_embedder.pipeline.core.errors import ShardError
from shard_embedder.pipeline.core.retries import StoreLimits
from shard_embedder.pipeline.core.storage import locate, stat
from shard_embedder.pipeline.shards.stream import ShardStream

limits = StoreLimits(chunk_bytes=10, request_timeout_s=0.2, retry_s=0.2, slowest_bytes_per_s=1000)
info = stat(*locate(sys.argv[1]), limits)
read = os.pread
hang_at = int(sys.argv[2])
# As on a mount whose server is gone: the call never comes back.
os.pread = lambda file, size, start: threading.Event().wait() if start >= hang_at else read(file, size, start)
with ShardStream(sys.argv[1], info.num_bytes, info.version, limits) as stream:
    try:
        print(len(stream.read(10)))
    except ShardError as error:
        print(error.transient, error)
"""


@pytest.mark.parametrize(
    ("hang_at", "says"),
    [(10, "10\n"), (0, "True reading bytes 0 to 10 failed .*TimeoutError: the disk did not answer for 0 s\n")],
    ids=["read ahead", "read"],
)
def test_a_disk_that_hangs_is_given_up_and_does_not_keep_the_process(tmp_path: Path, hang_at: int, says: str) -> None:
    write_bytes(str(tmp_path), "f.tar", bytes(100))
    command = [sys.executable, "-c", _HUNG, f"{tmp_path}/f.tar", str(hang_at)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert re.fullmatch(says, done.stdout), done


def test_a_link_to_nothing_is_listed_so_that_it_does_not_vanish(tmp_path: Path) -> None:
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere")
    assert list(list_files(*locate(str(tmp_path)))) == [FileInfo(f"{tmp_path}/gone.tar", 0, "")]
    with (
        ShardStream(f"{tmp_path}/gone.tar", 0, "") as stream,
        pytest.raises(ShardChangedError, match="not found"),
    ):
        stream.check_unchanged()


def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may list everything")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError):
        listed(str(tmp_path))


@pytest.mark.parametrize(
    ("environment", "bucket", "kind", "message"),
    [
        ({}, "bkt", PermissionError, "Unable to locate credentials"),
        ({"AWS_ACCESS_KEY_ID": "x"}, "bkt", PermissionError, "missing: AWS_SECRET_ACCESS_KEY"),
        ({"AWS_PROFILE": "nowhere"}, "bkt", PermissionError, "profile .nowhere. could not be found"),
        ({}, "bad bucket!", OSError, 'Invalid bucket name "bad bucket!"'),
    ],
)
@pytest.mark.usefixtures("no_credentials")
def test_what_s3_is_never_asked_is_an_error_at_once_that_names_the_thing(
    environment: dict[str, str],
    bucket: str,
    kind: type[OSError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{bucket}/out/run.json"
    started = time.monotonic()
    with pytest.raises(kind, match=f"reading {url}.*{message}"):
        read_bytes(url)
    assert verify.main([f"s3://{bucket}/out"]) == EXIT_FAILED
    assert time.monotonic() - started < LIMITS.retry_s / 4
    assert re.search(f"^verify.py: {url} cannot be read: .*{message}.*\n$", capsys.readouterr().err)


def test_a_store_that_cannot_be_had_is_told_of_in_one_line() -> None:
    for url in ("hdfs://host/x", "nostore://x"):
        with pytest.raises(SettingsError, match=r"^no filesystem for \w+:// URLs: [^\n]+$"):
            locate(url)
