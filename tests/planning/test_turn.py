"""Jobs that start on one cluster at the same time take turns in looking for room."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import ray

from shard_embedder.pipeline.core.errors import ClusterError
from shard_embedder.pipeline.planning.turn import Turn
from tests.conftest import ROOT

TAKES_IT = """
import os, ray
from shard_embedder.pipeline.planning.turn import Turn
ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False)
Turn().take(60, print)
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def turn(ray_session: None) -> Turn:
    return Turn()


def test_a_job_waits_for_the_turn_of_another_and_says_so(turn: Turn) -> None:
    said: list[str] = []
    waits = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        waits.set()

    second = Turn()
    turn.take(60, pytest.fail)
    thread = threading.Thread(target=second.take, args=(60, say))
    thread.start()
    assert waits.wait(30)
    assert thread.is_alive()
    turn.end()
    thread.join(30)
    assert not thread.is_alive()
    second.end()
    assert [text.partition(";")[0] for text in said] == ["another job is starting on this cluster"]


def test_who_has_its_turn_has_it_until_its_end(turn: Turn) -> None:
    turn.take(60, pytest.fail)
    turn.take(60, pytest.fail)
    turn.end()
    turn.end()


def test_a_turn_that_does_not_come_is_an_error(turn: Turn) -> None:
    turn.take(60, pytest.fail)
    try:
        with pytest.raises(ClusterError, match=r"starting on this cluster for 1 s: .* one named turn"):
            Turn().take(1, lambda text: None)
    finally:
        turn.end()


def test_a_killed_job_has_no_turn(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    killed = subprocess.run([sys.executable, "-c", TAKES_IT], cwd=ROOT, check=False)
    assert killed.returncode == -9
    turn.take(60, lambda text: None)
    turn.end()
