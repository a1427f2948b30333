"""One run at a time on one output: who gets the lease, who is told to wait, and when a dead run's lease ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.pipeline.core import storage
from shard_embedder.pipeline.core.errors import OutputBusyError, OutputError, StoredDataError, StoreError
from shard_embedder.pipeline.core.retries import StoreLimits
from shard_embedder.pipeline.core.storage import list_files, locate, read_bytes
from shard_embedder.pipeline.core.writing import TEMPORARY_FOLDER, clear_temporary, create, delete, write_bytes
from shard_embedder.pipeline.output import lease
from shard_embedder.pipeline.output.lease import LeaseTimes, hold
from shard_embedder.pipeline.output.names import LEASE_FOLDER
from tests.conftest import ROOT, S3Server
from tests.faults.odd_store import OddStore, Quirks

# In place of 15 s and 60 s, so that the tests need not wait; the rules are the same.
BRISK = LeaseTimes(renew_s=0.1, expire_s=1.5, look_s=0.05)
# Where nobody renews the lease that is watched, nor is held for long: no beat can be late.
STILL = LeaseTimes(renew_s=0.1, expire_s=1.0, look_s=0.05)


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output that is empty, on disk and on S3."""
    if request.param == "disk":
        return str(tmp_path / "out")
    url: str = request.getfixturevalue("s3_url")
    return url


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every lease were of another machine: its processes cannot be looked at."""
    monkeypatch.setattr(lease, "_machine", lambda: "")


def files(place: str) -> list[str]:
    fs, path = locate(place)
    return [info.path[len(path) + 1 :] for info in list_files(fs, path)]


def silent(text: str) -> None:
    raise AssertionError(f"waits: {text}")


def planted_with(**changes: Any) -> bytes:
    """What is in a lease that a run left behind when it died."""
    content = {"token": "0" * 32, "holder": "x", "host": "gone-host", "machine": "another", "pid": 7}
    content |= {"started": "1", "since": "2026-01-01T00:00:00+00:00", **changes}
    return json.dumps(content).encode()


def planted(place: str, generation: int = 1, **changes: Any) -> dict[str, Any]:
    """A lease that a run left behind when it died, at `place`."""
    write_bytes(place, f"{LEASE_FOLDER}/{generation:08d}.json", planted_with(**changes))
    return dict(json.loads(planted_with(**changes)))


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


@pytest.mark.usefixtures("elsewhere")
def test_a_lease_that_moves_is_a_living_run_s_even_on_another_machine(place: str) -> None:
    said: list[str] = []
    with hold(place, silent, times=BRISK):
        with pytest.raises(OutputBusyError):
            hold(place, said.append, times=BRISK).__enter__()
        assert len(said) == 1
        assert "may be dead" in said[0]
        beat, claim = sorted(name for name in files(place) if name.startswith(LEASE_FOLDER))
        token = json.loads(read_bytes(f"{place}/{claim}"))["token"]
        assert (beat, claim) == (f"{LEASE_FOLDER}/00000001-{token}.beat", f"{LEASE_FOLDER}/00000001.json")


def test_a_lease_of_another_machine_that_stands_still_expires(place: str) -> None:
    planted(place, 4)
    said: list[str] = []
    start = time.monotonic()
    with hold(place, said.append, times=STILL) as held:
        assert time.monotonic() - start > STILL.expire_s
        assert f"{LEASE_FOLDER}/00000005.json" in files(place)
        held.confirm()
    assert "gone-host" in said[0]
    assert files(place) == []


_HOLDER = """
import sys, time
from shard_embedder.pipeline.output.lease import hold
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


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_of_many_who_wait_for_a_dead_run_s_lease_one_gets_it(place: str) -> None:
    planted(place)
    got: list[str] = []
    busy: list[str] = []
    ended = threading.Event()

    def contend() -> None:
        try:
            with hold(place, lambda text: None, times=BRISK):
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


