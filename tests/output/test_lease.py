"""One run at a time on one output: who gets the lease, who is told to wait, and when a dead run's lease ends."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import storage
from pipeline.core.errors import OutputBusyError, OutputError
from pipeline.core.storage import create, list_files, locate, read_bytes, write_bytes
from pipeline.output import lease
from pipeline.output.lease import hold
from pipeline.output.names import LEASE_FOLDER
from tests.conftest import ROOT, S3Server


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output that is empty, on disk and on S3."""
    if request.param == "disk":
        return str(tmp_path / "out")
    url: str = request.getfixturevalue("s3_url")
    return url


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats in place of 15 s and 60 s, so that the tests need not wait; the rules are the same."""
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "EXPIRE_S", 1.5)
    monkeypatch.setattr(lease, "_LOOK_EVERY_S", 0.05)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every lease were of another machine: its processes cannot be looked at."""
    monkeypatch.setattr(lease, "_machine", lambda: "")


def files(place: str) -> list[str]:
    fs, path = locate(place)
    return [info.path[len(path) + 1 :] for info in list_files(fs, path)]


def silent(text: str) -> None:
    raise AssertionError(f"waits: {text}")


def planted(place: str, generation: int = 1, **changes: Any) -> dict[str, Any]:
    """A lease that a run left behind when it died."""
    content = {"holder": "x", "host": "gone-host", "machine": "another", "pid": 7, "started": "1", "beat": 3}
    content |= {"since": "2026-01-01T00:00:00+00:00", **changes}
    write_bytes(place, f"{LEASE_FOLDER}/{generation:08d}.json", json.dumps(content).encode())
    return content


def test_a_lease_leaves_nothing_behind_when_it_is_released(place: str) -> None:
    with hold(place, silent) as held:
        assert files(place) == [f"{LEASE_FOLDER}/00000001.json"]
        held.check()
    assert files(place) == []
    if "://" not in place:
        assert not list(Path(place).iterdir())


def test_who_comes_while_a_run_goes_on_is_told_at_once_whose_it_is(place: str) -> None:
    with hold(place, silent):
        with pytest.raises(
            OutputBusyError, match=r"is held by run \w+, process \d+ on .*: wait for its end"
        ) as caught:
            hold(place, silent).__enter__()
        assert place in str(caught.value)
    with hold(place, silent):
        pass


@pytest.mark.usefixtures("brisk", "elsewhere")
def test_a_lease_that_moves_is_a_living_run_s_even_on_another_machine(place: str) -> None:
    said: list[str] = []
    with hold(place, silent):
        with pytest.raises(OutputBusyError):
            hold(place, said.append).__enter__()
        assert len(said) == 1
        assert "may be dead" in said[0]
        assert files(place) == [f"{LEASE_FOLDER}/00000001.json"]


@pytest.mark.usefixtures("brisk")
def test_a_lease_of_another_machine_that_stands_still_expires(place: str) -> None:
    planted(place, 4)
    said: list[str] = []
    start = time.monotonic()
    with hold(place, said.append) as held:
        assert time.monotonic() - start > 1.5
        assert f"{LEASE_FOLDER}/00000005.json" in files(place)
        held.check()
    assert "gone-host" in said[0]
    assert files(place) == []


_HOLDER = """
import sys, time
from pipeline.output.lease import hold
with hold(sys.argv[1], print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_of_this_machine_is_known_to_be_dead_at_once(place: str, s3_server: S3Server) -> None:
    run = subprocess.Popen([sys.executable, "-c", _HOLDER, place], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "held\n"
    with pytest.raises(OutputBusyError, match=f"process {run.pid} "):
        hold(place, silent).__enter__()
    run.kill()
    # Not waited for: a process that nobody has buried yet is dead too.
    deadline = time.monotonic() + 10
    while lease._started(run.pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with hold(place, silent):
        pass
    run.wait()
    run.stdout.close()
    assert files(place) == []


@pytest.mark.usefixtures("brisk", "elsewhere")
def test_of_many_who_wait_for_a_dead_run_s_lease_one_gets_it(place: str) -> None:
    planted(place)
    got: list[str] = []
    busy: list[str] = []
    ended = threading.Event()

    def contend() -> None:
        try:
            with hold(place, lambda text: None):
                got.append("lease")
                ended.wait(30)
        except OutputBusyError as error:
            busy.append(str(error))

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(got) + len(busy) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    ended.set()
    for thread in threads:
        thread.join()
    assert (len(got), len(busy)) == (1, 5)
    assert files(place) == []


@pytest.mark.usefixtures("brisk")
def test_a_run_whose_lease_was_taken_over_is_told(place: str) -> None:
    with hold(place, silent) as held:
        taken = planted(place, 2, pid=4711)
        deadline = time.monotonic() + 20
        while held._lost is None and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(OutputBusyError, match=r"took over .*process 4711 on gone-host"):
            held.check()
    assert json.loads(read_bytes(f"{place}/{LEASE_FOLDER}/00000002.json")) == taken, "it is the other's to remove"


def test_a_lease_file_of_something_else_is_named(place: str) -> None:
    write_bytes(place, f"{LEASE_FOLDER}/00000001.json", b"[1, 2]")
    with pytest.raises(OutputError, match=r"00000001\.json is no lease.*delete it if no run is going on"):
        hold(place, silent).__enter__()


def test_an_output_that_cannot_be_written_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write to .*file/out"):
        hold(str(tmp_path / "file" / "out"), silent).__enter__()


def test_a_file_is_created_once(place: str) -> None:
    assert create(place, "a/b", b"first")
    assert not create(place, "a/b", b"second")
    assert read_bytes(f"{place}/a/b") == b"first"
    storage.clear_temporary(place)
    assert files(place) == ["a/b"]


def test_of_many_who_create_a_file_at_once_one_does(place: str) -> None:
    made: list[bool] = []
    barrier = threading.Barrier(8)

    def contend(number: int) -> None:
        barrier.wait()
        made.append(create(place, "f", bytes([number])))

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
