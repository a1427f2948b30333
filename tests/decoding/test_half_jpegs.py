"""JPEGs of every kind, cut anywhere: half a picture is an error, and a whole one is not."""

from __future__ import annotations

import random

import pytest

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.rules import DecodingRules
from tests.conftest import encode, photo
from tests.decoding.images import SMALL

DECODER = Decoder(DecodingRules(preprocess=SMALL, max_pixels=4_000_000))
SCAN, END = b"\xff\xda", b"\xff\xd9"


def any_jpeg(seed: int) -> bytes:
    """CMYK of a reduced sampling is a kind that libjpeg-turbo's own interface does not know."""
    rng = random.Random(seed)
    restarts = {"restart_marker_blocks": rng.choice((1, 10, 50))} if rng.random() < 0.4 else {}
    return encode(
        photo(seed, (rng.randrange(60, 300), rng.randrange(60, 300))).convert(rng.choice(("RGB", "L", "CMYK"))),
        progressive=rng.random() < 0.4,
        subsampling=rng.choice((0, 1, 2)),
        quality=rng.choice((30, 75, 95)),
        **restarts,
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_jpeg_that_is_cut_anywhere_is_an_error_whatever_comes_after_the_cut(seed: int) -> None:
    file = any_jpeg(seed)
    start = file.index(SCAN) + 14
    at = start + int((len(file) - start) * random.Random(seed).uniform(0.05, 0.9))
    rest = len(file) - at - len(END)
    for filler in (b"", bytes(rest), b"\x55" * rest, bytes(100), b"\xff" * 100):
        with pytest.raises(SampleError, match=r"^(damaged|broken) image: "):
            DECODER.decode(file[:at] + filler + END)


@pytest.mark.parametrize("seed", range(20))
def test_a_whole_jpeg_is_embedded_whatever_comes_after_its_picture(seed: int) -> None:
    file = any_jpeg(seed)[: -len(END)]
    for filler in (b"", bytes(100), bytes(9000), b"\xff" * 100, b"\x33" * 100, b"abc"):
        assert DECODER.decode(file + filler + END).shape == (32, 32, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_progressive_jpeg_without_one_of_its_scans_is_an_error(mode: str) -> None:
    file = encode(photo(1, (200, 160)).convert(mode), progressive=True)
    # A scan begins with its tables.
    scans = [piece.rpartition(b"\xff\xc4")[0] or piece for piece in file.split(SCAN)]
    for number in range(2, len(scans)):
        cut = file[: file.index(scans[number]) - len(SCAN)] + END
        with pytest.raises(SampleError, match=r"^damaged image: its later scans are missing; "):
            DECODER.decode(cut)
    assert len(scans) > 5
    assert DECODER.decode(file).shape == (32, 32, 3)
