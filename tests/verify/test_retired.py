"""What verify advises where the parts of a shard are damaged that has left the input: no run makes them again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.jobs.verify import main
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.run.passes import run
from tests.conftest import write_shards
from tests.outputs import IN_PROCESS, UNHEARD, job_for

_ADVICE = re.compile(
    r"^MEND  delete (all but one version of )?(embeddings/\S+) in (\S+), and the same in errors/", re.M
)


def embed(folder: Path) -> None:
    job = job_for(folder / "in", folder / "out", part_rows=3)
    report = run(job, make_plan(job.shards, job.config.output), UNHEARD, IN_PROCESS)
    assert report["balanced"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of two shards in three parts each, the first with errors, and the input without the first."""
    folder = tmp_path_factory.mktemp("whole")
    write_shards(folder / "in" / "_old", num_shards=1)
    write_shards(folder / "in", num_shards=2)
    tar = folder / "in" / "_old" / "photos-00000.tar"
    # A picture that is none, so that there are errors.
    data = tar.read_bytes()
    tar.write_bytes(data[:512] + bytes(100) + data[612:])
    embed(folder)
    tar.rename(folder / "retired.tar")
    return folder


def parts(folder: Path) -> list[Path]:
    """The stored files of the shard that is gone."""
    return sorted((folder / "out").glob("e*/~5Fold/*.parquet"))


def cut(folder: Path) -> None:
    parts(folder)[0].write_bytes(b"PAR1")


def unlink(number: int) -> Callable[[Path], None]:
    return lambda folder: parts(folder)[number].unlink()


def copy_as_older(folder: Path) -> None:
    path = parts(folder)[0]
    shutil.copy(path, path.with_name("photos-00000.0123456789ab-00000-last.parquet"))


@pytest.mark.parametrize(
    "damage",
    [cut, unlink(0), unlink(2), unlink(3), copy_as_older],
    ids=["a part is cut", "a part is lost", "the last part is lost", "errors are lost", "two versions"],
)
def test_the_advice_for_parts_of_a_shard_that_left_the_input_leads_to_a_proven_output(
    damage: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "whole", copy_function=shutil.copy2))
    arguments = [str(folder / "out"), "--input", str(folder / "in"), "--recompute", "0"]
    damage(folder)
    assert main(arguments) == 1
    told = capsys.readouterr().out
    # Another run is no help, and not advised.
    assert "run the job again" not in told
    advice = [match.groups() for match in _ADVICE.finditer(told)]
    assert advice
    for all_but_one, pattern, output in advice:
        embeddings = sorted(Path(output).glob(pattern))
        stem = str(embeddings[0]).rpartition("-0")[0] if all_but_one else ""
        for path in (*embeddings, *Path(output).glob(pattern.replace("embeddings/", "errors/"))):
            if not stem or str(path).startswith(stem):
                path.unlink()
    assert main(arguments) == 0, capsys.readouterr().out
    # A run with the shard put back makes it again.
    (folder / "retired.tar").rename(folder / "in" / "_old" / "photos-00000.tar")
    embed(folder)
    assert main(arguments) == 0
    assert len(parts(folder)) >= 4
    assert "proven" in capsys.readouterr().out


def test_without_an_input_the_advice_says_of_which_shards_a_run_makes_what_is_missing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "whole"))
    unlink(0)(folder)
    assert main([str(folder / "out")]) == 1
    assert "of the shards that its input still names; --input tells of the others" in capsys.readouterr().out
