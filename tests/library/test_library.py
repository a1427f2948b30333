"""From Python: images to embeddings, the job, and an index, as the commands make them."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import shard_embedder
from shard_embedder import build_backbone, embed, embed_images
from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.errors import InputError, PipelineError, SampleError, SettingsError
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.verify.proof import verify
from shard_embedder.pipeline.verify.recompute import Recompute
from tests.conftest import encode, photo, sample_members, write_shards, write_tar
from tests.outputs import rows

SETTINGS = {"backbone": "squeezenet1_1", "weights": "random:3", "precision": "fp32"}


def test_what_is_handed_on_is_there_and_nothing_else() -> None:
    for name in shard_embedder.__all__:
        assert getattr(shard_embedder, name) is not None
    with pytest.raises(AttributeError, match="shard_embedder has no 'embedd'; it has PipelineError, Run, "):
        _ = shard_embedder.embedd


def test_a_run_is_the_jobs_and_is_gone_on_with(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=2, samples_each=3)
    write_tar(shards / "bad.tar", [("a.jpg", b"no image"), *sample_members("b", 1)])
    run = embed(str(shards / "*.tar"), str(tmp_path / "out"), image_size="64", **SETTINGS)
    assert (run.num_samples, run.num_embedded, run.num_errors, run.complete) == (8, 7, 1, True)
    assert run.embeddings.to_table().num_rows == 7
    assert run.errors.to_table()["image_id"].to_pylist() == ["a"]
    again = embed(str(shards / "*.tar"), str(tmp_path / "out"), image_size="64", **SETTINGS)
    assert again.report["shards"]["done_before"] == 3
    # The one that had nothing to do leaves no report.
    (kept,) = (tmp_path / "out" / "reports").iterdir()
    assert kept.name == f"{run.report['run']}.json"
    assert kept.read_bytes() == (tmp_path / "out" / "report.json").read_bytes()
    assert not [note for note in verify(str(tmp_path / "out")).notes if "reports/" in note]
    with pytest.raises(shard_embedder.PipelineError, match="weights_sha256"):
        embed(str(shards / "*.tar"), str(tmp_path / "out"), image_size="64", **{**SETTINGS, "weights": "random:4"})


def test_a_run_that_refused_a_shard_is_not_complete(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    # A name of more bytes than a file system takes with what is added to it.
    write_tar(shards / f"{'n' * 240}.tar", sample_members("long", 7))
    run = embed(str(shards), str(tmp_path / "out"), image_size="64", **SETTINGS)
    assert (run.report["balanced"], run.num_embedded, run.complete) == (True, 2, False)


def test_images_in_any_form_get_the_embeddings_of_the_job(tmp_path: Path) -> None:
    images = [photo(seed, (90, 70)) for seed in range(3)]
    write_tar(tmp_path / "in" / "s.tar", [(f"{i}.png", encode(image, "PNG")) for i, image in enumerate(images)])
    embed(str(tmp_path / "in"), str(tmp_path / "out"), image_size="64", device="cpu", **SETTINGS)
    stored = np.array([row["embedding"] for row in rows(tmp_path / "out")], np.float32)
    (tmp_path / "a.png").write_bytes(encode(images[0], "PNG"))
    given = [tmp_path / "a.png", images[1], np.asarray(images[2])]
    ids, found = embed_images(given, image_size=(64, 64), device="cpu", **SETTINGS)
    assert ids == [str(tmp_path / "a.png"), "1", "2"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, stored, rtol=1e-3, atol=1e-5)
    _, one = embed_images(images[1], image_size=(64, 64), device="cpu", **SETTINGS)
    np.testing.assert_allclose(one, found[1:2], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=1, samples_each=1)
    for call in (
        lambda: embed_images(photo(0), device="cuda", **SETTINGS),
        lambda: embed(str(shards), str(tmp_path / "out"), device="cuda", **SETTINGS),
    ):
        with pytest.raises(SettingsError, match="device must be one that this machine has, got 'cuda'"):
            call()


def test_settings_that_do_not_exist_are_named() -> None:
    for wrong, told in (
        ({"device": "mps"}, "device must be one of auto, cuda, cpu, got 'mps'"),
        ({"precision": "auto"}, "precision must be one of fp32, bf16, fp16, got 'auto'"),
        (
            {"features": ("layer2", "layer3")},
            r"features must be pooled or map, got \('layer2', 'layer3'\)",
        ),
    ):
        with pytest.raises(PipelineError, match=told):
            embed_images(photo(0), **{**SETTINGS, **wrong})


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"image .*nowhere\.jpg not found"):
        embed_images([tmp_path / "nowhere.jpg"], **SETTINGS)
    with pytest.raises(InputError, match=r"array must be uint8 of shape \[H, W, 3\], got float64 of shape \[4, 4\]"):
        embed_images([np.zeros((4, 4))], **SETTINGS)
    with pytest.raises(InputError, match="images must be at least one, got none"):
        embed_images([], **SETTINGS)
    with pytest.raises(SampleError):
        embed_images([b"no image"], **SETTINGS)


def test_an_image_of_another_mode_is_decoded_as_a_file_of_it_would_be() -> None:
    image = photo(1).convert("L")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    _, by_image = embed_images(image, **SETTINGS)
    _, by_file = embed_images(buffer.getvalue(), **SETTINGS)
    assert np.array_equal(by_image, by_file)
    assert isinstance(image, Image.Image)


def test_an_image_of_pillow_is_turned_as_its_file_would_be() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(1), exif=exif)
    _, (by_image, by_file) = embed_images([Image.open(io.BytesIO(data)), data], **SETTINGS)
    assert np.array_equal(by_image, by_file)


def test_an_index_is_built_and_searched_by_images(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="the extra `index` is not installed")
    shards = write_shards(tmp_path / "in", num_shards=1, samples_each=5)
    run = embed(str(shards), str(tmp_path / "out"), image_size="64", **SETTINGS)
    index = shard_embedder.build_index(run.output, tmp_path / "index")
    found = index.search([photo(2), photo(4)], k=2)
    assert [len(near) for near in found] == [2, 2]
    assert [near[0].image_id for near in found] == ["000-0002", "000-0004"]
    stored = vectors(run.embeddings.to_table())
    assert index.search_vectors(stored[:1], k=1)[0][0].image_id == "000-0000"


def test_a_backbone_is_a_plain_module() -> None:
    assert build_backbone("resnet18", weights="random:0").num_features == 512


@pytest.mark.slow
def test_a_folder_of_images_is_embedded_as_it_is_and_followed(tmp_path: Path) -> None:
    images, output = tmp_path / "photos", tmp_path / "out"
    settings = {**SETTINGS, "image_size": "64"}
    for number, path in enumerate(("2024/a.v1.jpg", "b.jpg", "c.png")):
        (images / path).parent.mkdir(parents=True, exist_ok=True)
        (images / path).write_bytes(encode(photo(number), "PNG" if path.endswith("png") else "JPEG"))
    (images / "notes.txt").write_text("no image")
    run = embed(str(images), str(output), **settings)
    assert run.complete
    assert run.report["input"] == [str(images)], "what was named, not where it is packed"
    assert [row["image_id"] for row in rows(output)] == ["2024/a.v1.jpg", "b.jpg", "c.png"]
    proof = verify(str(output), [str(output / "packed")], Recompute(None))
    assert (proof.proven, proof.notes) == (True, [])
    # New images are embedded, and nothing else is.
    (images / "new.jpg").write_bytes(encode(photo(7)))
    run = embed(str(images), str(output), **settings)
    assert (run.report["samples_now"], run.report["shards"]["done_before"], run.complete) == (1, 1, True)
    # What is deleted has no row any more, and what is changed has another.
    before = {row["image_id"]: row["embedding"] for row in rows(output)}
    (images / "new.jpg").unlink()
    (images / "b.jpg").write_bytes(encode(photo(8)))
    assert embed(str(images), str(output), **settings).complete
    after = {row["image_id"]: row["embedding"] for row in rows(output)}
    assert list(after) == ["2024/a.v1.jpg", "b.jpg", "c.png"]
    assert [name for name in after if after[name] != before[name]] == ["b.jpg"]
    assert verify(str(output), [str(output / "packed")], Recompute(None)).proven
    assert embed(str(images), str(output), **settings).report["samples_now"] == 0


def test_shards_in_a_folder_win_over_images(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    (folder / "a.jpg").write_bytes(encode(photo(1)))
    job = prepare_job(parse({"input": [str(folder)], "output": str(tmp_path / "out"), **SETTINGS}))
    assert (job.photos, job.left_out, len(job.shards)) == (None, {".jpg": 1}, 1)


@pytest.mark.parametrize(
    ("inputs", "output", "told"),
    [
        (
            ["photos"],
            "s3://bucket/out",
            "output must be on this machine where input is a folder of images, got s3://",
        ),
        (
            ["photos", "more"],
            "out",
            "no .tar shard found for input photos; a folder of images must hold an image, and be the only input",
        ),
        (["empty"], "out", "no .tar shard found for input empty"),
    ],
)
def test_a_folder_of_images_that_cannot_be_packed_is_told(
    inputs: list[str], output: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "more", "empty"):
        Path(name).mkdir()
        Path(name, "notes.txt" if name == "empty" else "a.jpg").write_bytes(encode(photo(1)))
    with pytest.raises(InputError, match=f"^{re.escape(told)}"):
        embed(inputs, output, **SETTINGS)
