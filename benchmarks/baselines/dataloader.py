#!/usr/bin/env python3
"""A plain alternative to this project: webdataset, a torch DataLoader, and torchvision eager in fp32."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchvision
import webdataset as wds
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--shards", type=Path, required=True, help="folder of .tar shards")
parser.add_argument("--output", type=Path, required=True, help="folder for the Parquet files")
parser.add_argument("--backbone", default="resnet50", help="a torchvision ResNet")
parser.add_argument("--image-size", type=int, help="default: that of the weights")
parser.add_argument("--seed", type=int, default=0, help="of the random weights")
parser.add_argument("--device", default="cpu")
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--rows-per-file", type=int, default=128)
options = parser.parse_args()

weights = torchvision.models.get_model_weights(options.backbone).DEFAULT
transform = weights.transforms()
if options.image_size:
    resize = round(options.image_size * transform.resize_size[0] / transform.crop_size[0])
    transform = weights.transforms(crop_size=options.image_size, resize_size=resize)

# Real weights would be `weights=weights`; the benchmark runs where they cannot be downloaded.
torch.manual_seed(options.seed)
model = torchvision.models.get_model(options.backbone, weights=None)
model.fc = torch.nn.Identity()
model = model.eval().to(options.device)

shards = sorted(map(str, options.shards.glob("*.tar")))
num_workers = min(len(os.sched_getaffinity(0)), len(shards))
dataset = (
    wds.WebDataset(shards, shardshuffle=False)
    .decode("pilrgb")
    .to_tuple("__key__", "jpg")
    .map_tuple(None, transform)
    .batched(options.batch_size)
)
loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, pin_memory=options.device != "cpu")

options.output.mkdir(parents=True, exist_ok=True)
keys: list[str] = []
embeddings: list[torch.Tensor] = []


def write(number: int) -> None:
    """Write what has been collected as one file."""
    rows = torch.cat(embeddings).numpy()
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    pq.write_table(pa.table({"image_id": keys, "embedding": column}), options.output / f"{number:05d}.parquet")
    keys.clear()
    embeddings.clear()


number = 0
with torch.inference_mode():
    for names, images in loader:
        embeddings.append(model(images.to(options.device, non_blocking=True)).cpu())
        keys.extend(names)
        if len(keys) >= options.rows_per_file:
            write(number)
            number += 1
if keys:
    write(number)
