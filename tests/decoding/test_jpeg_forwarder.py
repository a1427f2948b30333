"""Which JPEGs a device may decode, told by their markers and headers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from PIL import Image

from shard_embedder.pipeline.core.errors import SampleError, SettingsError
from shard_embedder.pipeline.core.schema import (
    ENCODED,
    IMAGE,
    REASON,
    STAGE,
    image_field,
    part_row,
    part_rows,
    sample_type,
)
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.jpeg_forwarder import (
    MAX_DEVICE_PIXELS,
    PIXELS_ALREADY,
    JpegForwarder,
    is_whole,
    require_device_decoding,
)
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.decoding.rules import DecodingRules
from tests.conftest import encode, photo
from tests.decoding.images import SMALL, every_format, with_orientation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

VALUES: dict[str, Any] = dict.fromkeys(("num_bytes", "part", "first_index", "num_samples"), 0)
VALUES |= dict.fromkeys(("name", "url", "version", "end", "fault"), "")
VALUES |= {"fault_transient": False, "ignored_members": 0, "kept_nulls": 0, "kept": [], "read_bytes": 0}
VALUES |= {"unused_images": 0, "unused_example": None, "apart_samples": 0, "batch_size": 0}
VALUES |= {"device_refused": 0, "device_refusal": None}
VALUES |= {f"{stage}_s": 0.0 for stage in ("read", "decode", "embed", "write")}


def decoder(max_pixels: int = 4_000_000, ignore_orientation: bool = False) -> Decoder:
    return Decoder(DecodingRules(preprocess=SMALL, max_pixels=max_pixels, ignore_orientation=ignore_orientation))


def jpegs() -> dict[str, bytes]:
    """What encoders write of grey and YCbCr."""
    image = photo(1)
    return {
        "baseline": encode(image, quality=90),
        "progressive": encode(image, progressive=True),
        "grey": encode(image.convert("L")),
        "grey progressive": encode(image.convert("L"), progressive=True),
        "4:4:4": encode(image, subsampling=0),
        "4:2:2": encode(image, subsampling=1),
        "optimised": encode(image, optimize=True),
        "restarts": encode(image, restart_marker_rows=1),
        "EXIF": with_orientation(image, 6, "JPEG"),
        "profile": encode(image, icc_profile=bytes(range(256)) * 300),
        "a comment that looks like the end": encode(image, comment=b"\xff\xd9 \xff\xda"),
    }


def segment(data: bytes, kind: int) -> int:
    """Where a segment of a kind begins."""
    return data.index(bytes((0xFF, kind)))


def test_what_encoders_write_is_whole() -> None:
    assert {name: is_whole(data) for name, data in jpegs().items()} == dict.fromkeys(jpegs(), True)


@pytest.mark.parametrize("name", ["baseline", "progressive", "restarts", "EXIF"])
def test_no_cut_leaves_a_whole_jpeg(name: str) -> None:
    data = jpegs()[name]
    assert not any(is_whole(data[:end]) for end in range(len(data)))
    # As a download that broke off over a file that was there.
    assert not is_whole(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def test_nothing_else_is_whole() -> None:
    for name, data in every_format().items():
        assert is_whole(data) == (name in ("jpeg", "jpeg progressive", "jpeg grey", "jpeg exif")), name
    data = jpegs()["baseline"]
    frame = segment(data, 0xC0)
    others = {
        "bytes behind it": data + b"\0",
        "two of them": data + data,
        "12 bits": data[: frame + 4] + b"\x0c" + data[frame + 5 :],
        "arithmetic codes": data[: frame + 1] + b"\xc9" + data[frame + 2 :],
        "RGB": encode(photo(1), keep_rgb=True),
        "RGB, as Adobe says it": data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0" + data[2:],
        "two frames": data[:frame] + data[frame : frame + 19] + data[frame:],
        "no frame": data[:frame] + data[frame + 19 :],
        "a gap between segments": data[:frame] + b"\0" + data[frame:],
        "nothing": b"",
        "its first marker": b"\xff\xd8",
        "no image": b"\xff\xd8\xff\xd9",
    }
    assert {name: is_whole(other) for name, other in others.items()} == dict.fromkeys(others, False)


def test_plain_jpegs_are_forwarded_as_they_are_but_for_their_metadata() -> None:
    for name, data in jpegs().items():
        height, width = 80, 96
        found = JpegForwarder(decoder()).forward(data)
        plain = found.pop("data")
        assert found == {"height": height, "width": width, "orientation": 6 if name == "EXIF" else 1}, name
        # What a decoder applies by itself is not there: it would turn the picture twice.
        assert b"Exif" not in plain
        assert is_whole(plain)
        assert np.array_equal(simplejpeg.decode_jpeg(plain), simplejpeg.decode_jpeg(data))
        assert (plain == data) == (name not in ("EXIF", "profile", "a comment that looks like the end"))
    unturned = JpegForwarder(decoder(ignore_orientation=True)).forward(jpegs()["EXIF"])
    assert unturned["orientation"] == 1


@pytest.mark.parametrize("name", ["png", "jpeg cmyk", "mpo", "png 16-bit grey", "webp", "tiff jpeg", "avif exif"])
def test_everything_else_is_pixels_as_the_decoder_makes_them(name: str) -> None:
    data = every_format()[name]
    value = JpegForwarder(decoder()).forward(data)
    assert (value["height"], value["width"], value["orientation"]) == (*SMALL.crop, PIXELS_ALREADY)
    assert value["data"] == decoder().decode(data).tobytes()


def test_a_jpeg_too_large_for_a_device_is_decoded_on_the_cpu() -> None:
    side = int(MAX_DEVICE_PIXELS**0.5) + 8
    data = encode(Image.new("L", (side, side), 90))
    assert is_whole(data)
    assert JpegForwarder(decoder(side * side)).forward(data)["orientation"] == PIXELS_ALREADY


def test_what_the_header_refuses_has_the_reason_of_the_decoder() -> None:
    scans = jpegs()["grey progressive"]
    first = segment(scans, 0xDA)
    bomb = scans[:first] + scans[first:-2] * 3000 + scans[-2:]
    cases = {
        "too many pixels: 96x80": (encode(photo(0)), 7000),
        "too many scans": (bomb, 80 * 96),
        "broken image": (encode(photo(0))[:1500], 4_000_000),
        "not an image": (b"\xff\xd8 no image", 4_000_000),
        "empty": (b"", 4_000_000),
    }
    for told, (data, max_pixels) in cases.items():
        with pytest.raises(SampleError) as expected:
            decoder(max_pixels).decode(data)
        with pytest.raises(SampleError) as found:
            JpegForwarder(decoder(max_pixels)).forward(data)
        assert str(found.value) == str(expected.value)
        assert str(found.value).startswith(told)
    assert is_whole(bomb)


def test_a_part_keeps_its_rows_and_the_reasons_that_it_has() -> None:
    images = [jpegs()["EXIF"], b"no image", None, every_format()["png"]]
    kind = sample_type(image_field(), ())
    rows = [{"sample_index": i, "image_id": str(i), IMAGE: image} for i, image in enumerate(images)]
    rows[2] |= {STAGE: "read", REASON: "no image: for the test"}
    (table,) = JpegForwarder(decoder())(part_row(VALUES, pa.array(rows, kind)))
    ((told, samples),) = part_rows(table)
    assert told["decode_s"] > 0.0
    assert samples.field("image_id").to_pylist() == ["0", "1", "2", "3"]
    assert samples.field(STAGE).to_pylist() == [None, "decode", "read", None]
    assert samples.field(REASON).to_pylist()[1:3] == [
        "not an image of a known format: text",
        "no image: for the test",
    ]
    found = samples.field(ENCODED).to_pylist()
    assert [value and value["orientation"] for value in found] == [6, None, None, PIXELS_ALREADY]
    np.testing.assert_array_equal(
        np.frombuffer(found[3]["data"], np.uint8).reshape(*SMALL.crop, 3), decoder().decode(images[3] or b"")
    )


def test_a_share_of_the_samples_goes_to_the_device_by_their_index_alone() -> None:
    image, kind = jpegs()["baseline"], sample_type(image_field(), ())

    def forwarded(share: float, first: int, count: int) -> list[bool]:
        rows = [{"sample_index": first + i, "image_id": str(i), IMAGE: image} for i in range(count)]
        (table,) = JpegForwarder(decoder(), share)(part_row(VALUES, pa.array(rows, kind)))
        ((_, samples),) = part_rows(table)
        assert samples.field(REASON).null_count == count
        return [value["orientation"] != PIXELS_ALREADY for value in samples.field(ENCODED).to_pylist()]

    assert forwarded(1.0, 0, 20) == [True] * 20
    for share in (0.5, 0.25, 0.07, 0.99):
        whole = forwarded(share, 0, 100)
        assert sum(whole) == round(100 * share)
        # Whatever parts they come in, and spread over them.
        assert forwarded(share, 0, 37) + forwarded(share, 37, 63) == whole
        assert all(abs(sum(whole[at : at + 20]) - 20 * share) <= 1 for at in range(80))
    # What the CPU decodes is what it decodes without a device.
    rows = [{"sample_index": 0, "image_id": "0", IMAGE: image}]
    (table,) = JpegForwarder(decoder(), 0.01)(part_row(VALUES, pa.array(rows, kind)))
    ((_, samples),) = part_rows(table)
    assert samples.field(ENCODED)[0].as_py()["data"] == decoder().decode(image).tobytes()


def test_weights_that_resize_in_another_way_are_refused() -> None:
    lanczos = Preprocess(40, (32, 32), "lanczos", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(SettingsError, match=r"decode gpu resizes by bilinear or bicubic, .* ask for lanczos"):
        require_device_decoding(lanczos)
    require_device_decoding(SMALL)
