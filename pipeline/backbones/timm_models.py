"""timm's models without their classifier, as `timm/NAME` or `timm/NAME.TAG`.

Pooled features are what timm's own `forward_head(forward_features(x), pre_logits=True)` gives, and the feature map is
that of `forward_features`, if it gives one. There is no table here: timm itself knows the tags, files and
preprocessing of its weights.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.data import resolve_data_config
from timm.models import (
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    get_deprecated_models,
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    split_model_name_tag,
)
from torch import Tensor

from shard_embedder.pipeline.backbones.base import (
    DEFAULT,
    Backbone,
    FeatureMaps,
    by,
    channels_of,
    check_features,
    first_line,
    near_names,
    own_preprocessing,
    run_without_values,
    seeded,
    unknown_backbone,
    unknown_layer,
    wrong_size,
)
from shard_embedder.pipeline.backbones.weights import (
    StateDict,
    check_fit,
    load_file,
    published,
    random_weights,
    weights_from,
)
from shard_embedder.pipeline.backbones.weights_spec import Weights, is_file, random_seed
from shard_embedder.pipeline.core.errors import BackboneError, WeightsError
from shard_embedder.pipeline.decoding.preprocess import CENTER, SQUASH, Preprocess
from shard_embedder.pipeline.decoding.resize import INTERPOLATIONS

PREFIX = "timm/"
# Names of the weights file in a repository of the hub: the first that exists is taken.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# What timm raises for an image size that an architecture does not take.
_SIZE_ERRORS = (AssertionError, RuntimeError, TypeError, ValueError)


class TimmBackbone(Backbone):
    """A model of timm without classifier, in `model`: images [N, 3, H, W] to features."""

    def __init__(self, model: Any, features: str) -> None:
        # The channels of what timm would feed its classifier, and of what `forward_features` gives.
        super().__init__(model.head_hidden_size if features == "pooled" else model.num_features)
        self.model = model
        self._is_pooled = features == "pooled"
        self._is_nhwc = str(getattr(model, "output_fmt", "NCHW")) == "NHWC"

    def forward(self, images: Tensor) -> Tensor:
        """Features of `images`, one row an image."""
        features: Tensor = self.model.forward_features(images)
        if self._is_pooled:
            pooled: Tensor = self.model.forward_head(features, pre_logits=True)
            return pooled
        return features.permute(0, 3, 1, 2) if self._is_nhwc else features


class _LayerMaps(FeatureMaps):
    """Maps from the inside of a model of timm, by the modules that `feature_info` names."""

    def __init__(self, name: str, model: Any, out_channels: dict[str, int]) -> None:
        super().__init__(out_channels)
        known = [info["module"] for info in getattr(model, "feature_info", ())]
        if not hasattr(model, "forward_intermediates") or len({*known}) != len(known):
            raise BackboneError(f"{name} has no feature maps by layer in timm")
        if not {*out_channels} <= {*known}:
            raise unknown_layer(name, tuple(out_channels), known)
        self.model = model
        self._layers = {known.index(layer): layer for layer in out_channels}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        indices = sorted(self._layers)
        maps = self.model.forward_intermediates(images, indices=indices, intermediates_only=True, stop_early=True)
        found = {self._layers[index]: value for index, value in zip(indices, maps, strict=True)}
        return {layer: found[layer] for layer in self.out_channels}


def find(name: str) -> str:
    """As `torchvision_models.find`. A tag stays in the name."""
    architecture, tag = _split(name)
    renamed = get_deprecated_models()
    if is_model(architecture) and architecture not in renamed:
        if tag:
            _config(architecture, tag)
        return name
    now = renamed.get(architecture)
    near = [now] if now else near_names(architecture, list_models())
    raise unknown_backbone(name, [PREFIX + one for one in near], "timm.list_models()")


def load_weights(name: str, spec: str) -> Weights:
    """Load the weights of a backbone, as `pipeline.backbones.load_weights` says.

    `spec` may be one of timm's tags. `DEFAULT` is the tag in the backbone's name, else timm's own default.
    """
    found = find(name)
    architecture, _ = _split(found)
    seed = random_seed(spec)
    if seed is not None:
        return _drawn(found, seed)
    if is_file(spec):
        weights = load_file(spec)
    else:
        config = _named(name, spec)
        data, file = _published(name, config)
        weights = weights_from(config.tag or DEFAULT, data, file)
    skeleton = _without_values(architecture, _config_of(name, weights), None)
    _fitted(skeleton, architecture, weights)
    return weights


@cache
def _drawn(name: str, seed: int) -> Weights:
    """What random weights are called: to draw and to hash them takes longer than many a run of a few images."""
    return random_weights(seed, _with_values(_split(name)[0], _config_of(name, None), None, seed))


def preprocess_for(name: str, weights: str, preprocess: str = DEFAULT) -> Preprocess:
    """As `torchvision_models.preprocess_for`, by timm's tags.

    `DEFAULT` is the tag in the backbone's name, else timm's own default.
    """
    find(name)
    if is_file(weights) or random_seed(weights) is not None:
        return _preprocess(_named(name, preprocess))
    own = _preprocess(_named(name, weights))
    if preprocess != DEFAULT and _preprocess(_named(name, preprocess)) != own:
        raise own_preprocessing(weights, preprocess)
    return own


def output_shape(name: str, features: str, size: tuple[int, int], weights: Weights | None = None) -> tuple[int, ...]:
    """As `torchvision_models.output_shape`. An architecture that is built for one image size is built for `size`."""
    check_features(features)
    architecture, _ = _split(find(name))
    config = _config_of(name, weights)
    model = _without_values(architecture, config, size)
    try:
        shape = run_without_values(TimmBackbone(model, features), size)
    except (NotImplementedError, AttributeError) as error:  # an encoder without pooling, or several maps
        raise BackboneError(f"{name} has no {features} features of one shape: {error}") from error
    except _SIZE_ERRORS as error:
        raise wrong_size(name, size, config.input_size[1:], error) from error
    if len(shape) != (1 if features == "pooled" else 3):
        raise BackboneError(
            f"{name} has no feature map: timm's forward_features gives [N, {', '.join(map(str, shape))}]; "
            f"use pooled features"
        )
    if weights is not None and weights.state is not None:
        _fitted(model, architecture, weights)
    return shape


def build_backbone(name: str, weights: Weights, features: str, image_size: tuple[int, int] | None) -> Backbone:
    """Build a backbone as `pipeline.backbones.build_backbone` says."""
    check_features(features)
    if features == "map":
        output_shape(name, features, image_size or _config_of(name, weights).input_size[1:])
    return TimmBackbone(_loaded(name, weights, image_size), features).eval()


def _loaded(name: str, weights: Weights, image_size: tuple[int, int] | None) -> Any:
    """timm's own model without classifier, with these weights."""
    architecture, _ = _split(find(name))
    model = _with_values(architecture, _config_of(name, weights), image_size, weights.seed or 0)
    if weights.state is not None:
        given = _fitted(model, architecture, weights)
        expected = model.state_dict()
        for key, value in given.items():
            expected[key].copy_(value.detach())
    return model


