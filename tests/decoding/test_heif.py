"""HEIC images: decoded as Pillow decodes them with pillow-heif, and told of where that is missing."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.decoding import child
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.resize import resize_crop
from shard_embedder.pipeline.decoding.rules import DecodingRules
from tests.conftest import ROOT, child_pid, encode, photo
from tests.decoding.images import SMALL, part
from tests.peaks import peak_memory_mib

pillow_heif = pytest.importorskip("pillow_heif", reason="the extra `heif` is not installed")
RULES = DecodingRules(preprocess=SMALL, max_pixels=Config.max_pixels)


def heic(image: Image.Image, **options: Any) -> bytes:
    pillow_heif.register_heif_opener()
    return encode(image, "HEIF", **options)


def deep(size: tuple[int, int]) -> bytes:
    """Ten bits a channel."""
    pixels = np.asarray(photo(1, size)).astype(np.uint16) * 257
    buffer = io.BytesIO()
    pillow_heif.from_bytes(mode="RGB;16", size=size, data=pixels.tobytes()).save(buffer, quality=80)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return heic(photo(1, (96, 64)), exif=exif.tobytes())


FILES = {
    "plain": lambda: heic(photo(1, (96, 64))),
    "in tiles": lambda: heic(photo(1, (300, 200)), tile_size=128),
    "grey": lambda: heic(photo(1).convert("L")),
    "alpha": lambda: heic(photo(1).convert("RGBA")),
    "ten bits": lambda: deep((96, 64)),
    "several": lambda: heic(photo(1), save_all=True, append_images=[photo(2)]),
    **{f"orientation {number}": lambda number=number: turned(number) for number in range(2, 9)},
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pillow_with_pillow_heif(name: str) -> None:
    file = FILES[name]()
    with Image.open(io.BytesIO(file)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    np.testing.assert_array_equal(Decoder(RULES).decode(file), resize_crop(np.asarray(expected), SMALL))
    assert Decoder(RULES).upright_size(file) == expected.size


def reason_of(file: bytes, **rules: Any) -> str:
    with pytest.raises(SampleError) as raised:
        Decoder(replace(RULES, **rules)).decode(file)
    return str(raised.value)


@pytest.fixture(scope="module")
def large() -> bytes:
    return heic(photo(1, (2000, 2000)).convert("RGBA"), quality=10)


@pytest.mark.slow
def test_the_number_of_pixels_is_looked_at_before_they_are_decoded(large: bytes) -> None:
    child.end()
    Decoder(RULES).decode(encode(photo(1), "PNG"))
    before = peak_memory_mib(child_pid())
    assert reason_of(large, max_pixels=3_999_999) == "too many pixels: 2000x2000, the limit is 3999999"
    assert peak_memory_mib(child_pid()) - before < 4


@pytest.mark.slow
def test_memory_grows_with_pixels_as_the_rules_say(large: bytes) -> None:
    child.end()
    Decoder(RULES).decode(encode(photo(1), "PNG"))
    before = peak_memory_mib(child_pid())
    Decoder(RULES).decode(large)
    # 20 bytes a pixel, and 28 MiB.
    assert peak_memory_mib(child_pid()) - before < 20 * 4e6 / 2**20 + 28


@pytest.mark.parametrize("options", [{}, {"tile_size": 128}], ids=["whole", "in tiles"])
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_file_that_is_cut_is_an_error(options: dict[str, int], share: float) -> None:
    file = heic(photo(1, (300, 200)), **options)
    cut = file[: int(share * len(file))]
    assert reason_of(cut).startswith(("damaged image: its data ends before its last row", "broken image: "))
    # What stands after the picture is none of it.
    Decoder(RULES).decode(file + b"trailer of a phone")


def test_a_cut_file_is_embedded_where_damage_is_accepted() -> None:
    file = heic(photo(1, (300, 200)), tile_size=128)
    assert Decoder(replace(RULES, accept_damaged=True)).decode(file[:-100]).any()


def test_a_broken_one_is_called_so_and_faults_of_its_exif_cost_no_image() -> None:
    assert reason_of(b"\0\0\0\x18ftypheic" + bytes(100)) == "broken image: the HEIC header cannot be read"
    file = turned(6)
    broken = file.replace(b"MM\0*", b"MM\xff\xff").replace(b"II*\0", b"II\xff\xff")
    assert broken != file
    np.testing.assert_array_equal(Decoder(RULES).decode(broken), Decoder(RULES).decode(file))


def test_a_driver_without_pillow_heif_has_every_node_say_so() -> None:
    rules = replace(RULES, heif=False)
    assert reason_of(heic(photo(1)), heif=False) == "needs pillow-heif: pip install 'pillow-heif>=1.8.1'"
    (decoded,) = Decoder(rules)(part([heic(photo(1)), encode(photo(1))]))
    reasons = [row["reason"] for row in decoded["samples"].to_pylist()[0]]
    assert reasons == ["needs pillow-heif: pip install 'pillow-heif>=1.8.1'", None]


_WITHOUT = """
import importlib.metadata, sys
version = importlib.metadata.version
def without(name):
    if name == "pillow-heif":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = without
"""
_NODE = """
import pickle
from shard_embedder.pipeline.core.errors import ClusterError
from tests.decoding.images import part
decoder = pickle.loads(sys.stdin.buffer.read())
try:
    next(decoder(part([b"x"])))
except ClusterError as error:
    print(error)
"""
_JOB = """
from shard_embedder.jobs import pack
from shard_embedder.pipeline.core.errors import InputError
from shard_embedder import embed
settings = {"backbone": "squeezenet1_1", "weights": "random:0", "image_size": "64", "precision": "fp32"}
pack.main(["phone", "shards"])
for inputs, output in (("shards", "a"), ("both", "b")):
    run = embed(inputs, output, **settings)
    print(run.num_embedded, run.errors_by_reason, *run.report["warnings"])
try:
    embed("phone", "c", **settings)
except InputError as error:
    print(error)
"""


def run_without(script: str, folder: Path, **options: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT + f"sys.path.insert(0, {str(ROOT)!r})\n" + script],
        cwd=folder, check=True, stdout=subprocess.PIPE, **options,
    )  # fmt: skip
    return done.stdout.decode()


def test_a_node_without_pillow_heif_refuses_a_job_whose_driver_has_it(tmp_path: Path) -> None:
    said = run_without(_NODE, tmp_path, input=pickle.dumps(Decoder(RULES)))
    assert said.startswith(
        "pillow-heif must be at least 1.8.1 on every node, as the job's driver has it, got none on "
    )


@pytest.mark.slow
def test_without_pillow_heif_its_images_are_counted_with_what_to_install(tmp_path: Path) -> None:
    for name in ("phone/a.heic", "phone/b.HEIC", "both/a.heic", "both/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(photo(1)) if name.endswith("jpg") else heic(photo(1)))
    said = run_without(_JOB, tmp_path)
    install = "pip install 'pillow-heif>=1.8.1'"
    assert f"HEIC   2 images of these, for which the job needs pillow-heif: {install}\n" in said
    assert "0 {'needs pillow-heif': 2} 2 images of this run are HEIC and stored as errors" in said
    assert f"1 {{}} 1 HEIC image of {tmp_path}/both left out: they need pillow-heif. {install} and run" in said
    assert f"must hold images that can be decoded, got '{tmp_path}/phone': 2 HEIC images of" in said
