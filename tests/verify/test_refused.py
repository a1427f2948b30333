"""What verify says of shards that no output can be named after: they are in the input, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from shard_embedder.jobs.verify import main
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.run.passes import run
from tests.conftest import sample_members, write_shards, write_tar
from tests.outputs import IN_PROCESS, UNHEARD, job_for


def test_an_output_without_a_shard_that_was_refused_is_not_proven(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path / "in", num_shards=1)
    refused = write_tar(shards / f"{'n' * 240}.tar", sample_members("long", 7))

    def embed_and_verify() -> int:
        job = job_for(shards, tmp_path / "out")
        run(job, make_plan(job.shards, job.config.output), UNHEARD, IN_PROCESS)
        return main([str(tmp_path / "out"), "--input", str(shards), "--recompute", "0"])

    assert embed_and_verify() == 1
    told = capsys.readouterr().out
    assert f"WRONG {'n' * 240}.tar: shard-refused: its name must have at most 200 bytes" in told
    assert "MEND  rename the refused shards" in told
    refused.rename(shards / "short.tar")
    assert embed_and_verify() == 0
