"""Overlap of spans (seconds) and of boxes (pixels or fractions, (x0, y0, x1, y1)): one definition for every task.

Every overlap is a finite number in [0, 1] for any numbers that are given. A reversed span or box, and one with a
coordinate that is not finite, overlaps nothing, not even itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite
from typing import Any


def span_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two spans (start, end); 1 for the same instant twice, 0 for two that are disjoint."""
    return spans_iou([a], [b])


def right_span_iou(span: Sequence[float], answer: Mapping[str, Any]) -> float:
    """Overlap of a span with the one of an annotation's `span` and `valid_spans` (right as well) that it fits best."""
    return max(span_iou(span, right) for right in (answer["span"], *answer.get("valid_spans", ())))


def near_span(span: Sequence[float], least: float, u: float, v: float) -> tuple[float, float]:
    """One of the spans with IoU >= `least`, in (0, 1], with a span that has a length; uniform in (start, end) if u and v are.

    Of a span of length 1 an end can move inwards by 1 - least when the other one stays, or outwards by (1 - least) / least,
    and the IoU is at least `least` just where the shares of these that the two ends use up sum to at most 1: four triangles,
    over which u and v in [0, 1] are spread by area. Nothing keeps the start from being below 0.
    """
    start, end = span
    inward = (end - start) * (1 - least)
    turn = least / (1 + least)  # below it an end moves inwards: inward / (inward + outward)
    (from_start, x), (from_end, y) = (
        (inward, w / turn) if w < turn else (-inward / least, (w - turn) / (1 - turn)) for w in (u, v)
    )
    if x + y > 1:  # the other half of the square, folded over
        x, y = 1 - x, 1 - y
    return (start + x * from_start, end - y * from_end)


def spans_iou(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """Intersection over union of two sets of spans, each first merged into its union (touching spans become one).

    A union without length scores 1 when both sets are empty or when they name the same instants, else 0. Reversed spans
    are dropped, and a set left empty by that is not an empty set; one coordinate that is not finite makes the score 0.
    """
    if not a and not b:
        return 1.0
    if not all(isfinite(x) for span in (*a, *b) for x in span):
        return 0.0
    merged_a, merged_b = _merge(a), _merge(b)
    len_a, len_b = (sum(end - start for start, end in spans) for spans in (merged_a, merged_b))
    if len_a == len_b == 0:
        return float(merged_a == merged_b != [])
    shared, i, j = 0.0, 0, 0
    while i < len(merged_a) and j < len(merged_b):
        start, end = max(merged_a[i][0], merged_b[j][0]), min(merged_a[i][1], merged_b[j][1])
        shared += max(0.0, end - start)
        if merged_a[i][1] < merged_b[j][1]:
            i += 1
        else:
            j += 1
    return _ratio(shared, len_a + len_b - shared)


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes in the same frame; 0 when the union has no area.

    Unlike an instant, which an annotator may mean, a box without area shows nothing: it scores 0 against itself.
    """
    if not all(isfinite(x) for x in (*a, *b)) or a[2] < a[0] or a[3] < a[1] or b[2] < b[0] or b[3] < b[1]:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    area_a, area_b = ((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return _ratio(shared, area_a + area_b - shared)


def merged(spans: Iterable[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    """The union of spans: disjoint, in order of time, touching ones as one. Reversed and endless ones are dropped."""
    return tuple((start, end) for start, end in _merge(s for s in spans if all(map(isfinite, s))))


def shared_spans(a: Iterable[Sequence[float]], b: Iterable[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    """The time that lies in both sets of spans, as `merged` gives it; a single instant in common is no time."""
    left, right, out, i, j = merged(a), merged(b), [], 0, 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            out.append((start, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return tuple(out)


def padded(
    spans: Iterable[Sequence[float]], share: float, least: float, low: float, high: float
) -> tuple[tuple[float, float], ...]:
    """Spans that reach out by `share` of their length to either side, at least by `least`, cut to [low, high] and merged."""
    wide = ((s - max(share * (e - s), least), e + max(share * (e - s), least)) for s, e in spans)
    return merged((max(s, low), min(e, high)) for s, e in wide)


def carried(box: Sequence[float], source: Sequence[float], target: Sequence[float]) -> tuple[float, float, float, float]:
    """A box in the coordinates of the frame `source` as it is in those of `target`, cut to it. Frames are boxes with an area.

    Corners keep their order, so that a reversed box stays reversed. What lies outside becomes a box without area on the
    edge. The way back gives the box again up to rounding.
    """
    out = []
    for i, edge in enumerate(box):
        low, high, first, last = source[i % 2], source[i % 2 + 2], target[i % 2], target[i % 2 + 2]
        out.append(min(max(first + (edge - low) * (last - first) / (high - low), first), last))
    return tuple(out)


def _merge(spans: Iterable[Sequence[float]]) -> list[list[float]]:
    """The union as disjoint spans in order of time."""
    merged: list[list[float]] = []
    for start, end in sorted((start, end) for start, end in spans if start <= end):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def _ratio(shared: float, union: float) -> float:
    """`shared / union` within [0, 1]; coordinates near the largest float can make the union infinite or NaN."""
    return min(1.0, shared / union) if 0 < union < inf else 0.0
