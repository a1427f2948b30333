"""Members of a shard in their order, grouped to samples: a sample is a run of consecutive members of one key."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from shard_embedder.pipeline.core.errors import ShardError
from shard_embedder.pipeline.shards.keys import IMAGE_EXTENSIONS, Naming, image_rank, split_key, tells_of_shard

# Members of one sample; what it may keep in memory has a bound, whatever a shard says.
MAX_SAMPLE_MEMBERS = 10_000
MAX_SAMPLE_NAMES = 2**24  # characters


class Named(Protocol):
    """A member: all that grouping needs of one is its name."""

    @property
    def name(self) -> str:
        """The path in the shard."""


M = TypeVar("M", bound=Named)


@dataclass(slots=True)
class Sample(Generic[M]):
    """Members of one key, as far as they are needed.

    Of `num_images` members that are images one is `image`; `other_image` names another.
    """

    key: str
    image: M | None = None
    rank: int = 2 * len(IMAGE_EXTENSIONS)
    metadata: dict[str, M] = field(default_factory=dict)
    parsed: dict[str, Any] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    names_length: int = 0
    problem: str | None = None
    first_name: str = ""
    num_images: int = 0
    other_image: str = ""

    @property
    def num_unused(self) -> int:
        """Image members that the sample's row does not stand for."""
        return max(self.num_images - 1, 0)

    def add(self, member: M, extension: str, rank: int | None, metadata: Collection[str]) -> None:
        """Add a member: an image if it has a `rank`, metadata if that has its extension."""
        name = member.name
        if rank is not None:
            self.num_images += 1
            self.other_image = name
        if name in self.names:
            self.problem = f"duplicate member: {brief(name)}"
            return
        if len(self.names) >= MAX_SAMPLE_MEMBERS:
            self.problem = f"too many members: more than {MAX_SAMPLE_MEMBERS}"
            return
        self.names_length += len(name)
        if self.names_length > MAX_SAMPLE_NAMES:
            self.problem = f"too many members: their names have more than {MAX_SAMPLE_NAMES} characters"
            return
        self.names.add(name)
        if metadata and (lower := extension.lower()) in metadata:
            self.metadata.setdefault(lower, member)
        if rank is not None and rank < self.rank:
            if self.image is not None:
                self.other_image = self.image.name
            self.image, self.rank = member, rank


@dataclass(frozen=True, slots=True)
class Ignored:
    """Members that are of no sample: a hidden one, or a run of those that tell of the shard and not of a sample."""

    name: str
    num_members: int = 1


def iter_samples(
    members: Iterable[M], naming: Naming, metadata: Collection[str] = frozenset()
) -> Iterator[Sample[M] | Ignored]:
    """Yield each sample when it is complete, and what is of none.

    A run of one key without an image is no sample where all its members tell of the shard (`tells_of_shard`).
    `metadata` are the extensions, in lower case, of the other members that are wanted.

    Raises:
        ShardError: where `members` does, after the sample that was begun.
    """
    current: Sample[M] | None = None
    fault: ShardError | None = None
    to_key, image_member = naming.key, naming.image_member
    try:
        for member in members:
            split = split_key(member.name, to_key)
            if split is None:
                yield Ignored(member.name)
                continue
            key, extension = split
            if current is None or current.key != key:
                if current is not None:
                    yield _of_sample_or_none(current)
                current = Sample(key, first_name=member.name)
            current.add(member, extension, image_rank(extension, image_member), metadata)
    except ShardError as error:
        fault = error
    if current is not None:
        yield _of_sample_or_none(current)
    if fault is not None:
        raise fault


def _of_sample_or_none(sample: Sample[M]) -> Sample[M] | Ignored:
    # One with a problem has members that are not among its names.
    if sample.image is None and sample.problem is None and all(map(tells_of_shard, sample.names)):
        return Ignored(sample.first_name, len(sample.names))
    return sample


def brief(name: str) -> str:
    """A member's name, or a piece of it, as a reason shows it: short, and without control characters."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name[:100])
    return shown + ("..." if len(name) > 100 else "")
