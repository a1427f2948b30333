"""Faults through whole jobs: a failing network, a full disk, files changed by hand, secrets that must not leak."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from shard_embedder.jobs.embed import main
from shard_embedder.jobs.verify import main as verify_main
from shard_embedder.pipeline.core import storage
from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.storage import locate
from shard_embedder.pipeline.output.names import UNCOUNTED_FILE
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.run.on_ray import OnRay
from shard_embedder.pipeline.run.passes import Watcher, run
from shard_embedder.pipeline.verify.proof import verify
from tests.conftest import Done, S3Server, SmallDisk, sample_members, start_ray, write_tar
from tests.faults.proxy import FaultProxy

RunJob = Callable[..., Done]
RunProcess = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("--backbone", "squeezenet1_1", "--weights", "random:3", "--image-size", "64", "--device", "cpu")
SMALL += ("--precision", "fp32", "--part-rows", "4")
SAMPLES = 6
OUTPUT_FILES = {"run.json", "embeddings", "report.json", "report.html", "reports"}
# Above this a shard is a read task of its own, so that its fault keeps no other shard waiting.
ALONE_BYTES = 33 * 2**20


def write_shard(path: Path, seed: int, *, alone: bool = False) -> Path:
    """A shard of `SAMPLES` samples in two parts; `alone` makes it large by a hidden file that is skipped."""
    members = [member for i in range(SAMPLES) for member in sample_members(f"{path.stem}-{i}", seed + i)]
    return write_tar(path, members + ([(".pad", bytes(ALONE_BYTES))] if alone else []))


def rows(output: Path, folder: str = "embeddings") -> list[dict[str, Any]]:
    found = [row for path in sorted((output / folder).rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return sorted(found, key=lambda row: (row["shard"], -1 if row["sample_index"] is None else row["sample_index"]))


@pytest.fixture(scope="module")
def between(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A proxy before the store, for this process and the workers of a Ray of its own."""
    with FaultProxy(s3_server.environment["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage._filesystem.cache_clear()
        yield proxy
    storage._filesystem.cache_clear()


@pytest.fixture(scope="module")
def ray_session(between: FaultProxy) -> Iterator[None]:
    ray.shutdown()
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture
def proxy(between: FaultProxy) -> Iterator[FaultProxy]:
    between.rules.clear()
    between.requests.clear()
    yield between
    between.rules.clear()


# Shard, whether it is read in a task of its own, then method, fault and how often.
PASSING = [
    ("a-burst", False, "GET", "slow_down", 5),
    ("b-reset", False, "GET", "reset", 2),
    ("c-cut", False, "GET", "cut", 2),
    ("d-short", False, "GET", "short", 2),
    ("e-gone", False, "GET", "missing", 1),
    ("f-put-burst", False, "PUT", "slow_down", 4),
    ("g-put-lost", False, "PUT", "lost", 1),
    ("h-put-late", False, "PUT", "late", 1),
    ("i-stall", True, "GET", "stall", 1),
    ("j-silent", True, "GET", "silent", 1),
]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_job_through_faults_that_pass_ends_as_one_without_them(
    run_job: RunJob, proxy: FaultProxy, s3_server: S3Server, s3_url: str, tmp_path: Path
) -> None:
    direct = s3_server.filesystem()
    shards, newer = tmp_path / "in", tmp_path / "newer"
    for number, (name, alone, method, fault, times) in enumerate(PASSING):
        write_shard(shards / f"{name}.tar", 10 * number, alone=alone)
        proxy.add(fault, rf"/{name}\.", method, times)
    for number, (name, method) in enumerate({"k-replaced-before": "GET", "l-replaced-after": "HEAD"}.items()):
        write_shard(shards / f"{name}.tar", 500 + 10 * number)
        write_shard(newer / f"{name}.tar", 900 + 10 * number)
        proxy.meanwhile(
            lambda name=name: direct.put_file(str(newer / f"{name}.tar"), f"{s3_url}/in/{name}.tar"),
            rf"/{name}\.tar",
            method,
        )
    direct.put(str(shards), f"{s3_url}/in", recursive=True)
    proxy.add("slow_down", "list-type=2", "GET", 2)
    proxy.add("empty", "list-type=2", "GET", 1)
    proxy.add("slow_down", "delete", "POST", 2)
    proxy.add("slow_down", r"run\.json", "PUT", 1)
    proxy.add("lost", r"report\.json", "PUT", 1)
    done = run_job("embed.py", "--input", f"{s3_url}/in", "--output", f"{s3_url}/out", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exit 0: every sample is one stored row" in done.stdout
    assert not [rule for rule in proxy.rules if rule.times > 0], "every fault happened"
    for path in newer.iterdir():
        path.rename(shards / path.name)
    assert embed(shards, tmp_path / "expected")["balanced"]
    direct.get(f"{s3_url}/out/", str(tmp_path / "out"), recursive=True)
    assert rows(tmp_path / "out") == rows(tmp_path / "expected")
    assert not rows(tmp_path / "out", "errors")
    assert verify(str(tmp_path / "out")).findings == []


# Shard, then the fault of each of its GETs (and HEADs where both), and what its error row must say.
LASTING = [
    ("b-denied", "GET", "denied", "shard fault: not permitted to read it: PermissionError"),
    ("c-gone", "GET|HEAD", "missing", "shard fault: listed, but not found when it was read"),
    ("d-busy", "GET", "slow_down", r"shard fault: reading bytes 0 to \d+ failed \d+ times in \d+ s, at last with"),
    ("e-reset", "GET", "reset", r"shard fault: reading bytes 0 to \d+ failed \d+ times in \d+ s, at last with"),
    ("f-stall", "GET", "stall", r"shard fault: reading bytes 0 to \d+ failed \d+ times in \d+ s, at last with"),
    ("g-short", "GET", "short", r"shard fault: reading bytes 0 to \d+ failed \d+ times in \d+ s, at last with"),
]
if os.environ.get("EMBED_TEST_FAULTS") != "all":
    # Each of the others takes a worker for a minute, and is tried in test_network.py with less patience.
    LASTING = LASTING[:2]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_job_through_faults_that_last_names_each_shard_and_the_next_one_makes_it_whole(
    run_job: RunJob, proxy: FaultProxy, s3_server: S3Server, s3_url: str, tmp_path: Path
) -> None:
    direct = s3_server.filesystem()
    shards = tmp_path / "in"
    write_shard(shards / "a-good.tar", 0)
    for number, (name, method, fault, _) in enumerate(LASTING, 1):
        write_shard(shards / f"{name}.tar", 10 * number, alone=True)
        proxy.add(fault, rf"/in/{name}\.", method, times=10_000)
    direct.put(str(shards), f"{s3_url}/in", recursive=True)
    job = ("embed.py", "--input", f"{s3_url}/in", "--output", f"{s3_url}/out", *SMALL)
    done = run_job(*job, "--max-passes", "1")
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(r"^exit 3: \d+ of \d+ shards are incomplete\. ", done.stdout.splitlines()[-1])
    direct.get(f"{s3_url}/out/", str(tmp_path / "out"), recursive=True)
    assert [row["shard"] for row in rows(tmp_path / "out")] == ["a-good"] * SAMPLES
    errors = rows(tmp_path / "out", "errors")
    assert [row["shard"] for row in errors] == [name for name, *_ in LASTING], "one row a shard"
    for row, (name, _, _, reason) in zip(errors, LASTING, strict=True):
        assert (row["image_id"], row["sample_index"], row["stage"]) == (None, None, "read")
        assert re.match(reason, row["reason"]), row
        assert f"BROKEN    {name}: {row['reason'].removeprefix('shard fault: ')}" in done.stdout
        # One layer of retries: three on top of each other would be some hundred requests.
        assert proxy.count("GET", rf"/in/{name}\.") <= 20
    proxy.rules.clear()
    again = run_job(*job)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"1 done, {len(LASTING)} pending ({len(LASTING)} broken before)" in again.stdout
    assert embed(shards, tmp_path / "expected")["balanced"]
    direct.get(f"{s3_url}/out/", str(tmp_path / "whole"), recursive=True)
    assert rows(tmp_path / "whole") == rows(tmp_path / "expected")
    assert not rows(tmp_path / "whole", "errors")


def stored(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*.parquet"))}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_full_disk_ends_the_job_with_its_path_and_with_space_again_the_next_goes_on(
    run_job: RunJob, small_disk: SmallDisk, tmp_path: Path
) -> None:
    shards, out = tmp_path / "in", small_disk.folder / "out"
    for number in range(20):
        write_shard(shards / f"s-{number:02d}.tar", 10 * number)
    job = ("embed.py", "--input", shards, *SMALL, "--output")
    ballast = small_disk.fill(0)
    none = run_job(*job, out)
    assert none.returncode == 2, none.stdout + none.stderr
    assert f"cannot write to {out}" in none.stderr
    assert "No space left on device" in none.stderr
    assert not [path for path in out.rglob("*") if path.is_file()]
    ballast.unlink()

    full = run_job(*job, out)
    assert full.returncode == 4, full.stdout + full.stderr
    assert re.search(rf"PROBLEM   pass 1: .*No space left on device: '{out}/(embeddings|errors)/s-\d\d", full.stdout)
    assert "pass 2" not in full.stdout, "what cannot be stored is not embedded again"
    assert full.stdout.splitlines()[-1].startswith("exit 4: ")
    before = stored(out)
    assert before
    # The report may be what there was no space for.
    assert {path.name for path in out.iterdir()} <= {*OUTPUT_FILES, UNCOUNTED_FILE}

    small_disk.resize(8192)
    again = run_job(*job, out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert embed(shards, tmp_path / "expected")["balanced"]
    assert stored(out) == stored(tmp_path / "expected")
    assert {name: stored(out)[name] for name in before} == before, "what was stored stayed as it was"
    assert {path.name for path in out.iterdir()} == OUTPUT_FILES

    # A run without work writes a report only where there is none of a run that had some. A page of memory is left,
    # which the run needs to say that it runs.
    (out / "report.json").unlink()
    small_disk.fill(4096)
    unreported = run_job(*job, out)
    assert unreported.returncode == 4, unreported.stdout + unreported.stderr
    message = f"the report cannot be stored: OSError: [Errno 28] No space left on device: '{out}/report."
    (last,) = unreported.stdout.splitlines()[-1:]
    assert last.startswith("exit 4: ")
    assert message in last
    assert last.endswith("Run the same command again.")
    assert stored(out) == stored(tmp_path / "expected")


def everything(*folders: Path) -> dict[str, bytes]:
    """All files below `folders`, whatever they are; Parquet also as its footer's metadata and its values."""
    found = {}
    for path in (path for folder in folders for path in folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found[str(path)] = path.read_bytes()
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                found[f"{path} decompressed"] = repr((table.schema.metadata, table.to_pydict())).encode()
    return found


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its logs; sockets below it have paths of 107 bytes at most."""
    folder = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_nothing_that_a_failing_run_leaves_holds_a_secret(
    run_process: RunProcess, ray_folder: Path, tmp_path: Path
) -> None:
    secrets = {
        "AWS_ACCESS_KEY_ID": "AKIADISTINCTIVEKEYID",
        "AWS_SECRET_ACCESS_KEY": "Distinctive/Secret+Key0123456789",
    }
    server = S3Server(tmp_path / "s3")
    server.environment |= secrets
    server.start()
    try:
        with FaultProxy(server.environment["AWS_ENDPOINT_URL"]) as proxy:
            direct = server.filesystem()
            shards = tmp_path / "in"
            for number, name in enumerate(("a-good", "b-denied", "c-gone", "d-broken", "e-not-written")):
                write_shard(shards / f"{name}.tar", 10 * number)
            cut = (shards / "d-broken.tar").read_bytes()[:4000]
            (shards / "d-broken.tar").write_bytes(cut)
            direct.put(str(shards), "bkt/in", recursive=True)
            proxy.add("denied", r"/in/b-denied", "GET", 10_000)
            proxy.add("missing", r"/in/c-gone", "GET|HEAD", 10_000)
            proxy.add("denied", r"/out/embeddings/e-not-written", "PUT", 10_000)
            environment = {**server.environment, "AWS_ENDPOINT_URL": proxy.url, "RAY_TMPDIR": str(ray_folder)}
            job = ("embed.py", "--input", "s3://bkt/in", "--output", "s3://bkt/out", *SMALL, "--max-passes", "2")
            failed = run_process(*job, **environment)
            wrong = {"AWS_SECRET_ACCESS_KEY": "Wrong/Secret+Key0123456789", "AWS_SESSION_TOKEN": "WrongToken=="}
            refused = run_process(*job, **{**environment, **wrong})
            direct.get("bkt/out/", str(tmp_path / "out"), recursive=True)
    finally:
        server.stop()
    assert failed.returncode == 4, failed.stdout + failed.stderr
    assert refused.returncode == 2, refused.stdout + refused.stderr
    # The server keeps its own keys, and no run left them there.
    left = everything(ray_folder, *(path for path in tmp_path.iterdir() if path.name not in ("s3", "in")))
    assert [name for name in left if "/session_" in name], "Ray's logs were looked at"
    assert [name for name in left if name.endswith("decompressed")], "Parquet was looked at"
    for number, text in enumerate((failed.stdout, failed.stderr, refused.stdout, refused.stderr)):
        left[f"output {number}"] = text.encode()
    for secret in [*secrets.values(), *wrong.values()]:
        told = [name for name, data in left.items() if secret.encode() in data]
        assert not told, f"{secret} is in {told}"


def embed(input: Path, output: Path, **settings: Any) -> dict[str, Any]:
    """One run in the shared Ray session, with its report."""
    values = {"backbone": "squeezenet1_1", "weights": "random:3", "image_size": "64", "precision": "fp32"}
    job = prepare_job(parse({"input": [str(input)], "output": str(output), **values, "part_rows": 4, **settings}))
    plan = make_plan(job.shards, job.config.output)
    return run(
        job, plan, Watcher(lambda job, resources: None, lambda number, pending: None, lambda tally: None), OnRay()
    )


@pytest.fixture(scope="module")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    assert "MEND  then run embed.py again" in told
    for path in advice:
        Path(path).unlink()
    report = embed(changing / "in", out)
    assert report["balanced"]
    assert stored(out) == before
    assert verify_main([str(out)]) == 0


SECRET = "Hunter2SecretValue"
# Nobody listens there: what is refused is refused before a request is made.
HOST = "127.0.0.1:9"
SECRET_URLS = [
    f"https://user:{SECRET}@{HOST}/x.tar",
    f"HTTPS://user:{SECRET}@{HOST}/x.tar",
    f"https://{SECRET}@{HOST}/x.tar",
    f"https:user:{SECRET}@{HOST}/x.tar",
    f"https://{HOST}/x.tar?X-Amz-Credential=AKIA&X-Amz-Signature={SECRET}",
    f"https://{HOST}/{{0..3}}.tar?X-Amz-Security-Token={SECRET}",
    f"https://{HOST}/{{0..3.tar?X-Amz-Signature={SECRET}",
    f"https://{HOST}/x.tar?X-Goog-Signature={SECRET}",
    f"https://{HOST}/x.tar?sv=2026-01-01&sig={SECRET}",
    f"https://{HOST}/x.tar?api_key={SECRET}",
    f"https://{HOST}/x.tar#access_token={SECRET}",
    f"https://{HOST}/list.txt?token={SECRET}",
    f"s3://AKIA:{SECRET}@bkt/x.tar",
    f"s3://AKIA:{SECRET}/with/slashes@bkt/x.tar",
    f"s3:///AKIA:{SECRET}@bkt/x.tar",
    f"s3:AKIA:{SECRET}@bkt/x.tar",
    f"s3://{{a,b}}:{SECRET}@bkt/x.tar",
    f"s3://bkt/x.tar?X-Amz-Signature={SECRET}",
    f"gs://bkt/x.tar?GoogleAccessId=a&Signature={SECRET}",
    f"simplecache::https://user:{SECRET}@{HOST}/x.tar",
]


@pytest.mark.parametrize("url", SECRET_URLS)
@pytest.mark.parametrize("way", ["input", "output", "weights", "environment", "config file", "list file"])
def test_a_url_with_credentials_is_refused_wherever_it_stands_and_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, way: str, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"input": "in", "output": "out", "weights": "random:3"}
    if way == "list file":
        (tmp_path / "list.txt").write_text(f"# shards\n{url}\n")
        values["input"] = "list.txt"
    elif way == "environment":
        del values["input"]
        monkeypatch.setenv("EMBED_INPUT", url)
    elif way == "config file":
        del values["input"]
        (tmp_path / "job.toml").write_text(f'input = ["{url}"]\n')
        values["config"] = "job.toml"
    else:
        values[way] = url
    assert main([part for name, value in values.items() for part in (f"--{name}", value)]) == 2
    told = "".join(capsys.readouterr())
    assert "must not carry credentials" in told
    assert SECRET not in told


@pytest.mark.parametrize(
    "arguments",
    [
        ["--inptu", f"s3://AKIA:{SECRET}@bkt/x.tar"],
        ["--config", f"https://user:{SECRET}@{HOST}/job.toml"],
        ["--config", "odd.toml"],
        ["--input", "in", "--output", "out", "--backbone", f"https://user:{SECRET}@{HOST}/x"],
        ["--input", "in", "--output", f"https://{SECRET}@{HOST}/out:"],
    ],
)
def test_a_secret_that_stands_where_none_is_expected_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.toml").write_text(f'input = ["https://user:{SECRET}@{HOST}/x.tar", 5]\noutput = "out"\n')
    with pytest.raises(SystemExit) if arguments[0] == "--inptu" else contextlib.nullcontext():
        assert main(arguments) == 2
    told = "".join(capsys.readouterr())
    assert told
    assert SECRET not in told


@pytest.mark.parametrize(
    "name",
    [
        "/data/10:30:00@v1.tar",
        "/data/a?key=1&token=2.tar",
        "s3://bkt/a@b.tar",
        "s3://bkt/x/a:b@c.tar",
        "C:x",
        "{0..3}",
    ],
)
def test_an_ordinary_name_is_not_taken_for_one_with_credentials(name: str) -> None:
    assert locate(name)[1].endswith(name.rpartition("/")[2])
