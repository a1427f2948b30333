"""An input that changes at random, and the rows that each of its shards must give: no code of the pipeline."""

from __future__ import annotations

import os
import random
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import encode, photo, write_tar

PHOTOS = [encode(photo(seed)) for seed in range(6)]


@dataclass
class Shard:
    """A tar: the number of the photo of each sample, or why it has none; and the sample in which it is cut."""

    samples: list[int | str]
    cut: int | None = None

    def members(self, index: int) -> list[tuple[str, bytes]]:
        """The members of a sample: those that are `broken` hold no image, and `lonely` ones have none."""
        sample = self.samples[index]
        image = PHOTOS[sample] if isinstance(sample, int) else b"no image"
        return [(f"k{index}.jpg", image)] * (sample != "lonely") + [(f"k{index}.txt", str(sample).encode())]

    def rows(self) -> list[tuple[Any, ...]]:
        """The rows that it must give: the folder, sample_index and image_id of each."""
        folders = ["embeddings" if isinstance(sample, int) else "errors" for sample in self.samples]
        rows: list[tuple[Any, ...]] = [(folder, index, f"k{index}") for index, folder in enumerate(folders)]
        end = [] if self.cut is None else [("errors", self.cut, f"k{self.cut}"), ("errors", None, None)]
        return rows[: self.cut] + end


@dataclass
class ChangingInput:
    """Shards in `folder`/in, and those that left it, in `folder`/aside."""

    folder: Path
    rng: random.Random
    clock: int = 0
    shards: dict[str, Shard] = field(default_factory=dict)
    retired: dict[str, Shard] = field(default_factory=dict)

    def add(self) -> None:
        self._write(f"{self.rng.choice(('', 'deep/', 'deep/er/'))}s{self.clock}", self._samples())

    def change(self) -> None:
        self._write(self._any(), self._samples())

    def damage(self) -> None:
        name = self._any()
        if samples := self.shards[name].samples:
            self._write(name, samples, cut=self.rng.randrange(len(samples)))

    def repair(self) -> None:
        name = self._any()
        self._write(name, self.shards[name].samples)

    def retire(self) -> None:
        if len(self.shards) > 1:
            name = self._any()
            self._tar(name).rename(self._tar(name, "aside"))
            self.retired[name] = self.shards.pop(name)

    def bring_back(self) -> None:
        for name in sorted(self.retired)[:1]:
            self._tar(name, "aside").rename(self._tar(name))
            self.shards[name] = self.retired.pop(name)

    def move(self) -> None:
        self.folder = self.folder.rename(self.folder.with_name(f"moved-{self.clock}"))

    def _write(self, name: str, samples: list[int | str], cut: int | None = None) -> None:
        """Make a shard, of a version that was never there."""
        path, shard = self._tar(name), Shard(samples, cut)
        write_tar(path, [member for index in range(len(samples)) for member in shard.members(index)])
        if cut is not None:
            with tarfile.open(path) as tar:
                os.truncate(path, tar.getmember(shard.members(cut)[0][0]).offset_data + 1)
        os.utime(path, (self.clock, self.clock))
        self.shards[name] = shard

    def _samples(self) -> list[int | str]:
        """Up to seven samples, with no photo more than twice: five alike would be a finding."""
        return self.rng.sample([*range(len(PHOTOS)), "broken", "lonely"] * 2, self.rng.randrange(8))

    def _tar(self, name: str, folder: str = "in") -> Path:
        path = self.folder / folder / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _any(self) -> str:
        return self.rng.choice(sorted(self.shards))
