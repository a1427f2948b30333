"""What a fingerprint names, had again: the weights, preprocessing and decoder that made some embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.backbones import load_weights
from pipeline.backbones.weights_spec import Weights
from pipeline.core.config import DECODES
from pipeline.core.errors import OutputError, WeightsError
from pipeline.decoding.decoder import Decoder
from pipeline.decoding.preprocess import Preprocess
from pipeline.decoding.rules import DecodingRules
from pipeline.output.fingerprint import Fingerprint


@dataclass(frozen=True)
class Recipe:
    """How embeddings were made, ready to make more of them. `shape` is that of one embedding."""

    backbone: str
    weights: Weights
    rules: DecodingRules
    features: str
    shape: tuple[int, ...]
    dtype: str
    precision: str
    normalize: bool
    # What decoded: of a device's decoder the CPU has the like, not the same.
    decode: str

    def decoder(self) -> Decoder:
        """The decoder of the run; of one that decoded on its devices, what those have in common with the CPU."""
        return Decoder(self.rules)


def recipe_of(made: Fingerprint, spec: str | None = None) -> Recipe:
    """What `made` names. Weights are taken from `spec`, without it by the name that the run gave them.

    Raises:
        OutputError: a setting is missing.
        WeightsError: the weights cannot be had, or are not those of the run: their sha256 differs.
    """
    settings = made.settings
    try:
        return Recipe(
            backbone=settings["backbone"],
            weights=_weights(settings["backbone"], settings["weights_sha256"], made.versions["weights"], spec),
            rules=DecodingRules(
                preprocess=Preprocess.from_settings(settings["preprocess"]),
                max_pixels=settings["max_pixels"],
                ignore_orientation=settings["ignore_orientation"],
                # Outputs that do not say it were made before damage was looked for.
                accept_damaged=settings.get("accept_damaged", True),
            ),
            features=settings["features"],
            shape=tuple(settings["embedding_shape"]),
            dtype=settings["dtype"],
            precision=settings["precision"],
            normalize=settings["normalize"],
            decode=settings.get("decode", DECODES[0]),
        )
    except (KeyError, TypeError) as error:
        raise OutputError(f"the fingerprint is not of this version: {error!r}") from error


def _weights(backbone: str, sha256: str, name: str, spec: str | None) -> Weights:
    # torchvision's own are told as ResNet50_Weights.IMAGENET1K_V2, and asked for by the last part.
    try:
        weights = load_weights(backbone, spec or name.partition("_Weights.")[2] or name)
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
