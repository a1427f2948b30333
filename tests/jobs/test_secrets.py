"""No secret leaks: not from what a failing run leaves behind, and not from a URL or a setting that holds one."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shard_embedder.jobs.embed import main
from shard_embedder.pipeline.core.storage import locate
from tests.conftest import S3Server, write_shard
from tests.faults.proxy import FaultProxy

RunProcess = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("--backbone", "squeezenet1_1", "--weights", "random:3", "--device", "cpu")
SMALL += ("--precision", "fp32", "--part-rows", "4")


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
            job = ("embed.py", "--input", "s3://bkt/in", "--output", "s3://bkt/out", *SMALL, "--max-passes", "1")
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
