"""JPEGs decoded at a fraction of their size: which, to which pixels, and what stays as it is."""

from __future__ import annotations

import io
import json
import random
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.decoding import child, jpeg
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.preprocess import SQUASH, Preprocess
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.decoding.scaled import eighths_for
from shard_embedder.pipeline.embedding.queries import QueryEmbedder
from shard_embedder.pipeline.output.fingerprint import read_fingerprint
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.verify.proof import verify
from shard_embedder.pipeline.verify.recompute import Recompute
from tests.conftest import Done, encode, photo, write_tar
from tests.decoding.images import FUZZ_SEED, mutate, with_orientation
from tests.outputs import embed

SMALL = Preprocess(20, (16, 16), "bilinear", (0.5,) * 3, (0.5,) * 3)
RULES = DecodingRules(preprocess=SMALL, max_pixels=4_000_000, scaled=True)
EXACT = Decoder(replace(RULES, scaled=False))


def ramp(width: int, height: int) -> Image.Image:
    """Colours that rise evenly along either side, so that the smallest shift of a crop shows in all of its pixels."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).round().astype(np.uint8))


def eighths(data: bytes, rules: DecodingRules = RULES) -> int:
    header = jpeg.read_header(data)
    assert header is not None
    return eighths_for(header, rules)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((99, 150), 8), ((100, 150), 4), ((150, 100), 4), ((199, 300), 4), ((200, 300), 2), ((399, 400), 2),
        ((400, 2000), 1), ((4000, 4000), 1), ((2000, 24), 8),
    ],
)  # fmt: skip
def test_the_smallest_size_that_is_two_and_a_half_times_what_the_resize_needs(
    size: tuple[int, int], expected: int
) -> None:
    assert eighths(encode(photo(1, size))) == expected
    assert eighths(encode(photo(1, size)), EXACT.rules) == 8


def test_each_side_counts_where_the_image_is_squashed_and_that_of_the_turned_image() -> None:
    # To 60 x 16: 150 and 40 pixels are needed.
    squash = replace(RULES, preprocess=replace(SMALL, resize=60, crop=(16, 60), mode=SQUASH))
    assert [eighths(encode(photo(1, size)), squash) for size in ((300, 80), (300, 79), (80, 300))] == [4, 8, 8]
    turned = with_orientation(photo(1, (80, 300)), 6, "JPEG")
    assert eighths(turned, squash) == 4
    assert eighths(turned, replace(squash, ignore_orientation=True)) == 8


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(401, 403), (408, 300), (129, 111)])
def test_the_scaled_pixels_are_those_of_pillows_draft(
    size: tuple[int, int], subsampling: int, progressive: bool
) -> None:
    data = encode(photo(2, size), quality=90, subsampling=subsampling, progressive=progressive)
    header = jpeg.read_header(data)
    assert header is not None
    for scale in (1, 2, 4):
        image = Image.open(io.BytesIO(data))
        # It never scales below what is asked for; a fraction of a pixel more, and it would not scale at all.
        image.draft("RGB", (size[0] * scale // 8, size[1] * scale // 8))
        decoded = jpeg.decode(data, header, scale)
        assert decoded is not None
        np.testing.assert_array_equal(decoded, np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(401, 401), (407, 513), (209, 300), (161, 323), (160, 800)])
def test_the_crop_is_that_of_the_exact_decoder(size: tuple[int, int], orientation: int) -> None:
    data = with_orientation(ramp(*size), orientation, "JPEG", quality=95)
    assert eighths(data) < 8
    for ignore in (False, True):
        rules = replace(RULES, ignore_orientation=ignore)
        found = Decoder(rules).decode(data).astype(int)
        difference = found - Decoder(replace(rules, scaled=False)).decode(data)
        # A pixel of the crop is 13 to 16 levels; half of a decoded one would be 3 or more.
        assert np.abs(difference.mean((0, 1))).max() < 0.5
        assert np.abs(difference).max() <= 4


def test_other_images_are_decoded_exactly() -> None:
    large = photo(3, (400, 500))
    others = [encode(large, "PNG"), encode(large, "WEBP"), encode(large.convert("CMYK")), encode(photo(3, (90, 90)))]
    for data in others:
        np.testing.assert_array_equal(Decoder(RULES).decode(data), EXACT.decode(data))
    assert not np.array_equal(Decoder(RULES).decode(encode(large)), EXACT.decode(encode(large)))


def test_a_jpeg_that_goes_to_the_child_is_scaled_there() -> None:
    data = encode(photo(4, (403, 500)))
    found, _ = child.decode(data, RULES)
    np.testing.assert_array_equal(found, Decoder(RULES).decode(data))
    # Too much metadata for the process itself.
    laden = data[:2] + b"\xff\xe1\xff\xffExif\0\0" + bytes(65527) + data[2:]
    laden = laden[:2] + laden[2:65539] * 5 + laden[65539:]
    assert Decoder(RULES).plain_jpeg(laden) is None
    np.testing.assert_array_equal(Decoder(RULES).decode(laden), found)


def test_limits_and_damage_are_judged_as_without_it() -> None:
    data = encode(photo(5, (400, 400)), quality=90)
    halves = data[: len(data) // 2]
    for rules, file, reason in (
        (replace(RULES, max_pixels=150_000), data, "too many pixels: 400x400, the limit is 150000"),
        (RULES, halves, "broken image: OSError: image file is truncated"),
        (RULES, halves + b"\xff\xd9", "damaged image: premature end of data segment; --accept-damaged embeds it"),
    ):
        for scaled in (True, False):
            with pytest.raises(SampleError) as caught:
                Decoder(replace(rules, scaled=scaled)).decode(file)
            assert str(caught.value).startswith(reason)


def test_libjpeg_finds_the_same_faults_at_every_size() -> None:
    rng = random.Random(FUZZ_SEED)
    files = [
        encode(photo(6, (200, 230)), quality=80, progressive=progressive, subsampling=subsampling)
        for progressive in (False, True)
        for subsampling in (0, 2)
    ]
    num_whole = num_faulty = 0
    for number in range(2000):
        data = mutate(files[number % 4], files[number % 3], rng)
        header = Decoder(RULES).plain_jpeg(data)
        if header is None:
            continue
        found = {scale: jpeg.decode(data, header, scale) is not None for scale in (1, 2, 4, 8)}
        assert len(set(found.values())) == 1, (number, found)
        num_whole += found[8]
        num_faulty += not found[8]
    sys.stdout.write(f"{num_whole} whole, {num_faulty} faulty")
    assert min(num_whole, num_faulty) > 100


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Large photos, and their output with `decode` scaled."""
    folder = tmp_path_factory.mktemp("scaled")
    members = [(f"{number}.jpg", encode(photo(number, (401, 500)))) for number in range(4)]
    write_tar(folder / "in" / "shard.tar", members)
    embed(folder / "in", folder / "out", decode="scaled")
    return folder / "in", folder / "out"


