"""The input spec: which shards it names, and what they are called."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

from shard_embedder.pipeline.core import storage
from shard_embedder.pipeline.core.errors import InputError, SettingsError
from shard_embedder.pipeline.core.storage import join
from shard_embedder.pipeline.core.writing import write_bytes
from shard_embedder.pipeline.shards import find as module
from shard_embedder.pipeline.shards.find import Refused, find_shards, shards_below
from shard_embedder.pipeline.shards.left_out import add_left_out, archives_among, format_left_out
from tests.conftest import S3Server
from tests.faults.odd_store import OddStore

FILES = [
    "train/00000.tar",
    "train/00001.tar",
    "train/00002.tar",
    "train/deep/00000.tar",
    "val/00000.tar",
    "val/a[1].tar",
    "other.tar",
    "notes.txt.gz",
    "train/readme.md",
    "train/.hidden.tar",
    ".tmp/x.tar",
]


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on disk and a prefix on S3 that hold the same files."""
    place = str(tmp_path / "place") if request.param == "disk" else request.getfixturevalue("s3_url")
    for name in FILES:
        write_bytes(place, name, name.encode())
    return place


def names(*inputs: str) -> list[str]:
    return [shard.name for shard in find_shards(inputs).shards]


EVERY = ["other", "train/00000", "train/00001", "train/00002", "train/deep/00000", "val/00000", "val/a[1]"]
TRAIN = ["00000", "00001", "00002"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", EVERY),
        ("/", EVERY),
        ("/**", EVERY),
        ("/**/*.tar", EVERY),
        ("/*", ["other"]),
        ("/*/*.tar", [name for name in EVERY if name.count("/") == 1]),
        ("/{train,val}", [name for name in EVERY if name != "other"]),
        ("/{train,val}/*.tar", ["train/00000", "train/00001", "train/00002", "val/00000", "val/a[1]"]),
        ("/train", [*TRAIN, "deep/00000"]),
        ("/train/*.tar", TRAIN),
        ("/train/*", TRAIN),
        ("/train/0000?.tar", TRAIN),
        ("/train/0000[12].tar", TRAIN[1:]),
        ("/train/0000[!0].tar", TRAIN[1:]),
        ("/train/**/00000.tar", ["00000", "deep/00000"]),
        ("/train/{00000..00002}.tar", TRAIN),
        ("/train/{00000,00002}.tar", [TRAIN[0], TRAIN[2]]),
        ("/train/0000{1..2}.tar", TRAIN[1:]),
        ("/train/00001.tar", TRAIN[1:2]),
        ("/train/.hidden.tar", [".hidden"]),
        ("/val/a[[]1].tar", ["a[1]"]),
        ("/{train,val}/00000.tar", ["train/00000", "val/00000"]),
    ],
)
def test_a_spec_names_the_same_shards_on_disk_and_on_s3(place: str, spec: str, expected: list[str]) -> None:
    assert names(place + spec) == expected


def test_a_shard_is_told_with_its_url_size_and_version(place: str) -> None:
    for spec in ("/train/00001.tar", "/train/*1.tar", "/train/{00001..00001}.tar"):
        found = find_shards([place + spec])
        assert found.prefix == f"{place}/train"
        (shard,) = found.shards
        assert (shard.name, shard.url) == ("00001", f"{place}/train/00001.tar")
        assert shard.num_bytes == len("train/00001.tar")
        assert shard.version
    assert find_shards([place]).shards[2]._replace(name="00001") == shard


LEFT_OUT = {"hidden": 2, ".gz": 1, ".md": 1}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", LEFT_OUT),
        ("/**", LEFT_OUT),
        ("/*", {".gz": 1}),
        ("/train", {"hidden": 1, ".md": 1}),
        ("/train/**", {"hidden": 1, ".md": 1}),
        # What a glob does not name is not left out.
        ("/train/*.tar", {"hidden": 1}),
        ("/train/0000*.tar", {}),
        ("/train/{00000..00002}.tar", {}),
    ],
)
def test_files_of_the_input_that_are_no_shards_are_counted_by_kind(
    place: str, spec: str, expected: dict[str, int]
) -> None:
    assert dict(find_shards([place + spec]).left_out) == expected


