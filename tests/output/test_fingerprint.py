"""What made an output, and who may add to it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.errors import OutputError, StoredDataError
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.output.fingerprint import (
    Fingerprint,
    check_against_output,
    make_fingerprint,
    read_fingerprint,
    write_fingerprint,
)
from shard_embedder.pipeline.output.names import RUN_FILE
from shard_embedder.pipeline.output.settings import OutputSettings
from tests.conftest import ROOT

PREPROCESS = Preprocess(256, (224, 224), "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def made(
    precision: str = "fp32", prefix: str = "s3://bkt/in", versions: str = "2.15", **settings: Any
) -> Fingerprint:
    config = parse({"input": ["in"], "output": "out", **settings})
    made = OutputSettings.of(
        replace(config, precision=precision),
        backbone="resnet18",
        weights_sha256="ab" * 32,
        preprocess=PREPROCESS,
        embedding_shape=(512,),
    )
    return make_fingerprint(made, weights_name="DEFAULT", input_prefix=prefix, versions={"torch": versions})


def test_an_output_says_what_made_it(place: str) -> None:
    assert read_fingerprint(place) is None
    asked = made(keep=["cls", "json:a.b=float64"], id="json:id")
    write_fingerprint(place, asked)
    assert read_fingerprint(place) == asked
    assert check_against_output(asked, read_fingerprint(place)) == asked


def test_the_digest_is_the_same_in_every_process_and_of_the_settings_alone() -> None:
    script = "import sys; from tests.output.test_fingerprint import made; sys.stdout.write(made().digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONPATH": f"{ROOT}", "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert digests == {made().digest} == {made(versions="3.0").digest}
    reordered = dict(reversed(made().to_json()["settings"].items()))
    assert OutputSettings.from_json(reordered) == made().settings


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        ("dtype", {"dtype": "float16"}, 'dtype: output "float32", this run "float16"'),
        ("features", {"features": "map"}, 'features: output "pooled", this run "map"'),
        ("normalize", {"normalize": True}, "normalize: output false, this run true"),
        ("part_rows", {"part_rows": 5}, "part_rows: output 1024, this run 5"),
        ("id", {"id": "json:id"}, 'id: output "key", this run "json:id=string"'),
        ("keep", {"keep": ["cls"]}, 'keep: output [], this run ["cls=int64"]'),
        ("precision", {"precision": "bf16"}, 'precision: output "fp32", this run "bf16"'),
        ("decode", {"decode": "gpu"}, 'decode: output "cpu", this run "gpu"'),
        ("decode", {"decode": "gpu:0.5"}, 'decode: output "cpu", this run "gpu:0.5"'),
        ("decode", {"decode": "scaled"}, 'decode: output "cpu", this run "scaled"'),
        ("max_pixels", {"max_pixels": 1000}, "max_pixels: output 67108864, this run 1000"),
        ("key", {"key": "last-dot"}, 'key: output "first-dot", this run "last-dot"'),
        ("image_member", {"image_member": "png"}, 'image_member: output null, this run "png"'),
    ],
)
def test_another_setting_is_refused_and_named(name: str, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(OutputError) as caught:
        check_against_output(made(**changed), made())
    assert str(caught.value).splitlines()[1:] == [f"  {told}"]


def test_every_difference_is_named() -> None:
    with pytest.raises(OutputError) as caught:
        check_against_output(made(dtype="float16", normalize=True), made("bf16"))
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "dtype",
        "normalize",
        "precision",
    ]


@pytest.mark.parametrize(
    "changed",
    [
        {"prefix": "s3://bkt/other"},
        {"limit": 3},
        {"actors": "4"},
        {"batch_size": 3},
        {"device": "cpu"},
        {"max_passes": 9},
    ],
)
def test_what_does_not_change_a_vector_may_differ(changed: dict[str, Any]) -> None:
    assert check_against_output(made(**changed), made()).digest == made().digest


def test_other_versions_may_go_on_and_are_told_as_their_own() -> None:
    assert check_against_output(made(versions="3.0"), made()).versions["torch"] == "3.0"


def test_the_batch_size_of_an_output_is_told_to_who_goes_on() -> None:
    begun = replace(made(), versions={"torch": "2.15"}, batch_size={"cuda": 512})
    assert check_against_output(made(versions="3.0", batch_size="auto"), begun).batch_size == {"cuda": 512}
    assert check_against_output(made(versions="3.0"), begun).versions["torch"] == "3.0"


def test_an_automatic_precision_follows_the_output() -> None:
    assert check_against_output(made("auto"), None).settings.precision == "auto"
    assert check_against_output(made("auto"), made("bf16")) == made("bf16")
    assert check_against_output(made("auto"), made("fp32")).digest == made("fp32").digest
    with pytest.raises(OutputError, match='precision: output "bf16", this run "fp32"'):
        check_against_output(made("fp32"), made("bf16"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"max_pixels": None}, "max_pixels is None"),
        ({"max_pixels": ...}, "unknown or missing: max_pixels"),
        ({"colour": "blue"}, "unknown or missing: colour"),
        ({"format": 1}, "format must be 2, got 1"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, got 'int8'"),
        ({"decode": "gpu:0.50"}, "decode must be one of cpu, scaled, gpu, gpu:SHARE, got 'gpu:0.50'"),
        ({"embedding_shape": [2**70]}, "the sizes must be positive whole numbers, got [1180591620717411303424, "),
        ({"embedding_shape": "ab"}, "the sizes must be positive whole numbers, got ['a', 'b', "),
        ({"keep": ["cls=int3"]}, "the type of field 'cls=int3' must be one of"),
    ],
)
def test_settings_that_no_run_of_this_version_wrote_are_refused_and_named(changed: dict[str, Any], told: str) -> None:
    values = made().to_json()["settings"] | changed
    with pytest.raises(StoredDataError, match=re.escape(told)):
        OutputSettings.from_json({name: value for name, value in values.items() if value is not ...})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        "null",
        "{}",
        '{"settings": {}}',
        '{"settings": 5, "versions": {}, "fingerprint": ""}',
        '{"settings": {}, "versions": [], "fingerprint": ""}',
        '{"settings": {}, "versions": {}}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_broken_run_file_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / RUN_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    broken = (
        "is not a run.json of this pipeline|cannot be used: (it does not say what made|the settings are not of this)"
    )
    with pytest.raises(StoredDataError, match=broken):
        read_fingerprint(str(tmp_path))


def test_a_run_file_that_another_run_wrote_meanwhile_stays(tmp_path: Path) -> None:
    write_fingerprint(str(tmp_path), made("fp32"))
    before = (tmp_path / RUN_FILE).read_bytes()
    write_fingerprint(str(tmp_path), made("fp32"))
    with pytest.raises(OutputError, match='precision: output "fp32", this run "bf16"'):
        write_fingerprint(str(tmp_path), made("bf16"))
    assert (tmp_path / RUN_FILE).read_bytes() == before


def test_a_run_file_edited_by_hand_is_refused(tmp_path: Path) -> None:
    write_fingerprint(str(tmp_path), made())
    run = json.loads((tmp_path / RUN_FILE).read_text())
    run["settings"]["dtype"] = "float16"
    (tmp_path / RUN_FILE).write_text(json.dumps(run))
    with pytest.raises(OutputError, match="was changed by hand"):
        read_fingerprint(str(tmp_path))
