"""Header blocks and pax records: what they say is what the standard library, or a plain parser, reads in them."""

from __future__ import annotations

import tarfile

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shard_embedder.pipeline.shards.headers import BLOCK, parse_header, read_pax
from tests.shards.tar_bytes import FORMATS, Bytes, pax, with_checksum


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.binary(min_size=1, max_size=160).filter(lambda name: b"\0" not in name),
    st.integers(0, 2**34),
    st.sampled_from([b"0", b"\0", b"x", b"g", b"L", b"K", b"5", b"7", b"S", b"1", b"M"]),
    st.lists(st.tuples(st.integers(0, BLOCK - 1), st.integers(0, 255)), max_size=3),
    st.booleans(),
)
def test_a_header_says_what_the_standard_library_reads_in_it(
    format: int, name: bytes, size: int, kind: bytes, changes: list[tuple[int, int]], has_checksum: bool
) -> None:
    info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
    info.size, info.type, info.mtime = size, kind, size % 2**33
    try:
        block = bytearray(info.tobuf(format, errors="surrogateescape")[-BLOCK:])
    except ValueError:
        assume(False)
    for at, value in changes:
        block[at] = value
    if has_checksum:
        block[:] = with_checksum(block)
    try:
        expected = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        with pytest.raises((tarfile.HeaderError, ValueError)):
            parse_header(bytes(block))
        return
    found = parse_header(bytes(block))
    assert (found.size, found.type, found.is_folder) == (expected.size, expected.type, expected.isdir())
    if not block.startswith(b"ustar  \0", 257):
        assert found.name == expected.name


RECORDS = st.lists(
    st.tuples(
        st.sampled_from(["path", "size", "mtime", "comment", "GNU.sparse.name", "GNU.sparse.major", "é"]),
        st.one_of(st.text(max_size=20), st.integers(0, 9000).map("v".__mul__)),
    ),
    max_size=6,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(RECORDS, st.integers(0, 2000), st.data())
def test_pax_records_are_those_of_a_plain_parser_however_they_are_cut_into_pieces(
    listed: list[tuple[str, str]], num_zeros: int, data: st.DataObject
) -> None:
    records = b"".join(pax({key: value})[BLOCK:].rstrip(b"\0") for key, value in listed) + bytes(num_zeros)
    # A value that ends in zeros is not told apart from the end of a header block here.
    assume(not any(value.endswith("\0") for _, value in listed))
    expected = dict(listed)
    found = read_pax(Bytes(records + b"more"), len(records), piece_bytes=1024)
    assert (found.path, found.size) == (expected.get("path"), expected.get("size"))
    assert found.sparse_name == expected.get("GNU.sparse.name")
    assert found.is_sparse == any(key.startswith("GNU.sparse.") for key in expected)
    if records:
        at = data.draw(st.integers(0, len(records) - 1))
        changed = records[:at] + b"\0" + records[at:]
        for piece_bytes in (1024, 2**16):
            try:
                read_pax(Bytes(changed), len(changed), piece_bytes)
            except ValueError:
                continue
