#!/usr/bin/env python3
"""A plain alternative to this project: batch inference as Ray Data's own documentation shows it."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torchvision
from PIL import Image
from ray.data import ActorPoolStrategy

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--shards", type=Path, required=True, help="folder of .tar shards")
parser.add_argument("--output", type=Path, required=True, help="folder for the Parquet files")
parser.add_argument("--backbone", default="resnet50", help="a torchvision ResNet")
parser.add_argument("--image-size", type=int, help="default: that of the weights")
parser.add_argument("--seed", type=int, default=0, help="of the random weights")
parser.add_argument("--device", default="cpu")
parser.add_argument("--batch-size", type=int, default=32)
options = parser.parse_args()

on_gpu = options.device != "cpu"
cores = len(os.sched_getaffinity(0))
# "local": not whatever other Ray runs on this machine. Without a GPU one actor takes all cores, and Ray believes in
# as many again, to read and write beside it: with only the cores that there are, 2 cores hung.
ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=cores if on_gpu else 2 * cores)
weights = torchvision.models.get_model_weights(options.backbone).DEFAULT
transform = weights.transforms()
if options.image_size:
    resize = round(options.image_size * transform.resize_size[0] / transform.crop_size[0])
    transform = weights.transforms(crop_size=options.image_size, resize_size=resize)


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    """One sample as the weights want it."""
    return {"image_id": row["__key__"], "image": transform(Image.fromarray(row["jpg"])).numpy()}


class Model:
    """One backbone an actor."""

    def __init__(self, backbone: str, seed: int, device: str) -> None:
        # Real weights would be `weights=weights`; the benchmark runs where they cannot be downloaded.
        torch.manual_seed(seed)
        self.model = torchvision.models.get_model(backbone, weights=None)
        self.model.fc = torch.nn.Identity()
        self.model.eval().to(device)
        self.device = device

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Images [N, 3, H, W] to embeddings [N, C]."""
        with torch.inference_mode():
            embeddings = self.model(torch.from_numpy(batch["image"]).to(self.device))
        result = {"image_id": batch["image_id"], "embedding": embeddings.cpu().numpy()}
        # For the benchmark: Ray may leave all files to the end, so that they do not tell how fast it was.
        return {**result, "embedded_at": np.full(len(embeddings), time.time())}


shards = sorted(map(str, options.shards.glob("*.tar")))
(
    ray.data.read_webdataset(shards)
    .map(preprocess)
    .map_batches(
        Model,
        fn_constructor_args=(options.backbone, options.seed, options.device),
        batch_size=options.batch_size,
        compute=ActorPoolStrategy(size=int(ray.cluster_resources()["GPU"]) if on_gpu else 1),
        num_cpus=1 if on_gpu else cores,
        num_gpus=1 if on_gpu else None,
    )
    .write_parquet(str(options.output))
)
