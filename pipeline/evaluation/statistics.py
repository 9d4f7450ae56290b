"""From scores per pair to aggregates with 95 % intervals: of levels, of paired differences, and over training seeds.

A pair's score depends on its target's recording and on its interferer's, and many pairs share either: two crossed
random effects. The classes are held fixed; they are the benchmark, not a sample of one. Recordings are the unit and not
clips, because two clips of one recording are not independent.

An interval has its centre, its width and its skewness from three places:

  centre     the statistic of the sample
  width      the variance by both kinds of recordings, T + I - P: the sum over target recordings of the squared sum of
             their pairs' influences, the same over interferer recordings, less that over single pairs, which both
             contain (Cameron, Gelbach and Miller 2011); at least P. Each is made unbiased for few
             recordings of unequal size. Between seeds comes what the runs differ by more than by their pairs. The
             quantile is Student's t, its degrees of freedom by Satterthwaite
  skewness   a bootstrap: each pair weighs the multinomial count of its target recording, drawn within its class, times
             that of its interferer recording, drawn over all classes. How its 2.5 and 97.5 % points lie about its mean
             divides the width. Alone it would be too wide: noise of single pairs counts three times in it (Owen 2007)

Mixtures of mixtures are of several recordings in no role, which other mixtures may share: any two mixtures with a
recording in common are taken to depend on one another (`Design.overlapping`), the dyadic form of the same variance
(Aronow, Samii and Assenova 2015).

Training seeds are a third random effect, crossed with both kinds of recordings: all runs of a study are scored on the
same pairs. The interval of a mean over seeds contains all three (`mean_over_classes`).

The influence of a pair on a class' mean is its deviation over the number of pairs. On a class' median it is the side it
lies on, by the median's standard error of Maritz and Jarrett (1978). That one is too large for few pairs, by a tenth to
a fifth at 8; a factor found by simulation takes this back (`_median_bias`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.special import betainc, stdtrit

AGGREGATES: tuple[Literal["median", "mean"], ...] = ("median", "mean")
LEVELS = (2.5, 97.5)  # percent: a 95 % interval


@dataclass(frozen=True)
class Design:
    """Dependence between pairs: their class, and the recordings of target and interferer, as numbers."""

    class_index: Int[np.ndarray, " pairs"]  # 0 .. classes - 1
    target: Int[np.ndarray, " pairs"]  # numbered over the (class, recording) there are
    interferer: Int[np.ndarray, " pairs"]  # numbered over all recordings
    cell: Int[np.ndarray, " pairs"]  # numbered over the (class, target, interferer) there are
    classes: Int[np.ndarray, " classes"]  # the given index of each class
    members: csr_array | None = None  # (items, recordings), 0 or 1: of items of one class that may share recordings

    @classmethod
    def of(cls, class_index: Sequence[int], target: Sequence[object], interferer: Sequence[object]) -> "Design":
        """The design of pairs, from the class and the two recordings of each."""
        classes, index = np.unique(np.asarray(class_index, np.int64), return_inverse=True)
        first, second = (np.unique(np.asarray(x, str), return_inverse=True)[1] for x in (target, interferer))
        own = np.unique(index * (first.max(initial=0) + 1) + first, return_inverse=True)[1]
        cell = np.unique(own * (second.max(initial=0) + 1) + second, return_inverse=True)[1]
        return cls(index, own, second, cell, classes)

    @classmethod
    def one_way(cls, cluster: Sequence[object]) -> "Design":
        """The design of items of one class that depend on one another within a cluster, and on nothing else."""
        return cls.of([0] * len(cluster), cluster, [str(i) for i in range(len(cluster))])

    @classmethod
    def overlapping(cls, recordings: Sequence[Iterable[str]]) -> "Design":
        """The design of items of one class, each of several recordings, that depend where they share one."""
        sets = [sorted(set(each)) for each in recordings]
        number = {name: i for i, name in enumerate(sorted({name for each in sets for name in each}))}
        rows = np.repeat(np.arange(len(sets)), [len(each) for each in sets])
        columns = np.array([number[name] for each in sets for name in each], np.int64)
        members = csr_array((np.ones(len(rows), np.int64), (rows, columns)), shape=(len(sets), len(number)))
        return replace(cls.one_way(range(len(sets))), members=members)

    def dependence(self, rows: Int[np.ndarray, " some"]) -> "_Dependence":
        """The clusters that these pairs lie in, found once for the many numbers that are defined on the same pairs."""
        key = rows.tobytes()
        if key not in self._known:
            self._known[key] = _Dependence.of(self, rows)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[bytes, "_Dependence"]:
        return {}


@dataclass(frozen=True)
class Statistic:
    """Median or mean per class of one column, or a difference of two: on the sample and on resamples of it.

    `influence` is what each pair adds to the deviation of its class' statistic from the truth; NaN where undefined.
    """

    point: Float[np.ndarray, " classes"]
    resampled: Float[np.ndarray, "resamples classes"]
    influence: Float[np.ndarray, " pairs"]

    def __sub__(self, other: "Statistic") -> "Statistic":
        return Statistic(self.point - other.point, self.resampled - other.resampled, self.influence - other.influence)


def finite_mean(x: Float[np.ndarray, "*lead n"]) -> Float[np.ndarray, "*lead"]:
    """Mean over the last axis of what is not NaN; NaN where nothing is (numpy warns of that, and it is normal here)."""
    defined = ~np.isnan(x)
    total = np.where(defined, x, 0.0).sum(axis=-1)
    count = defined.sum(axis=-1)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def weighted_median(
    values: Float[np.ndarray, " n"], weights: Int[np.ndarray, "draws n"]
) -> Float[np.ndarray, " draws"]:
    """Median of `values` with each taken `weights` times, for every row of weights; NaN where a row is all zero.

    Repeating the values and sorting, draw by draw, gives the same and takes 40 times as long at 100 pairs.
    """
    order = np.argsort(values, kind="stable")
    ranked = np.append(values[order], np.nan)  # an index one past the end means there was nothing to rank
    last_rank = np.cumsum(weights[:, order], axis=1)  # (draws, n): how many values lie at or before this one
    total = last_rank[:, -1:]
    # 0-based ranks of the two middle values, the same one twice when the total is odd
    lower = (last_rank <= (total - 1) // 2).sum(axis=1)
    upper = (last_rank <= total // 2).sum(axis=1)
    return np.where(total[:, 0] > 0, (ranked[lower] + ranked[upper]) / 2, np.nan)


def resample(
    columns: Mapping[str, Float[np.ndarray, " pairs"]],
    design: Design,
    *,
    n_resamples: int,
    seed: int,
    kinds: Sequence[str] = AGGREGATES,
) -> dict[tuple[str, str], Statistic]:
    """Median and mean per class of each column, by (column, "median" | "mean"), all columns on the same draws.

    Undefined (NaN) pairs are left out of their class. A class draws its target recordings from a stream of its own.
    """
    n_columns, n_pairs, n_classes = len(columns), len(design.class_index), len(design.classes)
    x = np.stack([np.asarray(values, np.float64) for values in columns.values()]) if columns else np.empty((0, n_pairs))
    point = {kind: np.full((n_columns, n_classes), np.nan) for kind in kinds}
    drawn = {kind: np.full((n_columns, n_resamples, n_classes), np.nan) for kind in kinds}
    influence = {kind: np.full((n_columns, n_pairs), np.nan) for kind in kinds}
    for position, (rows, weights) in enumerate(_weights(design, n_resamples, seed)):
        defined = ~np.isnan(x[:, rows])
        if "mean" in kinds:
            # What is undefined has no part in either sum.
            sums, total = weights @ np.where(defined, x[:, rows], 0.0).T, weights @ defined.T.astype(np.float64)
            means = np.divide(sums, total, out=np.full(total.shape, np.nan), where=total > 0)
            drawn["mean"][:, :, position] = means.T
            point["mean"][:, position] = finite_mean(x[:, rows])
            n_defined = np.maximum(defined.sum(axis=1, keepdims=True), 1)
            influence["mean"][:, rows] = (x[:, rows] - point["mean"][:, [position]]) / n_defined
        for column in np.flatnonzero(defined.any(axis=1)) if "median" in kinds else ():
            known = rows[defined[column]]
            values = x[column, known]
            point["median"][column, position] = np.median(values)
            drawn["median"][column, :, position] = weighted_median(values, weights[:, defined[column]])
            influence["median"][column, known] = _median_influence(values)
    return {
        (name, kind): Statistic(point[kind][i], drawn[kind][i], influence[kind][i])
        for i, name in enumerate(columns)
        for kind in kinds
    }


def _weights(
    design: Design, n_resamples: int, seed: int
) -> Iterator[tuple[Int[np.ndarray, " members"], Int[np.ndarray, "resamples members"]]]:
    """For each class, its pairs and how often each resample contains them."""
    # spawn_key sets this stream apart from those of the classes, [seed, class]
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    if design.members is not None:
        count = _draws(design.members.shape[1], n_resamples, rng)
        start, recording = design.members.indptr, design.members.indices
        each = [count[:, recording[i:j]].prod(axis=1) for i, j in pairwise(start.tolist())]
        yield np.arange(len(each)), np.stack(each, axis=1)
        return
    of_interferer = _draws(int(design.interferer.max(initial=-1)) + 1, n_resamples, rng)
    for position, index in enumerate(design.classes.tolist()):
        rows = np.flatnonzero(design.class_index == position)
        recordings, member = np.unique(design.target[rows], return_inverse=True)
        of_target = _draws(len(recordings), n_resamples, np.random.default_rng([seed, index]))
        yield rows, of_target[:, member] * of_interferer[:, design.interferer[rows]]


def _draws(n: int, n_resamples: int, rng: np.random.Generator) -> Int[np.ndarray, "resamples n"]:
    """How often each of n recordings is drawn: the counts say all that a list of drawn ones would."""
    return rng.multinomial(n, np.full(n, 1 / n), size=n_resamples) if n else np.zeros((n_resamples, 0), np.int64)


def _median_influence(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The side of the median that each value lies on, scaled so that the squares sum to (n - 1) / n of its variance.

    That is the variance of a median of independent values, after Maritz and Jarrett, less its bias; `_clustered`
    brings back the n / (n - 1), as it does for the deviations from a mean.
    """
    n = len(x)
    share = np.diff(betainc((n + 1) / 2, (n + 1) / 2, np.arange(n + 1) / n))
    ordered = np.sort(x) - np.median(x)
    variance = float(share @ ordered**2 - (share @ ordered) ** 2)
    error = np.sqrt(max(variance, 0.0)) / _median_bias(n)
    return np.sign(x - np.median(x)) * (error * np.sqrt(n - 1) / n)


