"""What verify proves of a good output, and that it finds each fault that is planted in one."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shard_embedder.jobs.verify import main
from shard_embedder.pipeline.core.errors import InputError, OutputError, SettingsError
from shard_embedder.pipeline.core.schema import EMBEDDING, IMAGE_ID, SAMPLE_INDEX, SHARD
from shard_embedder.pipeline.core.storage import locate
from shard_embedder.pipeline.core.writing import write_bytes
from shard_embedder.pipeline.output.names import PartName, version_tag
from shard_embedder.pipeline.output.parts import content_sha256, vectors
from shard_embedder.pipeline.verify.findings import RULES, Verdict
from shard_embedder.pipeline.verify.proof import verify
from shard_embedder.pipeline.verify.recompute import Recompute
from tests.conftest import encode, photo, sample_members, write_tar
from tests.outputs import embed

ALL = Recompute(None, required=True)
Edit = Callable[[pa.Table], pa.Table]


def shard_members(shard: int) -> list[tuple[str, bytes]]:
    """Seven samples, of which the fifth has no image and the sixth a broken one."""
    samples = [sample_members(f"{shard:03d}-{i:04d}", 10 * shard + i) for i in range(7)]
    samples[4] = samples[4][1:]
    samples[5][0] = (samples[5][0][0], samples[5][0][1][:500])
    return [member for sample in samples for member in sample]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "shards"
    for shard in range(2):
        write_tar(folder / f"photos-{shard:05d}.tar", shard_members(shard))
    return folder


@pytest.fixture(scope="session")
def good(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole output: two shards of parts 0, 1 (one embedding, two errors) and 2."""
    output = tmp_path_factory.mktemp("good") / "out"
    embed(shards, output, keep=["cls", "json:caption"])
    return output


@pytest.fixture
def planted(good: Path, tmp_path: Path) -> Path:
    """A copy of the whole output, to plant a fault in."""
    return Path(shutil.copytree(good, tmp_path / "out"))


def part_path(output: Path, part: int, shard: int = 0, folder: str = "embeddings") -> Path:
    (path,) = (output / folder).glob(f"photos-{shard:05d}.*-{part:05d}*.parquet")
    return path


def rewrite(path: Path, edit: Edit, *, honest: bool = True, **metadata: str) -> None:
    """Edit the rows of a part. An honest edit has a checksum of its own, as of a fault before the write."""
    table = pq.read_table(path)
    before = table.schema.metadata
    edited = edit(table)
    changes = {f"embed.{key}".encode(): value.encode() for key, value in metadata.items()}
    if honest:
        changes[b"embed.content_sha256"] = content_sha256([edited]).encode()
    pq.write_table(edited.replace_schema_metadata({**before, **changes}), path)


def set_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    position = table.column_names.index(name)
    column = values if isinstance(values, pa.Array) else pa.array(values, table.schema.field(name).type)
    return table.set_column(position, table.schema.field(name), column)


def set_vectors(edit: Callable[[np.ndarray[Any, Any]], None]) -> Edit:
    """An edit of the embeddings [N, C] in place."""

    def edited(table: pa.Table) -> pa.Table:
        values = vectors(table).copy()
        edit(values)
        kind = table.schema.field(EMBEDDING).type
        return set_column(
            table, EMBEDDING, pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)
        )

    return edited


def swap(values: np.ndarray[Any, Any]) -> None:
    values[[0, 2]] = values[[2, 0]]


def found(verdict: Verdict) -> set[tuple[str, str]]:
    """The findings as (rule, file) pairs."""
    return {(finding.rule, finding.file) for finding in verdict.findings}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


# Good outputs.


