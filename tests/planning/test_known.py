"""What a run knows of its backbone from an earlier one is what it would find out itself; else it knows nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest

from pipeline.backbones.weights_spec import Weights
from pipeline.core.config import Config, parse
from pipeline.decoding.preprocess import Preprocess
from pipeline.planning.cache import Cache
from pipeline.planning.known import Known, look_up, make_key
from tests.conftest import ROOT, write_shards

PREPROCESS = Preprocess(256, (224, 224), "bilinear", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
CONSTANTS = np.arange(100, dtype=np.uint8)


def config_for(**settings: Any) -> Config:
    return parse({"input": ["in"], "output": "out", "backbone": "resnet18", "weights": "random:0", **settings})


def keep(cache: Cache, config: Config, weights: Weights) -> Known:
    known = Known("resnet18", weights, PREPROCESS, (512,), {"torch": "2"})
    _, kept = look_up(config, cache)
    assert kept is not None
    kept.keep(known, b"<graph/>", CONSTANTS)
    return known


def key(cache: Cache, **settings: Any) -> str:
    made = make_key(config_for(**settings), cache)
    assert made is not None
    return made


def test_what_was_kept_is_known(tmp_path: Path) -> None:
    cache, config = Cache(tmp_path), config_for()
    assert look_up(config, cache)[0] is None
    expected = keep(cache, config, Weights("random:0", "ab12", seed=0))
    known, kept = look_up(config, cache)
    assert known == expected
    assert kept is not None
    graph = kept.graph()
    assert graph is not None
    assert graph[0] == b"<graph/>"
    assert np.array_equal(graph[1], CONSTANTS)


def test_nothing_is_known_without_a_cache_or_for_a_gpu(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    keep(cache, config_for(), Weights("random:0", "ab12", seed=0))
    assert look_up(config_for(), None) == (None, None)
    assert look_up(config_for(device="cuda"), cache) == (None, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone": "resnet34"}, {"weights": "random:1"}, {"preprocess": "IMAGENET1K_V1"}, {"image_size": "96"},
        {"features": "map"}, {"normalize": True},
    ],
)  # fmt: skip
def test_another_setting_of_the_backbone_has_another_key(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert key(Cache(tmp_path), **settings) != key(Cache(tmp_path))


def test_settings_that_do_not_change_the_network_share_a_key(tmp_path: Path) -> None:
    others = {"input": ["other"], "output": "elsewhere", "precision": "bf16", "part_rows": 3, "id": "json:uid"}
    assert key(Cache(tmp_path), **others) == key(Cache(tmp_path))


@pytest.mark.parametrize("library", ["torch", "torchvision", "openvino", "safetensors"])
def test_another_build_of_a_library_has_another_key(
    tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import version

    before = key(Cache(tmp_path))
    # As installed, of the same version, and found before the one that is.
    info = tmp_path / f"{library}-{version(library)}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: {version(library)}\n")
    (info / "RECORD").write_text(f"{library}/__init__.py,sha256=other,1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert key(Cache(tmp_path)) != before
    (info / "direct_url.json").write_text('{"url": "file:///src", "dir_info": {"editable": true}}')
    assert make_key(config_for(), Cache(tmp_path)) is None
    (info / "direct_url.json").unlink()
    (info / "RECORD").unlink()
    assert make_key(config_for(), Cache(tmp_path)) is None


def test_timm_counts_for_its_own_backbones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    before, torchvision = key(Cache(tmp_path), backbone="timm/resnet18"), key(Cache(tmp_path))
    info = tmp_path / "timm-99.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 99\n")
    (info / "RECORD").write_text("timm/__init__.py,sha256=other,1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert key(Cache(tmp_path), backbone="timm/resnet18") != before
    assert key(Cache(tmp_path)) == torchvision


def test_another_processor_has_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.planning import cpu

    keys = []
    for text in (
        "model name : A\nflags : fma\n\n",
        "model name : B\nflags : fma\n\n",
        "model name : A\nflags : sse\n",
    ):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
        keys.append(key(Cache(tmp_path)))
    assert len(set(keys)) == 3


def test_other_code_of_ours_has_another_key(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "from pathlib import Path; from pipeline.cache import Cache; from pipeline.config import parse\n"
        "from pipeline.known import make_key\n"
        "print(make_key(parse({'input': 'in', 'output': 'out'}), Cache(Path('c'))))"
    )

    def printed() -> str:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    before = printed()
    assert len(before.strip()) == 64
    with (tmp_path / "pipeline" / "torch_runner.py").open("a") as file:
        file.write("# changed\n")
    assert printed() != before


def test_weights_from_a_file_are_known_while_the_file_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    file.write_bytes(b"weights")
    cache, config = Cache(tmp_path / "cache"), config_for(weights=str(file))
    keep(cache, config, Weights("w.pth", hashlib.sha256(b"weights").hexdigest()))
    known, _ = look_up(config, cache)
    assert known is not None
    assert not known.weights.is_loaded
    times = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    known, kept = look_up(config, cache)
    assert known is None
    assert kept is not None
    assert kept.graph() is None
    file.unlink()
    assert look_up(config, cache)[0] is None
    file.write_bytes(b"weights")
    assert look_up(config, cache)[0] is not None


def test_weights_by_name_are_known_while_their_file_is_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "resnet18-12345678.pth"
    file.write_bytes(b"weights")
    cache, config = Cache(tmp_path / "cache"), config_for(weights="DEFAULT")
    keep(cache, config, Weights("ResNet18_Weights.A", hashlib.sha256(b"weights").hexdigest(), path=file))
    known, _ = look_up(config, cache)
    assert known is not None
    file.write_bytes(b"other")
    assert look_up(config, cache)[0] is None
    file.unlink()
    assert look_up(config, cache)[0] is None


def test_weights_that_cannot_be_compared_later_are_not_kept(tmp_path: Path) -> None:
    cache, config = Cache(tmp_path), config_for(weights="DEFAULT")
    keep(cache, config, Weights("some", "ab12"))
    assert not list(tmp_path.iterdir())


def test_facts_of_another_version_are_nothing(tmp_path: Path) -> None:
    cache, config = Cache(tmp_path), config_for()
    for facts in ({}, {"weights_path": 3}, {"weights_path": None, "weights": "a"}):
        cache.keep(key(cache), facts, {"graph": b"", "constants": b""})
        assert look_up(config, cache)[0] is None


@pytest.mark.slow
def test_a_second_run_imports_no_torch_and_stores_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="without OpenVINO torch computes the embeddings")
    shards = write_shards(tmp_path / "in", num_shards=1)
    code = (
        "import sys; from jobs.embed import main; status = main(sys.argv[1:])\n"
        "print('imported:', sorted({'torch', 'torchvision'} & sys.modules.keys())); sys.exit(status)"
    )
    options = ["--input", str(shards), "--backbone", "squeezenet1_1", "--weights", "random:3", "--image-size", "64"]
    options += ["--device", "cpu", "--part-rows", "4", "--cache", str(tmp_path / "cache")]
    stored, imported = [], []
    for name in ("cold", "warm"):
        done = subprocess.run(
            [sys.executable, "-c", code, *options, "--output", str(tmp_path / name)],
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        imported.append(done.stdout.splitlines()[-1])
        files = sorted((tmp_path / name / "embeddings").iterdir())
        stored.append([(file.name, file.read_bytes()) for file in files])
    assert imported == ["imported: ['torch', 'torchvision']", "imported: []"]
    assert stored[0] == stored[1]
    assert ds.dataset(tmp_path / "warm" / "embeddings").count_rows() == 7
    assert (tmp_path / "cold" / "run.json").read_bytes() == (tmp_path / "warm" / "run.json").read_bytes()
