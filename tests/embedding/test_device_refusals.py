"""What the device refuses, does not hold, or dies of: the CPU decodes it, and it is counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from shard_embedder.pipeline.backbones import load_weights
from shard_embedder.pipeline.backbones.torchvision_models import preprocess_for
from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.core.schema import part_rows
from shard_embedder.pipeline.decoding import jpeg
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.jpeg_forwarder import JpegForwarder
from shard_embedder.pipeline.embedding import device_decode
from shard_embedder.pipeline.embedding.device_decode import DeviceDecoder
from tests.conftest import ROOT, encode, photo
from tests.decoding.images import part, with_orientation
from tests.embedding.test_device_decode import (
    assert_alike,
    decoder,
    embedder,
    on_device,
    refused,
    samples_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def test_what_the_device_refuses_has_the_decoders_reason_and_costs_only_itself() -> None:
    cpu = decoder()
    assert JpegForwarder(cpu).forward(refused())["orientation"] == 1
    images = [encode(photo(seed)) for seed in range(5)]
    found, faults = on_device([*images[:3], refused(), *images[3:]], cpu)
    with pytest.raises(SampleError) as expected:
        cpu.decode(refused())
    assert faults == {3: str(expected.value)}
    good, _ = on_device(images, cpu)
    assert np.array_equal(np.delete(found, 3, 0), good)


class Counted(Decoder):
    """Keeps what it is asked to decode."""

    def decode(self, data: bytes | pa.Buffer) -> Any:
        asked.append(bytes(memoryview(data)))
        return super().decode(data)


asked: list[bytes] = []


def test_one_that_is_refused_leaves_its_group_to_the_device() -> None:
    asked.clear()
    on_device([encode(photo(0)), refused(), encode(photo(1))], decoder(kind=Counted))
    assert asked == [refused()]


def test_one_that_is_refused_is_found_by_halves_and_counted_where_the_cpu_decodes_it(
    decodes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [with_orientation(photo(seed), 6, "JPEG") for seed in range(64)]
    expected, _ = on_device(images)
    decodes.clear()
    device = DeviceDecoder(decoder(), "cpu")
    lengths = [len(jpeg.without_metadata(image)) for image in images]
    place = next(place for place in range(30, 64) if lengths.count(lengths[place]) == 1)
    counted = device_decode.decode_jpeg

    def odd_one_out(given: list[torch.Tensor], **options: Any) -> Any:
        found = counted(given, **options)
        if any(len(image) == lengths[place] for image in given):
            raise RuntimeError("nvjpegDecode failed: 6")
        return found

    monkeypatch.setattr(device_decode, "decode_jpeg", odd_one_out)
    found = device(samples_of(images, decoder()), np.arange(64), "a part")
    assert sorted(decodes, reverse=True) == [64, 32, 32, 16, 16, 8, 8, 4, 4, 2, 2, 1, 1, 1]
    assert (found.faults, found.num_refused, found.refusal) == ({}, 1, "RuntimeError: nvjpegDecode failed: 6")
    # Turned as its metadata said, which the device was not given.
    assert_alike(found.values.numpy(), expected)
    assert np.array_equal(found.values[place].numpy(), decoder().decode(images[place]))


def test_a_group_that_the_memory_does_not_hold_is_tried_again_and_then_halved(
    decodes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [encode(photo(seed)) for seed in range(8)]
    expected, _ = on_device(images)
    device, samples = DeviceDecoder(decoder(), "cpu"), samples_of(images, decoder())
    counted = device_decode.decode_jpeg
    full: list[int] = []

    def tight(given: list[torch.Tensor], **options: Any) -> Any:
        found = counted(given, **options)
        if full and len(given) >= full[0]:
            full.pop(0)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(device_decode, "decode_jpeg", tight)
    for sizes, calls in (([8], [8, 8]), ([8, 8], [8, 8, 4, 4]), ([8, 8, 4], [8, 8, 4, 2, 2, 4])):
        decodes.clear()
        full[:] = sizes
        found = device(samples, np.arange(8), "a part")
        assert decodes == calls
        assert (found.num_refused, found.refusal, found.faults) == (0, None, {})
        assert np.array_equal(found.values.numpy(), expected)


def test_a_device_that_fails_altogether_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    device = DeviceDecoder(decoder(), "cpu")

    def poisoned(*args: Any, **options: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    monkeypatch.setattr(device_decode, "decode_jpeg", poisoned)
    samples = samples_of([encode(photo(1))] * 2, decoder())
    for _ in range(2):
        with pytest.raises(torch.AcceleratorError):
            device(samples, np.arange(2), "a part")
    assert device(samples, np.arange(2), "a part").num_refused == 2
    with pytest.raises(torch.AcceleratorError):
        device(samples, np.arange(2), "a part")


def test_what_the_device_refuses_keeps_its_place_when_threads_share_a_child_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = [[encode(photo(seed)) for seed in range(first, first + 20)] * 10 for first in (0, 20, 40, 60)]
    parts = [samples_of(files, decoder()) for files in images]
    device = DeviceDecoder(decoder(), "cpu")
    monkeypatch.setattr(device_decode, "decode_jpeg", broken)
    with ThreadPoolExecutor(len(images)) as pool:
        at_once = list(pool.map(lambda samples: device(samples, np.arange(200), str(id(samples))), parts))
    for found, files in zip(at_once, images, strict=True):
        assert (found.faults, found.num_refused) == ({}, 200)
        assert found.refusal == "RuntimeError: Failed to initialize nvjpeg"
        assert np.array_equal(found.values.numpy(), np.stack([decoder().decode(one) for one in files]))


def broken(*args: Any, **options: Any) -> None:
    raise RuntimeError("Failed to initialize nvjpeg")


def test_a_device_that_decodes_nothing_is_told_of_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_decode, "decode_jpeg", broken)
    with pytest.raises(RuntimeError, match="Failed to initialize nvjpeg"):
        DeviceDecoder(decoder(), "cpu")


def test_a_part_says_how_many_of_its_images_the_device_refused_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = preprocess_for("squeezenet1_1", "random:0").with_size((64, 64))
    cpu = decoder(preprocess)
    actor = embedder("squeezenet1_1", load_weights("squeezenet1_1", "random:0"), preprocess, cpu)
    (forwarded,) = JpegForwarder(cpu)(part([encode(photo(1)), b"no image", encode(photo(2)), refused()]))
    ((before, _),) = part_rows(actor(forwarded))
    assert (before["device_refused"], before["device_refusal"]) == (0, None)
    monkeypatch.setattr(device_decode, "decode_jpeg", broken)
    ((values, samples),) = part_rows(actor(forwarded))
    # One is an error, which is told as one.
    assert (values["device_refused"], values["device_refusal"]) == (2, "RuntimeError: Failed to initialize nvjpeg")
    assert samples.field("stage").to_pylist() == [None, "decode", None, "decode"]


# Three processes one after the other, forked from one that has imported what takes them longest.
DEADLY = """
import os, signal, sys
import numpy as np
import pyarrow as pa
from shard_embedder.pipeline.core.schema import encoded_field
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.jpeg_forwarder import JpegForwarder
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.embedding import device_decode
cpu = Decoder(DecodingRules(preprocess=Preprocess(40, (32, 28), "bilinear", (), ()), max_pixels=4_000_000))
decode = device_decode.decode_jpeg
def deadly(images, **options):
    if len(images) > 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(images, **options)
device_decode.decode_jpeg = deadly
def run():
    device = device_decode.DeviceDecoder(cpu, "cpu")
    images = [open(path, "rb").read() for path in sys.argv[1:]]
    field = encoded_field()
    encoded = pa.array([JpegForwarder(cpu).forward(image) for image in images], field.type)
    samples = pa.StructArray.from_arrays([encoded], fields=[field])
    assert device(samples, np.arange(1), "another part").num_refused == 0
    found = device(samples, np.arange(3), "a part")
    assert np.array_equal(found.values.numpy(), np.stack([cpu.decode(image) for image in images]))
    print(found.num_refused, found.refusal, flush=True)
for _ in range(3):
    process = os.fork()
    if process == 0:
        run()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_part_that_kills_its_process_twice_is_decoded_on_the_cpu(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.jpg" for seed in range(3)]
    for seed, path in enumerate(paths):
        path.write_bytes(with_orientation(photo(seed), 1 + seed, "JPEG"))
    command = [sys.executable, "-c", DEADLY, *map(str, paths)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        str(-signal.SIGSEGV),
        str(-signal.SIGSEGV),
        "3 2 times the process died, or failed, while its device decoded this part",
        "0",
    ], done.stderr
