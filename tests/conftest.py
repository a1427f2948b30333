"""What the tests share: small real images and shards, one Ray session, one S3 server."""

from __future__ import annotations

import ctypes
import gc
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from tests.peaks import Peaks, peak_memory_mib

ROOT = Path(__file__).parent.parent
METRICS_INTERVAL_S = 2
# Ray reads these when it is imported.
os.environ |= {
    # Of its metrics, 10 s otherwise: it forgets a gauge in two of them.
    "RAY_metrics_report_interval_ms": str(1000 * METRICS_INTERVAL_S),
    # It would end idle workers after a second, and the next test would start them again: seconds of a core for each.
    "RAY_idle_worker_killing_time_threshold_ms": "20000",
}
_DATA = Path(os.environ.get("EMBED_TEST_DATA", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real photos as shards and real weights, where the machine has them."""
    if not (_DATA / "data" / "grocery").is_dir():
        pytest.skip(f"no test data in {_DATA}: set EMBED_TEST_DATA to a folder with data/ and weights/")
    return _DATA


def photo(seed: int, size: tuple[int, int] = (96, 80), mode: str = "RGB") -> Image.Image:
    """A smooth, colourful image of `size` (width, height) that differs for each seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """`image` as a file of a format."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of `members` in order, with a fixed modification time inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_members(key: str, seed: int) -> list[tuple[str, bytes]]:
    """Members of one sample: a photo, its class and its JSON."""
    return [
        (f"{key}.jpg", encode(photo(seed))),
        (f"{key}.cls", str(seed % 3).encode()),
        (f"{key}.json", json.dumps({"id": f"photo-{seed}", "caption": f"number {seed}"}).encode()),
    ]


def write_shards(folder: Path, num_shards: int = 3, samples_each: int = 7) -> Path:
    """`num_shards` shards of photos, no two alike."""
    for shard in range(num_shards):
        members = [
            member
            for i in range(samples_each)
            for member in sample_members(f"{shard:03d}-{i:04d}", shard * samples_each + i)
        ]
        write_tar(folder / f"photos-{shard:05d}.tar", members)
    return folder


def write_shard(path: Path, seed: int, num_samples: int = 6, pad_bytes: int = 0) -> Path:
    """A shard of photos with ids of its own; a hidden file, which is skipped, makes it as large as is asked for."""
    members = [member for i in range(num_samples) for member in sample_members(f"{path.stem}-{i}", seed + i)]
    return write_tar(path, members + ([(".pad", bytes(pad_bytes))] if pad_bytes else []))


def child_pid() -> int:
    """The process that decodes for this one."""
    (found,) = (
        int(process.name)
        for process in Path("/proc").iterdir()
        if process.name.isdigit() and is_decoding_for(process, os.getpid())
    )
    return found


def is_decoding_for(process: Path, parent: int) -> bool:
    """Whether a process of /proc decodes for another."""
    try:
        command, status = (process / "cmdline").read_bytes(), (process / "stat").read_text()
    except OSError:
        return False
    return b".decoding.child" in command and int(status.rpartition(")")[2].split()[1]) == parent


@contextmanager
def hearing_sigint() -> Iterator[None]:
    """What is started meanwhile ends by Ctrl-C.

    What a shell without job control runs in the background ignores SIGINT, as does all that it starts.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch with one thread: bits do not depend on how many cores a machine has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What the job and its stores read. Libraries set others when they are imported.
_OURS = ("AWS_", "EMBED_", "FSSPEC_", "HF_", "HOME", "RAY_ADDRESS", "TORCH_HOME")
_HEAD, _RAY, _SLOW, _OTHER = range(4)
_KIND: dict[Path, int] = {}
# What starts Ray, by itself or in a job.
_RAY_FIXTURES = {"ray_session", "run_process"}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Import all without searching it for garbage: nearly half of the time."""
    gc.disable()
    result = yield
    gc.enable()
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs Ray. First come files with heads of their own, then those that share one, then slow ones."""
    for item in items:
        own_head = item.get_closest_marker("head") is not None
        if own_head or _RAY_FIXTURES & {*getattr(item, "fixturenames", ())}:
            item.add_marker("ray")
        uses_ray = item.get_closest_marker("ray") is not None
        kind = _HEAD if own_head else _RAY if uses_ray else _SLOW if item.get_closest_marker("slow") else _OTHER
        _KIND[item.path] = min(kind, _KIND.get(item.path, _OTHER))
    # The kills take longest.
    items.sort(key=lambda item: (_KIND[item.path], item.path.name != "test_kills.py"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """End the shared Ray where nobody needs it: idle, it takes a tenth of a core."""
    ray = sys.modules.get("ray")
    if ray is not None and _KIND[item.path] > _RAY and ray.is_initialized():
        ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def _environment_kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """A file leaves the environment as it was: what it sets by its way would be every later file's."""
    before = dict(os.environ)
    yield
    kept = before | S3Server.in_environment
    changed = {name for name in {*kept, *os.environ} if kept.get(name) != os.environ.get(name)}
    ours = sorted(name for name in changed if name.startswith(_OURS))
    assert not ours, f"{request.path.name} leaves a changed environment: {ours}"


# How many blocks of memory Python's objects had after the last search of all of them for garbage.
_SEARCHED = {"blocks": 0}


@pytest.fixture(scope="module", autouse=True)
def _memory_given_back() -> Iterator[None]:
    """What a file built goes with it: a process that has built every architecture would hold 7 GB."""
    # Libraries stay, and are not searched for garbage after each file.
    gc.freeze()
    yield
    if sys.getallocatedblocks() > _SEARCHED["blocks"] + 200_000:
        # Search all objects. Some were frozen while in use, such as S3 clients that were still closing, 15 MiB each.
        gc.unfreeze()
        gc.collect()
        _SEARCHED["blocks"] = sys.getallocatedblocks()
    else:
        gc.collect()
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the peak memory of a process to the one that started it."""
    gc.unfreeze()  # a library tells what is left at the end
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["peak_mib"] = peak_memory_mib()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Peaks(), "peaks")


def start_ray() -> None:
    """A local Ray. Its workers have the environment of this moment."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Never one that another test has started meanwhile.
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


@pytest.fixture(scope="module")
def ray_session(s3_server: S3Server) -> None:
    """One local Ray for all tests, which takes ten seconds and more to start; its workers can reach S3."""
    import ray

    if not ray.is_initialized():
        start_ray()


def ray_here() -> dict[str, str]:
    """The variable by which a job joins the Ray of this process."""
    import ray

    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


class SmallDisk:
    """A file system of a few hundred KiB in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, kib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(self.folder)], check=True)

    def fill(self, leave_bytes: int) -> Path:
        """Take all of the space but `leave_bytes` with one file, and return it."""
        space = os.statvfs(self.folder)
        ballast = self.folder / "ballast"
        ballast.write_bytes(bytes(space.f_bavail * space.f_frsize - leave_bytes))
        return ballast


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"a small disk cannot be made: {error}")
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be made: {done.stderr.strip()}")
    yield SmallDisk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that are free now, low enough for SeaweedFS to add 10000."""
    ports: list[int] = []
    sockets = []
    # Far from those of the process beside this one, which looks for some at the same time.
    candidate = 20000 + os.getpid() * 101 % 9000
    while len(ports) < count:
        candidate += 1
        # Whoever got one before may not have bound it yet.
        if candidate in _given:
            continue
        pair = [socket.socket(), socket.socket()]
        try:
            pair[0].bind(("127.0.0.1", candidate))
            pair[1].bind(("127.0.0.1", candidate + 10000))
        except OSError:
            for one in pair:
                one.close()
            continue
        sockets.extend(pair)
        ports.append(candidate)
    for one in sockets:
        one.close()
    _given.update(ports)
    return ports


class S3Server:
    """A SeaweedFS with one bucket, on loopback."""

    bucket = "bkt"
    # The variables of the session's server, once it runs.
    in_environment: ClassVar[dict[str, str]] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, *self._other_ports = free_ports(5)
        self.environment = {
            "AWS_ACCESS_KEY_ID": "test-access-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret-key-0123456789",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until the bucket is there."""
        master, volume, filer, admin = self._other_ports
        weed = Path(sys.executable).with_name("weed")
        self.folder.mkdir(parents=True, exist_ok=True)
        options = [
            f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={self.port}",
            f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
            f"-admin.port={admin}", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0",
            "-s3.port.lance=0", "-master.telemetry=false", f"-bucket={self.bucket}",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [str(weed), "mini", *options],
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(OSError):
                urllib.request.urlopen(f"{self.environment['AWS_ENDPOINT_URL']}/healthz", timeout=2)
                if self.filesystem().exists(self.bucket):
                    return
            time.sleep(0.2)
        raise RuntimeError("SeaweedFS did not start within 60 s")

    def filesystem(self) -> Any:
        """A fresh s3fs with this server's credentials."""
        import s3fs

        return s3fs.S3FileSystem(
            key=self.environment["AWS_ACCESS_KEY_ID"],
            secret=self.environment["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def stop(self) -> None:
        """Kill it, as a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server; its variables are in the environment of this process and of what it starts."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    S3Server.in_environment = server.environment
    os.environ.update(server.environment)
    yield server
    server.stop()


@pytest.fixture
def s3_url(s3_server: S3Server) -> str:
    """A fresh prefix on the S3 server."""
    return f"s3://{s3_server.bucket}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh folder on local disk, and a fresh prefix on S3."""
    return str(tmp_path / "place") if request.param == "disk" else request.getfixturevalue("s3_url")


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Run one of `jobs/` in this process, in a folder of its own; with `ray_session` on the Ray that is there."""

    def run(name: str, *arguments: object, **environment: str) -> Done:
        command = import_module(f"shard_embedder.jobs.{Path(name).stem}")
        capsys.readouterr()
        with monkeypatch.context() as here:
            here.chdir(tmp_path)
            for variable, value in environment.items():
                here.setenv(variable, value)
            try:
                code = command.main(list(map(str, arguments)))
            except SystemExit as stop:
                code = stop.code
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return run


@pytest.fixture
def run_process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one of `jobs/` as a user does: as a process with arguments and a Ray of its own, in a folder of its own."""

    def run(name: str, *arguments: object, timeout: float = 300, **environment: str) -> Any:
        return subprocess.run(
            [sys.executable, str(ROOT / "jobs" / name), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