def test_such_an_output_is_verified_and_queried_by_the_same_pixels(output: tuple[Path, Path], tmp_path: Path) -> None:
    shards, out = output
    verdict = verify(str(out), [str(shards)], Recompute(None, required=True))
    assert (verdict.findings, verdict.recomputed) == ([], 4)
    assert verdict.lowest_cosine is not None
    assert verdict.lowest_cosine > 0.999999
    with tarfile.open(shards / "shard.tar") as tar:
        (tmp_path / "query.jpg").write_bytes(tar.extractfile("0.jpg").read())  # type: ignore[union-attr]
    made = read_fingerprint(str(out))
    assert made is not None
    table = pq.read_table(sorted((out / "embeddings").glob("*.parquet"))[0])
    stored = vectors(table)[table["image_id"].to_pylist().index("0")]

    def query(settings: Any) -> Any:
        (found,) = QueryEmbedder(replace(made, settings=settings), device="cpu")([tmp_path / "query.jpg"])
        return found.embedding

    np.testing.assert_allclose(query(made.settings), stored, rtol=0, atol=1e-5)
    assert np.abs(query(replace(made.settings, decode="cpu")) - stored).max() > 1e-3


def test_it_is_a_setting_of_the_output(output: tuple[Path, Path], run_job: Callable[..., Done]) -> None:
    shards, out = output
    assert json.loads((out / "run.json").read_text())["settings"]["decode"] == "scaled"
    options = ["--backbone", "squeezenet1_1", "--weights", "random:0", "--image-size", 64, "--precision", "fp32"]
    options += ["--part-rows", 3, "--input", shards, "--output", out, "--dry-run"]
    assert run_job("embed.py", *options, "--decode", "scaled").returncode == 0
    refused = run_job("embed.py", *options)
    assert refused.returncode == 2
    assert 'decode: output "scaled", this run "cpu"' in refused.stderr