def _median_bias(n: int) -> float:
    """By how much the bootstrap's standard error of the median of n values is too large, on average.

    Simulated: 1.06 to 1.26 at 4, 1.14 to 1.19 at 8, 1.07 to 1.11 at 20, 1.05 at 50, for normal, exponential and t4.
    """
    return 1 + 0.4 / np.sqrt(n)


def class_intervals(statistic: Statistic, design: Design) -> Float[np.ndarray, "2 classes"]:
    """Lower and upper end of each class' own 95 % interval; NaN where the class is undefined."""
    variance = _Variance.of([statistic.influence], design)
    ends = np.full((2, len(statistic.point)), np.nan)
    for c in np.flatnonzero(~np.isnan(statistic.point)).tolist():
        half = _half_width(variance.of_class(c))
        ends[:, c] = _ends(float(statistic.point[c]), half, statistic.resampled[:, c])
    return ends


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN where undefined."""

    value: float
    low: float
    high: float


def mean_over_classes(runs: Sequence[Statistic], design: Design) -> Estimate:
    """Mean over the classes and over the runs, one per training seed, with an interval over recordings and seeds.

    The variance of the recordings is that of the runs' mean influences; to it comes the runs' own, by as much as they
    differ by more than by their pairs' noise (`_run_noise`). Few runs that happen to agree make their part small, and
    its few degrees of freedom weightless: towards Student's interval of the runs alone, where it is the wider, the
    interval is widened, wholly for 2 runs and by (n - 1)^-1.5 for n. By simulation: without, 3 runs hold the truth in
    92 to 96 % of studies, with the whole of it in 95 to 99 %. A single run has no spread between seeds: its interval
    is of the recordings alone.
    """
    points = np.array([float(finite_mean(run.point)) for run in runs])
    draws = np.mean([finite_mean(run.resampled) for run in runs], axis=0)
    influences = [run.influence for run in runs]
    parts = _Variance.of(influences, design).of_mean()
    half = _half_width(parts)
    if (n := len(runs)) > 1:
        between = _Part(float(points.var(ddof=1)) / n, _run_noise(influences, design), float(n - 1))
        half, alone = _half_width(parts, between), _half_width([_Part(0.0, 0.0, 1.0)], between)
        half += max(alone - half, 0.0) * (n - 1) ** -1.5
    value = float(points.mean())
    return Estimate(value, *_ends(value, half, draws))


@dataclass(frozen=True)
class _Part:
    """One component of a variance, what of it the others contain already, and its degrees of freedom."""

    variance: float
    contained: float
    freedom: float


def _half_width(recordings: Sequence[_Part], between: _Part | None = None) -> float:
    """Half of the width of an interval by single pairs, target and interferer recordings, and by that between runs."""
    total = recordings[0].variance + max(sum(part.variance - part.contained for part in recordings[1:]), 0.0)
    parts = [*recordings[1:], *([between] if between is not None else [])]
    if between is not None:
        total += max(between.variance - between.contained, 0.0)
    if not total > 0:
        return 0.0
    # Where each recording is of one pair, its part equals that of single pairs but for rounding.
    apart = [part for part in parts if part.variance > part.contained * (1 + 1e-9)]
    uncertain = sum(part.variance**2 / part.freedom for part in apart)
    freedom = total**2 / uncertain if uncertain > 0 else max(recordings[0].freedom, 1.0)
    return float(np.sqrt(total) * stdtrit(max(freedom, 1.0), 0.975))


def _ends(point: float, half_width: float, draws: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    """An interval of twice the half width about the point, divided as the draws lie about their mean."""
    draws = draws[~np.isnan(draws)]
    if np.isnan(point) or not draws.size:
        return np.nan, np.nan
    low, high = np.percentile(draws, LEVELS)
    below = (draws.mean() - low) / (high - low) if high > low else 0.5
    return float(point - 2 * half_width * below), float(point + 2 * half_width * (1 - below))


def _run_noise(influences: Sequence[Float[np.ndarray, " pairs"]], design: Design) -> float:
    """Variance of the mean over runs if the runs differed in their pairs' noise alone, and not as a whole."""
    apart = np.stack(influences)
    rows = np.flatnonzero(~np.isnan(apart).all(axis=0))
    apart = np.nan_to_num(apart[:, rows])
    apart -= apart.mean(axis=0)
    n_runs, n_classes = len(apart), len(design.classes)
    single = design.dependence(rows).single
    variance = sum(single.variance(x).sum() for x in apart) / n_classes**2
    return float(variance / (n_runs - 1) / n_runs)