def test_archives_that_are_not_read_are_counted_by_kind_and_the_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar.gz", "2.tgz", "3.TAR", "x/4.Tar", "5.tar.zst", "6.TAR.GZ", "7", "8.json", "9.zip"):
        write_bytes(str(tmp_path), name, b"x")
    found = find_shards([str(tmp_path)])
    assert [shard.name for shard in found.shards] == ["0", "3.TAR", "x/4.Tar"]
    assert [shard.url for shard in found.shards] == [f"{tmp_path}/{name}" for name in ("0.tar", "3.TAR", "x/4.Tar")]
    left_out = {".tar.gz": 2, ".tgz": 1, ".tar.zst": 1, "without an extension": 1, ".json": 1, ".zip": 1}
    assert dict(found.left_out) == left_out
    assert archives_among(left_out) == {".tar.gz": 2, ".tgz": 1, ".tar.zst": 1, ".zip": 1}
    assert format_left_out(left_out) == ("2 .tar.gz, 1 .tar.zst, 1 .tgz, 1 .zip, 1 .json, 1 without an extension")
    assert names(f"{tmp_path}/3.TAR", f"{tmp_path}/0.tar") == ["0", "3.TAR"]


def test_a_folder_of_archives_alone_is_told_what_to_do(tmp_path: Path) -> None:
    for name in ("0.tar.gz", "1.tar.gz", "notes.json"):
        write_bytes(str(tmp_path), name, b"x")
    for spec in (str(tmp_path), f"{tmp_path}/*"):
        with pytest.raises(
            InputError, match=r"; it holds 2 \.tar\.gz, and only plain \.tar is read: decompress them with `gunzip`$"
        ):
            find_shards([spec])


def test_two_shards_that_would_share_a_name_are_refused(tmp_path: Path) -> None:
    for name in ("a.TAR", "a.tar"):
        write_bytes(str(tmp_path), name, b"x")
    assert names(str(tmp_path)) == ["a.TAR", "a"]
    write_bytes(str(tmp_path), "a.TAR.tar", b"x")
    with pytest.raises(InputError, match=r"shards must have names of their own, got .*/a\.TAR and .*/a\.TAR\.tar"):
        find_shards([str(tmp_path)])


def test_kinds_of_hostile_names_are_few_short_and_printable() -> None:
    left_out: Counter[str] = Counter()
    for number in range(1000):
        add_left_out(left_out, f"f.{number}")
    for name in ("x." + "y" * 200, "a.\x1b[31m", "b.\udcff", "c.a b", "d."):
        add_left_out(left_out, name)
    assert left_out.total() == 1005
    assert len(left_out) < 110
    assert all(kind.isprintable() and len(kind) <= 20 for kind in left_out)
    text = format_left_out(left_out)
    assert text.endswith(" more")
    assert len(text) < 200


def test_a_name_keeps_the_folders_below_what_all_of_the_input_shares(place: str) -> None:
    assert names(f"{place}/train/*.tar", f"{place}/val/00000.tar") == [
        *(f"train/{name}" for name in TRAIN),
        "val/00000",
    ]
    assert names(f"{place}/val/00000.tar", f"{place}/train/00000.tar") == ["train/00000", "val/00000"]


def test_a_shard_named_twice_is_there_once(place: str) -> None:
    assert names(f"{place}/train", f"{place}/train/0000*.tar", f"{place}/train/00001.tar") == [*TRAIN, "deep/00000"]