def test_a_whole_output_is_proven_and_counted(good: Path, shards: Path) -> None:
    verdict = verify(str(good), [str(shards)], ALL)
    assert verdict.findings == []
    assert verdict.notes == []
    assert verdict.proven
    assert (verdict.shards, verdict.parts, verdict.tars_compared) == (2, 6, 2)
    assert (verdict.samples, verdict.embedded, verdict.errors) == (14, 10, 4)
    assert verdict.num_bytes == sum(path.stat().st_size for path in good.glob("e*/*.parquet"))
    assert verdict.recomputed == 10
    assert verdict.lowest_cosine is not None
    assert verdict.lowest_cosine > 0.9999


def test_without_an_input_the_parquet_alone_is_proven(good: Path) -> None:
    verdict = verify(str(good))
    assert verdict.proven
    assert (verdict.samples, verdict.tars_compared, verdict.recomputed) == (14, 0, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"normalize": True},
        {"normalize": True, "dtype": "float16"},
        {"dtype": "float16", "precision": "bf16"},
        {"features": "map"},
        {"features": "map", "dtype": "float16"},
        {"id": "json:id"},
        {"backbone": "resnet18", "part_rows": 100},
    ],
    ids=str,
)
def test_every_kind_of_output_is_proven(settings: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    embed(shards, tmp_path / "out", **settings)
    verdict = verify(str(tmp_path / "out"), [str(shards)], ALL)
    assert verdict.findings == []
    assert verdict.notes == []
    assert verdict.recomputed == 10


def odd_tar(path: Path) -> None:
    """What our reader and `tarfile` must see alike: folders, links, hidden files, odd names, two tars in one."""
    halves = []
    for half in range(2):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            names = [
                "__index__",
                "README",
                "labels.csv",
                "a.b.jpg",
                "._a.b.jpg",
                "a.json",
                "noextension",
                "sub/.hidden",
                "a.jpg",
                "é" * 120 + ".JPG",
            ]
            for name in [*names, "/absolute.png", "../up.jpg", "line\nbreak.jpg", "folder/" + "x" * 250 + ".jpg"]:
                image = encode(photo(tar.offset))
                info = tarfile.TarInfo(f"{half}/{name}" if name[0] not in "/." else name)
                info.size = len(image)
                tar.addfile(info, io.BytesIO(image))
            link = tarfile.TarInfo(f"{half}/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
            tar.addfile(link)
        halves.append(sink.getvalue())
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        image = encode(photo(7))
        info = tarfile.TarInfo("latin-é.jpg")
        info.size = len(image)
        tar.addfile(info, io.BytesIO(image))
    path.parent.mkdir()
    path.write_bytes(b"".join([*halves, raw.getvalue()]))


def test_odd_but_whole_tars_balance_with_what_tarfile_reads(tmp_path: Path) -> None:
    odd_tar(tmp_path / "in" / "odd.tar")
    write_tar(tmp_path / "in" / "empty.tar", [])
    embed(tmp_path / "in", tmp_path / "out")
    verdict = verify(str(tmp_path / "out"), [str(tmp_path / "in")], ALL)
    assert verdict.findings == []
    assert (verdict.shards, verdict.tars_compared) == (2, 2)
    assert verdict.samples > 15
    assert verdict.errors > 4


def test_image_members_without_a_row_are_told_and_counted_against_the_tar(tmp_path: Path) -> None:
    names = ["1.2.840.1.jpg", "1.2.840.2.jpg", ".hidden.jpg", "._mac.jpg", "x.jpg", "x.png", "x.json"]
    write_tar(tmp_path / "in" / "s.tar", [(name, encode(photo(seed))) for seed, name in enumerate(names)])
    output, inputs = str(tmp_path / "out"), [str(tmp_path / "in")]
    embed(tmp_path / "in", output)
    for given in ([], inputs):
        verdict = verify(output, given, ALL)
        assert verdict.findings == []
        assert verdict.unused_images == 3
        assert verdict.notes == ["3 image members without a row: s: .hidden.jpg, which is hidden"]
    (path,) = (tmp_path / "out" / "embeddings").iterdir()
    rewrite(path, lambda table: table, unused_images="2")
    (finding,) = verify(output, inputs).findings
    assert (finding.rule, finding.value) == (
        "tar-count",
        "2 image members without a row are counted, its tar has 3",
    )


def test_files_of_the_input_that_may_be_shards_are_told(good: Path, own_shards: Path) -> None:
    (own_shards / "more.tar.gz").write_bytes(b"x")
    (own_shards / "photos-00000.json").write_bytes(b"x")
    verdict = verify(str(good), [str(own_shards)])
    assert verdict.findings == []
    assert "files of the input that may be shards and are not read: 1 .tar.gz" in verdict.notes


def test_an_output_of_keys_to_the_last_dot_is_proven_by_that_rule(tmp_path: Path) -> None:
    names = ["1.2.840.1.jpg", "1.2.840.2.jpg", "a.left.jpg", "a.right.jpg", "a.right.json"]
    data = [encode(photo(seed)) for seed in range(4)] + [b'{"id": "own"}']
    write_tar(tmp_path / "in" / "s.tar", list(zip(names, data, strict=True)))
    embed(tmp_path / "in", tmp_path / "out", key="last-dot")
    verdict = verify(str(tmp_path / "out"), [str(tmp_path / "in")], ALL)
    assert (verdict.findings, verdict.notes) == ([], [])
    assert (verdict.samples, verdict.recomputed, verdict.unused_images) == (4, 4, 0)


def test_an_incremental_archive_of_gnu_tar_is_proven(tmp_path: Path) -> None:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for seed, name in enumerate(("a.jpg", "b.jpg", "deep/c.jpg", "deep/" + "d" * 120 + ".jpg")):
        (tmp_path / "photos" / name).write_bytes(encode(photo(seed)))
    (tmp_path / "in").mkdir()
    command = ["tar", "--format=gnu", "-g", "snapshot", "-cf", "in/s.tar", "photos"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no GNU tar: {done.stderr.strip()}")
    embed(tmp_path / "in", tmp_path / "out")
    verdict = verify(str(tmp_path / "out"), [str(tmp_path / "in")], ALL)
    assert (verdict.findings, verdict.embedded, verdict.recomputed) == ([], 4, 4)


def test_a_shard_with_a_pax_header_of_a_resource_fork_is_proven(tmp_path: Path) -> None:
    fork = {"LIBARCHIVE.xattr.com.apple.ResourceFork": "QUJD" * 600_000}
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for seed in range(3):
            image = encode(photo(seed))
            info = tarfile.TarInfo(f"m{seed}.jpg")
            info.size, info.pax_headers = len(image), fork if seed == 1 else {}
            tar.addfile(info, io.BytesIO(image))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "s.tar").write_bytes(sink.getvalue())
    embed(tmp_path / "in", tmp_path / "out")
    verdict = verify(str(tmp_path / "out"), [str(tmp_path / "in")], ALL)
    assert (verdict.findings, verdict.embedded, verdict.recomputed) == ([], 3, 3)


def test_the_same_rows_are_drawn_for_the_same_seed(good: Path, shards: Path) -> None:
    cosines = [verify(str(good), [str(shards)], Recompute(3, seed=seed)).lowest_cosine for seed in (5, 5)]
    assert cosines[0] == cosines[1]
    assert verify(str(good), [str(shards)], Recompute(3)).recomputed == 3


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


# Faults that only the tars show.


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards to change, of the same version where it is not changed."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def test_a_wrong_id_is_found(planted: Path, shards: Path) -> None:
    path = part_path(planted, 0)
    rewrite(path, lambda table: set_column(table, IMAGE_ID, ["000-0000", "renamed", "000-0002"]))
    assert verify(str(planted)).proven
    (finding,) = verify(str(planted), [str(shards)]).findings
    assert (finding.rule, finding.file) == ("tar-id", name_of(path))
    assert finding.value == "1 rows: sample 1 is 'renamed', the tar has '000-0001'"


def test_a_wrong_id_of_an_error_is_found(planted: Path, shards: Path) -> None:
    path = part_path(planted, 1, folder="errors")
    rewrite(path, lambda table: set_column(table, IMAGE_ID, ["000-0004", "000-0006"]))
    assert found(verify(str(planted), [str(shards)])) == {("tar-id", name_of(path))}


def test_ids_swapped_between_two_rows_are_found_where_ids_are_a_field(shards: Path, tmp_path: Path) -> None:
    embed(shards, tmp_path / "out", id="json:id")
    path = part_path(tmp_path / "out", 0)
    rewrite(path, lambda table: set_column(table, IMAGE_ID, table.column(IMAGE_ID).to_pylist()[::-1]))
    (finding,) = verify(str(tmp_path / "out"), [str(shards)]).findings
    assert finding.rule == "tar-id"
    assert "sample 0 is 'photo-2', the tar has 'photo-0'" in finding.value


def test_ids_of_a_member_with_a_number_are_read_as_the_job_reads_them(tmp_path: Path) -> None:
    members = [
        [(f"{key}.jpg", encode(photo(key))), (f"{key}.cls", text)]
        for key, text in enumerate((b"007\n", b"1_0", b"\xef\xbb\xbf8"))
    ]
    write_tar(tmp_path / "in" / "s.tar", [member for sample in members for member in sample])
    embed(tmp_path / "in", tmp_path / "out", id="cls")
    assert verify(str(tmp_path / "out"), [str(tmp_path / "in")]).findings == []
    (path,) = (tmp_path / "out" / "embeddings").iterdir()
    assert pq.read_table(path).column(IMAGE_ID).to_pylist() == ["7", "1_0", "8"]


def test_samples_that_were_lost_before_they_were_counted_are_found(planted: Path, shards: Path) -> None:
    last = part_path(planted, 2)
    rewrite(last, lambda table: table.slice(0, 0), num_samples="0", num_embedded="0")
    assert verify(str(planted)).proven
    (finding,) = verify(str(planted), [str(shards)]).findings
    assert (finding.rule, finding.value) == ("tar-count", "6 samples are stored, its tar has 7")


@pytest.mark.parametrize(
    "settings", [{}, {"backbone": "resnet18"}, {"precision": "bf16", "dtype": "float16"}], ids=str
)
def test_rows_swapped_before_they_were_written_are_found_by_embedding_again(
    settings: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    embed(shards, tmp_path / "out", **settings)
    path = part_path(tmp_path / "out", 0)
    rewrite(path, set_vectors(swap))
    assert verify(str(tmp_path / "out"), [str(shards)]).proven
    verdict = verify(str(tmp_path / "out"), [str(shards)], ALL)
    assert found(verdict) == {("recompute", name_of(path))}
    assert verdict.findings[0].value == (
        "2 of 3 rows: image_id '000-0000': its image's embedding is that of '000-0002'; "
        "image_id '000-0002': its image's embedding is that of '000-0000'"
    )


def test_embeddings_of_other_weights_are_found_by_embedding_again(shards: Path, tmp_path: Path) -> None:
    embed(shards, tmp_path / "out")
    embed(shards, tmp_path / "other", weights="random:1")
    values = vectors(pq.read_table(part_path(tmp_path / "other", 0)))

    def plant(stored: np.ndarray[Any, Any]) -> None:
        stored[:] = values

    rewrite(part_path(tmp_path / "out", 0), set_vectors(plant))
    verdict = verify(str(tmp_path / "out"), [str(shards)], ALL)
    (finding,) = verdict.findings
    assert finding.rule == "recompute"
    assert finding.value.startswith("3 of 3 rows: image_id '000-0000': cosine 0.")


def test_a_changed_shard_and_a_new_one_are_found_and_a_removed_one_told(own_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_tar(own_shards / "photos-00002.tar", shard_members(2))
    embed(own_shards, output)
    (own_shards / "photos-00002.tar").unlink()
    os.utime(own_shards / "photos-00000.tar", (1, 1))
    write_tar(own_shards / "new.tar", shard_members(3))
    verdict = verify(str(output), [str(own_shards)])
    files = {(rule, file.partition(".")[0]) for rule, file in found(verdict)}
    assert files == {("old-version", "embeddings/photos-00000"), ("shard-missing", "embeddings/new")}
    assert any(note.startswith("1 shard stored and not in this input") for note in verdict.notes)


def test_a_stale_version_beside_the_present_one_is_found(own_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    embed(own_shards, output)
    os.utime(own_shards / "photos-00001.tar", (1, 1))
    embed(own_shards, output)
    verdict = verify(str(output), [str(own_shards)])
    (finding,) = verdict.findings
    assert finding.rule == "old-version"
    assert finding.file.startswith("embeddings/photos-00001.")
    assert {rule for rule, _ in found(verify(str(output)))} == {"two-versions"}


# Damaged shards.


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def garbage_header(data: bytes) -> bytes:
    at = data.index(b"000-0003.jpg")
    return data[:at] + b"\x07" * 512 + data[at + 512 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut inside a member": cut,
    "garbage instead of a header": garbage_header,
    "no end of archive": lambda data: data[: data.index(b"000-0003.jpg")],
    "garbage after the end": lambda data: data + b"garbage" * 100,
    "no tar at all": lambda data: b"<html>" + bytes(1000),
    "0 bytes": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_reported_broken_and_nothing_else_is(damage: str, shards: Path, tmp_path: Path) -> None:
    data = DAMAGE[damage]((shards / "photos-00000.tar").read_bytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "photos-00000.tar").write_bytes(data)
    embed(tmp_path / "in", tmp_path / "out")
    verdict = verify(str(tmp_path / "out"), [str(tmp_path / "in")], ALL)
    (finding,) = verdict.findings
    assert finding.rule == "shard-broken"
    assert finding.file.endswith("-broken.parquet")
    assert "shard fault: " in finding.value
    assert verdict.broken_shards == 1


def made_of_the_first_three(shards: Path, tmp_path: Path, now: bytes) -> Path:
    """An output that holds three samples of a shard, and says that the shard as it is now is all of it."""
    path = write_tar(tmp_path / "in" / "photos-00000.tar", shard_members(0)[:9])
    embed(tmp_path / "in", tmp_path / "out", part_rows=10)
    path.write_bytes(now)
    relabel(tmp_path / "out", path)
    return tmp_path / "in"


def test_samples_lost_at_a_damaged_header_of_a_shard_that_is_called_good_are_found(
    shards: Path, tmp_path: Path
) -> None:
    folder = made_of_the_first_three(shards, tmp_path, garbage_header((shards / "photos-00000.tar").read_bytes()))
    (finding,) = verify(str(tmp_path / "out"), [str(folder)]).findings
    assert (finding.rule, finding.value) == ("tar-count", "3 samples are stored, its tar has 7")


def test_a_cut_shard_that_is_called_good_is_found(shards: Path, tmp_path: Path) -> None:
    folder = made_of_the_first_three(shards, tmp_path, cut((shards / "photos-00000.tar").read_bytes()))
    (finding,) = verify(str(tmp_path / "out"), [str(folder)]).findings
    assert (finding.rule, finding.file) == ("tar-unreadable", str(folder / "photos-00000.tar"))


def test_a_shard_cut_inside_the_json_that_holds_an_id_is_reported_broken_and_no_more(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "in" / "s.tar", [m for i in range(3) for m in sample_members(f"k{i}", i)])
    whole.write_bytes(whole.read_bytes()[: whole.read_bytes().rindex(b"photo-2") - 2])
    embed(tmp_path / "in", tmp_path / "out", id="json:id")
    verdict = verify(str(tmp_path / "out"), [str(tmp_path / "in")], recompute=None)
    assert {finding.rule for finding in verdict.findings} == {"shard-broken"}


def test_a_readable_sample_that_a_broken_shard_lost_is_found(shards: Path, tmp_path: Path) -> None:
    data = garbage_header((shards / "photos-00000.tar").read_bytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "photos-00000.tar").write_bytes(data)
    embed(tmp_path / "in", tmp_path / "out")
    last = part_path(tmp_path / "out", 2)
    assert last.name.endswith("-broken.parquet")
    for path in (last, part_path(tmp_path / "out", 2, folder="errors")):
        empty = {"num_samples": "0", "num_embedded": "0"}
        rewrite(path, lambda table: table.slice(0, 0) if EMBEDDING in table.column_names else table, **empty)
    verdict = verify(str(tmp_path / "out"), [str(tmp_path / "in")])
    assert {rule for rule, _ in found(verdict)} == {"shard-broken", "tar-count"}
    assert "its tar has 1 sample beyond those stored: '000-0006'" in [finding.value for finding in verdict.findings]


def relabel(output: Path, shard: Path) -> None:
    """Give the one stored part the name and metadata of the shard as it is now."""
    (path,) = (output / "embeddings").iterdir()
    size, version = shard.stat().st_size, str(shard.stat().st_mtime_ns)
    name = PartName.parse(path.name)
    assert name is not None
    rewrite(path, lambda table: table, shard_bytes=str(size), shard_version=version)
    path.rename(path.with_name(str(name._replace(tag=version_tag(size, version)))))


# Where weights come from.


def test_weights_that_cannot_be_had_are_told_and_an_error_only_where_they_were_asked_for(
    good: Path, shards: Path
) -> None:
    verdict = verify(str(good), [str(shards)], Recompute(weights="nowhere/weights.pth"))
    assert verdict.proven
    assert verdict.recomputed == 0
    assert any("nowhere/weights.pth not found" in note for note in verdict.notes)
    with pytest.raises(SettingsError, match=r"nowhere/weights\.pth not found"):
        verify(str(good), [str(shards)], Recompute(weights="nowhere/weights.pth", required=True))


def test_weights_of_another_sha256_are_refused(good: Path, shards: Path) -> None:
    with pytest.raises(SettingsError, match="the output was made with random:0"):
        verify(str(good), [str(shards)], Recompute(weights="random:1", required=True))


def test_an_input_that_names_nothing_is_refused(good: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing-here"):
        verify(str(good), [str(tmp_path / "nothing-here.tar")])


# Object storage.


def test_an_output_on_s3_is_proven_and_a_fault_in_it_found(s3_url: str, shards: Path) -> None:
    for path in shards.iterdir():
        write_bytes(f"{s3_url}/shards", path.name, path.read_bytes())
    config = embed(f"{s3_url}/shards", f"{s3_url}/out")
    verdict = verify(config.output, [f"{s3_url}/shards/"], ALL)
    assert verdict.findings == []
    assert (verdict.samples, verdict.tars_compared, verdict.recomputed) == (14, 2, 10)
    fs, path = locate(f"{config.output}/embeddings")
    first, second, *_ = sorted(fs.find(path))
    fs.pipe_file(first, fs.cat_file(first)[:-100])
    fs.rm_file(second)
    verdict = verify(config.output, [f"{s3_url}/shards/"])
    name = PartName.parse(first.rpartition("/")[2])
    assert name is not None
    assert found(verdict) == {
        ("unreadable", f"embeddings/{name}"),
        ("part-missing", f"embeddings/{name.shard}.{name.tag}-*"),
        ("errors-alone", f"errors/{second.rpartition('/')[2]}"),
    }


# The command.


def test_the_command_proves_a_good_output_and_writes_json(
    good: Path, shards: Path, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    done = run_job("verify.py", good, "--input", shards, "--recompute", "all", "--json", tmp_path / "verdict.json")
    assert done.returncode == 0, done.stderr
    assert "14: 10 embedded, 4 errors" in done.stdout
    assert f"proven: {good}" in done.stdout
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["proven"] is True
    assert verdict["findings"] == []
    assert (verdict["samples"], verdict["recomputed"]) == (14, 10)


def test_the_command_names_each_fault_on_a_line_and_exits_with_1(
    planted: Path, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    path = part_path(planted, 0)
    rewrite(path, lambda table: set_column(table, IMAGE_ID, ["a\nb\x1b[31m", "c", "c"]), honest=False)
    done = run_job("verify.py", planted, "--json", tmp_path / "verdict.json")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("WRONG")]
    assert len(lines) == 2
    assert any(f"embeddings/{path.name}: checksum: " in line for line in lines)
    assert "\x1b" not in done.stdout
    assert "NOT PROVEN: 2 findings" in done.stdout
    findings = json.loads((tmp_path / "verdict.json").read_text())["findings"]
    assert {finding["rule"] for finding in findings} == {"checksum", "id-repeated"}
    assert all(finding["means"] == RULES[finding["rule"]] for finding in findings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not an output: it has no run.json"),
        (["nowhere", "--recompute", "3"], "--recompute and --weights need --input"),
        (["nowhere", "--input", "x", "--recompute", "-1"], "must be `all` or a whole number of at least 0, got '-1'"),
        (["nowhere", "--threads", "0"], "must be a whole number of at least 1, got '0'"),
        (["nowhere", "--threads", "x"], "argument --threads: must be a whole number of at least 1, got 'x'"),
        ([""], "argument OUTPUT: must not be empty, got ''"),
        (["nowhere", "--json", "no/such/x.json"], "--json must be in a folder that is there, got 'no/such/x.json'"),
        ([], "the following arguments are required: OUTPUT"),
    ],
)
def test_the_command_refuses_wrong_usage_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command_says_why_no_tar_was_compared(
    good: Path, own_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in own_shards.iterdir():
        os.utime(path, (1, 1))
    assert main([str(good)]) == 0
    assert "tars        not compared: no --input\n" in capsys.readouterr().out
    assert main([str(good), "--input", str(own_shards), "--recompute", "0"]) == 1
    said = capsys.readouterr().out
    assert "tars        0 compared: no stored shard is in the input, unchanged and readable\n" in said


def test_the_command_says_to_delete_files_that_are_there_and_shows_no_name_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("plain", "esc\x1b[31m"):
        write_tar(tmp_path / "in" / f"{name}.tar", shard_members(0))
    embed(tmp_path / "in", tmp_path / "out")
    (alone,) = (tmp_path / "out" / "embeddings").glob("plain.*-00001.parquet")
    alone.unlink()
    (cut_off,) = (tmp_path / "out" / "embeddings").glob("esc*-00000.parquet")
    cut_off.write_bytes(b"")
    assert main([str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said
    advice = re.findall(r"^MEND  delete (.+)$", said, re.MULTILINE)
    assert advice == [str(cut_off).replace("\x1b", "\\x1b"), f"{tmp_path}/out/errors/{alone.name}"]


@pytest.mark.parametrize("mistake", [["--input"], [], ["--threads"]])
def test_the_command_shows_no_secret_of_what_it_refuses(
    mistake: list[str], good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code([str(good), *mistake, "https://127.0.0.1:9/b/a.tar?X-Amz-Signature=hunter2"]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("verify.py: ")
    assert "hunter2" not in said.out + said.err


def exit_code(arguments: list[str]) -> object:
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def test_help_tells_every_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--help"]) == 0
    text = capsys.readouterr().out
    for rule, meaning in RULES.items():
        assert rule in text
        assert meaning in text
