"""What a fingerprint names, had again: the network, weights and decoder that made some embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from shard_embedder.pipeline.backbones import load_weights
from shard_embedder.pipeline.backbones.weights_spec import Weights, spec_of
from shard_embedder.pipeline.core.errors import WeightsError
from shard_embedder.pipeline.embedding.network import Network
from shard_embedder.pipeline.output.fingerprint import Fingerprint
from shard_embedder.pipeline.output.settings import OutputSettings


@dataclass(frozen=True)
class Recipe:
    """How embeddings were made, ready to make more of them.

    What decoded them may have been a device's decoder, of which the CPU has the like and not the same:
    `settings.decode` tells.
    """

    settings: OutputSettings
    network: Network
    weights: Weights


def recipe_of(made: Fingerprint, spec: str | None = None) -> Recipe:
    """What `made` names. Weights are taken from `spec`, without it by the name that the run gave them.

    Raises:
        WeightsError: the weights cannot be had, or are not those of the run: their sha256 differs.
    """
    settings = made.settings
    network = Network(
        backbone=settings.backbone,
        preprocess=settings.preprocess,
        features=settings.features,
        normalize=settings.normalize,
    )
    name = made.versions.get("weights", "")
    return Recipe(settings, network, _weights(settings.backbone, settings.weights_sha256, name, spec))


def _weights(backbone: str, sha256: str, name: str, spec: str | None) -> Weights:
    try:
        weights = load_weights(backbone, spec or spec_of(name))
    except WeightsError as error:
        if spec is not None:
            raise
        raise WeightsError(f"{error}: the output was made with these; say by --weights where they are") from error
    if weights.sha256 != sha256:
        raise WeightsError(
            f"weights {weights.name} have sha256 {weights.sha256[:12]}, the output was made with {name} "
            f"of sha256 {sha256[:12]}"
        )
    return weights
