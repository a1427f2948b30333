"""Random steps in the life of an output, each run held against a model that shares no code with the pipeline."""

from __future__ import annotations

import random
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from shard_embedder import embed_images
from shard_embedder.pipeline.planning.plan import check_names, make_plan
from shard_embedder.pipeline.run.passes import Watcher, run
from shard_embedder.pipeline.verify.findings import Verdict
from shard_embedder.pipeline.verify.proof import verify
from tests.outputs import IN_PROCESS, UNHEARD, job_for
from tests.run.changing_input import PHOTOS, ChangingInput

SEED, NUM_STEPS = 0, 220
# How often each step is taken; a run that is not disturbed is the one after which all must be right.
STEPS = {
    "add": 4, "change": 3, "damage": 4, "repair": 3, "retire": 2, "bring_back": 2, "delete_a_file": 3,
    "spoil_a_file": 2, "move": 1, "kill": 5, "rerun": 8,
}  # fmt: skip


@dataclass
class World(ChangingInput):
    """Such an input and its output, and what is known of that. Every public method is a kind of step."""

    vectors: np.ndarray[Any, Any] = field(kw_only=True)
    # Files that were spoiled, which no listing shows, with what they hold; errors that were deleted hold nothing.
    spoiled: dict[str, bytes | None] = field(default_factory=dict)

    def delete_a_file(self) -> None:
        if stored := self._stored():
            file = self.rng.choice(sorted(stored))
            (self._out / file).unlink()
            if file.startswith("errors/"):
                self.spoiled[file] = None

    def spoil_a_file(self) -> None:
        if stored := self._stored():
            file = self.rng.choice(sorted(stored))
            self.spoiled[file] = stored[file][: self.rng.choice((0, 1000))]
            (self._out / file).write_bytes(self.spoiled[file] or b"")

    def kill(self) -> None:
        before, countdown = self._stored(), iter(range(self.rng.randrange(10)))

        def die(*_: Any) -> None:
            if next(countdown, None) is None:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            self._run(Watcher(die, die, die, on_end=die))
        for name, shard in self.shards.items():
            assert set(self._rows(name, but=before.keys())) <= set(shard.rows())

    def rerun(self) -> None:
        report = self._run(UNHEARD)
        verdict = self._verify()
        if verdict.to_delete() or verdict.retired:
            both = [which for parts in verdict.retired for which in (parts, parts.replace("embeddings", "errors", 1))]
            retired = [path for which in both for path in self._out.glob(which)]
            for path in {*retired, *(self._out / file for file in verdict.to_delete())}:
                path.unlink(missing_ok=True)
            report = self._run(UNHEARD)
            verdict = self._verify()
        broken = [name for name, shard in self.shards.items() if shard.cut is not None]
        assert (report["balanced"], report["shards"]["broken"]) == (True, len(broken))
        assert (report["shards"]["found"], report["shards"]["missing"]) == (len(self.shards), 0)
        assert [finding.rule for finding in verdict.findings] == ["shard-broken"] * len(broken)
        for name, shard in self.shards.items():
            assert sorted(self._rows(name), key=str) == sorted(shard.rows(), key=str)

    def _run(self, watcher: Watcher) -> dict[str, Any]:
        job = job_for(self.folder / "in", self._out, part_rows=2, batch_size=2, keep=["txt"])
        plan = make_plan(job.shards, job.config.output)
        check_names(job, plan)
        before = {name: self._stored(name) for name in self.retired}
        try:
            return run(job, plan, watcher, IN_PROCESS)
        finally:
            assert before == {name: self._stored(name) for name in self.retired}

    def _verify(self) -> Verdict:
        """What verify finds, which is each fault that is known, and no other."""
        stored = self._stored()
        bad = {file for file, data in self.spoiled.items() if data is not None and stored.get(file) == data}
        known = {(file, "unreadable") for file in bad if part_of(file) in stored}
        deleted = [file for file, data in self.spoiled.items() if data is None and file not in stored]
        known |= {(file, "errors-missing") for file in deleted if part_of(file) in stored.keys() - bad}
        known |= {(name, "shard-broken") for name, shard in self.shards.items() if shard.cut is not None}
        for name in self.retired:
            files = self._stored(name)
            known |= {(file, "errors-alone") for file in files if file[:2] == "er" and part_of(file) not in files}
            # As `0001-last.parquet`.
            parts = sorted(file.rpartition("-0")[2] for file in files if file.startswith("embeddings/"))
            known |= {(name, "shard-broken") for part in parts if "-broken" in part}
            if [int(part[:4]) for part in parts] != list(range(len(parts))) or (parts and "-" not in parts[-1]):
                known.add((name, "part-missing"))
        verdict = verify(str(self._out), [str(self.folder / "in")])
        of_a_shard = ("shard-broken", "part-missing")
        assert known == {
            (shard_of(finding.file) if finding.rule in of_a_shard else finding.file, finding.rule)
            for finding in verdict.findings
        }
        return verdict

    def _rows(self, name: str, but: Iterable[str] = ()) -> list[tuple[Any, ...]]:
        """The stored rows of a shard, each with the values that it must have, but for those of some files."""
        found = []
        for file in sorted(self._stored(name).keys() - but):
            for row in pq.read_table(self._out / file).to_pylist():
                found.append((file.partition("/")[0], row["sample_index"], row["image_id"]))
                assert row["shard"] == name
                if "embedding" in row:
                    sample = self.shards[name].samples[row["sample_index"]]
                    assert row["txt"] == str(sample)
                    np.testing.assert_allclose(row["embedding"], self.vectors[sample], rtol=1e-3, atol=1e-4)
        return found

    def _stored(self, name: str | None = None) -> dict[str, bytes]:
        """The files of the output, or those of one shard."""
        files = {str(path.relative_to(self._out)): path for path in self._out.rglob("*.parquet")}
        return {file: path.read_bytes() for file, path in files.items() if name in (None, shard_of(file))}

    @property
    def _out(self) -> Path:
        return self.folder / "out"


def shard_of(file: str) -> str:
    return file.partition("/")[2].partition(".")[0]


def part_of(file: str) -> str:
    """The part that a file of errors belongs to, or the part itself."""
    return file.replace("errors/", "embeddings/", 1)


@pytest.mark.slow
def test_whatever_happens_to_an_output_the_next_run_makes_it_right(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    _, vectors = embed_images(PHOTOS, "squeezenet1_1", weights="random:3", image_size=(64, 64))
    world = World(tmp_path / "world", rng, vectors=vectors)
    steps = ["add", *rng.choices([*STEPS], [*STEPS.values()], k=NUM_STEPS), "rerun"]
    for world.clock, step in enumerate(steps):
        try:
            getattr(world, step)()
        except AssertionError as error:
            error.add_note(f"after the steps {' '.join(steps[: world.clock + 1])}")
            raise
