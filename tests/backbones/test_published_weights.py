"""Weights by name: downloaded once, checked by the sha256 in their name, and nothing of them is executed."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torchvision import models
from torchvision.models._api import BUILTIN_MODELS

from shard_embedder.pipeline.backbones import load_weights
from shard_embedder.pipeline.backbones.torchvision_models import BACKBONES, Entry, preprocess_for
from shard_embedder.pipeline.backbones.weights import HASH_IN_NAME, published
from shard_embedder.pipeline.core.errors import WeightsError
from tests.backbones.weights_files import Touch, assert_loads, saved, torchvision_state, write


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub folder of this test's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def publish(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Add an architecture `published` to torchvision and to our table, as torchvision adds its own.

    The files of torchvision's real models cannot be made here: their names hold their own sha256.
    """
    real = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.value

    class Published_Weights(models.WeightsEnum):  # noqa: N801  torchvision's way of naming them
        IMAGENET1K_V1 = models.Weights(url=url, transforms=real.transforms, meta=real.meta)
        DEFAULT = IMAGENET1K_V1

    def published(*, weights: Published_Weights | None = None, **options: Any) -> nn.Module:
        return models.squeezenet1_1(weights=weights, **options)

    published.__annotations__["weights"] = Published_Weights
    monkeypatch.setitem(BUILTIN_MODELS, "published", published)
    monkeypatch.setitem(BACKBONES, "published", Entry("published"))


@pytest.fixture
def published_file(tmp_path: Path) -> Path:
    """A weights file named as torchvision names its own."""
    data = saved(torchvision_state(seed=5))
    path = tmp_path / "site" / f"published-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    path.parent.mkdir()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("spec", ["DEFAULT", "IMAGENET1K_V1"])
def test_named_weights_are_downloaded_once_and_named_by_the_sha256_of_their_file(
    spec: str, hub: Path, published_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, published_file.as_uri())
    weights = load_weights("published", spec)
    assert weights.name == "Published_Weights.IMAGENET1K_V1"
    assert weights.sha256 == hashlib.sha256(published_file.read_bytes()).hexdigest()
    assert [file.name for file in hub.iterdir()] == [published_file.name]
    published_file.unlink()
    assert load_weights("published", spec).sha256 == weights.sha256
    assert_loads("published", spec, torchvision_state(seed=5))
    assert preprocess_for("published", spec) == preprocess_for("squeezenet1_1", spec)


def test_a_hub_folder_filled_beforehand_needs_no_network(
    hub: Path, published_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, f"https://download.invalid/models/{published_file.name}")
    hub.mkdir(parents=True)
    published_file.rename(hub / published_file.name)
    assert_loads("published", "DEFAULT", torchvision_state(seed=5))


def test_a_file_in_the_hub_folder_that_torchvision_did_not_publish_is_refused(hub: Path) -> None:
    hub.mkdir(parents=True)
    path = hub / "squeezenet1_1-b8a52dc0.pth"
    write(path, torchvision_state())
    with pytest.raises(WeightsError, match=r"sha256 starts with b8a52dc0, but it is [0-9a-f]{64}; remove it"):
        load_weights("squeezenet1_1", "DEFAULT")


def test_a_published_file_is_loaded_without_executing_it(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved({"extra": Touch(tmp_path / "canary")})
    path = tmp_path / f"evil-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    publish(monkeypatch, Path(write(path, data)).as_uri())
    with pytest.raises(WeightsError, match="loads without code"):
        load_weights("published", "DEFAULT")
    assert not (tmp_path / "canary").exists()


def test_a_download_that_is_not_what_was_published_is_refused_and_not_kept(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "published-00000000.pth"
    publish(monkeypatch, Path(write(path, torchvision_state())).as_uri())
    with pytest.raises(WeightsError, match="invalid hash value"):
        load_weights("published", "DEFAULT")
    assert list(hub.iterdir()) == []


def test_where_no_download_is_possible_the_error_says_what_to_give_instead(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, "https://download.invalid/models/published-12345678.pth")
    with pytest.raises(WeightsError) as caught:
        load_weights("published", "DEFAULT")
    for text in ("cannot download", "https://download.invalid", str(hub), "--weights a path", "random:SEED"):
        assert text in str(caught.value)


@pytest.mark.usefixtures("hub")
def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/published-12345678.pth"
        with pytest.raises(WeightsError, match=r"cannot download .* timed out"):
            published(url, "published", "torchvision", timeout_s=0.3)
    assert socket.getdefaulttimeout() is None


def test_every_file_of_torchvision_holds_its_hash_in_its_name() -> None:
    for name in models.list_models(module=models):
        for entry in models.get_model_weights(name):
            assert HASH_IN_NAME.search(entry.url), entry.url
