"""timm's own models with random weights that tell each part from its absence."""

from __future__ import annotations

from typing import Any

import timm
import torch


def redrawn(architecture: str, **options: Any) -> Any:
    """timm's own model with its classifier, in which no parameter is 0 or 1 throughout.

    timm begins layer scales, last norms and biases so that a random network nearly is its stem, and embeddings
    would agree whatever is behind that.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(architecture, **options)
        for key, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.numel() > 1 and value.std() < 1e-6:
                value.copy_(torch.randn_like(value) * 0.2 + (1.0 if value.flatten()[0] != 0 else 0.0))
    return model.eval()
