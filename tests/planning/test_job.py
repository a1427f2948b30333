"""A job's settings as they are looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.samples import MAX_PART_PIXEL_BYTES, SampleReader
from tests.conftest import encode, photo, write_tar
from tests.outputs import job_for


@pytest.mark.parametrize(
    ("settings", "part_rows"),
    [
        ({"image_size": "224"}, 1024),
        ({"image_size": "224", "part_rows": 3566}, 3566),
        ({"image_size": "224", "part_rows": 4096}, 3566),
        ({"image_size": "64", "part_rows": 1_000_000}, 43_690),
        ({"image_size": "256x512", "part_rows": 5000}, 1365),
        ({"image_size": "4096"}, 10),
        ({"image_size": "4096", "part_rows": 3}, 3),
    ],
)
def test_the_rows_of_a_part_are_no_more_than_its_pixels_have_room_for(
    settings: dict[str, Any], part_rows: int, tmp_path: Path
) -> None:
    write_tar(tmp_path / "in" / "s.tar", [("a.jpg", b"")])
    job = job_for(tmp_path / "in", tmp_path / "out", **settings)
    assert job.config.part_rows == part_rows
    # It is a setting of the output: a run that may have more rows does not go on with it.
    assert job.fingerprint.settings.part_rows == part_rows
    height, width = job.network.preprocess.crop
    assert part_rows * height * width * 3 <= MAX_PART_PIXEL_BYTES


def test_parts_of_large_pixels_end_sooner(tmp_path: Path) -> None:
    image = encode(photo(1))
    write_tar(tmp_path / "in" / "s.tar", [(f"{i:02d}.jpg", image) for i in range(25)])
    job = job_for(tmp_path / "in", tmp_path / "out", image_size="4096")
    parts = SampleReader(job.config).parts(Pending(*job.shards[0]))
    assert [part.column("num_samples")[0].as_py() for part in parts] == [10, 10, 5]
