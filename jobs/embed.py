#!/usr/bin/env python3
"""Embed every image of WebDataset shards into Parquet: the job."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shard_embedder.jobs.support.command import Parser
from shard_embedder.jobs.support.console_json import make_console
from shard_embedder.jobs.support.exit_codes import EXIT_USAGE
from shard_embedder.pipeline.core import config as settings
from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.formatting import did_you_mean
from shard_embedder.pipeline.core.schema import KEEP_TYPES

_EPILOG = """\
Every option may also come from the environment (EMBED_INPUT, EMBED_OUTPUT, EMBED_PART_ROWS ...) or from a
TOML file (input = "...", part_rows = 1024 ...). A flag beats the environment, that beats the file, and that
the default. Credentials and endpoints of object storage come by the usual variables (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_PROFILE ...) or the machine's role.

exit codes:
  0    every sample is stored: as an embedding, or in errors/ with its reason
  2    wrong usage or settings; nothing was started
  3    some shards could not be read to their end, or went from the input meanwhile; what could be read is stored
  4    the counts do not balance, or the store failed: run the same command again
  5    more errors than --max-error-fraction, or in a shard than --max-shard-error-fraction
  75   another run holds the output: nothing was started, or it took over and this one stopped
  130  interrupted (143 by SIGTERM): run the same command again to go on
"""


def parser() -> Parser:
    """The command line. Every default is None here: `Config` holds the defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    top = Parser(
        prog="embed.py",
        description=__doc__,
        epilog=_EPILOG,
        examples=[
            "--input photos/ --output out/ --backbone resnet50",
            "--input 's3://bkt/shards/*.tar' --output s3://bkt/out",
        ],
    )

    def add(group: argparse._ArgumentGroup, name: str, text: str, **options: Any) -> None:
        default = defaults.get(name)
        shown = "" if default in (None, (), False, dataclasses.MISSING) else f" (default: {default})"
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, help=text + shown, **options)

    flag: dict[str, Any] = {"action": "store_const", "const": True}
    data = top.add_argument_group("what to embed, and where to")
    add(
        data,
        "input",
        "shards: a .tar, a brace range, a glob, a folder, or a .txt list of these; or one local folder of "
        "images, which is packed into shards in OUTPUT/packed",
        nargs="+",
        metavar="URL",
    )
    add(data, "output", "folder or s3:// prefix of the result", metavar="URL")
    data.add_argument("--config", metavar="FILE", help="TOML file with any of these options")
    add(data, "limit", "embed at most the first N pending shards", metavar="N")
    data.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")

    model = top.add_argument_group("backbone")
    add(model, "backbone", "a torchvision classifier, resnet50_stride1, or timm/NAME", metavar="NAME")
    add(
        model,
        "weights",
        "DEFAULT, a name such as IMAGENET1K_V1, a path or URL (.pth, .pt, .safetensors), or random[:SEED]",
        metavar="W",
    )
    add(model, "preprocess", "whose preprocessing to use for weights from a file or random", metavar="NAME")
    add(model, "image_size", "input size in pixels: N or HEIGHTxWIDTH (default: that of the weights)", metavar="N")
    add(model, "features", "pooled gives [C] an image, map gives [C, H, W]", choices=settings.FEATURES)

    samples = top.add_argument_group("samples")
    add(samples, "id", "image_id: key, or a field such as json:uid", metavar="FIELD")
    add(
        samples,
        "keep",
        "fields to carry along as columns: cls, txt, json:caption, each with =TYPE where it is not text "
        f"({', '.join(KEEP_TYPES)}); a value of another type becomes null",
        nargs="+",
        metavar="FIELD",
    )
    add(
        samples,
        "key",
        "where the key of a sample ends in a member's name: first-dot is WebDataset's rule; "
        "last-dot makes two samples of 1.2.840.jpg and 1.2.841.jpg",
        choices=settings.KEYS,
    )
    add(
        samples,
        "image_member",
        "extension of the member that is the image (default: by a fixed order)",
        metavar="EXT",
    )
    add(samples, "ignore_orientation", "do not turn images upright by their EXIF orientation", **flag)
    add(
        samples,
        "accept_damaged",
        "embed images of which a part is missing or garbled (grey, black), which are errors otherwise",
        **flag,
    )
    add(samples, "max_pixels", "larger images are errors, found before they are decoded", metavar="PIXELS")
    add(samples, "max_image_bytes", "larger members are errors, and are not read", metavar="BYTES")

    out = top.add_argument_group("embeddings")
    add(out, "dtype", "type of the stored values", choices=settings.DTYPES)
    add(out, "normalize", "scale each embedding to L2 length 1", **flag)
    add(
        out,
        "part_rows",
        "samples a Parquet part; fewer where its images and texts are 512 MiB, or its decoded pixels would be more",
        metavar="N",
    )

    compute = top.add_argument_group("compute")
    add(compute, "device", "where the backbone runs", choices=settings.DEVICES)
    add(
        compute,
        "precision",
        "auto is bf16 or fp16, where the device has it and images of the input show that it is close to fp32",
        choices=settings.PRECISIONS,
    )
    add(
        compute,
        "batch_size",
        "images a batch, or auto: measured at the start of a new output, at most 20 s (2 minutes with --compile), "
        "and kept in its run.json (default: by device)",
        metavar="N",
    )
    add(
        compute,
        "decode",
        "scaled decodes large JPEGs at a fraction of their size (cosine at least 0.999 at the weights' own input "
        "size); gpu decodes plain JPEGs on the backbone's GPU, for machines with few CPU cores a GPU, and gpu:0.7 "
        "those of 7 in 10 samples; all else stays on CPU",
        metavar="|".join(settings.DECODES),
    )
    add(
        compute,
        "compile",
        "compile the backbone for its GPU by torch.compile, which takes a C compiler and half a minute there",
        **flag,
    )
    add(compute, "price_per_hour", "money a device-hour: the report then says what the run cost", metavar="PRICE")
    add(
        compute,
        "actors",
        "backbones at once, at least and at most (default: one a GPU, or on CPUs one for every 16 of a node)",
        metavar="MIN:MAX",
    )
    add(
        compute,
        "actor_resource",
        "only nodes with this Ray resource get backbones: accelerator_type:H100, or one that they were started with "
        "(default: any node)",
        metavar="NAME",
    )
    add(
        compute,
        "node_wait_s",
        "how long to wait for nodes that are missing, at the start and later (default: 0 at the start, 1800 later)",
        metavar="S",
    )

    shown = top.add_argument_group("what is shown")
    add(shown, "log_format", "text for people, json for machines: an object a line", choices=settings.LOG_FORMATS)

    faults = top.add_argument_group("faults")
    add(
        faults,
        "max_passes",
        "give up after so many passes in a row, the first included, that stored nothing new",
        metavar="N",
    )
    add(faults, "max_error_fraction", "end with 5 where more of the samples are errors, 0 to 1", metavar="F")
    add(faults, "max_shard_error_fraction", "end with 5 where more of the samples of any shard are", metavar="F")
    return top


