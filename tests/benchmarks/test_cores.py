"""Core-seconds of processes, as the benchmark counts them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.cores import CoreWatch, cores_in_use

BURN = "import time\nwhile time.process_time() < 1.5: pass"


@pytest.mark.slow
def test_the_core_seconds_of_a_child_count_from_the_moment_at_which_they_pass() -> None:
    with CoreWatch() as watch:
        subprocess.run([sys.executable, "-c", BURN], check=True)
    (begin, first), (end, last) = watch.looks[0], watch.looks[-1]
    assert 0.5 < last["other"] - first["other"] < 2.5
    used = cores_in_use(watch.looks, begin, end)
    assert used["worker"] == 0.0
    assert used["other"] == (last["other"] - first["other"]) / (end - begin)
    assert cores_in_use(watch.looks, begin, begin) == {}
