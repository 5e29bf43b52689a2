"""Entries of a data set that hold the same content: within a split, across splits, under two labels.

Shapes: N entries, M entries that have a twin, G groups of twins.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .audit import Listing

# What a group of twins is, the worst that holds; in the order in which they are told.
TRAIN_TEST, TWO_LABELS, SPLITS, WITHIN = "train-test", "two-labels", "splits", "within"
KINDS = (TRAIN_TEST, TWO_LABELS, SPLITS, WITHIN)


@dataclass(frozen=True)
class Duplicates:
    """``row_M``: entries with a twin, group by group; ``begin_G``, ``size_G``: where in it each group lies;
    ``kind_G``: index into KINDS; ``labels_G``, ``several_G``: whether the group has two labels, is in two splits, whatever
    its kind."""

    row_M: np.ndarray
    begin_G: np.ndarray
    size_G: np.ndarray
    kind_G: np.ndarray
    labels_G: np.ndarray
    several_G: np.ndarray

    def of_kind(self, kind: str) -> np.ndarray:
        """Indices of the groups of one kind."""
        return np.flatnonzero(self.kind_G == KINDS.index(kind))

    def rows(self, groups: np.ndarray) -> np.ndarray:
        """All entries of some groups."""
        inside_G = np.zeros(len(self.size_G), bool)
        inside_G[groups] = True
        return self.row_M[np.repeat(inside_G, self.size_G)]

    def worst_first(self) -> Iterator[np.ndarray]:
        """Entries of each group, by kind, then in the order of the listing."""
        for group in np.lexsort((self.row_M[self.begin_G], self.kind_G)):
            yield self.row_M[self.begin_G[group] : self.begin_G[group] + self.size_G[group]]


def find(listing: Listing, content_N: np.ndarray) -> Duplicates:
    """Group the entries by content (-1: none)."""
    rows = np.flatnonzero(content_N >= 0)
    order = rows[np.argsort(content_N[rows], kind="stable")]
    begin = np.flatnonzero(np.r_[True, content_N[order[1:]] != content_N[order[:-1]]]) if order.size else np.zeros(0, np.int64)
    size = np.diff(np.r_[begin, order.size])
    row_M = order[np.repeat(size > 1, size)]
    size_G = size[size > 1]
    begin_G = np.cumsum(size_G) - size_G
    if not size_G.size:
        nothing = np.zeros(0, np.int64)
        return Duplicates(row_M, nothing, nothing, nothing, nothing.astype(bool), nothing.astype(bool))
    bit_M = (1 << listing.split_N[row_M].astype(np.int64)).astype(np.int64)
    splits_G = np.bitwise_or.reduceat(bit_M, begin_G)
    label_M = listing.label_N[row_M]
    labels_G = np.minimum.reduceat(label_M, begin_G) != np.maximum.reduceat(label_M, begin_G)
    both = sum(1 << listing.splits.index(split) for split in ("train", "test") if split in listing.splits)
    leak_G = ((splits_G & both) == both) & (both.bit_count() == 2)
    several_G = (splits_G & (splits_G - 1)) != 0
    kind_G = np.select([leak_G, labels_G, several_G], [0, 1, 2], 3)
    return Duplicates(row_M, begin_G, size_G, kind_G, labels_G, several_G)