def test_names_and_order_do_not_depend_on_the_order_of_the_listing(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = find_shards([place])
    listing = module.list_files
    monkeypatch.setattr(module, "list_files", lambda *args, **options: reversed(list(listing(*args, **options))))
    assert find_shards([place]) == before


def test_a_list_file_holds_any_specs_with_comments(place: str) -> None:
    text = f"""\ufeff# the training set
{place}/train/{{00000..00001}}.tar   # two of them
   {place}/val/*\r

{place}/has#mark.tar
"""
    write_bytes(place, "has#mark.tar", b"")
    write_bytes(place, "list.txt", text.encode())
    found = ["has#mark", "train/00000", "train/00001", "val/00000", "val/a[1]"]
    assert names(f"{place}/list.txt") == found
    assert names(f"{place}/list.txt", f"{place}/other.tar") == sorted([*found, "other"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no shard is named"),
        (b"# nothing\n", "no shard is named"),
        (b"more.txt\n", "names another list file: more.txt"),
        (b"\xff\xfe\n", "cannot be read: UnicodeDecodeError"),
    ],
)
def test_a_list_file_without_sense_is_refused(place: str, text: bytes, message: str) -> None:
    write_bytes(place, "list.txt", text)
    with pytest.raises(InputError, match=message):
        find_shards([f"{place}/list.txt"])
    with pytest.raises(InputError, match=r"list file .* not found"):
        find_shards([f"{place}/nowhere.txt"])


@pytest.mark.parametrize("last", [5, 40])
def test_named_shards_that_are_missing_are_an_error_that_names_the_first(place: str, last: int) -> None:
    with pytest.raises(InputError) as caught:
        find_shards([f"{place}/train/{{00000..{last:05d}}}.tar", f"{place}/val/00007.tar"])
    expected = [f"{place}/train/{number:05d}.tar" for number in range(3, last + 1)] + [f"{place}/val/00007.tar"]
    more = f" and {len(expected) - 4} more" if len(expected) > 4 else ""
    assert str(caught.value) == (
        f"{len(expected)} of {last + 2} shards named in the input not found: {', '.join(expected[:4])}{more}"
    )


@pytest.mark.parametrize(
    "spec", ["/nowhere", "/nowhere/*.tar", "/train/x*.tar", "/train/readme.md", "/{train,tset}/*.tar", "/[a-b].tar"]
)
def test_a_part_of_the_input_that_names_nothing_is_an_error_though_others_do(place: str, spec: str) -> None:
    with pytest.raises(InputError, match=r"no \.tar shard found for input"):
        find_shards([f"{place}/train", place + spec])


def test_a_folder_that_ends_in_tar_is_a_folder(place: str) -> None:
    write_bytes(place, "folder.tar/a.tar", b"x")
    assert names(f"{place}/folder.tar/") == ["a"]


def test_broken_braces_are_refused(place: str) -> None:
    with pytest.raises(SettingsError, match="unbalanced braces"):
        find_shards([f"{place}/{{a,b.tar"])
    with pytest.raises(SettingsError, match="must name at most"):
        find_shards([f"{place}/{{0..99999999}}.tar"])


@pytest.mark.parametrize(
    "spec",
    [
        "https://127.0.0.1:9/b/a.tar?X-Amz-Signature=hunter2",
        "s3://bkt/{0..99999999}.tar?X-Amz-Signature=hunter2",
        "s3://bkt/{a,b.tar?token=hunter2",
        "s3://key:hunter2@bkt/*.tar",
        "s3://bkt/list.txt?sig=hunter2&.txt",
    ],
)
def test_an_input_that_carries_credentials_is_refused_whoever_asks_and_not_shown(spec: str) -> None:
    with pytest.raises(SettingsError, match="input must not carry credentials") as caught:
        find_shards(["plain.tar", spec])
    assert "hunter2" not in str(caught.value)


def test_an_input_lies_in_one_store(tmp_path: Path, s3_url: str) -> None:
    write_bytes(str(tmp_path), "a.tar", b"")
    with pytest.raises(SettingsError, match="must lie in one store, got 2"):
        find_shards([str(tmp_path), s3_url])


def test_a_bucket_may_be_the_input(s3_server: S3Server) -> None:
    s3_server.filesystem().mkdir("whole-bucket")
    write_bytes("s3://whole-bucket", "at-the-root.tar", b"x")
    write_bytes("s3://whole-bucket", "folder/x.tar", b"x")
    for spec in ("s3://whole-bucket", "s3://whole-bucket/"):
        assert find_shards([spec]).prefix == "s3://whole-bucket"
        assert names(spec) == ["at-the-root", "folder/x"]
    assert names("s3://whole-bucket/at-*.tar") == ["at-the-root"]
    assert names("s3://{whole-bucket,whole-bucket}/at-the-root.tar") == ["whole-bucket/at-the-root"]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("nowhere", "no .tar shard found for input nowhere: there is no such folder"),
        (
            "photos",
            "no .tar shard found for input photos; a folder of images must hold an image, and be the only input",
        ),
        ("photos/a.jpg", "no .tar shard found for input photos/a.jpg: a file must be a .tar, or a .txt list of"),
    ],
)
def test_what_holds_no_shard_is_told_by_what_it_is(
    spec: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(str(tmp_path), "photos/a.jpg", b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{re.escape(told)}"):
        find_shards([spec])


def test_a_bucket_that_is_not_there_is_an_error(s3_server: S3Server) -> None:
    none, not_there = "no .tar shard found for input", "1 of 1 shard named in the input not found:"
    for spec, found in (("a", none), ("a.tar", not_there)):
        url = f"s3://no-such-bucket/{spec}"
        with pytest.raises(InputError, match=f"{re.escape(f'{found} {url}')}: there is no bucket no-such-bucket$"):
            find_shards([url])
    with pytest.raises(InputError, match=f"no .tar shard found for input s3://{s3_server.bucket}/no-such-folder$"):
        find_shards([f"s3://{s3_server.bucket}/no-such-folder"])


@pytest.mark.parametrize(
    "spec", ["place", "./place/", "other/../place", "{place,place}", "pl*/*.tar", "{a,pl}*/*.tar"]
)
def test_a_relative_path_is_below_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    write_bytes(str(tmp_path), "place/x.tar", b"")
    write_bytes(str(tmp_path), "ab/x.tar", b"")
    monkeypatch.chdir(tmp_path)
    found = find_shards([spec])
    assert f"{tmp_path}/place/x.tar" in [shard.url for shard in found.shards]
    assert {join(found.prefix, shard.name + ".tar") for shard in found.shards} == {s.url for s in found.shards}


def test_a_shard_outside_the_prefix_is_refused(tmp_path: Path) -> None:
    write_bytes(str(tmp_path), "a/x.tar", b"")
    write_bytes(str(tmp_path), "y.tar", b"")
    with pytest.raises(InputError, match=r"y\.tar cannot name its output"):
        find_shards([f"{tmp_path}/a/{{x,../y}}.tar"])


@pytest.mark.parametrize(
    ("name", "shown", "reason"),
    [
        (b"x" * 201 + b".tar", "x" * 201, "its name must have at most 200 bytes"),
        (b"\xff.tar", r"\xff", "its name must be UTF-8"),
        (b"\xff/a.tar", r"\xff/a", "its name must be UTF-8"),
    ],
)
def test_a_name_that_cannot_be_is_refused_and_the_others_are_found(
    tmp_path: Path, name: bytes, shown: str, reason: str
) -> None:
    write_bytes(str(tmp_path), os.fsdecode(name), b"")
    write_bytes(str(tmp_path), "good.tar", b"")
    for spec in (
        str(tmp_path),
        f"{tmp_path}/**",
        f"{tmp_path}/{{good,{os.fsdecode(name).removesuffix('.tar')}}}.tar",
    ):
        found = find_shards([spec])
        assert [shard.name for shard in found.shards] == ["good"]
        assert found.refused == [Refused(shown, reason)]
        shown.encode()
    (tmp_path / "good.tar").unlink()
    assert find_shards([str(tmp_path)]).shards == []


ODD_KEYS = {
    "a//b": "its name must have no empty folder in it, and no `.` or `..`",
    "/b": "its name must have no empty folder in it, and no `.` or `..`",
    "../b": "its name must have no empty folder in it, and no `.` or `..`",
    "x/../b": "its name must have no empty folder in it, and no `.` or `..`",
    "./b": "its name must have no empty folder in it, and no `.` or `..`",
    "n" * 201: "its name must have at most 200 bytes",
}


def test_odd_keys_of_a_bucket_are_refused_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    good = [
        "nl\n",
        "tab\t",
        "esc\x1b",
        " ",
        "%2e%2e%2f",
        "a+b",
        "\u00e9",
        "\ufffe",
        "[x]",
        "{1,2}",
        "q?",
        "h#",
        "b&<>\"'",
        "😀",
    ]
    with OddStore() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        storage._filesystem.cache_clear()
        store.stored.objects.update({f"in/{name}.tar": b"x" for name in [*good, *ODD_KEYS]})
        found = find_shards(["s3://bkt/in"])
    storage._filesystem.cache_clear()
    assert [shard.name for shard in found.shards] == sorted(good)
    assert dict(found.refused) == ODD_KEYS
    assert found.refused == sorted(found.refused)


def test_a_folder_that_is_not_utf8_cannot_be_the_input(tmp_path: Path) -> None:
    write_bytes(str(tmp_path), os.fsdecode(b"\xff/in/a.tar"), b"")
    with pytest.raises(InputError, match="the folder of the input must be UTF-8"):
        find_shards([f"{tmp_path}/{os.fsdecode(bytes([0xFF]))}/in"])


def test_a_linked_folder_counts_and_a_loop_ends(tmp_path: Path) -> None:
    write_bytes(str(tmp_path), "real/x.tar", b"")
    (tmp_path / "place").mkdir()
    (tmp_path / "place/linked").symlink_to(tmp_path / "real")
    (tmp_path / "real/loop").symlink_to(tmp_path / "place")
    (tmp_path / "place/gone.tar").symlink_to(tmp_path / "nowhere")
    (tmp_path / "place/self").symlink_to(tmp_path / "place/self")
    assert names(str(tmp_path / "place")) == ["gone", "linked/x"]


def test_a_path_that_is_there_with_a_wildcard_in_its_name_is_told_how_to_be_named(tmp_path: Path) -> None:
    write_bytes(str(tmp_path), "d[1].tar", b"")
    with pytest.raises(InputError, match=r"no \.tar shard found for input .*d\[1\]\.tar, whose .* in brackets"):
        names(str(tmp_path / "d[1].tar"))
    assert names(str(tmp_path / "d[[]1].tar")) == ["d[1]"]


def test_shards_below_a_folder_are_found_whatever_its_name(tmp_path: Path) -> None:
    write_bytes(str(tmp_path), "w[2]*{a,b}/x/y.tar", b"")
    (found,) = shards_below(str(tmp_path / "w[2]*{a,b}"))
    assert (found.name, found.url) == ("x/y", str(tmp_path / "w[2]*{a,b}/x/y.tar"))
    with pytest.raises(InputError, match=r"no \.tar shard found for input"):
        shards_below(str(tmp_path / "nothing"))


def test_a_folder_that_may_not_be_listed_is_an_error(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **options: object) -> object:
        raise PermissionError("no")

    monkeypatch.setattr(module, "list_files", denied)
    with pytest.raises(InputError, match=f"cannot list {place}: PermissionError"):
        find_shards([place])


def test_a_pipe_among_shards_is_refused_by_name_and_one_of_another_kind_counted(tmp_path: Path) -> None:
    write_bytes(str(tmp_path), "in/a.tar", b"")
    for name in ("pipe.tar", "pipe.log"):
        os.mkfifo(tmp_path / "in" / name)
    found = find_shards([str(tmp_path / "in")])
    assert [shard.name for shard in found.shards] == ["a"]
    assert found.refused == [Refused("pipe", "it cannot be read: it is no file, but a pipe, a socket or a device")]
    assert found.left_out == {".log": 1}
