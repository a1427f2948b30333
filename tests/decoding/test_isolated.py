"""A decoder in a process of its own: the same pixels, and an image that kills it is found."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL.PngImagePlugin import PngInfo

from pipeline.core.errors import SampleError
from pipeline.decoding.decoder import Decoder
from pipeline.decoding.isolated import IsolatedDecoder
from pipeline.decoding.preprocess import Preprocess
from pipeline.decoding.rules import DecodingRules
from tests.conftest import ROOT, encode, photo, write_tar

PREPROCESS = Preprocess(64, (56, 48), "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
RULES = DecodingRules(preprocess=PREPROCESS, max_pixels=10_000)
# Stands for a fault in a C library that one image meets: no file is known that crashes Pillow.
_FAULTY_PILLOW = """
import os, signal
from PIL import ImageFile
load = ImageFile.ImageFile.load
def faulty(image):
    if image.info.get("comment") == "deadly":
        os.kill(os.getpid(), signal.SIGSEGV)
    return load(image)
ImageFile.ImageFile.load = faulty
"""


@pytest.fixture
def faulty_pillow(tmp_path: Path) -> str:
    """Value of PYTHONPATH with which Python processes have a Pillow that one image kills."""
    (tmp_path / "faulty").mkdir()
    (tmp_path / "faulty" / "sitecustomize.py").write_text(_FAULTY_PILLOW)
    return f"{tmp_path / 'faulty'}{os.pathsep}{ROOT}"


def deadly(seed: int) -> bytes:
    text = PngInfo()
    text.add_text("comment", "deadly")
    return encode(photo(seed), "PNG", pnginfo=text)


def test_pixels_and_reasons_are_those_of_the_plain_decoder() -> None:
    plain, isolated = Decoder(RULES), IsolatedDecoder(RULES)
    for seed in range(3):
        data = encode(photo(seed))
        np.testing.assert_array_equal(isolated.decode(data), plain.decode(data))
    for broken in (b"", b"no image", encode(photo(0))[:300], encode(photo(0, (200, 200)))):
        with pytest.raises(SampleError) as expected:
            plain.decode(broken)
        with pytest.raises(SampleError) as found:
            isolated.decode(broken)
        assert str(found.value) == str(expected.value)


def test_an_image_that_kills_the_decoder_is_named_and_the_next_is_decoded(
    faulty_pillow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(faulty_pillow.split(os.pathsep, maxsplit=1)[0])
    decoder = IsolatedDecoder(RULES)
    before = decoder.decode(encode(photo(1)))
    with pytest.raises(SampleError, match="decoder crash: it died of the image 2 times: SIGSEGV"):
        decoder.decode(deadly(2))
    np.testing.assert_array_equal(decoder.decode(encode(photo(1))), before)


def test_a_decoder_that_is_killed_from_outside_is_started_again() -> None:
    decoder = IsolatedDecoder(RULES)
    before = decoder.decode(encode(photo(1)))
    assert decoder._child is not None
    decoder._child[0].kill()
    np.testing.assert_array_equal(decoder.decode(encode(photo(1))), before)


@pytest.mark.slow
def test_an_image_that_kills_its_worker_costs_a_job_one_row(
    run_job: Callable[..., Any], tmp_path: Path, faulty_pillow: str
) -> None:
    images = {f"k{i}": encode(photo(i)) for i in range(6)}
    for shard in ("a", "b"):
        write_tar(tmp_path / "in" / f"{shard}.tar", [(f"{key}.jpg", data) for key, data in images.items()])
    with_deadly = {**images, "k3": deadly(3)}
    write_tar(tmp_path / "in" / "c.tar", [(f"{key}.jpg", data) for key, data in with_deadly.items()])
    small = ("--backbone", "squeezenet1_1", "--weights", "random:3", "--image-size", "64", "--device", "cpu")
    job = ("embed.py", "--input", "in", "--output", "out", *small, "--precision", "fp32", "--part-rows", "2")
    done = run_job(*job, PYTHONPATH=faulty_pillow)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "balanced: every sample is one stored row" in done.stdout
    errors = [row for path in (tmp_path / "out" / "errors").iterdir() for row in pq.read_table(path).to_pylist()]
    (row,) = errors
    assert (row["shard"], row["image_id"], row["stage"]) == ("c", "k3", "decode")
    assert row["reason"] == "decoder crash: it died of the image 2 times: SIGSEGV"
    vectors: dict[str, dict[str, list[float]]] = {"a": {}, "b": {}, "c": {}}
    for path in (tmp_path / "out" / "embeddings").iterdir():
        for row in pq.read_table(path).to_pylist():
            vectors[row["shard"]][row["image_id"]] = row["embedding"]
    assert vectors["a"] == vectors["b"]
    assert vectors["c"] == {key: value for key, value in vectors["a"].items() if key != "k3"}
