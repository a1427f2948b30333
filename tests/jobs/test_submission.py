"""What is submitted and refused, what is uploaded for a job, and how its log is shown: without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from shard_embedder.jobs import submit
from shard_embedder.jobs.support.upload import MAX_BYTES, check_size, upload_sizes
from shard_embedder.pipeline.core.errors import SettingsError
from tests.conftest import ROOT, Done


def test_a_working_folder_that_ray_would_refuse_is_told_with_what_is_large(tmp_path: Path) -> None:
    for name, size in {
        "data/a.bin": 5000,
        "data/b.bin": 4000,
        "model.pt": 3000,
        "code.py": 10,
        "tour/x": 9000,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    with pytest.raises(
        SettingsError, match=r"at most 11\.7 KiB.*most of it in data \(.*\), model\.pt \(.*\.rayignore"
    ):
        check_size(str(tmp_path), submit.EXCLUDES, 12_000)
    (tmp_path / ".rayignore").write_text("data/\n")
    check_size(str(tmp_path), submit.EXCLUDES, 12_000)
    (tmp_path / ".rayignore").unlink()
    (tmp_path / ".gitignore").write_text("*.bin\n")
    assert set(upload_sizes(str(tmp_path), submit.EXCLUDES)) == {"model.pt", "code.py", ".gitignore"}


def test_what_is_measured_is_what_ray_uploads_and_its_limit_is_the_dashboard_s(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    for number in range(50):
        (folder / f"folder-{number % 7}").mkdir(parents=True, exist_ok=True)
        (folder / f"folder-{number % 7}" / f"ü-{number}.py").write_bytes(bytes(number * 100))
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(bytes(10_000))
    package = tmp_path / "package.zip"
    create_package(str(folder), package, include_gitignore=True, excludes=list(submit.EXCLUDES))
    assert 0 <= package.stat().st_size - upload_sizes(str(folder), submit.EXCLUDES).total() < 1000
    assert MAX_BYTES == 100 * 2**20


def test_a_log_is_printed_line_by_line_without_secrets_and_commands(capsys: pytest.CaptureFixture[str]) -> None:
    log = submit._LogPrinter()
    for text in ("a\x1b[36m(pid 1)\x1b[0m b\nreading s3://key:hun", "ter2@bkt/x\r\n\x1b]0;t\x07", "end"):
        log.write(text)
    log.end()
    assert capsys.readouterr().out == "a(pid 1) b\nreading s3://***@bkt/x\n\\x1b]0;t\\x07end\n"


def test_a_script_that_would_not_be_uploaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"jobs/embed.py must be in --working-dir, got '.*: name a clone"):
        submit.check_script(["jobs/embed.py"], str(tmp_path))
    submit.check_script(["jobs/embed.py"], str(ROOT))
    submit.check_script(["shard-embedder", "embed"], str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "EMBED_NOT_SET_ANYWHERE"], "--env must name a variable that is set, got EMBED_NOT_SET_ANYWHERE"),
        (["--env", "AWS_SECRET_ACCESS_KEY"], "--env must not name a credential, got AWS_SECRET_ACCESS_KEY"),
        (["--env", "HF_TOKEN"], "--env must not name a credential, got HF_TOKEN"),
        (["--env", "EMBED_INPUT"], "--env must not name a URL with credentials, got EMBED_INPUT"),
        (["--", "jobs/embed.py", "--input", "s3://key:sesame@bkt/in"], "the command must not carry credentials"),
        (["--", "jobs/embed.py", "--weights=https://h/w?key=sesame"], "the command must not carry credentials"),
        (["--", "env", "AWS_SECRET_ACCESS_KEY=sesame", "jobs/embed.py"], "the command must not carry credentials"),
        (["--address", "http://me:sesame@127.0.0.1:nowhere"], "submit.py: the cluster cannot be reached"),
        (["--backbone", "resnet50"], "unrecognized arguments: --backbone resnet50"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_started(
    run_job: Callable[..., Done], arguments: list[str], message: str
) -> None:
    secret_input = "s3://bkt/in?X-Amz-Signature=sesame"
    done = run_job(
        "submit.py", *arguments, AWS_SECRET_ACCESS_KEY="sesame", HF_TOKEN="sesame", EMBED_INPUT=secret_input
    )
    assert done.returncode == (69 if "--address" in arguments else 2)
    assert message in done.stderr
    assert "sesame" not in done.stdout + done.stderr
