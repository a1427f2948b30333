"""What a job has to do, which kills it meets and when, what became of them, and a table of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.conftest import encode, photo, write_tar

READ, DECODE, WRITE, EMBED = "read worker", "decode worker", "write worker", "embed actor"
NODE, DRIVER, STORE, TWO = "node", "driver", "S3 server", "two at once"
SINGLE = (READ, DECODE, WRITE, EMBED, NODE, DRIVER, STORE)
KINDS = (*SINGLE, TWO)
# The share of kills that do not wait until the embed stage is up.
_STARTING = 0.2


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a job has to do: shards of equal samples, some of them broken images."""

    num_shards: int = 48
    samples_each: int = 40
    image_bytes: int = 150_000
    image_size: int = 128
    part_rows: int = 8
    backbone: str = "resnet18"

    @property
    def num_samples(self) -> int:
        return self.num_shards * self.samples_each

    @property
    def options(self) -> list[str]:
        """Options of the job; half of them as SLOWER in the tests of the job."""
        return [
            "--backbone", self.backbone, "--weights", "random:3", "--image-size", str(self.image_size),
            "--device", "cpu", "--precision", "fp32", "--part-rows", str(self.part_rows),
            "--batch-size", str(self.part_rows),
        ]  # fmt: skip

    def write(self, folder: Path) -> Path:
        """Write the shards. Bytes after a JPEG's end make it heavy to read and light to decode."""
        images = [encode(photo(i, (320, 240))).ljust(self.image_bytes, b"\0") for i in range(64)]
        for shard in range(self.num_shards):
            members = [
                (f"{shard:03d}-{i:03d}.jpg", images[(7 * shard + i) % len(images)]) for i in range(self.samples_each)
            ]
            if shard % 4 == 0:
                members[2] = (members[2][0], b"no image")
            write_tar(folder / f"s-{shard:05d}.tar", members)
        return folder

    def rows(self) -> set[tuple[str, int, str]]:
        """Shard, index and id of every sample."""
        shards, samples = range(self.num_shards), range(self.samples_each)
        return {(f"s-{shard:05d}", i, f"{shard:03d}-{i:03d}") for shard in shards for i in samples}


class Plan(NamedTuple):
    """One kill to come: what, how long after it is seen, and for how long a server or node stays away.

    `away_s` of infinity is a node that never comes back. Only some of the kills of a driver or server come while
    the job still starts.
    """

    kinds: tuple[str, ...]
    starting: bool
    pause_s: float
    linger_s: float
    away_s: float

    @property
    def label(self) -> str:
        return TWO if len(self.kinds) == 2 else self.kinds[0]


def make_plan(num_kills: int, seed: int, spread_s: float, kinds: tuple[str, ...] = KINDS) -> list[Plan]:
    """Kills of every kind in random order: two nodes and two drivers to three of any other."""
    rng = random.Random(seed)
    deck = [*kinds, *kinds, *(kind for kind in kinds if kind not in (NODE, DRIVER))]
    labels = (deck * (num_kills // len(deck) + 1))[:num_kills]
    rng.shuffle(labels)
    # Two workers of short tasks are seldom there at once.
    lasting = [kind for kind in kinds if kind in (EMBED, NODE, DRIVER, STORE)]

    def two() -> tuple[str, ...]:
        first = rng.choice(lasting)
        return first, rng.choice([kind for kind in kinds if kind not in (first, TWO)])

    return [
        Plan(
            two() if label == TWO else (label,),
            starting=rng.random() < _STARTING,
            pause_s=rng.uniform(0.0, spread_s),
            linger_s=rng.uniform(0.0, 0.3),
            away_s=rng.uniform(1.0, 5.0),
        )
        for label in labels
    ]


@dataclass
class Kill:
    """One kill that happened."""

    label: str
    kinds: tuple[str, ...]
    at: float
    survived: bool = True
    again: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "embed": 0.0})


@dataclass
class Run:
    """One output, made by one or more attempts of the same command."""

    kills: list[Kill] = field(default_factory=list)
    attempts: int = 1
    gave_up: list[str] = field(default_factory=list)
    more_passes: int = 0
    problems: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    begun: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def table(runs: list[Run]) -> str:
    """What each kind of kill did, as markdown."""
    kills = [kill for run in runs for kill in run.kills]
    lines = [
        "| killed | kills | survived | decoded again | embedded again |",
        "|---|---|---|---|---|",
    ]
    for label in (*KINDS, "all"):
        some = [kill for kill in kills if label in ("all", kill.label)]
        if not some:
            continue
        again = {stage: sum(kill.again[stage] for kill in some) / len(some) for stage in ("decode", "embed")}
        survived = sum(kill.survived for kill in some)
        lines.append(f"| {label} | {len(some)} | {survived} | {again['decode']:.1f} | {again['embed']:.1f} |")
    return "\n".join(lines)
