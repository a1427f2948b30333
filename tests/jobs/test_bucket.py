"""The commands of docs/bucket.md, as they stand there, on a bucket of a real S3 server."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Done, S3Server, write_shards

PAGE = (ROOT / "docs" / "bucket.md").read_text()
BLOCKS = [textwrap.dedent(text) for text in re.findall(r"^ *```sh\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)]
# A backbone that needs no download and is quick.
SMALL = {
    "EMBED_BACKBONE": "squeezenet1_1",
    "EMBED_WEIGHTS": "random:0",
    "EMBED_IMAGE_SIZE": "64",
    "EMBED_PRECISION": "fp32",
}


@pytest.mark.usefixtures("ray_session")
def test_five_commands_go_from_a_bucket_of_shards_to_a_proven_output(
    tmp_path: Path, s3_server: S3Server, s3_url: str, run_job: Callable[..., Done]
) -> None:
    export, *commands = BLOCKS
    assert len(commands) == 4
    # The server's, but for its endpoint, which the page names beside them.
    named = set(re.findall(r"(AWS_\w+)=", export)) | {"AWS_ENDPOINT_URL"}
    assert named == set(s3_server.environment)
    assert "set `AWS_ENDPOINT_URL`, too" in PAGE
    s3_server.filesystem().put(str(write_shards(tmp_path / "shards")), f"{s3_url}/shards", recursive=True)
    printed = []
    for command in commands:
        python, script, *arguments = shlex.split(command.replace("s3://my-bucket", s3_url))
        assert python == "python"
        done = run_job(script.removeprefix("jobs/"), *arguments, **SMALL)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        printed.append(done.stdout)
    plan, first, rest, verified = printed
    assert "shards    0 done, 3 pending" in plan
    assert re.search(r"shards done now +1 of 3 \(0 before\)", first)
    assert re.search(r"shards done now +2 of 3 \(1 before\)", rest)
    assert "tars        3 compared" in verified
    assert f"proven: {s3_url}/embeddings" in verified
