"""Verify finds each fault that the Parquet alone shows."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shard_embedder.pipeline.core.errors import OutputError
from shard_embedder.pipeline.core.schema import IMAGE_ID, SAMPLE_INDEX, SHARD
from shard_embedder.pipeline.output.names import PartName
from shard_embedder.pipeline.verify.proof import verify
from tests.conftest import encode, photo, write_tar
from tests.outputs import embed
from tests.verify.planting import ALL, found, name_of, part_path, rewrite, set_column, set_vectors, swap

# Faults that the Parquet alone shows.


def test_a_missing_part_is_found(planted: Path) -> None:
    path = part_path(planted, 0)
    path.unlink()
    verdict = verify(str(planted))
    (finding,) = verdict.findings
    assert finding.rule == "part-missing"
    assert finding.file.startswith("embeddings/photos-00000.")
    assert finding.value == "part 0 of 3 is missing"


def test_a_missing_last_part_is_found(planted: Path) -> None:
    part_path(planted, 2).unlink()
    (finding,) = verify(str(planted)).findings
    assert (finding.rule, finding.value) == ("part-missing", "the last part is missing: 1 is not the last")


def test_a_missing_errors_file_is_found(planted: Path) -> None:
    path = part_path(planted, 1, folder="errors")
    path.unlink()
    assert found(verify(str(planted))) == {("errors-missing", name_of(path))}


def test_an_errors_file_without_its_part_is_found(planted: Path) -> None:
    path = part_path(planted, 1)
    path.unlink()
    verdict = verify(str(planted))
    assert ("errors-alone", f"errors/{path.name}") in found(verdict)
    assert {rule for rule, _ in found(verdict)} == {"errors-alone", "part-missing"}


def test_a_duplicate_row_is_found(planted: Path) -> None:
    path = part_path(planted, 0)
    rewrite(path, lambda table: pa.concat_tables([table, table.slice(1, 1)]))
    verdict = verify(str(planted))
    assert ("sample-index", name_of(path)) in found(verdict)
    assert {rule for rule, _ in found(verdict)} == {"sample-index", "counts", "metadata", "id-repeated"}
    values = [finding.value for finding in verdict.findings]
    assert "sample 1 more than once" in values
    assert "4 embeddings and 0 errors for 3 samples" in values


def test_a_row_that_is_lost_is_found(planted: Path) -> None:
    path = part_path(planted, 0)
    rewrite(path, lambda table: table.slice(0, 2), num_embedded="2")
    verdict = verify(str(planted))
    assert found(verdict) == {("sample-index", name_of(path)), ("counts", name_of(path))}
    assert "sample 2 missing" in [finding.value for finding in verdict.findings]


def test_rows_out_of_order_are_found(planted: Path) -> None:
    path = part_path(planted, 0)
    rewrite(path, lambda table: table.take([1, 0, 2]))
    (finding,) = verify(str(planted)).findings
    assert (finding.rule, finding.value) == ("sample-index", "not in order: 0 follows 1")


def test_a_count_off_by_one_is_found(planted: Path) -> None:
    path = part_path(planted, 1)
    errors = part_path(planted, 1, folder="errors")
    for file in (path, errors):
        rewrite(file, lambda table: table, num_samples="2")
    verdict = verify(str(planted))
    assert ("counts", name_of(path)) in found(verdict)
    assert "1 embeddings and 2 errors for 2 samples" in [finding.value for finding in verdict.findings]


def test_parts_that_do_not_follow_on_each_other_are_found(planted: Path) -> None:
    path = part_path(planted, 2)
    shift = pa.scalar(1, pa.int32())
    rewrite(
        path,
        lambda table: set_column(
            table, SAMPLE_INDEX, pa.compute.add(table.column(SAMPLE_INDEX), shift).combine_chunks()
        ),
        first_index="7",
    )
    (finding,) = verify(str(planted)).findings
    assert finding.rule == "sample-index"
    assert finding.value == "begins at sample 7, the part before ends at 6"


def test_a_swapped_row_is_found_by_the_checksum(planted: Path) -> None:
    path = part_path(planted, 0)
    rewrite(path, set_vectors(swap), honest=False)
    assert found(verify(str(planted))) == {("checksum", name_of(path))}


@pytest.mark.parametrize("column", [IMAGE_ID, "caption", "cls"])
def test_any_edited_value_is_found_by_the_checksum(column: str, planted: Path) -> None:
    path = part_path(planted, 0)

    def edit(table: pa.Table) -> pa.Table:
        values = table.column(column).to_pylist()
        return set_column(table, column, [values[0] * 2 if column != "cls" else 77, *values[1:]])

    rewrite(path, edit, honest=False)
    assert found(verify(str(planted))) == {("checksum", name_of(path))}


def test_an_edited_reason_is_found_by_the_checksum(planted: Path) -> None:
    path = part_path(planted, 1, folder="errors")
    rewrite(path, lambda table: set_column(table, "reason", ["none", "none"]), honest=False)
    assert found(verify(str(planted))) == {("checksum", name_of(path))}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_found(value: float, planted: Path) -> None:
    path = part_path(planted, 0)

    def plant(values: np.ndarray[Any, Any]) -> None:
        values[1, 17] = value

    rewrite(path, set_vectors(plant))
    (finding,) = verify(str(planted)).findings
    assert (finding.rule, finding.file) == ("not-finite", name_of(path))
    assert finding.value == "1 rows: sample 1 ('000-0001')"


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_vector_of_one_value_is_found(value: float, planted: Path) -> None:
    path = part_path(planted, 0)

    def plant(values: np.ndarray[Any, Any]) -> None:
        values[2] = value

    rewrite(path, set_vectors(plant))
    (finding,) = verify(str(planted)).findings
    assert (finding.rule, finding.file) == ("constant", name_of(path))
    assert "sample 2 ('000-0002')" in finding.value


def test_a_shard_whose_embeddings_are_all_alike_is_found_unless_its_images_are(planted: Path, shards: Path) -> None:
    vector = np.linspace(0, 1, 512, dtype=np.float32)

    def plant(values: np.ndarray[Any, Any]) -> None:
        values[:] = vector

    for part in range(3):
        rewrite(part_path(planted, part), set_vectors(plant))
    for inputs, more in (([], "; run with --input to see whether its images are, too"), ([str(shards)], "")):
        (finding,) = verify(str(planted), inputs).findings
        assert (finding.rule, finding.value) == ("all-alike", f"its 5 embeddings are one and the same{more}")


def test_a_shard_of_one_image_many_times_is_proven_against_its_tar_and_of_few_without_it(tmp_path: Path) -> None:
    image = encode(photo(1))
    for count, rules in ((2, set()), (6, {"all-alike"})):
        folder, output = tmp_path / f"in{count}", str(tmp_path / f"out{count}")
        write_tar(folder / "s.tar", [(f"{key}.jpg", image) for key in range(count)])
        embed(folder, output)
        assert {finding.rule for finding in verify(output).findings} == rules
        assert verify(output, [str(folder)], ALL).findings == []


def test_a_vector_of_another_length_is_found(shards: Path, tmp_path: Path) -> None:
    embed(shards, tmp_path / "out", normalize=True)
    path = part_path(tmp_path / "out", 0)

    def plant(values: np.ndarray[Any, Any]) -> None:
        values[0] *= 1.001

    rewrite(path, set_vectors(plant))
    assert found(verify(str(tmp_path / "out"))) == {("length", name_of(path))}


def test_a_part_of_another_setting_is_found_and_the_setting_named(
    planted: Path, shards: Path, tmp_path: Path
) -> None:
    embed(shards, tmp_path / "other", keep=["cls", "json:caption"], weights="random:1")
    path = part_path(planted, 0)
    shutil.copy(part_path(tmp_path / "other", 0), path)
    (finding,) = verify(str(planted)).findings
    assert (finding.rule, finding.file) == ("fingerprint", name_of(path))
    assert finding.value.startswith("weights_sha256 ")
    assert " instead of " in finding.value


def test_a_part_of_another_backbone_is_found_by_its_width_too(planted: Path, shards: Path, tmp_path: Path) -> None:
    embed(shards, tmp_path / "other", keep=["cls", "json:caption"], backbone="mobilenet_v2")
    path = part_path(planted, 0)
    shutil.copy(part_path(tmp_path / "other", 0), path)
    verdict = verify(str(planted))
    assert found(verdict) == {("fingerprint", name_of(path)), ("schema", name_of(path))}
    assert "[1280]" in verdict.findings[1].value
    assert "[512]" in verdict.findings[1].value


def test_an_edited_run_json_is_refused(planted: Path) -> None:
    run = json.loads((planted / "run.json").read_text())
    run["settings"]["ignore_orientation"] = True
    (planted / "run.json").write_text(json.dumps(run))
    with pytest.raises(OutputError, match=r"run\.json cannot be used: it was changed by hand"):
        verify(str(planted))


def test_a_truncated_part_is_found(planted: Path) -> None:
    path = part_path(planted, 0)
    path.write_bytes(path.read_bytes()[:-1000])
    assert found(verify(str(planted))) == {("unreadable", name_of(path))}


def test_a_part_of_no_bytes_is_found(planted: Path) -> None:
    path = part_path(planted, 1, folder="errors")
    path.write_bytes(b"")
    assert found(verify(str(planted))) == {("unreadable", name_of(path))}


@pytest.mark.slow
def test_a_flipped_bit_in_any_page_is_found(planted: Path) -> None:
    path = part_path(planted, 0)
    data = path.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    for position in range(4, len(data) - footer, max(1, (len(data) - footer) // 40)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        rules = {rule for rule, _ in found(verify(str(planted)))}
        # Bits that the format does not use change no row.
        assert rules or pq.read_table(path).equals(pq.read_table(io.BytesIO(data))), position


def test_a_wrong_shard_column_is_found(planted: Path) -> None:
    path = part_path(planted, 0)
    rewrite(path, lambda table: set_column(table, SHARD, ["photos-00001"] * 3))
    (finding,) = verify(str(planted)).findings
    assert (finding.rule, finding.value) == ("shard-column", "'photos-00001' in a part of 'photos-00000'")


def test_a_repeated_id_is_found_across_parts(planted: Path) -> None:
    rewrite(part_path(planted, 2), lambda table: set_column(table, IMAGE_ID, ["000-0001"]))
    (finding,) = verify(str(planted)).findings
    assert finding.rule == "id-repeated"
    assert "'000-0001'" in finding.value


def test_a_part_stored_under_the_name_of_another_is_found(planted: Path) -> None:
    shutil.copy(part_path(planted, 0, shard=1), part_path(planted, 0, shard=0))
    rules = {rule for rule, _ in found(verify(str(planted)))}
    assert {"metadata", "shard-column"} <= rules


def test_a_part_that_is_stored_twice_is_found(planted: Path) -> None:
    path = part_path(planted, 1)
    for folder in ("embeddings", "errors"):
        source = planted / folder / path.name
        shutil.copy(source, source.with_name(source.name.replace("-00001.", "-00001-broken.")))
    assert "part-twice" in {rule for rule, _ in found(verify(str(planted)))}


def test_two_versions_of_one_shard_are_found(planted: Path) -> None:
    for path in list(planted.glob("e*/photos-00000.*")):
        name = PartName.parse(path.name)
        assert name is not None
        shutil.copy(path, path.with_name(str(name._replace(tag="0" * 12))))
    verdict = verify(str(planted))
    assert ("two-versions", "embeddings/photos-00000.*") in found(verdict)


def test_stray_files_among_the_parts_are_found_and_others_told(planted: Path) -> None:
    (planted / "embeddings" / "copy of part.parquet").write_bytes(b"x")
    (planted / "errors" / "notes.txt").write_bytes(b"x")
    (planted / "index.faiss").write_bytes(b"x")
    (planted / ".tmp").mkdir(exist_ok=True)
    (planted / ".tmp" / "0123").write_bytes(b"x")
    verdict = verify(str(planted))
    assert found(verdict) == {("stray-file", "embeddings/copy of part.parquet"), ("stray-file", "errors/notes.txt")}
    assert any("index.faiss" in note for note in verdict.notes)
    assert any("1 temporary files in .tmp/" in note for note in verdict.notes)


def test_an_output_without_parts_is_not_proven(planted: Path) -> None:
    shutil.rmtree(planted / "embeddings")
    shutil.rmtree(planted / "errors")
    assert found(verify(str(planted))) == {("no-parts", "embeddings/")}


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"settings": {}, "versions": {}}', b'{"settings": 1}'])
def test_what_is_not_an_output_is_refused(content: bytes | None, planted: Path) -> None:
    (planted / "run.json").unlink()
    if content is not None:
        (planted / "run.json").write_bytes(content)
    with pytest.raises(OutputError, match=r"run\.json"):
        verify(str(planted))
