"""Items in groups of a bounded size."""

from __future__ import annotations

import pytest

from shard_embedder.pipeline.core.groups import grouped


@pytest.mark.parametrize(
    ("sizes", "most_items", "expected"),
    [
        ([], None, []),
        ([4, 6, 1, 9], None, [[4, 6], [1, 9]]),
        ([11, 1, 12, 10], None, [[11], [1], [12], [10]]),
        ([1, 1, 1, 1, 1], 2, [[1, 1], [1, 1], [1]]),
        ([9, 1, 1, 9], 2, [[9, 1], [1, 9]]),
    ],
)
def test_groups_keep_the_order_and_no_bound_is_passed_but_by_one_item(
    sizes: list[int], most_items: int | None, expected: list[list[int]]
) -> None:
    assert list(grouped(sizes, lambda size: size, 10, most_items)) == expected
