"""What a sweep found beside the paper's numbers: means, spreads, and how far the order of rows is the paper's."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.classes import VOC_CLASSES
from .paper import PaperTable
from .scores import kept
from .sweep import Sweep


@dataclass(frozen=True)
class Found:
    """A number of ours, in percent, beside the paper's.

    Attributes:
        name: of the row or class.
        paper: the paper's number; None where it has none.
        values: ours, one for each seed that is done.
        default: the paper's own choice.
    """

    name: str
    paper: float | None
    values: tuple[float, ...]
    default: bool = False

    @property
    def mean(self) -> float | None:
        """Over the seeds; None without any."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, of a sample; None where there are fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self) -> str:
        """``63.8 ± 0.4``, or ``63.8``, or a dash."""
        if self.mean is None:
            return "–"
        return f"{self.mean:.1f}" if self.spread is None else f"{self.mean:.1f} ± {self.spread:.1f}"


@dataclass(frozen=True)
class Results:
    """A table with our numbers.

    Attributes:
        table: the paper's.
        seeds: how many there are of each row.
        rows: our numbers.
        others: further label maps of the rows: what they are called -> their numbers.
        classes: of table 6: IoU per class, the paper's beside it where its classes are ours; empty otherwise.
    """

    table: PaperTable
    seeds: int
    rows: tuple[Found, ...]
    others: dict[str, tuple[Found, ...]]
    classes: tuple[Found, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every row has all its seeds."""
        return all(len(row.values) == self.seeds for row in self.rows)

    @property
    def compared(self) -> tuple[Found, ...]:
        """What is compared with the paper: the rows, or of a table of classes those."""
        return self.classes or self.rows


def results_of(sweep: Sweep, table: PaperTable) -> Results:
    """What there is of a table so far."""
    seeds = sweep.seeds_of(table)
    scores = [[_scores(sweep, table, number, seed) for seed in seeds] for number in range(len(table.rows))]

    def of_kind(kind: str) -> tuple[Found, ...]:
        found = []
        for row, own in zip(table.rows, scores):
            values = [100 * score[kind or row.name]["miou"] for score in own if score is not None]
            found.append(Found(row.name, row.paper, tuple(values), row.default))
        return tuple(found)

    kinds = table.kinds or ("",)
    others = {kind: of_kind(kind) for kind in kinds[1:]}
    return Results(table, len(seeds), of_kind(kinds[0]), others, _classes(table, scores[0]))


def _scores(sweep: Sweep, table: PaperTable, number: int, seed: int):
    return kept(*sweep.scored(table, table.rows[number], seed))


def _classes(table: PaperTable, scores: Sequence) -> tuple[Found, ...]:
    """IoU per class, the paper's beside it where the classes are VOC's."""
    done = [score[table.kinds[0]]["iou"] for score in scores if score is not None] if table.per_class else []
    if not done:
        return ()
    names = list(done[0])
    same = tuple(names) == VOC_CLASSES
    papers = table.per_class.methods["Ours"] if same else [None] * len(names)
    return tuple(
        Found(name, paper, tuple(100 * iou[name] for iou in done if iou[name] is not None))
        for name, paper in zip(names, papers)
    )


@dataclass(frozen=True)
class Agreement:
    """How far the order of our rows is the paper's. Pairs of rows that the paper gives one number do not count.

    Attributes:
        pairs: of rows with different numbers in the paper.
        same: of those, how many are in the paper's order here.
        equal: of those, how many are one number here.
        tau: Kendall's: (same - reversed) / pairs, from -1 (reversed) to 1 (the same order).
        clear: pairs whose difference here is larger than the spreads of both rows together; None for one seed.
        clear_same: of those, how many are in the paper's order.
    """

    pairs: int
    same: int
    equal: int
    tau: float
    clear: int | None
    clear_same: int | None


def agreement(rows: Sequence[Found]) -> Agreement | None:
    """None where there are no two rows to compare."""
    known = [row for row in rows if row.paper is not None and row.mean is not None]
    signs = []
    for one, other in itertools.combinations(known, 2):
        if one.paper == other.paper:
            continue
        difference = one.mean - other.mean
        as_paper = difference * (one.paper - other.paper)
        spread = None if None in (one.spread, other.spread) else one.spread + other.spread
        signs.append((as_paper, spread is not None and abs(difference) > spread))
    if not signs:
        return None
    same, reverse = sum(sign > 0 for sign, _ in signs), sum(sign < 0 for sign, _ in signs)
    spreads = all(row.spread is not None for row in known)
    clear = [sign for sign, is_clear in signs if is_clear]
    return Agreement(
        len(signs),
        same,
        len(signs) - same - reverse,
        (same - reverse) / len(signs),
        len(clear) if spreads else None,
        sum(sign > 0 for sign in clear) if spreads else None,
    )


def in_words(results: Results) -> str:
    """Whether the paper's order holds, in a plain paragraph made of the numbers."""
    rows = results.compared
    what = "classes" if results.classes else "rows"
    known = [row for row in rows if row.paper is not None and row.mean is not None]
    missing = "" if results.complete else f"Not complete: {_missing(results)}. "
    order = agreement(rows)
    if order is None:
        return f"{missing}There is nothing of the paper's to compare with."
    papers = max(known, key=lambda row: row.paper)
    best = max(known, key=lambda row: (row.mean, row.name == papers.name))
    place = sorted((row.mean for row in known), reverse=True).index(papers.mean) + 1
    verdict = "holds" if order.tau >= 0.8 else "holds in part" if order.tau >= 0.3 else "does not hold"
    words = [
        f"{missing}The paper's order {verdict}: of {order.pairs} pairs of {what} {order.same} are in it"
        f"{f', {order.equal} are equal here' if order.equal else ''} (Kendall's τ {order.tau:+.2f})."
    ]
    if order.clear is None:
        why = "There is one seed" if results.seeds == 1 else "Some have the number of one seed only"
        words.append(f"{why}, so how much of that is chance is not known.")
    else:
        words.append(
            f"{order.clear} of the pairs differ by more than the spread over the seeds, of those"
            f" {order.clear_same} in the paper's order."
        )
    if best.name == papers.name:
        words.append(f"Best in both: {best.name} (here {best.mean:.1f}, there {best.paper:.1f}).")
    else:
        words.append(
            f"Best here: {best.name} ({best.mean:.1f}; the paper's {best.paper:.1f}); best there: {papers.name}"
            f" ({papers.paper:.1f}), which is number {place} of {len(known)} here ({papers.mean:.1f})."
        )
    equal = [row.name for row in known if row.mean == best.mean and row is not best]
    if equal:
        words.append(f"As good as the best here: {', '.join(equal)}.")
    return " ".join(words)


def _missing(results: Results) -> str:
    done, wanted = sum(len(row.values) for row in results.rows), results.seeds * len(results.rows)
    return f"{wanted - done} of {wanted} numbers are missing"
