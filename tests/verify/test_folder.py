"""An output of a folder of images is compared with the folder, by the shards that it is packed in."""

from __future__ import annotations

from pathlib import Path

import pytest

from shard_embedder import embed
from shard_embedder.pipeline.core.errors import NoShardError
from shard_embedder.pipeline.verify.proof import verify
from shard_embedder.pipeline.verify.recompute import Recompute
from tests.conftest import encode, photo


def test_the_folder_is_named_as_for_the_job(tmp_path: Path) -> None:
    folder, output = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.jpg").write_bytes(encode(photo(seed)))
    embed(folder, output, backbone="squeezenet1_1", weights="random:0", image_size="64", precision="fp32")
    found = verify(str(output), [str(folder)], Recompute(None, required=True))
    assert (found.tars_compared, found.findings, found.notes) == (1, [], [])
    assert found.recomputed == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoShardError):
        verify(str(output), [str(tmp_path / "empty")])
