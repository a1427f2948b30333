"""An index follows its output: what is new is added, and where more has changed it is built again."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shard_embedder.pipeline.core.errors import OutputError, SettingsError
from shard_embedder.pipeline.output.fingerprint import read_fingerprint, write_fingerprint
from shard_embedder.pipeline.output.names import RUN_FILE
from shard_embedder.pipeline.retrieval.build import Options, build
from shard_embedder.pipeline.retrieval.index import open_index
from shard_embedder.pipeline.retrieval.kinds import KINDS
from tests.conftest import sample_members, write_tar
from tests.outputs import embed
from tests.retrieval.stored import Vectors, clusters, garble, numbers, store

pytest.importorskip("faiss", reason="the extra `index` is not installed")

# What is new, gone and changed.


def test_without_anything_new_nothing_is_done(chosen: tuple[Path, Vectors], tmp_path: Path) -> None:
    output, _ = chosen
    first = build(str(output), tmp_path / "index")
    again = build(str(output), tmp_path / "index")
    assert (first.num_added, again.num_added, again.rebuilt) == (3000, 0, "")
    assert again.facts == first.facts


@pytest.mark.parametrize("kind", KINDS)
def test_new_parts_are_added_and_the_rest_is_kept(kind: str, tmp_path: Path) -> None:
    output, values = tmp_path / "out", clusters(3600)
    store(output, "b", values[1800:3000])
    build(str(output), tmp_path / "index", Options(kind=kind))
    store(output, "a", values[:1800])
    store(output, "c", values[3000:])
    built = build(str(output), tmp_path / "index")
    assert (built.facts.kind, built.facts.num_rows, built.num_added, built.rebuilt) == (kind, 3600, 2400, "")
    assert built.facts.recall >= 0.95
    found = numbers(tmp_path / "index", values, 1)
    assert np.mean([row == [number] for number, row in enumerate(found)]) >= (1.0 if kind == "flat" else 0.98)
    folders = [path.name for path in (tmp_path / "index").iterdir() if path.is_dir()]
    assert folders == [built.facts.data]


def test_a_part_that_is_gone_means_an_index_built_anew(tmp_path: Path) -> None:
    output, values = tmp_path / "out", clusters(3000)
    store(output, "a", values[:1800])
    store(output, "b", values[1800:])
    build(str(output), tmp_path / "index")
    for path in (output / "embeddings").glob("a.*"):
        path.unlink()
    built = build(str(output), tmp_path / "index")
    assert built.rebuilt.startswith("of the parts in the index, 4 have gone, such as a.")
    assert built.facts.num_rows == 1200
    assert {near.shard for (near,) in open_index(tmp_path / "index").search(values, 1)} == {"b"}


def test_a_part_of_other_content_means_an_index_built_anew_and_a_touched_one_does_not(tmp_path: Path) -> None:
    output, values = tmp_path / "out", clusters(1000)
    store(output, "a", values)
    build(str(output), tmp_path / "index")
    for path in (output / "embeddings").iterdir():
        os.utime(path, (1, 1))
    assert build(str(output), tmp_path / "index").num_added == 0
    values[700] += 1
    store(output, "a", values)
    built = build(str(output), tmp_path / "index")
    assert built.rebuilt.startswith("of the parts in the index, 1 have changed, such as a.")
    ((near,),) = open_index(tmp_path / "index").search(values[700:701], 1)
    assert (near.sample_index, near.score) == (700, pytest.approx(1.0, abs=1e-5))


def test_an_index_that_outgrows_its_kind_is_built_anew(tmp_path: Path) -> None:
    values = clusters(8000, 64)
    store(tmp_path / "out", "a", values[:3000])
    small = Options(memory_bytes=2**20)
    assert build(str(tmp_path / "out"), tmp_path / "index", small).facts.kind == "flat"
    store(tmp_path / "out", "b", values[3000:])
    built = build(str(tmp_path / "out"), tmp_path / "index", small)
    assert built.rebuilt == "it was flat, and is ivf for 8000 rows"
    assert built.facts.recall >= 0.95


def test_lists_laid_out_for_far_fewer_rows_are_laid_out_anew(tmp_path: Path) -> None:
    values = clusters(3000)
    store(tmp_path / "out", "a", values[:500])
    assert build(str(tmp_path / "out"), tmp_path / "index", Options(kind="ivf")).facts.lists == 7
    store(tmp_path / "out", "b", values[500:])
    built = build(str(tmp_path / "out"), tmp_path / "index")
    assert built.rebuilt == "its lists were laid out for 500 rows, and it has 3000 now"
    assert built.facts.lists == 46


def test_a_shard_that_is_not_whole_is_indexed_as_far_as_it_is_and_told(embedded: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(embedded, tmp_path / "out"))
    (last,) = output.glob("embeddings/photos-00001.*-last.parquet")
    last.unlink()
    built = build(str(output), tmp_path / "index")
    assert built.facts.num_rows == 13
    assert built.notes == ["1 shard not whole yet, such as 'photos-00001': what is stored there is indexed"]


# What is refused.


def test_an_index_of_other_settings_is_refused_and_the_difference_named(
    embedded: Path, shards: Path, tmp_path: Path
) -> None:
    build(str(embedded), tmp_path / "index")
    before = {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()}
    embed(shards, tmp_path / "other", normalize=True)
    with pytest.raises(OutputError, match="normalize: index false, output true"):
        build(str(tmp_path / "other"), tmp_path / "index")
    assert {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()} == before


def test_another_metric_feature_maps_strange_folders_and_two_versions_are_refused(
    embedded: Path, shards: Path, tmp_path: Path
) -> None:
    build(str(embedded), tmp_path / "index")
    with pytest.raises(SettingsError, match="has metric cosine, asked for l2"):
        build(str(embedded), tmp_path / "index", Options("l2"))
    embed(shards, tmp_path / "map", features="map")
    with pytest.raises(OutputError, match=r"only pooled features \[C\] can be compared"):
        build(str(tmp_path / "map"), tmp_path / "other")
    with pytest.raises(OutputError, match=r"is not empty and no index: it has 'photos-00000\.tar'"):
        build(str(embedded), shards)
    with pytest.raises(OutputError, match=r"nowhere is not an output"):
        build(str(tmp_path / "nowhere"), tmp_path / "other")
    with pytest.raises(SettingsError, match="kind must be one of flat, hnsw, ivf, got 'tree'"):
        Options(kind="tree")
    own = Path(shutil.copytree(shards, tmp_path / "own"))
    embed(own, tmp_path / "twice")
    write_tar(own / "photos-00001.tar", sample_members("x", 1))
    embed(own, tmp_path / "twice")
    with pytest.raises(OutputError, match="1 shard stored in two versions, such as 'photos-00001'"):
        build(str(tmp_path / "twice"), tmp_path / "other")


def test_parts_of_other_settings_and_parts_that_are_cut_are_refused(embedded: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(embedded, tmp_path / "out"))
    made = read_fingerprint(str(output))
    assert made is not None
    (output / RUN_FILE).unlink()
    write_fingerprint(str(output), replace(made, settings=replace(made.settings, precision="bf16")))
    with pytest.raises(OutputError, match=r"was made with other settings than run\.json"):
        build(str(output), tmp_path / "index")
    (output / RUN_FILE).unlink()
    write_fingerprint(str(output), made)
    path = next((output / "embeddings").iterdir())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OutputError, match="is not whole Parquet"):
        build(str(output), tmp_path / "index")
    assert not (tmp_path / "index" / "index.json").exists()


@pytest.mark.parametrize("name", ["vectors.faiss", "rows.parquet", "parts.parquet", "lists.ivfdata"])
def test_an_index_with_a_file_of_another_size_is_refused_and_the_next_build_makes_it_anew(
    name: str, chosen: tuple[Path, Vectors], tmp_path: Path
) -> None:
    output, values = chosen
    facts = build(str(output), tmp_path / "index", Options(kind="ivf")).facts
    path = tmp_path / "index" / facts.data / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OutputError, match=rf"{name} must have \d+ bytes, it has \d+; remove the folder"):
        open_index(tmp_path / "index")
    built = build(str(output), tmp_path / "index")
    assert re.search(rf"{name} must have \d+ bytes, it has \d+", built.rebuilt)
    assert (built.facts.kind, built.num_added) == ("ivf", 3000)
    (tmp_path / "index" / built.facts.data / name).unlink()
    assert build(str(output), tmp_path / "index").rebuilt.endswith("it is missing")
    assert np.mean([row == [number] for number, row in enumerate(numbers(tmp_path / "index", values, 1))]) > 0.98


@pytest.mark.parametrize("name", ["vectors.faiss", "rows.parquet", "parts.parquet", "lists.ivfdata"])
def test_nothing_is_added_to_an_index_whose_bytes_have_changed_but_it_is_made_anew(name: str, tmp_path: Path) -> None:
    output, values = tmp_path / "out", clusters(3000)
    store(output, "a", values[:1800])
    facts = build(str(output), tmp_path / "index", Options(kind="ivf")).facts
    garble(tmp_path / "index" / facts.data / name, 500)
    store(output, "b", values[1800:])
    built = build(str(output), tmp_path / "index")
    assert built.rebuilt.endswith(f"{name} has changed since it was written")
    assert (built.facts.num_rows, built.num_added) == (3000, 3000)
    assert np.mean([row == [number] for number, row in enumerate(numbers(tmp_path / "index", values, 1))]) > 0.98
