"""What verify proves of a good output, whatever its settings and wherever it lies."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.pipeline.core.errors import InputError, SettingsError
from shard_embedder.pipeline.core.storage import locate
from shard_embedder.pipeline.core.writing import write_bytes
from shard_embedder.pipeline.output.names import PartName
from shard_embedder.pipeline.verify.proof import verify
from shard_embedder.pipeline.verify.recompute import Recompute
from tests.conftest import encode, photo, write_tar
from tests.outputs import embed
from tests.verify.planting import ALL, found, rewrite

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


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"normalize": True},
        {"normalize": True, "dtype": "float16"},
        {"dtype": "float16", "precision": "bf16"},
        {"features": "map"},
        {"features": "map", "dtype": "float16"},
        {"id": "json:id"},
        {"backbone": "shufflenet_v2_x0_5", "part_rows": 100},
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