@dataclass(frozen=True)
class _Clusters:
    """Pairs in clusters within their class, and what makes a variance by clusters of unequal sizes unbiased.

    Of clusters of sizes n_g the deviations from the class' mean have 1 - 2 s3 / (s1 s2) + s2 / s1^2 of the variance
    that is sought, s_k being the sum of n_g^k: (G - 1) / G where all G are of one size.
    """

    member: Int[np.ndarray, " pairs"]
    of_class: Int[np.ndarray, " clusters"]
    unbias: Float[np.ndarray, " classes"]
    freedom: Float[np.ndarray, " classes"]

    @classmethod
    def of(cls, cluster: Int[np.ndarray, " pairs"], index: Int[np.ndarray, " pairs"], n: int) -> "_Clusters":
        """The clusters of pairs of `n` classes."""
        clusters, first, member = np.unique(cluster, return_index=True, return_inverse=True)
        size, of_class = np.bincount(member, minlength=len(clusters)).astype(float), index[first]
        s1, s2, s3 = (np.bincount(of_class, size**k, minlength=n) for k in (1, 2, 3))
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = 1 - 2 * s3 / (s1 * s2) + s2 / s1**2
            freedom = s1**2 / s2 - 1
        # Of one cluster nothing is known: its deviations are zero.
        unbias = np.divide(1.0, kept, where=np.bincount(of_class, minlength=n) > 1, out=np.ones(n))
        return cls(member, of_class, unbias, np.nan_to_num(freedom))

    def variance(self, u: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " classes"]:
        """Per class, the unbiased sum of the squared sums of the clusters' influences."""
        sums = np.bincount(self.member, u, minlength=len(self.of_class))
        return np.bincount(self.of_class, sums**2, minlength=len(self.unbias)) * self.unbias


