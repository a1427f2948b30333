"""Shards of every kind and damage, and what must become of each."""

from __future__ import annotations

import gzip
import tarfile
from dataclasses import dataclass

from shard_embedder.pipeline.shards.headers import BLOCK
from tests.shards.tar_bytes import (
    ABC,
    END,
    GARBAGE,
    LEN_A,
    LEN_B,
    LONG,
    NFC,
    NFD,
    WHOLE,
    A,
    B,
    C,
    entry,
    flipped,
    gnu_times,
    header,
    in_zip,
    packed,
    padded,
    pax,
)


@dataclass(frozen=True)
class Case:
    """A shard, and what must become of it.

    `read` are the keys whose image is handed on, in order; `errors` the others, as `key: class of
    reason`; `fault` how the shard's fault begins, None where its end is proven.
    """

    name: str
    data: bytes
    read: str = ""
    errors: tuple[str, ...] = ()
    fault: str | None = None
    ignored: int = 0


CASES = [
    Case("whole", WHOLE, "a b c"),
    Case("whole, as Python writes it", packed([("a.jpg", A), ("b.jpg", B)]), "a b"),
    # Cut.
    Case(
        "cut inside an image", WHOLE[: LEN_A + BLOCK + 99], "a", ("b: unreadable member",), "cut: ends inside 'b.jpg'"
    ),
    Case("cut inside the padding", ABC[:-1], "a b c", (), "cut: ends in the padding after 'c.jpg'"),
    Case("cut inside a header", WHOLE[: LEN_A + 200], "a", (), "cut: ends inside the header"),
    Case("cut inside the first header", WHOLE[:200], "", (), "cut: ends inside the header"),
    Case("cut between members", WHOLE[: LEN_A + LEN_B], "a b", (), "cut: ends without an end-of-archive block"),
    Case("without its end-of-archive blocks", ABC, "a b c", (), "cut: ends without an end-of-archive block"),
    Case("cut inside the first end-of-archive block", ABC + bytes(100), "a b c", (), "cut: ends inside the header"),
    Case("one end-of-archive block of two", ABC + bytes(BLOCK), "a b c"),
    Case("cut inside the padding of the archive", ABC + bytes(3 * BLOCK + 7), "a b c"),
    Case(
        "a long-name header without its member", ABC + pax({"path": LONG}) + END, "a b c", (), "damaged: a header ext"
    ),
    # Damaged headers.
    Case("wrong header checksum", flipped(WHOLE, LEN_A + 150), "a c", (), f"damaged: no tar header at byte {LEN_A}"),
    Case("one bit of a name flipped", flipped(WHOLE, LEN_A), "a c", (), f"damaged: no tar header at byte {LEN_A}"),
    Case("the first header damaged", flipped(WHOLE, 0), "b c", (), "damaged: no tar header at byte 0"),
    Case(
        "garbage header",
        WHOLE[:LEN_A] + GARBAGE[:BLOCK] + WHOLE[LEN_A + BLOCK :],
        "a c",
        (),
        "damaged: no tar header",
    ),
    Case("garbage between members", WHOLE[:LEN_A] + GARBAGE + WHOLE[LEN_A:], "a b c", (), "damaged: no tar header"),
    Case(
        "garbage that is no whole block",
        WHOLE[:LEN_A] + GARBAGE[:77] + WHOLE[LEN_A:],
        "a b c",
        (),
        "damaged: no tar header",
    ),
    Case("a byte lost", WHOLE[: LEN_A + 600] + WHOLE[LEN_A + 601 :], "a b c", (), "damaged: no tar header"),
    Case(
        "a block of zeros for a header",
        WHOLE[:LEN_A] + bytes(BLOCK) + WHOLE[LEN_A + BLOCK :],
        "a c",
        (),
        "damaged: 512 bytes",
    ),
    Case(
        "a page of zeros between members",
        entry("a.jpg") + bytes(4096) + entry("b.jpg") + END,
        "a b",
        (),
        "damaged: 4096",
    ),
    Case("a hole of 4 MiB", entry("a.jpg") + bytes(4 * 2**20) + entry("b.jpg") + END, "a b", (), "damaged: a hole"),
    Case("zeros to the end, 4 MiB", ABC + bytes(4 * 2**20), "a b c", (), "damaged: a hole"),
    Case("zeros to the end, 100 KiB", ABC + bytes(100 * 2**10), "a b c", (), "damaged: a hole"),
    Case(
        "two faults",
        flipped(flipped(WHOLE, 0), LEN_A + LEN_B),
        "b",
        (),
        "damaged: no tar header at byte 0 (bad checksum); more",
    ),
    # Sizes that lie.
    Case(
        "a size of 1 TiB",
        entry("a.jpg")
        + header(b"b.jpg", raw_size=b"\x80" + (2**40).to_bytes(11, "big"))
        + padded(B)
        + entry("c.jpg")
        + END,
        "a c",
        ("b: unreadable member",),
        "cut: ends inside 'b.jpg'",
    ),
    Case(
        "a negative size",
        entry("a.jpg") + header(b"b.jpg", raw_size=b"\xff" * 12) + padded(B) + entry("c.jpg") + END,
        "a c",
        (),
        "damaged: a size of -1",
    ),
    Case(
        "a negative size by pax",
        entry("a.jpg") + pax({"size": "-7"}) + entry("b.jpg") + entry("c.jpg") + END,
        "a c",
        (),
        "damaged: a size of -7",
    ),
    Case(
        "a size that is no number",
        entry("a.jpg") + header(b"b.jpg", raw_size=b"9" * 12) + padded(B) + entry("c.jpg") + END,
        "a c",
        (),
        "damaged: no tar header",
    ),
    Case(
        # Its data is b's and half of c: whether that is an image is for the decoder to say.
        "a size too large by 700 bytes",
        entry("a.jpg") + header(b"b.jpg", len(B) + 700) + padded(B) + entry("c.jpg") + entry("d.jpg") + END,
        "a b d",
        (),
        "damaged: no tar header",
    ),
    Case(
        "a size too small",
        entry("a.jpg") + header(b"b.jpg", 100) + padded(B) + entry("c.jpg") + END,
        "a b c",
        (),
        "damaged: no tar header",
    ),
    # No tar at all.
    Case("gzip under .tar", gzip.compress(WHOLE), "", (), "damaged: no tar header at byte 0"),
    Case("zip under .tar", in_zip(), "", (), "damaged: no tar header at byte 0 (bad checksum); it looks like a zip"),
    Case("HTML under .tar", b"<!doctype html><p>404" + b" " * 600, "", (), "damaged: no tar header at byte 0 (bad"),
    Case(
        "short HTML under .tar",
        b"<html>404</html>",
        "",
        (),
        "cut: ends inside the header at byte 0; it looks like an H",
    ),
    Case("JPEG under .tar", A, "", (), "damaged: no tar header at byte 0 (bad checksum); it looks like a JPEG"),
    Case("random bytes under .tar", GARBAGE, "", (), "damaged: no tar header at byte 0"),
    Case("0 bytes", b"", "", (), "empty file: 0 bytes"),
    Case("a valid empty tar", END, ""),
    Case("a valid empty tar, as Python writes it", packed([]), ""),
    # More than one archive, and what follows it.
    Case("two tars concatenated", packed([("a.jpg", A)]) + packed([("b.jpg", B)]), "a b"),
    Case("two tars without padding concatenated", entry("a.jpg") + END + entry("b.jpg") + END, "a b"),
    Case("two tars, the second cut", packed([("a.jpg", A)]) + entry("b.jpg"), "a b", (), "cut: ends without"),
    Case("trailing garbage", WHOLE + b"garbage", "a b c", (), "damaged: 7 bytes of garbage"),
    Case("trailing blocks of garbage", WHOLE + GARBAGE, "a b c", (), "damaged: no tar header"),
    # Members that are no plain files.
    Case("a sparse file", entry("a.jpg", A, b"S") + entry("b.jpg") + END, "b", ("a: unreadable member",)),
    Case(
        "a sparse file by pax",
        pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg"}) + entry("x/y.jpg") + END,
        "",
        ("a: unreadable member",),
    ),
    Case("a symbolic link", entry("a.jpg", b"", b"2") + entry("b.jpg") + END, "b", ("a: unreadable member",)),
    Case("a hard link", entry("a.jpg", b"", b"1") + entry("b.jpg") + END, "b", ("a: unreadable member",)),
    Case("a fifo", entry("a.jpg", b"", b"6") + entry("b.jpg") + END, "b", ("a: unreadable member",)),
    Case(
        "a device",
        entry("a.jpg", b"", b"3") + entry("b.jpg", b"", b"4") + END,
        "",
        ("a: unreadable member", "b: unreadable member"),
    ),
    Case(
        "a member of an unknown type", entry("a.jpg", A, b"M") + entry("b.jpg") + END, "b", ("a: unreadable member",)
    ),
    Case(
        "a folder, a volume label", entry("f/", b"", b"5") + entry("label", b"", b"V") + entry("f/a.jpg") + END, "f/a"
    ),
    Case("a contiguous file, one of 1979", entry("a.jpg", A, b"7") + entry("b.jpg", B, b"\0") + END, "a b"),
    # Names.
    Case("a pax long name", packed([(LONG + ".jpg", A)], tarfile.PAX_FORMAT), LONG),
    Case("a GNU long name", packed([(LONG + ".jpg", A)], tarfile.GNU_FORMAT), LONG),
    Case(
        "a long name in two fields",
        packed([("d" * 120 + "/" + "n" * 90 + ".jpg", A)], tarfile.USTAR_FORMAT),
        "d" * 120 + "/" + "n" * 90,
    ),
    Case("pax records of the whole archive", pax({"comment": "x"}, b"g") + entry("a.jpg") + END, "a"),
    Case(
        "a long name lost",
        entry("a.jpg") + flipped(packed([(LONG + ".jpg", A)], tarfile.GNU_FORMAT), 3),
        "a",
        (f"{LONG[:100]}: no image",),
        "damaged: no tar header",
    ),
    Case(
        "a name beyond ASCII lost",
        entry("a.jpg") + flipped(packed([("é.jpg", A)], tarfile.PAX_FORMAT), 3),
        "a",
        ("?: unreadable member",),
        "damaged: no tar header",
    ),
    Case(
        "a broken pax record",
        entry("a.jpg") + entry("p", b"99 path=x\n", b"x") + entry("b.jpg") + entry("c.jpg") + END,
        "a c",
        ("b: unreadable member",),
        "damaged: the pax",
    ),
    Case(
        # As Go writes it: what is not ASCII is left out of the header.
        "a name beyond ASCII lost, of which the header has the rest",
        entry("a.jpg") + flipped(pax({"path": "é1.jpg"}), 3) + entry("1.jpg") + entry("c.jpg") + END,
        "a c",
        ("1: unreadable member",),
        "damaged: no tar header",
    ),
    Case(
        "a pax header whose member is zeros",
        entry("a.jpg") + pax({"path": "b.jpg"}) + bytes(1024) + entry("c.jpg") + END,
        "a c",
        (),
        "damaged: a header extension without its member",
    ),
    Case(
        "a GNU long name at the end of the first of two tars",
        entry("a.jpg") + entry("x", LONG.encode(), b"L") + END + entry("b.jpg") + END,
        "a b",
        (),
        "damaged: a header extension without its member",
    ),
    Case(
        "times of access and change where ustar has a name's first half, as `tar --format=gnu -G` writes them",
        gnu_times(entry("a.jpg"), b"13727410000") + gnu_times(entry("a.cls", b"1"), b"14524410000") + END,
        "a",
    ),
    Case(
        "a header extension of 1 GiB",
        entry("a.jpg") + header(b"x", 2**30, b"L") + entry("b.jpg") + END,
        "a b",
        (),
        "damaged: a header extension of",
    ),
    Case(
        "a header extension cut",
        entry("a.jpg") + entry("x", b"n" * 900, b"L")[:900],
        "a",
        (),
        "cut: ends inside the header ext",
    ),
    Case(
        "a name that is not UTF-8", entry(b"caf\xe9.jpg") + entry("b.jpg") + END, "b", (r"caf\xe9: key is not UTF-8",)
    ),
    Case("NFC and NFD twins", entry(f"{NFC}.jpg") + entry(f"{NFD}.jpg", B) + END, f"{NFC} {NFD}"),
    Case("control characters", entry("a\n\x1b[31m\x7f.jpg") + END, "a\n\x1b[31m\x7f"),
    Case("240 characters", packed([("é" * 120 + "/" + "x" * 119 + ".jpg", A)]), "é" * 120 + "/" + "x" * 119),
    Case("../ and absolute names", entry("../../etc/a.jpg") + entry("/etc/b.jpg") + END, "../../etc/a /etc/b"),
    Case("shell text", entry("$(id);`id`|&'\".jpg") + END, "$(id);`id`|&'\""),
    Case("an empty name", entry("", A) + entry("b.jpg") + END, "b", ignored=1),
    Case("no extension", entry("a") + entry("b.jpg") + END, "b", ("a: no image",)),
    Case(
        "dotfiles and macOS files", entry(".DS_Store") + entry("d/._a.jpg") + entry("d/a.jpg") + END, "d/a", ignored=2
    ),
    Case(
        "what tells of the shard and not of a sample",
        entry("__index__")
        + entry("__meta__.json", b"{}")
        + entry("README")
        + entry("d/LICENSE.txt")
        + entry("a.jpg")
        + entry("labels.csv")
        + entry("d/labels.TSV")
        + entry("d/sum.sha256")
        + END,
        "a",
        ignored=7,
    ),
    Case(
        "names that only look as if they told of the shard",
        entry("__index__.jpg")
        + entry("README.png")
        + entry("readme", b"x")
        + entry("README_2")
        + entry("labels.json")
        + entry("classes.txt")
        + entry("__x")
        + entry("labels.csv.jpg")
        + END,
        "__index__ README labels",
        ("README_2: no image", "labels: no image", "classes: no image", "__x: no image"),
        ignored=1,
    ),
    Case(
        "a table beside an image, and one beside what may be of a sample",
        entry("a.csv", b"x") + entry("a.jpg") + entry("b.csv", b"x") + entry("b.json", b"{}") + END,
        "a",
        ("b: no image",),
    ),
    Case("a table twice", entry("a.csv", b"x") + entry("a.csv", b"y") + END, "", ("a: duplicate member",)),
    Case("upper case", entry("A.JPG") + entry("B.Jpeg") + entry("a.jpg") + END, "A B a"),
    # Samples.
    Case(
        "a duplicate member", entry("a.jpg") + entry("a.jpg", B) + entry("b.jpg") + END, "b", ("a: duplicate member",)
    ),
    Case(
        "a key repeated apart", entry("a.jpg") + entry("b.jpg") + entry("a.jpg", C) + END, "a b", ("a: repeated key",)
    ),
    Case(
        "members not side by side",
        entry("a.jpg") + entry("b.jpg") + entry("a.json", b"{}") + entry("b.json", b"{}") + END,
        "a b",
        ("a: members apart", "b: members apart"),
    ),
    Case(
        "members not side by side, the images last",
        entry("a.json", b"{}") + entry("b.json", b"{}") + entry("a.jpg") + entry("b.jpg") + END,
        "a b",
        ("a: no image", "b: no image"),
    ),
    Case(
        "members not side by side, three of each key",
        entry("a.json", b"{}")
        + entry("b.txt")
        + entry("a.jpg")
        + entry("b.jpg")
        + entry("a.txt")
        + entry("b.json")
        + END,
        "a b",
        ("a: no image", "b: no image", "a: members apart", "b: members apart"),
    ),
    Case(
        "a key repeated apart, with its metadata between",
        entry("a.jpg") + entry("b.jpg") + entry("a.json", b"{}") + entry("c.jpg") + entry("a.jpg", C) + END,
        "a b c",
        ("a: members apart", "a: repeated key"),
    ),
    Case("metadata before the image", entry("a.json", b"{}") + entry("a.cls", b"1") + entry("a.jpg") + END, "a"),
    Case("a sample without an image", entry("a.json", b"{}") + entry("b.jpg") + END, "b", ("a: no image",)),
    Case(
        "a shard without images",
        entry("a.json", b"{}") + entry("b.txt", b"x") + END,
        "",
        ("a: no image", "b: no image"),
    ),
    Case("several images a key", entry("a.png", B) + entry("a.jpg", A) + entry("a.webp", C) + END, "a"),
    Case("an image of 0 bytes", entry("a.jpg", b"") + entry("b.jpg") + END, "a b"),
]
