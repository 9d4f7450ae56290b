"""Which anchors meet: an endless stream of (target, interferer), item j of which is a pure function of the seed and j.

The classes come in permutations, so that after every whole permutation each class has been the target equally often,
"Music" with its thousands of clips no more than a class of 48 (Kong et al., arXiv:2305.07447, sec. 3.3). In the p-th
permutation each class shows its p-th anchor; it walks through all of them in a shuffled order before any comes again.

    permutation p      c7   c2   c9   c4  ...         item j is target class number j mod n of permutation j // n
    p-th anchor of     a    b    c    d
    target             a                              the interferer is the first anchor after the target that may
    interferer              b, else c, else d ...     meet it, round the permutation, then the classes' next anchors

Nothing is remembered between items but caches, so a run resumes, and any number of workers or ranks shares the work,
by asking for other j.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

Exclude = Literal["none", "label", "ontology"]

# First word after the seed of every generator here. Without it a class' shuffles would repeat the permutations:
# NumPy pads the words with zeros, so that [seed, p] and [seed, p, 0] are one generator.
CLASS_ORDER, ANCHOR_ORDER = 0, 1


@dataclass(frozen=True)
class Draw:
    """One item of the stream: rows of the target and the interferer, and how many anchors were passed over."""

    target: int
    interferer: int
    passed_over: int


class PairStream:
    """The pair stream over an index of anchors, given by its columns, one entry per anchor, in any order.

    class_index   of the anchor
    mids          the same class as AudioSet's id
    clip_ids      the clip it was cut from, which gives at most one anchor per class
    recordings    the recording that the clip was cut from
    labels        all labels of that clip, mids joined by ;

    The interferer is always of another class and from another recording. Beyond that, its clip
    `none`      may carry anything: the target's own class too (in 24 % of the "Speech" pairs of Kong et al.);
    `label`     does not carry the target's class;
    `ontology`  nor `kin(mid)` of it: its ancestors and descendants.

    A class that no anchor may meet under this rule is never a target: `without_interferer` names it. It can still
    interfere with others. No class left: ValueError. Both are known at the start; drawing cannot fail.
    """

    def __init__(
        self,
        class_index: Sequence[int] | Int[np.ndarray, " anchors"],
        mids: Sequence[str],
        clip_ids: Sequence[str],
        recordings: Sequence[str],
        labels: Sequence[str],
        *,
        seed: int,
        exclude: Exclude,
        kin: Callable[[str], Collection[str]],
    ) -> None:
        # Sorted, so that the order of the index does not matter. From here on an anchor is its place in this order.
        anchors = sorted(zip(map(int, class_index), clip_ids, mids, labels, range(len(mids)), strict=True))
        self._row = [anchor[4] for anchor in anchors]
        clips = [anchor[1] for anchor in anchors]
        self._recording = [recordings[row] for row in self._row]
        bits: dict[str, int] = {}
        masks: dict[str, int] = {}
        for joined in labels:
            if joined not in masks:
                masks[joined] = sum(bits.setdefault(mid, 1 << len(bits)) for mid in set(joined.split(";")))
        self._labels = [masks[anchor[3]] for anchor in anchors]  # a set of labels is the bits of one integer
        members: dict[int, list[int]] = {}
        names: dict[int, str] = {}
        for place, (index, clip_id, mid, joined, _) in enumerate(anchors):
            if not masks[joined] & bits.get(mid, 0) or names.setdefault(index, mid) != mid:
                raise ValueError(f"anchor of class {index} ({mid}) from clip {clip_id!r} labelled {joined!r}")
            if (others := members.setdefault(index, [])) and clips[others[-1]] == clip_id:
                raise ValueError(f"clip {clip_id!r} has two anchors of class {index}")
            others.append(place)
        self._classes = list(members)  # ascending; from here on a class is its place in this list
        self._members = list(members.values())
        self._seed = seed
        self._forbidden = []
        for index in self._classes:
            forbidden = set() if exclude == "none" else {names[index]}
            if exclude == "ontology":
                forbidden.update(kin(names[index]))
            self._forbidden.append(sum(bits.get(mid, 0) for mid in forbidden))
        targets = [k for k in range(len(self._classes)) if self._has_interferers(k)]
        self.classes = [self._classes[k] for k in targets]
        self.without_interferer = sorted(set(self._classes) - set(self.classes))
        if not targets:
            raise ValueError(
                f"no two of {len(anchors)} anchors of {len(self._classes)} classes may meet under exclude={exclude!r}"
            )
        self._is_target = [k in set(targets) for k in range(len(self._classes))]
        self._orders: dict[int, tuple[list[int], list[int]]] = {}
        self._walks: dict[int, tuple[int, list[int]]] = {}

    def draw(self, item: int) -> Draw:
        """Item number `item` (>= 0) of the stream."""
        return next(self.choices(item))

    def choices(self, item: int) -> Iterator[Draw]:
        """Every pair that could be item number `item` (>= 0): the stream's own first, then the next best ones.

        After the pairs of the item's target come those of the class' further anchors, so that each pair of the class
        is given exactly once.
        """
        permutation, slot = divmod(item, len(self.classes))
        order, slots = self._order(permutation)
        at = slots[slot]
        walk = self._walk(order[at], permutation)
        first = permutation % len(walk)
        for target in walk[first:] + walk[:first]:
            for passed_over, other in enumerate(self._candidates(order, at, permutation)):
                if self._may_meet(target, order[at], other):
                    yield Draw(self._row[target], self._row[other], passed_over)

    def batch(self, n: int, size: int) -> tuple[Int[np.ndarray, " size"], Int[np.ndarray, " size"]]:
        """Rows of the targets and of the interferers of items n * size to (n + 1) * size."""
        draws = [self.draw(item) for item in range(n * size, (n + 1) * size)]
        return np.array([d.target for d in draws], np.int64), np.array([d.interferer for d in draws], np.int64)

    def _candidates(self, order: list[int], at: int, permutation: int) -> Iterator[int]:
        """Anchors of the other classes: each class' turn in this permutation, then their further ones."""
        others = order[at + 1 :] + order[:at]
        further = 0
        while others:
            for k in others:
                walk = self._walk(k, permutation)
                yield walk[(permutation + further) % len(walk)]
            further += 1
            others = [k for k in others if further < len(self._members[k])]

    def _may_meet(self, target: int, target_class: int, other: int) -> bool:
        is_other = self._recording[other] != self._recording[target]
        return is_other and not self._labels[other] & self._forbidden[target_class]

    def _has_interferers(self, target_class: int) -> bool:
        """Whether every anchor of the class finds an interferer: two recordings that may meet it always suffice."""
        recordings: set[str] = set()
        for k, members in enumerate(self._members):
            if k != target_class:
                for other in members:
                    if not self._labels[other] & self._forbidden[target_class]:
                        recordings.add(self._recording[other])
                    if len(recordings) == 2:
                        return True
        return bool(recordings) and recordings.isdisjoint(self._recording[a] for a in self._members[target_class])

    def _order(self, permutation: int) -> tuple[list[int], list[int]]:
        """The classes in the order of this permutation, and where in it the targets are."""
        if permutation not in self._orders:
            if len(self._orders) >= 4:  # a batch needs one, or the two that it straddles
                self._orders.clear()
            rng = np.random.default_rng([self._seed, CLASS_ORDER, permutation])
            order = rng.permutation(len(self._classes)).tolist()
            self._orders[permutation] = order, [at for at, k in enumerate(order) if self._is_target[k]]
        return self._orders[permutation]

    def _walk(self, k: int, permutation: int) -> list[int]:
        """The class' anchors in the order of its present pass through them."""
        members = self._members[k]
        number = permutation // len(members)
        if k not in self._walks or self._walks[k][0] != number:
            rng = np.random.default_rng([self._seed, ANCHOR_ORDER, self._classes[k], number])
            self._walks[k] = number, rng.permutation(members).tolist()
        return self._walks[k][1]