def gather(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Config:
    """Flags over `EMBED_*` variables over the config file.

    Raises:
        SettingsError: an unreadable file, an unknown name in it, or a value that breaks its rule.
    """
    names = [field.name for field in dataclasses.fields(Config)]
    values: dict[str, Any] = {}
    path = flags.get("config") or environment.get("EMBED_CONFIG")
    if path:
        try:
            values |= _with_underscores(tomllib.loads(Path(path).read_text(encoding="utf-8")))
            # Spaces separate inputs in a variable; a file has lists for that.
            if isinstance(values.get("input"), str):
                values["input"] = [values["input"]]
        except (OSError, ValueError) as error:
            raise SettingsError(f"config file {path} cannot be read: {error}") from error
    values |= {
        name: environment[f"EMBED_{name.upper()}"] for name in names if environment.get(f"EMBED_{name.upper()}")
    }
    values |= {name: flags[name] for name in names if flags.get(name) is not None}
    return settings.parse(values)


def _with_underscores(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file, whose names may have dashes, as flags have."""
    named: dict[str, Any] = {}
    for given, value in values.items():
        name = given.replace("-", "_")
        if name in named:
            raise ValueError(f"{name} is there twice, with dashes and with underscores")
        named[name] = value
    return named


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A warning for each `EMBED_` variable that names no option; `EMBED_TEST_...` is for tests."""
    known = {f"EMBED_{field.name.upper()}" for field in dataclasses.fields(Config)} | {"EMBED_CONFIG"}
    ours = (name for name in environment if name.startswith("EMBED_") and not name.startswith("EMBED_TEST_"))
    unknown = sorted({*ours} - known)
    # They all share a prefix, so that only a close match counts.
    return [f"{name} names no option: it is not used{did_you_mean(name, known, cutoff=0.8)}" for name in unknown]


def main(arguments: list[str] | None = None) -> int:
    """Run the job, and return its exit code."""
    top = parser()
    options, unknown = top.parse_known_args(arguments)
    if unknown:
        places = not any(argument.startswith("-") for argument in unknown)
        told = "; shards or photos are named by --input, and the result by --output" if places else ""
        top.error(f"unrecognized arguments: {' '.join(unknown)}{told}")
    flags = vars(options)
    console = make_console(flags["log_format"] or os.environ.get("EMBED_LOG_FORMAT", "text"))
    try:
        config = gather(flags, os.environ)
    except SettingsError as error:
        console.error(str(error), EXIT_USAGE)
        console.end(EXIT_USAGE)
        return EXIT_USAGE
    console = make_console(config.log_format, flags["config"] or os.environ.get("EMBED_CONFIG"))
    for text in unknown_variables(os.environ):
        console.warning(f"the variable {text}")
    # torch and Ray take seconds to import: --help and usage errors do not need them.
    from shard_embedder.jobs.support.session import run_job  # noqa: PLC0415

    code = run_job(config, console, dry_run=flags["dry_run"])
    console.end(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
