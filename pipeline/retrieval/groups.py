"""Groups of near-duplicates: what a chain of pairs connects is one group.

Memory grows with the rows, however many pairs there are: of a hundred thousand copies of one image, which make five
billion pairs, a group is a number a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Rows = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


class Components:
    """Which rows are connected. Each row has a parent before it, or is the first row of its component."""

    def __init__(self, num_rows: int) -> None:
        self._parents = np.arange(num_rows, dtype=np.int64)

    def roots(self, rows: Rows) -> Rows:
        """The first row of the component of each row."""
        while True:
            parents = self._parents[rows]
            above = self._parents[parents]
            if np.array_equal(parents, above):
                return parents
            self._parents[rows] = above

    def join(self, a: Rows, b: Rows) -> None:
        """Connect each row of `a` with that of `b` at its place."""
        while True:
            own, other = self.roots(a), self.roots(b)
            differ = own != other
            if not differ.any():
                return
            a, b = own[differ], other[differ]
            np.minimum.at(self._parents, np.maximum(a, b), np.minimum(a, b))

    def join_near(self, first: range, others: range, is_near: Flags) -> None:
        """Connect rows of `first` with rows of `others` where `is_near` [A, B] is true.

        Every component takes one of its connections at a time, so that a full matrix takes a few steps.
        """
        a, b = np.arange(first.start, first.stop), np.arange(others.start, others.stop)
        while True:
            differ = is_near & (self.roots(a)[:, None] != self.roots(b)[None, :])
            rows, columns = np.flatnonzero(differ.any(axis=1)), np.flatnonzero(differ.any(axis=0))
            if not len(rows):
                return
            of_rows, of_columns = differ[rows].argmax(axis=1), differ[:, columns].argmax(axis=0)
            self.join(np.concatenate([a[rows], a[of_columns]]), np.concatenate([b[of_rows], b[columns]]))

    def are_one(self, first: range, others: range) -> bool:
        """Whether all these rows are connected already."""
        rows = np.concatenate([np.arange(first.start, first.stop), np.arange(others.start, others.stop)])
        roots = self.roots(rows)
        return bool((roots == roots[0]).all())

    def numbers(self) -> Rows:
        """The group of each row, counted from 0 in the order of their first rows."""
        roots = self.roots(np.arange(len(self._parents)))
        numbers: Rows = np.unique(roots, return_inverse=True)[1].astype(np.int64)
        return numbers


def choose_kept(numbers: Rows, sizes: Rows | None = None) -> Flags:
    """Which rows [N] to keep, one of each group: the largest by `sizes` [N], and of equally large ones the first."""
    position = np.arange(len(numbers))
    order = np.lexsort((position, numbers if sizes is None else -sizes, numbers))
    keep = np.zeros(len(numbers), bool)
    keep[order[np.unique(numbers[order], return_index=True)[1]]] = True
    return keep
