"""Stores that lack what Amazon's S3 has, and disks without hard links: each has a second way, or one clear error."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shard_embedder.pipeline.core import storage
from shard_embedder.pipeline.core.errors import InputError, StoreError
from shard_embedder.pipeline.core.retries import StoreLimits
from shard_embedder.pipeline.core.storage import FileInfo, list_files, locate, read_bytes, stat
from shard_embedder.pipeline.core.writing import create, delete, write_bytes
from shard_embedder.pipeline.shards.find import find_shards
from tests.conftest import ROOT, S3Server
from tests.faults.odd_store import OddStore, Quirks

LIMITS = StoreLimits(request_timeout_s=5.0, retry_s=0.4, settle_s=0.3)
UNSUPPORTED = [
    (501, "NotImplemented"),
    (400, "InvalidArgument"),
    (405, "MethodNotAllowed"),
    (400, "MissingContentMD5"),
]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[OddStore]:
    with OddStore() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        storage._filesystem.cache_clear()
        yield store
    storage._filesystem.cache_clear()


def listed(url: str) -> list[FileInfo]:
    return list(list_files(*locate(url, LIMITS), limits=LIMITS))


@pytest.mark.parametrize(
    ("answer", "num_names"),
    [
        pytest.param((501, "NotImplemented"), 1001, marks=pytest.mark.slow),
        ((403, "SignatureDoesNotMatch"), 20),
        *((answer, 20) for answer in UNSUPPORTED),
    ],
)
def test_where_many_cannot_be_deleted_at_once_each_is(
    store: OddStore, answer: tuple[int, str], num_names: int
) -> None:
    store.quirks = Quirks(delete_many=answer)
    names = [f"a [{number}]*.parquet" for number in range(num_names)]
    store.stored.objects.update({f"out/{name}": b"x" for name in names[:10]}, kept=b"x")
    delete("s3://bkt/out", names, LIMITS)
    assert list(store.stored.objects) == ["kept"]
    assert store.count("POST") == 1, "what the store does not have is asked for once"


def test_one_that_cannot_be_deleted_alone_is_an_error(store: OddStore) -> None:
    store.quirks = Quirks(delete_many=(501, "NotImplemented"))
    store.stored.objects["out/a"] = b"x"

    def down(method: str, key: str) -> None:
        if method == "DELETE":
            raise ConnectionError

    store.quirks.before = down
    with pytest.raises(StoreError, match="deleting an old part failed"):
        delete("s3://bkt/out", ["a"], LIMITS)


@pytest.mark.slow
@pytest.mark.parametrize("answer", UNSUPPORTED)
def test_without_conditional_writes_a_file_is_still_made_once(store: OddStore, answer: tuple[int, str]) -> None:
    store.quirks = Quirks(conditional=answer)
    assert create("s3://bkt/out", "f", b"first", LIMITS)
    assert not create("s3://bkt/out", "f", b"second", LIMITS)
    assert store.stored.objects == {"out/f": b"first"}


def test_without_conditional_writes_one_of_many_at_once_has_the_file(store: OddStore) -> None:
    store.quirks = Quirks(conditional=(501, "NotImplemented"))
    num_callers = 6
    looked = threading.Barrier(num_callers)

    def together(method: str, key: str) -> None:
        # Who finds no such file asks whether there is a folder: by then all have looked, and nobody has written.
        if method == "GET" and not key:
            looked.wait(60)

    store.quirks.before = together
    made: list[bool] = []

    def contend(number: int) -> None:
        made.append(create("s3://bkt/out", "f", b"%d" % number, LIMITS))

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(num_callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * (num_callers - 1) + [True]


def test_what_is_not_implemented_is_not_tried_again(store: OddStore) -> None:
    store.quirks = Quirks(put_fault=lambda key: (501, "NotImplemented"))
    with pytest.raises(OSError, match="NotImplemented, says the store"):
        write_bytes("s3://bkt/out", "f", b"", LIMITS)
    assert store.count("PUT") == 1


@pytest.mark.parametrize("token", [lambda start: "again", lambda start: None, lambda start: str(start % 20)])
def test_a_listing_that_does_not_go_on_is_an_error_and_ends(store: OddStore, token: object) -> None:
    store.quirks = Quirks(token=token, page_size=10)  # type: ignore[arg-type]
    store.stored.objects.update({f"in/{number:03d}.tar": b"x" for number in range(100)})
    with pytest.raises(StoreError, match="gives no new token"):
        listed("s3://bkt/in")
    with pytest.raises(InputError, match=r"cannot list s3://bkt/in: .*gives no new token"):
        find_shards(["s3://bkt/in"], LIMITS)


def test_pages_are_read_to_the_last(store: OddStore) -> None:
    store.quirks = Quirks(page_size=7)
    store.stored.objects.update({f"in/{number:03d}.tar": b"x" for number in range(50)})
    assert [shard.name for shard in find_shards(["s3://bkt/in"], LIMITS).shards] == [f"{n:03d}" for n in range(50)]


@pytest.mark.parametrize(
    ("has_dates", "version"), [(True, "modified 2026-01-01T10:00:00Z"), (False, "by size")], ids=["dated", "bare"]
)
def test_without_an_etag_a_version_says_what_it_is(store: OddStore, has_dates: bool, version: str) -> None:
    store.quirks = Quirks(has_etags=False, has_dates=has_dates)
    store.stored.objects["in/a.tar"] = b"12345"
    (info,) = listed("s3://bkt/in")
    assert info == FileInfo("bkt/in/a.tar", 5, version)
    assert stat(*locate("s3://bkt/in/a.tar", LIMITS), LIMITS) == info


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS])
def test_on_a_disk_without_hard_links_a_file_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    made: list[bool] = []
    barrier = threading.Barrier(8)

    def contend(caller: int) -> None:
        barrier.wait()
        made.append(create(str(tmp_path), "a/f", bytes([caller]) * 1000))

    threads = [threading.Thread(target=contend, args=(caller,)) for caller in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
    data = read_bytes(f"{tmp_path}/a/f")
    assert len(data) == 1000
    assert len(set(data)) == 1
    assert [path.name for path in (tmp_path / ".tmp").iterdir()] == []


def test_a_link_that_fails_for_another_reason_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space"):
        create(str(tmp_path), "f", b"x")
    assert not (tmp_path / "f").exists()


_USES_ALL = """
from shard_embedder.pipeline.core.storage import read_bytes
from shard_embedder.pipeline.core.writing import create, delete, write_bytes
from shard_embedder.pipeline.shards.find import find_shards
write_bytes("s3://bkt/in", "a.tar", b"x")
assert create("s3://bkt/in", "b.tar", b"x")
assert [shard.name for shard in find_shards(["s3://bkt/in"]).shards] == ["a", "b"]
assert read_bytes("s3://bkt/in/a.tar") == b"x"
delete("s3://bkt/in", ["b.tar"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "methods", "header", "value"),
    [
        ({"FSSPEC_S3_ANON": "true"}, "GET HEAD PUT POST", "authorization", None),
        ({"FSSPEC_S3_REQUESTER_PAYS": "true"}, "GET HEAD PUT POST", "x-amz-request-payer", "requester"),
        (
            {"FSSPEC_S3": '{"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "key-1"}}'},
            "PUT", "x-amz-server-side-encryption-aws-kms-key-id", "key-1",
        ),
    ],
    ids=["anonymous", "requester pays", "SSE-KMS"],
)  # fmt: skip
def test_every_request_is_as_the_variables_of_fsspec_say(
    store: OddStore, variables: dict[str, str], methods: str, header: str, value: str | None
) -> None:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
    environment |= {**store.environment, **variables}
    if "FSSPEC_S3_ANON" in variables:
        del environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    subprocess.run([sys.executable, "-c", _USES_ALL], cwd=ROOT, env=environment, check=True, timeout=120)
    seen = {
        (method, headers.get(header))
        for (method, _), headers in zip(store.stored.requests, store.stored.headers, strict=True)
        if method in methods.split()
    }
    assert seen == {(method, value) for method in methods.split()}


_READS = """
from shard_embedder.pipeline.core.storage import read_bytes
from shard_embedder.pipeline.shards.find import find_shards
(shard,) = find_shards(["s3://public/in"]).shards
assert read_bytes(shard.url) == b"x"
"""


@pytest.mark.slow
def test_a_public_bucket_is_read_without_credentials(s3_server: S3Server) -> None:
    fs = s3_server.filesystem()
    fs.mkdir("public")
    fs.pipe_file("public/in/a.tar", b"x")
    everyone = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": ["arn:aws:s3:::public", "arn:aws:s3:::public/*"],
    }
    policy = {"Version": "2012-10-17", "Statement": [everyone]}
    fs.call_s3("put_bucket_policy", Bucket="public", Policy=json.dumps(policy))
    environment = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_ENDPOINT_URL": s3_server.environment["AWS_ENDPOINT_URL"], "FSSPEC_S3": '{"anon": true}'}
    subprocess.run([sys.executable, "-c", _READS], cwd=ROOT, env=environment, check=True, timeout=120)
