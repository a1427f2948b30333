"""The job as a command: its options, exit codes, what it prints, and what survives its death."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shard_embedder.jobs.embed import gather, parser
from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.writing import write_bytes
from shard_embedder.pipeline.output.lease import hold
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.run.in_process import InProcess
from shard_embedder.pipeline.run.passes import run
from tests.conftest import ROOT, Done, encode, photo, ray_here, write_shards, write_tar
from tests.faults.web_server import Kind, WebServer
from tests.outputs import UNHEARD, rows, stored

RunJob = Callable[..., Done]
SMALL = ("--backbone", "squeezenet1_1", "--weights", "random:3", "--device", "cpu")


# PIL.Image comes first: it does not load under another version.
_WITH_OLD_PILLOW = """
import sys
import PIL.Image
PIL.__version__ = "12.3.0"
from shard_embedder.jobs.embed import main
print(main([*sys.argv[1:], "--dry-run"]), main(sys.argv[1:]))
"""


def begin_job(*arguments: object, stderr: int | None = None, **environment: str) -> subprocess.Popen[str]:
    """The job as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "embed.py"), *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def test_a_flag_beats_the_environment_and_that_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('input = "from-file"\noutput = "from-file"\nbackbone = "resnet18"\npart_rows = 7\n')
    flags = vars(parser().parse_args(["--config", str(file), "--output", "from-flag"]))
    config = gather(flags, {"EMBED_OUTPUT": "from-environment", "EMBED_BACKBONE": "resnet34"})
    assert (config.input, config.output) == (("from-file",), "from-flag")
    assert (config.backbone, config.part_rows) == ("resnet34", 7)