def build_feature_maps(
    name: str, weights: Weights, layers: tuple[str, ...], image_size: tuple[int, int] | None
) -> FeatureMaps:
    """As `torchvision_models.build_feature_maps`, by the modules in timm's `feature_info`."""
    architecture, _ = _split(find(name))
    config = _config_of(name, weights)
    meta = _LayerMaps(name, _without_values(architecture, config, image_size), dict.fromkeys(layers, 0))
    channels = channels_of(name, meta, image_size or config.input_size[1:])
    return _LayerMaps(name, _loaded(name, weights, image_size), channels).eval()


def list_names() -> list[str]:
    """The names of all backbones, without tags."""
    return [PREFIX + name for name in list_models()]


def versions() -> dict[str, str]:
    """Versions of what computes the features."""
    return {"torch": torch.__version__, "timm": timm.__version__}


def _split(name: str) -> tuple[str, str]:
    """Architecture and tag of a backbone's name; the tag is empty where there is none."""
    architecture, tag = split_model_name_tag(name.removeprefix(PREFIX))
    return architecture, tag


def _config(architecture: str, tag: str) -> PretrainedCfg:
    """timm's configuration of the weights `tag` of an architecture, or of its default ones.

    Raises:
        WeightsError: no such tag; the known ones are listed.
    """
    if not tag:
        return get_pretrained_cfg(architecture) or PretrainedCfg()
    known = {config.tag: config for config in get_arch_pretrained_cfgs(architecture).values() if config.tag}
    if tag not in known:
        raise WeightsError(
            f"weights of timm/{architecture} must be one of {', '.join([DEFAULT, *known])}, random[:SEED], or the "
            f"path or URL of a .pth, .pt or .safetensors file, got {tag!r}"
        )
    return known[tag]


def _named(name: str, weights: str) -> PretrainedCfg:
    """The configuration of weights by their tag, or of the backbone's `DEFAULT` ones."""
    architecture, tag = _split(name)
    if tag and weights not in (DEFAULT, tag):
        raise WeightsError(f"{name} says in its name which weights: these must be DEFAULT, got {weights!r}")
    return _config(architecture, tag or ("" if weights == DEFAULT else weights))


def _config_of(name: str, weights: Weights | None) -> PretrainedCfg:
    """The configuration to build a model by: that of its weights, else that of its name."""
    architecture, tag = _split(name)
    own = {config.tag for config in get_arch_pretrained_cfgs(architecture).values()}
    is_tag = weights is not None and weights.name in own
    return _config(architecture, weights.name if is_tag and weights is not None else tag)