def test_a_run_whose_lease_was_taken_over_is_told(place: str) -> None:
    with hold(place, silent, times=BRISK) as held:
        taken = planted(place, 2, pid=4711)
        deadline = time.monotonic() + 20
        while held._lost is None and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(OutputBusyError, match=r"took over .*process 4711 on gone-host"):
            held.check()
    assert json.loads(read_bytes(f"{place}/{LEASE_FOLDER}/00000002.json")) == taken, "it is the other's to remove"


def test_a_lease_file_of_something_else_is_named(place: str) -> None:
    for content in (b"[1, 2]", b"{}", b"{", b'"a"', b"[" * 100_000, b"\xff", planted_with(token="../" * 10)):
        write_bytes(place, f"{LEASE_FOLDER}/00000001.json", content)
        with pytest.raises(StoredDataError, match=r"00000001\.json is no lease.*delete it if no run is going on"):
            hold(place, silent).__enter__()


@pytest.mark.parametrize("name", ["00000001.json~", "00000001.bak", "1.json", "00000007.tmp", "\u0663.json", "x"])
def test_a_file_that_an_editor_left_beside_the_leases_is_no_lease(place: str, name: str) -> None:
    write_bytes(place, f"{LEASE_FOLDER}/{name}", b"{}")
    with hold(place, silent, times=BRISK) as held:
        held.confirm()
    assert files(place) == [f"{LEASE_FOLDER}/{name}"]


def test_an_empty_lease_is_watched_and_taken_over_as_a_dead_run_s(place: str) -> None:
    # As a run leaves it that dies on a disk without hard links.
    write_bytes(place, f"{LEASE_FOLDER}/00000003.json", b"")
    said: list[str] = []
    with hold(place, said.append, times=STILL) as held:
        held.confirm()
    assert said == [f"{place} is held by a run that does not say who it is, which may be dead: watching it for 1 s"]
    assert files(place) == []


def test_a_lease_that_leads_nowhere_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LEASE_FOLDER).mkdir()
    (tmp_path / LEASE_FOLDER / "00000009.json").symlink_to("/nowhere")
    with hold(str(tmp_path), lambda why: None, times=STILL) as held:
        held.confirm()
    assert files(str(tmp_path)) == []


@pytest.mark.slow
def test_what_is_in_the_way_of_a_lease_is_named_and_not_asked_for_without_end(tmp_path: Path) -> None:
    (tmp_path / LEASE_FOLDER / "00000001.json").mkdir(parents=True)
    used = time.process_time()
    with pytest.raises(StoredDataError, match=r"00000001\.json is in the way, and no lease; delete it"):
        hold(str(tmp_path), silent, times=BRISK).__enter__()
    assert time.process_time() - used < BRISK.expire_s / 2, "it looks without a pause"


def test_an_output_that_cannot_be_written_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write to .*file/out"):
        hold(str(tmp_path / "file" / "out"), silent).__enter__()


def test_a_file_is_created_once(place: str) -> None:
    assert create(place, "a/b", b"first")
    assert not create(place, "a/b", b"second")
    assert read_bytes(f"{place}/a/b") == b"first"
    clear_temporary(place)
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


_PAUSED = """
import select, signal, sys
from shard_embedder.pipeline.core.errors import OutputBusyError
from shard_embedder.pipeline.output import lease
name, place = sys.argv[1:]
lease._machine = lambda: name  # as on a host of its own
times = lease.LeaseTimes(renew_s=0.2, expire_s=1.0, look_s=0.05)
with lease.hold(place, lambda why: None, name, times) as held:
    print("held", flush=True)
    try:
        while not select.select([sys.stdin], [], [], 0.02)[0]:
            name == "first" or held.check()
        held.confirm()
    except OutputBusyError as error:
        print(error, flush=True)
    else:
        print("kept", flush=True)
"""


def start(name: str, place: str) -> subprocess.Popen[str]:
    """A run of a machine of its own, which holds the lease until it is spoken to."""
    command = [sys.executable, "-c", _PAUSED, name, place]
    run = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "held\n"
    return run


