"""What is changed by hand between two runs, which are in this process: shards, settings, run.json, stored files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.jobs.embed import main
from shard_embedder.jobs.verify import main as verify_main
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.run.passes import run
from tests.conftest import sample_members, write_shard, write_tar
from tests.outputs import IN_PROCESS, UNHEARD, job_for, rows, stored

SMALL = ("--backbone", "squeezenet1_1", "--weights", "random:3", "--image-size", "64", "--device", "cpu")
SMALL += ("--precision", "fp32", "--part-rows", "4")
SAMPLES = 6


def embed(input: Path, output: Path) -> dict[str, Any]:
    """One run in this process, with its report."""
    job = job_for(input, output, part_rows=4)
    return run(job, make_plan(job.shards, job.config.output), UNHEARD, IN_PROCESS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards (`in`), of which each holds a bad image, and their output (`out`)."""
    folder = tmp_path_factory.mktemp("finished")
    for number in range(4):
        members = [member for i in range(SAMPLES) for member in sample_members(f"s-{number}-{i}", 10 * number + i)]
        write_tar(folder / "in" / f"s-{number}.tar", [(f"s-{number}-0.jpg", b"no image"), *members[1:]])
    assert embed(folder / "in", folder / "out")["balanced"]
    return folder


@pytest.fixture
def changing(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """The same folder, to be changed by hand: where shards lie is a setting, so a copy would be another input."""
    shutil.copytree(finished, tmp_path / "copy")
    yield finished
    shutil.rmtree(finished)
    shutil.copytree(tmp_path / "copy", finished)


def test_shards_changed_removed_and_added_between_two_runs_each_end_as_they_are_now(changing: Path) -> None:
    shards, out = changing / "in", changing / "out"
    before = stored(out)
    write_shard(shards / "s-0.tar", 700)
    (shards / "s-2.tar").unlink()
    write_shard(shards / "s-4.tar", 800)
    report = embed(shards, out)
    assert report["balanced"]
    wanted = {"found": 4, "done_before": 2, "changed": 1, "done_now": 2, "stored_but_not_in_input": 1}
    assert {name: report["shards"][name] for name in wanted} == wanted
    after = stored(out)
    kept = {name for name in before if not name.partition("/")[2].startswith("s-0.")}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}, "also of the removed one"
    assert not (set(before) - kept) & set(after), "the old version is gone, and its errors"
    embed(shards, changing / "fresh")
    for folder in ("embeddings", "errors"):
        assert [row for row in rows(out, folder) if row["shard"] != "s-2"] == rows(changing / "fresh", folder)


def test_another_setting_is_refused_and_each_difference_named(
    changing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {str(path): path.read_bytes() for path in changing.rglob("*") if path.is_file()}
    job = ["--input", str(changing / "in"), "--output", str(changing / "out"), *SMALL]
    others = ["--weights", "random:4", "--normalize", "--dtype", "float16", "--part-rows", "5", "--keep", "cls"]
    assert main([*job, *others]) == 2
    told = capsys.readouterr().err
    for difference in (
        "weights_sha256: output ",
        "normalize: output false, this run true",
        'dtype: output "float32", this run "float16"',
        "part_rows: output 4, this run 5",
        'keep: output [], this run ["cls=int64"]',
    ):
        assert difference in told
    assert told.count(": output ") == 5, "and nothing that does not differ"
    assert {str(path): path.read_bytes() for path in changing.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"part_rows": 4', '"part_rows": 8'), "cannot be used: it was changed by hand"),
        (lambda text: text[: len(text) // 2], "is not a run.json of this pipeline"),
        (lambda text: "", "is not a run.json of this pipeline"),
        (lambda text: "[]", "cannot be used: it does not say what made the output: a JSON object is needed"),
    ],
    ids=["a setting", "cut", "empty", "another JSON"],
)
def test_a_run_json_changed_by_hand_is_refused_by_name(
    changing: Path, capsys: pytest.CaptureFixture[str], change: Callable[[str], str], message: str
) -> None:
    file = changing / "out" / "run.json"
    file.write_text(change(file.read_text()))
    before = stored(changing / "out")
    (changing / "in" / "s-0.tar").touch()
    assert main(["--input", str(changing / "in"), "--output", str(changing / "out"), *SMALL]) == 2
    told = capsys.readouterr().err
    assert f"{file} {message}" in told
    assert stored(changing / "out") == before


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "emptied": b"", "flipped": flipped(data)}[how])


def flipped(data: bytes) -> bytes:
    return data[:300] + bytes([data[300] ^ 1]) + data[301:]


def test_files_spoiled_by_hand_are_found_and_made_again_as_verify_tells(
    changing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run plans from listings alone, so that only verify.py finds what keeps its name."""
    out = changing / "out"
    before = stored(out)
    victims = []
    for number, how in enumerate(("deleted", "cut", "emptied", "flipped")):
        victims += [next((out / "embeddings").glob(f"s-{number}.*-last.parquet"))]
        victims += [next((out / "errors").glob(f"s-{number}.*-00000.parquet"))]
        spoil(victims[-2], how)
        spoil(victims[-1], how)
    assert verify_main([str(out)]) == 1
    told = capsys.readouterr().out
    assert "embeddings/s-0.*: part-missing" in re.sub(r"\.[0-9a-f]{12}-\*", ".*", told)
    assert all(victim.name in told for victim in victims[1:])
    advice = re.findall(r"^MEND  delete (\S+)$", told, re.MULTILINE)
    # An errors file is made again with its part, whose deletion is enough.
    assert {Path(path).name for path in advice} == {victim.name for victim in victims[1:]}
    assert {Path(path).parent.name for path in advice} == {"embeddings"}
    assert "MEND  then run the job again" in told
    for path in advice:
        Path(path).unlink()
    report = embed(changing / "in", out)
    assert report["balanced"]
    assert stored(out) == before
    assert verify_main([str(out)]) == 0
