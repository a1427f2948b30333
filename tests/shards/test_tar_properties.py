"""What holds of any tar: whole ones give what others read in them, and no damage is silent."""

from __future__ import annotations

import io
import random
import tarfile

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shard_embedder.pipeline.core.schema import IMAGE
from shard_embedder.pipeline.shards.headers import BLOCK, is_header
from tests.shards.tar_bytes import FORMATS, MEMBERS, PIECES_OF_TARS, members, packed, read

SHORT_MEMBERS = st.lists(
    st.tuples(st.integers(0, 10**6).map(lambda i: f"{i}.jpg"), st.binary(min_size=1, max_size=1500)),
    min_size=1,
    max_size=6,
    unique_by=lambda member: member[0],
)


@settings(max_examples=150, deadline=None)
@given(MEMBERS, st.sampled_from(FORMATS[1:]))
def test_a_well_formed_tar_gives_what_tarfile_gives(listed: list[tuple[str, bytes]], format: int) -> None:
    data = packed(listed, format)
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        expected = [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]  # type: ignore[union-attr]
    found, fault = members(data)
    assert fault is None
    assert [(member.name, member.data) for member in found] == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-c/]{0,4}[a-c]\.(jpg|json|cls|seg\.png)", fullmatch=True), st.binary(max_size=60)
        ),
        max_size=12,
    )
)
def test_keys_and_bytes_are_webdatasets_on_well_formed_shards(
    tmp_path_factory: pytest.TempPathFactory, listed: list[tuple[str, bytes]]
) -> None:
    from webdataset.tariterators import base_plus_ext

    groups: list[tuple[str, dict[str, bytes]]] = []
    for name, data in listed:
        key, extension = base_plus_ext(name)
        if not groups or groups[-1][0] != key:
            groups.append((key, {}))
        assume(extension not in groups[-1][1])
        groups[-1][1][extension] = data
    assume(len({key for key, _ in groups}) == len(groups))
    path = tmp_path_factory.mktemp("shards") / "shard.tar"
    path.write_bytes(packed(listed))
    rows, parts = read(path)
    assert parts[-1]["end"] == "last"
    assert [row["image_id"] for row in rows] == [key for key, _ in groups]
    for row, (_, extensions) in zip(rows, groups, strict=True):
        assert row[IMAGE] == extensions.get("jpg", extensions.get("seg.png"))


def spans(data: bytes) -> list[tuple[str, int, int, int]]:
    """Name, first byte with all header extensions, end of data and end of padding of each member."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            end = info.offset_data + info.size
            found.append((info.name, info.offset, end, end + -info.size % BLOCK))
    return found


@settings(max_examples=200, deadline=None)
@given(SHORT_MEMBERS, st.sampled_from(FORMATS), st.data())
def test_a_cut_anywhere_is_found_and_costs_no_whole_member(
    listed: list[tuple[str, bytes]], format: int, data: st.DataObject
) -> None:
    whole = packed(listed, format)
    end = spans(whole)[-1][3]
    cut = data.draw(st.one_of(st.integers(0, len(whole) - 1), st.integers(end - 600, end + 1100)))
    found, fault = members(whole[:cut])
    kept = [(member.name, member.data) for member in found if member.data is not None]
    assert kept == [(name, dict(listed)[name]) for name, _, data_end, _ in spans(whole) if data_end <= cut]
    if fault is None:
        assert cut >= end + BLOCK
    # A member that was cut is named.
    cut_inside = [name for name, start, data_end, _ in spans(whole) if start + BLOCK <= cut < data_end]
    if format == tarfile.USTAR_FORMAT:
        assert [member.name for member in found if member.problem] == cut_inside


@settings(max_examples=200, deadline=None)
@given(SHORT_MEMBERS, st.sampled_from(FORMATS), st.data())
def test_one_wrong_byte_of_a_header_costs_that_member_alone_and_not_in_silence(
    listed: list[tuple[str, bytes]], format: int, data: st.DataObject
) -> None:
    whole = bytearray(packed(listed, format))
    position = data.draw(st.integers(0, len(listed) - 1))
    at = spans(bytes(whole))[position][1] + data.draw(st.integers(0, BLOCK - 1))
    # What looks like a damaged pax header may have held the next member's name.
    whole[at] = data.draw(st.integers(0, 255).filter(lambda value: value not in (whole[at], *b"xX")))
    found, fault = members(bytes(whole))
    got = [(member.name, member.data) for member in found]
    if fault is None:
        assert got == listed
    else:
        assert [member for member in got if member[0] != listed[position][0]] == listed[:position] + listed[
            position + 1 :
        ]


@settings(max_examples=200, deadline=None)
@given(SHORT_MEMBERS, st.data())
def test_garbage_over_any_range_costs_only_what_it_hits(listed: list[tuple[str, bytes]], data: st.DataObject) -> None:
    whole = packed(listed, tarfile.USTAR_FORMAT)
    start = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.one_of(st.integers(1, 40), st.integers(1, len(whole))))
    # With neither `x` nor `X`: a damaged pax header may have held the next member's name.
    garbage = random.Random(start * length).randbytes(length).translate(bytes.maketrans(b"xX", b"yY"))
    broken = whole[:start] + garbage + whole[start + length :]
    found, fault = members(broken)
    unhit = [
        (name, dict(listed)[name]) for name, first, end, _ in spans(whole) if end <= start or first >= start + length
    ]
    assert [member for member in ((member.name, member.data) for member in found) if member in unhit] == unhit
    hit = [first for _, first, _, _ in spans(whole) if first < start + length and start < first + BLOCK]
    # One in thousands has a right checksum by chance, and then it is a header.
    is_damaged = any(not is_header(broken[first : first + BLOCK]) for first in hit)
    if is_damaged and {member.name for member in found} != {name for name, _ in listed}:
        assert fault is not None


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=3000), st.lists(st.sampled_from(PIECES_OF_TARS), max_size=8).map(b"".join)))
def test_no_bytes_make_it_raise_anything_else_or_run_for_ever(data: bytes) -> None:
    found, fault = members(data)
    assert len(found) <= len(data) // BLOCK + 1
    assert fault is not None or data.endswith(bytes(BLOCK))