@pytest.mark.slow
@pytest.mark.parametrize("third", [False, True], ids=["nobody", "another"])
def test_a_run_that_was_paused_while_another_came_and_went_does_not_hold_the_lease(
    tmp_path: Path, third: bool
) -> None:
    place = str(tmp_path / "out")
    first = start("first", place)
    first.send_signal(signal.SIGSTOP)
    second = start("second", place)
    assert second.communicate()[0] == "kept\n"
    assert files(place) == [], "generations begin anew"
    now = start("third", place) if third else None
    first.send_signal(signal.SIGCONT)
    says = first.communicate("\n")[0]
    if now is None:
        assert says == f"the lease of {place} is gone: another run took it over and ended, or someone removed it\n"
    else:
        assert says.startswith(f"another run took over {place}: run third, process {now.pid} ")
        assert now.communicate()[0] == "kept\n", "the paused one has touched the lease of the other"
    assert files(place) == []


def check_for(held: lease.Lease, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        held.check()
        time.sleep(0.01)


@pytest.mark.slow
def test_a_lease_that_cannot_be_renewed_is_not_held(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with hold(str(place), silent, times=BRISK) as held:
        held.check()
        # No beat can be written any more: a file is where the folder of temporary files must be.
        temporary = place / TEMPORARY_FOLDER
        while not temporary.is_file():
            clear_temporary(str(place))
            with suppress(IsADirectoryError):
                temporary.write_bytes(b"")
        with pytest.raises(StoreError, match=r"could not be renewed .*another run may have it: .*/\.tmp'"):
            check_for(held, 30)
        # And is again where nobody has taken it meanwhile.
        temporary.unlink()
        held.check()


def test_a_renewing_thread_that_dies_does_not_leave_a_lease_that_seems_held(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with hold(str(place), silent, times=STILL) as held:
        held._released.set()
        held._renewer.join()
        time.sleep(STILL.expire_s)
        planted(str(place), 2)
        with pytest.raises(OutputBusyError, match="took over"):
            held.check()


def test_a_beat_that_meets_an_unforeseen_error_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[str] = []
    write = lease.write_bytes

    def broken(root: str, name: str, data: bytes, limits: StoreLimits) -> None:
        if len(failures) < 3:
            failures.append(name)
            raise RuntimeError("from a library")
        write(root, name, data, limits)

    monkeypatch.setattr(lease, "write_bytes", broken)
    with hold(str(tmp_path), silent, times=BRISK) as held:
        deadline = time.monotonic() + 20
        while held._beat < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        held.check()
    assert len(failures) == 3


def test_a_lease_that_someone_removed_is_not_held(place: str) -> None:
    with hold(place, silent) as held:
        delete(place, files(place))
        with pytest.raises(OutputBusyError, match="gone: another run took it over and ended, or someone removed it"):
            held.confirm()
    assert files(place) == []


@pytest.mark.slow
@pytest.mark.parametrize("quirks", [Quirks(conditional=(501, "NotImplemented")), Quirks(ignores_conditions=True)])
def test_without_conditional_writes_at_most_one_of_many_keeps_the_lease(
    quirks: Quirks, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = StoreLimits(request_timeout_s=5.0, retry_s=2.0, settle_s=1.0)
    times = LeaseTimes(renew_s=2.0, expire_s=60.0, look_s=0.05)  # on a busy machine, a beat may be seconds late
    with OddStore() as store:
        store.quirks = quirks
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        storage._filesystem.cache_clear()
        kept: list[int] = []
        ended: list[str] = []
        over = threading.Event()

        def contend(number: int) -> None:
            try:
                with hold("s3://bkt/out", lambda why: None, f"run {number}", times, limits) as held:
                    while not over.wait(0.05):
                        held.check()
                    held.confirm()
                    kept.append(number)
            except OutputBusyError as error:
                ended.append(str(error))

        threads = [threading.Thread(target=contend, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while len(ended) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        over.set()
        for thread in threads:
            thread.join()
        assert (len(kept), len(ended)) == (1, 4)
        assert store.stored.objects == {}
    storage._filesystem.cache_clear()