def test_an_input_in_the_file_may_have_spaces_and_a_variable_separates_by_them(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('input = "/my shards/"\noutput = "out"\n')
    assert gather({"config": str(file)}, {}).input == ("/my shards/",)
    assert gather({"config": str(file)}, {"EMBED_INPUT": "a.tar b.tar"}).input == ("a.tar", "b.tar")


def test_an_unknown_setting_in_the_file_is_named_with_the_known_ones(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('bakbone = "resnet18"\n')
    with pytest.raises(SettingsError, match=r"'bakbone'; did you mean backbone\? the known ones are "):
        gather({"config": str(file)}, {})
    file.write_text('nothing_like_it = "resnet18"\n')
    with pytest.raises(SettingsError, match=r"unknown setting 'nothing_like_it'; the known ones are "):
        gather({"config": str(file)}, {})


def test_a_setting_in_the_file_may_have_dashes_and_is_there_once(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('input = "in"\noutput = "out"\npart-rows = 7\n')
    assert gather({"config": str(file)}, {}).part_rows == 7
    file.write_text('input = "in"\noutput = "out"\npart-rows = 7\npart_rows = 8\n')
    with pytest.raises(SettingsError, match="part_rows is there twice, with dashes and with underscores"):
        gather({"config": str(file)}, {})


def test_a_variable_that_names_no_option_is_told_of(tmp_path: Path, run_job: RunJob) -> None:
    write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    options = ("--input", "in", "--output", "out", *SMALL, "--dry-run")
    done = run_job("embed.py", *options, EMBED_PARTROWS="5", EMBED_PART_ROWS="6", EMBED_TEST_X="1")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert told == [
        "WARNING   the variable EMBED_PARTROWS names no option: it is not used; did you mean EMBED_PART_ROWS?"
    ]


def test_help_names_every_setting_with_its_default() -> None:
    text = parser().format_help()
    for expected in ("--part-rows", "(default: 1024)", "EMBED_INPUT", "exit codes", "--max-error-fraction"):
        assert expected in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "out"), "input must be given"),
        (("--input", "nowhere.tar", "--output", "out"), "nowhere.tar"),
        (("--input", ".", "--output", "out", "--backbone", "resnet51"), "resnet50"),
        (("--input", ".", "--output", "out", "--part-rows", "0"), "part_rows must be at least 1, got 0"),
        (("--input", "s3://key:secret-word@bucket/x.tar", "--output", "out"), "must not carry credentials"),
    ],
)
def test_wrong_settings_end_with_2_before_ray_starts(
    run_job: RunJob, arguments: tuple[str, ...], message: str
) -> None:
    done = run_job("embed.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "secret-word" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_an_old_pillow_where_the_job_starts_ends_it_with_2_before_any_work(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    options = ("--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *SMALL)
    command = [sys.executable, "-c", _WITH_OLD_PILLOW, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "2 2\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    said = f"exit 2: Pillow must be at least 13.0 on every node, got 12.3.0 on {socket.gethostname()}: "
    assert all(said in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(run_job: RunJob, tmp_path: Path) -> None:
    write_shards(tmp_path / "in")
    (tmp_path / "job.toml").write_text('key = "last-dot"')
    done = run_job("embed.py", "--config", "job.toml", "--input", "in", "--output", "out", "--dry-run", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "\nconfig    job.toml\nsettings  device cpu, key last-dot\n" in done.stdout
    assert "0 done, 3 pending" in done.stdout
    assert re.search(r"estimate  2\d samples, by the front of the first shard", done.stdout)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_packs_no_folder_of_images(run_job: RunJob, tmp_path: Path) -> None:
    write_bytes(str(tmp_path), "photos/2024/a.jpg", encode(photo(1)))
    done = run_job("embed.py", "--input", "photos/", "--output", "out", "--dry-run", *SMALL)
    assert done.returncode == 0, done.stderr
    told = rf"to pack   1 image of {tmp_path}/photos \(\d.\d KiB\) into 1 shard in {tmp_path}/out/packed\n"
    assert re.search(told, done.stdout)
    assert "shards    0 done, 0 pending, 0 B to read; 1 to pack\n" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_session")
def test_a_folder_of_images_is_packed_and_embedded(run_job: RunJob, tmp_path: Path) -> None:
    write_bytes(str(tmp_path), "photos/2024/a.b.jpg", encode(photo(1)))
    done = run_job("embed.py", "--input", "photos/", "--output", "out", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"packing   1 image of {tmp_path}/photos (")
    assert f"input     {tmp_path}/photos: 1 shard\n" in done.stdout
    assert "to pack" not in done.stdout
    assert [row["image_id"] for row in rows(tmp_path / "out")] == ["2024/a.b.jpg"]


def test_a_run_on_an_output_that_another_holds_ends_with_75(run_job: RunJob, tmp_path: Path) -> None:
    write_shards(tmp_path / "in")
    job = ("embed.py", "--input", "in", "--output", "out", *SMALL)
    with hold(str(tmp_path / "out"), print):
        done = run_job(*job)
        assert done.returncode == 75
        assert re.search(rf"out is held by run \w+, process {os.getpid()} on", done.stderr)
        assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("ray_session")
def test_a_job_with_a_broken_shard_ends_with_3_and_one_of_another_setting_with_2(
    run_job: RunJob, tmp_path: Path
) -> None:
    shards = write_shards(tmp_path / "in", num_shards=2)
    (shards / "photos-00000.tar").write_bytes((shards / "photos-00000.tar").read_bytes()[:3000])
    job = ("embed.py", "--input", shards, "--output", tmp_path / "out", *SMALL)
    done = run_job(*job)
    assert done.returncode == 3, done.stderr
    assert "BROKEN    photos-00000: cut" in done.stdout
    assert done.stdout.splitlines()[-1] == (
        "exit 3: 1 of 2 shards is incomplete. Replace photos-00000.tar and run the same command again. "
        f"See {tmp_path}/out/report.html."
    )
    stored_report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (stored_report["exit_code"], stored_report["schema_version"]) == (3, 1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<p class="verdict warn"><strong>Incomplete shards</strong><span>Exit code 3: 1 of 2 shards' in page
    done = run_job(*job, "--normalize")
    assert done.returncode == 2
    assert "embed.py: exit 2: " in done.stderr
    assert "normalize: output false, this run true" in done.stderr


NUM_SHARDS = 10
# The images that engines are tried on come from other shards.
HELD = {f"/in/s-{number:05d}.tar" for number in (4, 8)}


def large_shards(folder: Path) -> dict[str, bytes]:
    """Shards of few images, each large enough to be read by a task of its own."""
    ballast = ("ballast.bin", bytes(17 * 2**20))
    files = {}
    for shard in range(NUM_SHARDS):
        members = [(f"{shard:02d}-{i:03d}.jpg", encode(photo(12 * shard + i))) for i in range(12)]
        path = write_tar(folder / "shard.tar", [*members, ballast])
        files[f"/in/s-{shard:05d}.tar"] = path.read_bytes()
    return files


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_stopped_driver_loses_nothing_and_no_finished_shard_is_opened_again(
    tmp_path: Path, run_job: RunJob
) -> None:
    """By SIGTERM, as clusters stop a job; SIGKILL at any moment is in test_kills.py."""
    with WebServer(Kind(index=True, etags=False), large_shards(tmp_path)) as server:

        def options(output: Path) -> list[str]:
            job = ["--input", f"{server.url}/in/", "--output", str(output), *SMALL, "--precision", "fp32"]
            return [*job, "--part-rows", "8"]

        out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
        # Whatever else the machine does, the run is not over before it is stopped.
        server.held = HELD
        process = begin_job(*options(out), stderr=subprocess.STDOUT, **ray_here())
        deadline = time.monotonic() + 240
        while len(list((out / "embeddings").glob("*-last.parquet"))) < 3:
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 143, output
        assert "run the same command again" in output
        before = stored(out)
        done = {name.split("/")[1].split(".")[0] for name in before if name.endswith("-last.parquet")}
        assert 3 <= len(done) <= NUM_SHARDS - len(HELD)
        server.released.set()
        server.read_paths.clear()
        again = run_job("embed.py", *options(out))
        assert again.returncode == 0, again.stdout + again.stderr
        read = {Path(path).stem for path in server.read_paths}
        assert {Path(path).stem for path in HELD} <= read
        assert not read & {name for name in done if complete(before, name)}
        whole = prepare_job(gather(vars(parser().parse_args(options(undisturbed))), {}))
        assert run(whole, make_plan(whole.shards, whole.config.output), UNHEARD, InProcess())["exit_code"] == 0
        after = stored(out)
        assert after == stored(undisturbed)
        assert {name: after[name] for name in before} == before
        assert not (out / ".tmp").exists()


def begun_ray(pid: int) -> bool:
    """Whether a process is inside `ray.init`, which starts others."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return any(Path(f"/proc/{child}/comm").read_text() == "gcs_server\n" for child in children)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("moment", ["while Ray starts", "after Ray has ended"])
def test_a_job_that_is_stopped_where_ray_has_a_say_about_signals_still_says_how_it_ends(
    moment: str, tmp_path: Path
) -> None:
    write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    out = tmp_path / "out"
    options = ("--input", str(tmp_path / "in"), "--output", str(out), *SMALL, "--precision", "fp32")
    awaited = "plan" if moment == "while Ray starts" else "summary"
    # Ray's start is that of a Ray of its own; its end is the same for one that was joined.
    environment = {} if awaited == "plan" else ray_here()
    process = begin_job(*options, "--log-format", "json", **environment)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if f'"event": "{awaited}"' in line:
            break
    while awaited == "plan" and not begun_ray(process.pid):
        assert process.poll() is None, lines
        time.sleep(0.02)
    process.terminate()
    lines += process.communicate(timeout=120)[0].splitlines()
    end = json.loads(lines[-1])
    assert (end["event"], end["exit_code"]) == ("end", process.returncode), lines
    # In the second case all is stored, and the page alone is given up.
    assert process.returncode in ((143,) if awaited == "plan" else (0, 143)), lines
    assert not (out / ".lease").exists()


def complete(files: dict[str, bytes], shard: str) -> bool:
    return sum(name.startswith(f"embeddings/{shard}.") for name in files) == 2


# All that a job does of Ray before it embeds, without what else it imports.
CONNECT = """
import sys
from shard_embedder.jobs.support.command import Parser, run_command
from shard_embedder.jobs.support.connection import connect
sys.exit(run_command(Parser("connect.py"), [], lambda flags: connect() or 0))
"""
_SECOND_EACH = {"RAY_gcs_rpc_server_connect_timeout_s": "1", "RAY_py_gcs_connect_timeout_s": "1"}


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_given_up_with_its_address(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    embed = [str(ROOT / "jobs" / "embed.py"), "--input", "in", "--output", "out", *SMALL]
    with socket.socket() as closed, socket.socket() as silent:
        # Ray takes 127.0.0.1 for the node's own address.
        closed.bind(("127.0.0.2", 0))
        silent.bind(("127.0.0.2", 0))
        silent.listen()
        addresses = [f"127.0.0.2:{one.getsockname()[1]}" for one in (closed, silent)]

        def run(command: list[str], address: str) -> subprocess.CompletedProcess[str]:
            # One try takes 4 s, where Ray waits a second for each answer instead of 5 or 30. Its own default is 20
            # tries, which is more than the limit; the rest is the start of a process on a busy machine.
            return subprocess.run(
                [sys.executable, *command],
                cwd=tmp_path,
                env={**os.environ, **_SECOND_EACH, "RAY_ADDRESS": address},
                capture_output=True,
                text=True,
                timeout=70,
                check=False,
            )

        with ThreadPoolExecutor() as pool:
            for address, done in zip(addresses, pool.map(run, (embed, ["-c", CONNECT]), addresses), strict=True):
                assert done.returncode == 2
                assert f"Ray cannot be reached or started on the cluster at {address}: " in done.stderr
