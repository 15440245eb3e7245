"""Moment retrieval and highlight detection as Moment-DETR scores them (Lei et al. 2021, QVHighlights), in [0, 1].

Clip c of a video is from second 2c to 2c + 2, and the second that names it is 2c: the map between the two is exact both
ways. (A published converter takes second t to clip int((t - 1) / 2), which moves every clip but the first by one.)

Legend: C clips of a video, int(duration / 2) of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from rft.geometry import span_iou

CLIP = 2.0  # seconds
LISTED = 10  # windows of an answer that count: the first ones
THRESHOLDS = tuple((50 + 5 * k) / 100 for k in range(10))  # of IoU, 0.5 to 0.95
SHOWN = (0.5, 0.75)
FIRST_AT = (0.5, 0.7)
LABELS = frozenset(("duration", "relevant_clip_ids", "saliency_scores"))  # columns that `clip_labels` reads
VERY_GOOD = 4  # the saliency from which a clip is a highlight; 3 is good, 2 is fair

Window = tuple[float, float, float]  # start, end, score
Span = Sequence[float]


def moment_retrieval(queries: Sequence[tuple[Sequence[Window], Sequence[Span]]]) -> dict[str, float]:
    """Means over queries of (answered windows, annotated ones); a query without an answer counts as 0.

    mr_map        average precision, over the IoU thresholds 0.5, 0.55 .. 0.95; `mr_map@t` at one of them
    mr_r1@t       the share of queries whose first listed window has IoU >= t with some annotated one
    """
    precisions = [average_precisions(answered, annotated) for answered, annotated in queries]
    firsts = [
        max((span_iou(a[:2], b) for a in answered[:1] for b in annotated), default=0.0) for answered, annotated in queries
    ]
    metrics = {"mr_map": fmean(map(fmean, precisions))}
    metrics |= {f"mr_map@{t}": fmean(p[THRESHOLDS.index(t)] for p in precisions) for t in SHOWN}
    return metrics | {f"mr_r1@{t}": fmean(iou >= t for iou in firsts) for t in FIRST_AT}


def average_precisions(answered: Sequence[Window], annotated: Sequence[Span]) -> list[float]:
    """Average precision at each of `THRESHOLDS`.

    The first `LISTED` windows count, by descending score. Each takes the annotated window of the highest IoU that is still
    free, and is right when that IoU reaches the threshold. Precision is interpolated: at a recall it is the best at that
    recall or a higher one. A reversed window overlaps nothing.
    """
    ranked = sorted(answered[:LISTED], key=lambda window: -window[2])
    ious = [[span_iou(window[:2], truth) for truth in annotated] for window in ranked]
    return [_average_precision(_hits(ious, threshold), len(annotated)) for threshold in THRESHOLDS]


def _hits(ious: Sequence[Sequence[float]], threshold: float) -> list[bool]:
    free = set(range(len(ious[0]))) if ious else set()
    hits = []
    for row in ious:
        best = max((j for j in free if row[j] >= threshold), key=lambda j: row[j], default=None)
        free.discard(best)
        hits.append(best is not None)
    return hits


def _average_precision(hits: Sequence[bool], num_true: int) -> float:
    """Each hit raises recall by 1 / `num_true`, at the best precision from there on."""
    total, best = 0.0, 0.0
    for rank in range(len(hits), 0, -1):
        best = max(best, sum(hits[:rank]) / rank)
        total += best * hits[rank - 1]
    return total / num_true if num_true else 0.0


def highlight_detection(
    queries: Sequence[tuple[Sequence[float] | None, Sequence[Sequence[float]]]], least: float = VERY_GOOD
) -> dict[str, float]:
    """Means over queries of (saliency per clip, annotators' scores per clip); None, an answer that cannot be read, counts 0.

    hl_map   average precision against the clips that an annotator scored `least` or more, averaged over the annotators
    hit@1    whether some annotator did so at the clip of the highest saliency, the first of several
    """
    return {
        "hl_map": fmean(_highlight_precision(saliency, labels, least) for saliency, labels in queries),
        "hit@1": fmean(_hit(saliency, labels, least) for saliency, labels in queries),
    }


def _hit(saliency_C: Sequence[float] | None, labels_C: Sequence[Sequence[float]], least: float) -> bool:
    if not saliency_C:
        return False
    top = max(range(len(saliency_C)), key=lambda clip: saliency_C[clip])
    return max(labels_C[top]) >= least


def _highlight_precision(saliency_C: Sequence[float] | None, labels_C: Sequence[Sequence[float]], least: float) -> float:
    if not saliency_C:
        return 0.0
    return fmean(clip_precision(saliency_C, [score >= least for score in scores_C]) for scores_C in zip(*labels_C))


def clip_precision(saliency_C: Sequence[float], is_true_C: Sequence[bool]) -> float:
    """Interpolated average precision of a ranking of clips; 0 when no clip is true.

    Clips of equal saliency come in together, and a level that brings in several true ones counts once, as in the evaluator.
    """
    num_true, found, taken, levels = sum(is_true_C), 0, 0, []
    ranked = sorted(zip(saliency_C, is_true_C), key=lambda clip: -clip[0])
    for _, level in groupby(ranked, key=lambda clip: clip[0]):
        new = [is_true for _, is_true in level]
        taken, found = taken + len(new), found + sum(new)
        levels.append((found / taken, any(new)))
    best, kept = 0.0, []
    for precision, brings in reversed(levels):
        best = max(best, precision)
        kept += [best] if brings else []
    return fmean(kept) if num_true else 0.0


def clip_labels(row: Mapping[str, Any]) -> list[Sequence[float]]:
    """[C, annotators] of a row with `duration`, `relevant_clip_ids` and `saliency_scores`; clips that none scored are 0."""
    scored = dict(zip(row["relevant_clip_ids"], row["saliency_scores"], strict=True))
    num_clips = max(int(row["duration"] / CLIP), max(scored, default=-1) + 1)
    none = [0] * len(next(iter(scored.values()), (0,)))
    return [scored.get(clip, none) for clip in range(num_clips)]


def clip_saliency(highlights: Sequence[tuple[float, float]], num_clips: int) -> list[float]:
    """[C] from (second on the grid, score): 0 where nothing is listed, the first score of a repeated second."""
    given = dict(reversed(highlights))
    return [given.get(CLIP * clip, 0.0) for clip in range(num_clips)]


def windows_of(highlights: Sequence[tuple[float, float]]) -> list[Window]:
    """Highlights as moments: each run of neighbouring clips is a window scored by its mean, the highest first."""
    given = dict(reversed(highlights))
    runs: list[list[float]] = []
    for second in sorted(given):
        if not runs or second > runs[-1][-1] + CLIP:
            runs.append([])
        runs[-1].append(second)
    windows = [(run[0], run[-1] + CLIP, fmean(given[second] for second in run)) for run in runs]
    return sorted(windows, key=lambda window: -window[2])


def windows_in_order(spans: Sequence[tuple[float, float]]) -> list[Window]:
    """Spans without scores, ranked as they are listed."""
    return [(start, end, -float(rank)) for rank, (start, end) in enumerate(spans)]
