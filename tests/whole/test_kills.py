"""Whatever is killed at whatever moment, the output is that of an undisturbed run, bit for bit.

`tests/faults/kills.py` makes the same with many more kills, and a table of them.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest

from tests.faults.kills import DRIVER, KINDS, NODE, Load, Plan, Run, harness, make_plan, table

pytestmark = pytest.mark.head

# Of two kills at once this seed's are the embed actor and the S3 server, both there for longer than a moment.
SEED = 27
_MAX_RUNS = 10


def test_a_plan_has_every_kind_in_its_share_and_is_the_same_for_one_seed() -> None:
    plan = make_plan(44, seed=3, spread_s=6.0)
    assert plan == make_plan(44, seed=3, spread_s=6.0)
    assert plan != make_plan(44, seed=4, spread_s=6.0)
    shares = {kind: 4 if kind in (NODE, DRIVER) else 6 for kind in KINDS}
    assert {kind: sum(one.label == kind for one in plan) for kind in KINDS} == shares
    assert all(len(set(one.kinds)) == len(one.kinds) for one in plan)


@pytest.mark.slow
def test_kill_anything_and_the_output_is_the_same() -> None:
    said: list[str] = []
    load = Load(num_shards=40, samples_each=16, image_size=96)
    # At last a node that never comes back: what is left of the cluster goes on.
    lost = Plan((NODE,), False, 1.0, 0.0, math.inf)
    plan = [*make_plan(len(KINDS), SEED, spread_s=1.0), lost]
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder, harness(load, Path(folder), said.append) as job:
        while plan and len(runs) < _MAX_RUNS:
            runs.append(job.run(f"run-{len(runs)}", plan))
    told = "\n".join([*said, table(runs)])
    assert [run.wrong for run in runs] == [[]] * len(runs), told
    assert not any(run.gave_up for run in runs), told
    assert not plan, f"not every kill found its victim in {len(runs)} runs\n{told}"
