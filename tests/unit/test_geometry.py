"""Overlaps by hand."""

from __future__ import annotations

import math
import random

import pytest

from rft import geometry

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ((1, 3), (2, 4), 1 / 3),  # share 1, cover 3
        ((0, 10), (2.5, 5), 0.25),  # 2.5 of 10
        ((0, 2), (2, 4), 0.0),  # they touch
        ((0, 1), (5, 9), 0.0),
        ((3, 3), (3, 3), 1.0),  # the same instant
        ((3, 3), (4, 4), 0.0),
        ((3, 3), (2, 4), 0.0),  # an instant has no length to share
        ((4, 2), (2, 4), 0.0),  # reversed
        ((4, 2), (4, 2), 0.0),  # reversed, even against itself
        ((-2, 2), (0, 2), 0.5),
        ((NAN, 2), (NAN, 2), 0.0),
        ((0, NAN), (0, 2), 0.0),
        ((0, INF), (0, INF), 0.0),
        ((-1e308, 1e308), (-1e308, 1e308), 0.0),  # the length itself overflows
    ],
)
def test_span_iou(a: tuple, b: tuple, iou: float) -> None:
    assert geometry.span_iou(a, b) == pytest.approx(iou)
    assert geometry.span_iou(b, a) == pytest.approx(iou)


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ([], [], 1.0),
        ([], [(0, 1)], 0.0),
        ([(0, 1), (1, 2)], [(0, 2)], 1.0),  # touching spans are one
        ([(0, 4), (1, 2), (3, 6)], [(0, 6)], 1.0),  # nested and overlapping too
        ([(0, 2), (8, 10)], [(1, 9)], 0.2),  # share 1 + 1, cover 4 + 8 - 2
        ([(0, 1), (2, 3), (4, 5)], [(0, 5)], 0.6),
        ([(8, 9), (0, 1)], [(0, 1), (8, 9)], 1.0),  # in any order
        ([(0, 2)] * 5, [(0, 2)], 1.0),  # saying it again adds nothing
        ([(1, 1), (1, 1)], [(1, 1)], 1.0),  # the same instants
        ([(1, 1), (2, 2)], [(1, 1)], 0.0),
        ([(1, 1), (0, 2)], [(0, 2)], 1.0),  # an instant beside a span adds no length
        ([(0, 2), (9, 4)], [(0, 2)], 1.0),  # the reversed one is dropped
        ([(9, 4)], [(9, 4)], 0.0),
        ([(9, 4)], [], 0.0),  # a set of reversed spans is not an empty set
        ([(0, 2), (NAN, 1)], [(0, 2)], 0.0),
    ],
)
def test_spans_iou(a: list, b: list, iou: float) -> None:
    assert geometry.spans_iou(a, b) == pytest.approx(iou)
    assert geometry.spans_iou(b, a) == pytest.approx(iou)


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),  # share 1, cover 4 + 4 - 1
        ((0, 0, 10, 10), (0, 0, 5, 10), 0.5),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),  # they touch
        ((0, 0, 1, 1), (5, 5, 6, 6), 0.0),
        ((5, 5, 5, 5), (5, 5, 5, 5), 0.0),  # no area, also against itself
        ((2, 2, 0, 0), (2, 2, 0, 0), 0.0),  # reversed in both axes would have a positive area
        ((2, 0, 0, 2), (0, 0, 2, 2), 0.0),  # reversed in one
        ((-1, -1, 1, 1), (0, 0, 1, 1), 0.25),
        ((0, 0, NAN, 1), (0, 0, 1, 1), 0.0),
        ((0, 0, INF, 1), (0, 0, INF, 1), 0.0),
        ((0, 0, 1e200, 1e200), (0, 0, 1e200, 1e200), 0.0),  # the area overflows
    ],
)
def test_box_iou(a: tuple, b: tuple, iou: float) -> None:
    assert geometry.box_iou(a, b) == pytest.approx(iou)
    assert geometry.box_iou(b, a) == pytest.approx(iou)


def test_random_sets_match_counting_on_a_grid() -> None:
    """Spans with integer ends: the union's length is a number of unit cells."""
    rng = random.Random(0)

    def draw() -> tuple[list[tuple[int, int]], set[int]]:
        spans = [(rng.randrange(20), rng.randrange(20)) for _ in range(rng.randrange(1, 6))]
        return spans, {cell for start, end in spans for cell in range(start, end)}

    for _ in range(500):
        (a, cells_a), (b, cells_b) = draw(), draw()
        if cells_a | cells_b:
            expected = len(cells_a & cells_b) / len(cells_a | cells_b)
            assert geometry.spans_iou(a, b) == pytest.approx(expected)


def test_any_numbers_give_a_number_between_0_and_1() -> None:
    rng = random.Random(1)
    values = [0.0, -0.0, 1.0, 0.1, 0.3, -5.0, 1e-300, 1e308, -1e308, INF, -INF, NAN]
    for _ in range(2000):
        a, b = ([rng.choice(values) for _ in range(4)] for _ in "ab")
        sets = [[tuple(c[:2]), tuple(c[2:])] for c in (a, b)]
        for iou in (geometry.box_iou(a, b), geometry.span_iou(a[:2], b[:2]), geometry.spans_iou(*sets)):
            assert 0.0 <= iou <= 1.0
