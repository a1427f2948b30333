"""Whatever a file can be broken into: an image, or a reason, in bounded time and memory."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.decoding import jpeg
from shard_embedder.pipeline.decoding.orientation import orientation_of
from shard_embedder.pipeline.decoding.pillow import FORMATS
from tests.conftest import child_pid, encode, photo
from tests.decoding.images import FILES, FUZZ_SEED, MIB, make_decoder, mutate
from tests.peaks import peak_memory_mib

FUZZ_INPUTS = int(os.environ.get("EMBED_FUZZ_INPUTS", "5000"))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


@pytest.mark.slow
def test_what_is_decoded_without_pillow_has_pillows_pixels() -> None:
    rng = random.Random(FUZZ_SEED)
    jpegs = [data for name, data in FILES.items() if "jpeg" in name and data[:2] == b"\xff\xd8"]
    jpegs += [encode(photo(9, (201, 133)), quality=quality, subsampling=subsampling)
              for quality in (30, 95) for subsampling in (0, 1, 2)]  # fmt: skip
    # Changed bytes that leave it a JPEG without a fault are rare: most of the changes are few.
    files = jpegs + [flipped(rng.choice(jpegs), rng) for _ in range(3000)]
    num_plain = 0
    for file in files:
        try:
            with Image.open(io.BytesIO(file), formats=FORMATS) as image:
                header = make_decoder().plain_jpeg(file)
                plain = None if header is None else jpeg.decode(file, header)
                if header is not None and plain is not None:
                    assert np.array_equal(plain, np.asarray(image.convert("RGB")))
                    assert header.orientation == orientation_of(image)
                    num_plain += 1
        except (OSError, ValueError, SyntaxError):
            continue
    assert num_plain > 300


def flipped(file: bytes, rng: random.Random) -> bytes:
    changed = bytearray(file)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def fuzz_input(seed: int, index: int) -> tuple[str, bytes]:
    rng = random.Random(f"{seed}-{index}")
    name = list(FILES)[index % len(FILES)]
    return name, mutate(FILES[name], FILES[rng.choice(list(FILES))], rng)


def fuzz(seed: int, count: int, progress_path: str) -> dict[str, Any]:
    """Decode `count` broken files; each one's number is in a file before its turn, should the process die."""
    decoder = make_decoder()
    outcomes: Counter[str] = Counter()
    escaped: dict[str, int] = {}
    slowest = 0.0
    with open(progress_path, "wb", buffering=0) as progress:
        for index in range(count):
            name, data = fuzz_input(seed, index)
            progress.seek(0)
            progress.write(f"{index:012d} {name:<40}".encode())
            start = decoder.clock()
            try:
                assert decoder.decode(data).shape == (32, 32, 3)
                outcomes["embedded"] += 1
            except SampleError as error:
                outcomes[": ".join(str(error).split(": ")[:2]) if "broken" in str(error) else str(error)[:15]] += 1
            except Exception as error:
                escaped.setdefault(f"{type(error).__name__}: {error}", index)
            slowest = max(slowest, decoder.clock() - start)
    return {
        "inputs": count,
        "outcomes": outcomes,
        "escaped": escaped,
        "slowest_s": round(slowest, 3),
        "peak_mib": peak_memory_mib(),
        "child_peak_mib": peak_memory_mib(child_pid()),
    }


@pytest.mark.slow
def test_no_broken_file_crashes_or_raises_anything_but_a_sample_error(tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(FUZZ_SEED), str(FUZZ_INPUTS), str(progress)]
    worker = subprocess.run(command, capture_output=True, text=True, check=False)
    where = progress.read_text() if progress.exists() else "the start"
    assert worker.returncode == 0, f"ended with {worker.returncode} at {where} of seed {FUZZ_SEED}: {worker.stderr}"
    result = json.loads(worker.stdout)
    sys.stdout.write(json.dumps(result, indent=2))
    assert result["escaped"] == {}
    assert sum(result["outcomes"].values()) == FUZZ_INPUTS
    # Most of what is flipped is still an image to Pillow, and much is not: both ways are walked.
    assert result["outcomes"]["embedded"] > FUZZ_INPUTS // 20
    assert sum(result["outcomes"].values()) - result["outcomes"]["embedded"] > FUZZ_INPUTS // 5
    # What kills the child, in whichever way, would be found by users: no known file does.
    assert [outcome for outcome in result["outcomes"] if outcome.startswith("decoder")] == []
    # Of processor time and memory no input takes more than some megapixels should.
    assert result["slowest_s"] < 5
    assert result["peak_mib"] < 300
    assert result["child_peak_mib"] < 70 + make_decoder().rules.memory_bytes // MIB


if __name__ == "__main__":
    sys.stdout.write(json.dumps(fuzz(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
