"""Tars made to cost much: time grows with their size alone, and memory does not grow."""

from __future__ import annotations

import cProfile
import random
import tracemalloc
from collections.abc import Iterator

import pytest

from shard_embedder.pipeline.core.errors import ShardError
from shard_embedder.pipeline.shards.headers import BLOCK
from shard_embedder.pipeline.shards.tars import WINDOW_BYTES, iter_members
from tests.shards.tar_bytes import ALL, GARBAGE, PIECES_OF_TARS, WHOLE, Bytes, entry, header, members, with_checksum

# What a shard may cost, whatever it holds. No clock decides, but what is read, and how often a function is called.
READS_OF_EACH_BYTE = 12
CALLS_A_BLOCK, CALLS_AT_LEAST = 1000, 5_000
HELD_BYTES = 5 * 2**20


def check_bounds(stream: Bytes, walk: Iterator[object], held_bytes: int = HELD_BYTES) -> None:
    """Walk a tar of any bytes, and hold what that costs against the bounds. What is yielded is not kept."""
    profile = cProfile.Profile()
    tracemalloc.start()
    profile.enable()
    try:
        for _ in walk:
            pass
    except ShardError:
        pass
    finally:
        profile.disable()
        _, held = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    calls = sum(entry.callcount for entry in profile.getstats())
    assert stream.read_bytes <= READS_OF_EACH_BYTE * stream.num_bytes + 2**16
    assert stream.furthest_back <= WINDOW_BYTES + 2**18
    assert calls <= CALLS_A_BLOCK * (stream.num_bytes // BLOCK + 1) + CALLS_AT_LEAST
    assert held <= held_bytes


def check_cost(data: bytes) -> None:
    stream = Bytes(data)
    check_bounds(stream, iter_members(stream, lambda name: True, ALL))


def sparse_header(more: int) -> bytes:
    """An old GNU sparse header, whose map goes on in the next block: which is another one."""
    block = bytearray(header(b"a.jpg", 0, b"S"))
    block[257:265], block[482], block[504] = b"ustar  \0", more, more
    return with_checksum(block)


NEAR = (b"ustar\0" + b"0" * 10) * 32
BOMBS = {
    "sparse maps that go on in each other": sparse_header(1),
    "pax headers that hold each other": header(b"p", 2**20 - 1, b"x"),
    "pax headers that hold each other and have a good begin": header(b"p", 2**20 - 1, b"x") + b"30 a=" + b"b" * 507,
    "long names that hold each other": header(b"n", 2**20 - 1, b"L"),
    "pax headers without an end": header(b"p", 512, b"x") + b"99 path=x\n".ljust(512, b"x"),
    "members whose size is a lie": header(b"a.jpg", 2**33 - 1),
    "garbage between headers": header(b"a.jpg", 0) + GARBAGE[:BLOCK],
    "what looks like headers": NEAR,
    "what looks like headers, and a header": NEAR + header(b"a.jpg", 0),
    "long names and no member": entry("x", b"n" * 900, b"L"),
    "empty members": header(b"a.jpg", 0),
    "tiny pax records": header(b"p", 2**16, b"x") + b"5 a=\n" * 10922 + bytes(4),
    "zeros": bytes(BLOCK),
    "zeros and a header": bytes(3 * BLOCK) + header(b"a.jpg", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("tail", [b"", b"\1" * 2**20], ids=["alone", "before garbage"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_shard_costs_time_by_its_size_and_constant_memory(bomb: str, tail: bytes) -> None:
    check_cost(BOMBS[bomb] * (2**19 // len(BOMBS[bomb])) + tail)


def test_nothing_of_each_damage_is_kept() -> None:
    data = header(b"p", 2**20 - 1, b"x") * (24 * 2**20 // BLOCK) + b"\1" * 2**20
    tracemalloc.start()
    try:
        with pytest.raises(
            ShardError, match=r"damaged: the pax header at byte 0 is malformed; more damage after it$"
        ):
            list(iter_members(Bytes(data), lambda name: True, ALL))
        assert tracemalloc.get_traced_memory()[1] <= HELD_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("seed", range(40))
def test_a_fuzzed_shard_costs_time_by_its_size_and_constant_memory(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [*PIECES_OF_TARS, *BOMBS.values(), WHOLE]
    data = bytearray()
    while len(data) < 2**16:
        data += rng.choice(pieces) * rng.choice((1, 1, 2, 5, 50))
    for _ in range(rng.choice((0, 1, 10, 100))):
        at = rng.randrange(len(data))
        change = rng.choice(("flip", "cut", "insert", "size"))
        if change == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif change == "cut":
            del data[at : at + rng.randrange(2000)]
        elif change == "insert":
            data[at:at] = rng.randbytes(rng.randrange(2000))
        else:
            at = at // BLOCK * BLOCK
            block = bytearray(data[at : at + BLOCK].ljust(BLOCK, b"\0"))
            block[124:136] = b"%011o\0" % rng.choice((0, 511, 2**16, 2**20, 2**24))
            data[at : at + BLOCK] = with_checksum(block)
    check_cost(bytes(data[: 2**18]))


def test_a_hostile_file_of_many_near_headers_takes_no_long_time() -> None:
    near = (b"ustar\0" + b"0" * 10) * 2**16
    found, fault = members(GARBAGE + near)
    assert (found, fault is None) == ([], False)