def _preprocess(config: PretrainedCfg) -> Preprocess:
    """What `timm.data.create_transform` does for weights, as numbers."""
    data = resolve_data_config(pretrained_cfg=config.to_dict())
    mode, (channels, height, width) = data["crop_mode"], data["input_size"]
    is_known = mode == SQUASH or (mode == CENTER and height == width)
    if not is_known or channels != 3:
        raise WeightsError(
            f"timm/{config.architecture} has a preprocessing that is not supported: crop_mode {mode!r} of "
            f"{channels} channels at {by((height, width))}; {CENTER} (of squares) and {SQUASH} of 3 channels are"
        )
    if data["interpolation"] not in INTERPOLATIONS:
        raise WeightsError(
            f"timm/{config.architecture} has a preprocessing that is not supported: interpolation must be one of "
            f"{', '.join(INTERPOLATIONS)}, got {data['interpolation']!r}"
        )
    return Preprocess(
        resize=math.floor(max(height, width) / data["crop_pct"]),
        crop=(height, width),
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        mode=mode,
    )


def _published(name: str, config: PretrainedCfg) -> tuple[bytes, str]:
    """The file of timm's own weights and its name, from the caches of the hub or downloaded there.

    Raises:
        WeightsError: there are none, or no download is possible.
    """
    label = f"{PREFIX}{config.architecture}{'.' if config.tag else ''}{config.tag or ''}"
    if config.hf_hub_id:
        return _from_hub(label, config.hf_hub_id)
    if config.url and not config.custom_load:
        return published(config.url, label, "timm"), config.url
    raise WeightsError(
        f"timm has no weights of {name} to download: give --weights a path, an s3:// URL or random:SEED"
    )


def _from_hub(label: str, repository: str) -> tuple[bytes, str]:
    name, _, revision = repository.partition("@")
    # A file in the cache is taken as it is, as in torch's hub folder. The hub is not asked for a newer one.
    for is_local in (True, False):
        for file in _HUB_FILES:
            try:
                path = hf_hub_download(name, file, revision=revision or None, local_files_only=is_local)
                return Path(path).read_bytes(), file
            except LocalEntryNotFoundError as error:
                if not is_local:
                    raise _no_download(label, name, error) from error
            except EntryNotFoundError:
                continue
            except Exception as error:  # of the hub, its HTTP library, or the disk
                raise _no_download(label, name, error) from error
    raise WeightsError(f"https://huggingface.co/{name} has no {' or '.join(_HUB_FILES)}")


def _no_download(label: str, repository: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"cannot download the weights {label} from https://huggingface.co/{repository}: {type(error).__name__}: "
        f"{first_line(error)[:300]} Where there is no network, fetch {_HUB_FILES[0]} from there and give --weights "
        "its path or an s3:// URL, or random:SEED"
    )


def _create(architecture: str, config: PretrainedCfg, size: tuple[int, int] | None) -> Any:
    """timm's own model without classifier. A model of one fixed size is built for `size`."""
    options = {"img_size": size} if config.fixed_input_size and size is not None else {}
    model = timm.create_model(
        architecture, pretrained=False, pretrained_cfg=config.to_dict(), num_classes=0, **options
    )
    return model.eval()


def _without_values(architecture: str, config: PretrainedCfg, size: tuple[int, int] | None) -> Any:
    """The model on the meta device: its shapes, in no time and memory.

    Raises:
        BackboneError: it cannot be built for images of `size`.
    """
    try:
        with torch.device("meta"):
            return _create(architecture, config, size)
    except _SIZE_ERRORS as error:
        own: tuple[int, int] = config.input_size[1:]
        raise wrong_size(f"{PREFIX}{architecture}", size or own, own, error) from error


def _with_values(architecture: str, config: PretrainedCfg, size: tuple[int, int] | None, seed: int) -> Any:
    """The model with `torch.manual_seed(seed)` and timm's own initialisation.

    Models whose weights are loaded afterwards need it too: timm computes tables of positions that no state dict has.
    """
    with seeded(seed):
        return _create(architecture, config, size)


def _fitted(model: Any, architecture: str, weights: Weights) -> StateDict:
    """The weights' state dict as `model` takes it: by timm's own conversion, and without the classifier.

    The conversion renames old keys, and resamples position embeddings to the model's image size.

    Raises:
        WeightsError: it does not fit; missing and unexpected keys are named.
    """
    assert weights.state is not None
    state: StateDict = dict(weights.state)
    convert = getattr(sys.modules[model_entrypoint(architecture).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, model)
        except Exception as error:  # a conversion does not check what it gets
            raise WeightsError(
                f"weights {weights.name} do not fit timm/{architecture}: {type(error).__name__}: {error}"
            ) from error
    expected = model.state_dict()
    with torch.device("meta"):
        classifier = timm.create_model(architecture, num_classes=1).state_dict().keys() - expected.keys()
    given = {key: value for key, value in state.items() if key not in classifier}
    check_fit(expected, given, weights.name, f"{PREFIX}{architecture}")
    return given