@dataclass(frozen=True)
class _Dependence:
    """The clusters that some pairs of a design lie in; `members` where they are of several recordings in no role."""

    index: Int[np.ndarray, " pairs"]
    single: _Clusters
    target: _Clusters
    interferer: _Clusters  # within a class
    recording: Int[np.ndarray, " pairs"]  # of the interferer, whatever the class
    members: csr_array | None  # (pairs, recordings), 0 or 1

    @classmethod
    def of(cls, design: Design, rows: Int[np.ndarray, " pairs"]) -> "_Dependence":
        """The dependence of these pairs of a design."""
        index, n = design.class_index[rows], len(design.classes)
        recording = design.interferer[rows]
        own = recording + index * (design.interferer.max(initial=0) + 1)
        return cls(
            index,
            _Clusters.of(design.cell[rows], index, n),
            _Clusters.of(design.target[rows], index, n),
            _Clusters.of(own, index, n),
            recording,
            None if design.members is None else design.members[rows],
        )


@dataclass(frozen=True)
class _Variance:
    """Variances of the classes' statistics by single pairs, target and interferer recordings."""

    single: Float[np.ndarray, " classes"]
    target: Float[np.ndarray, " classes"]
    target_freedom: Float[np.ndarray, " classes"]
    interferer: Float[np.ndarray, " classes"]
    interferer_freedom: Float[np.ndarray, " classes"]
    n_pairs: Int[np.ndarray, " classes"]
    over_all: float  # of the mean over classes, by interferer recordings, which classes share
    over_all_freedom: float

    @classmethod
    def of(cls, influences: Sequence[Float[np.ndarray, " pairs"]], design: Design) -> "_Variance":
        """From the mean of the influences over runs."""
        stacked = np.stack(influences)
        rows = np.flatnonzero(~np.isnan(stacked).all(axis=0))
        u, n = finite_mean(stacked[:, rows].T), len(design.classes)
        found = design.dependence(rows)
        n_pairs = np.bincount(found.index, minlength=n)
        single = found.single.variance(u)
        if found.members is not None:
            shared, freedom = _overlapping(u, found.members)
            return cls(
                single, np.full(n, shared), np.full(n, freedom), single, np.zeros(n), n_pairs, float(single.sum()), 0.0
            )  # what interferers add to single pairs is nothing
        used = max(int((n_pairs > 0).sum()), 1)
        sums = np.bincount(found.recording, u * np.sqrt(found.single.unbias[found.index])) / used
        sizes = np.bincount(found.recording).astype(float)
        return cls(
            single,
            found.target.variance(u),
            found.target.freedom,
            found.interferer.variance(u),
            found.interferer.freedom,
            n_pairs,
            float(np.sum(sums**2)),
            float(sizes.sum() ** 2 / np.sum(sizes**2)) - 1 if len(rows) else 0.0,
        )

    def of_class(self, c: int) -> list[_Part]:
        """The parts of one class' variance."""
        single = float(self.single[c])
        return [
            _Part(single, 0.0, float(self.n_pairs[c] - 1)),
            _Part(float(self.target[c]), single, max(float(self.target_freedom[c]), 1.0)),
            _Part(float(self.interferer[c]), single, max(float(self.interferer_freedom[c]), 1.0)),
        ]

    def of_mean(self) -> list[_Part]:
        """The parts of the variance of the mean over classes."""
        used = max(int((self.n_pairs > 0).sum()), 1)
        single, target = float(self.single.sum()) / used**2, float(self.target.sum()) / used**2
        spread = np.sum(self.target**2 / np.maximum(self.target_freedom, 1)) / used**4
        return [
            _Part(single, 0.0, float((self.n_pairs - 1).clip(0).sum())),
            _Part(target, single, float(target**2 / spread) if spread > 0 else 1.0),
            _Part(self.over_all, single, max(self.over_all_freedom, 1.0)),
        ]


def _overlapping(u: Float[np.ndarray, " items"], members: csr_array) -> tuple[float, float]:
    """The unbiased variance by all pairs of items that share a recording, and its degrees of freedom.

    The same as `_Clusters` has where no item is of two recordings: there `shares` is a block of ones per cluster.
    """
    shares = (members @ members.T > 0).astype(np.float64)  # (items, items)
    n, total, sizes = len(u), float(shares.sum()), members.sum(axis=0).astype(float)
    if not total:
        return 0.0, 0.0
    kept = 1 - 2 * float((shares.sum(axis=1) ** 2).sum()) / (n * total) + total / n**2
    variance = max(float(u @ (shares @ u)), 0.0) / (kept if kept > 1e-9 else 1.0)
    # As many as recordings where each item has one; of several, whose sums are not independent, fewer (by simulation).
    return variance, float(sizes.sum() ** 2 / (sizes**2).sum() / members.sum(axis=1).mean() ** 0.75) - 1
