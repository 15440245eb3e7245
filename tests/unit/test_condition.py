"""When a phase may end."""

from __future__ import annotations

import pytest

from rft.condition import Condition
from rft.errors import RecipeError

METRICS = {"miou": 0.5, "best_constant": 0.25, "r1@0.5": 0.75, "validation/box_iou": 0.125}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("miou >= 0.5", True),
        ("miou > 0.5", False),
        ("miou <= 0.5", True),
        ("miou < 0.5", False),
        ("miou>=best_constant+0.25", True),  # 0.5 >= 0.25 + 0.25
        ("miou > best_constant + 0.25", False),
        ("  miou >= best_constant - 0.25 + 0.5 ", True),  # 0.25 - 0.25 + 0.5
        ("miou >= best_constant - 0.25 - 0.25", True),  # -0.25
        ("miou >= -0.5", True),
        ("miou < - best_constant + 1", True),  # 0.75
        ("r1@0.5 >= 0.75", True),
        ("r1@0.5 > miou + best_constant", False),  # 0.75
        ("validation/box_iou > 1e-1", True),
        ("miou >= 5e-1", True),
    ],
)
def test_a_comparison_of_a_metric_with_a_sum(text: str, holds: bool) -> None:
    assert Condition.parse(text).holds(METRICS) is holds


@pytest.mark.parametrize(
    "text",
    [
        "", "miou", "miou >=", ">= 0.5", "0.5 <= miou", "miou == 0.5", "miou >= 0.5 and miou < 1", "miou >= 2 * best_constant",
        "miou >= 0.5 0.6", "miou >= (0.5)", "miou >= +", "miou >= 0.5 +", "miou >= .5", "miou => 0.5", "__import__('os') > 0",
        "miou + 0.1 >= 0.5", "miou >= --1",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Condition.parse(text, "phases.p.until")
    assert caught.value.where == "phases.p.until"
    assert caught.value.do == 'write e.g. "miou >= best_constant + 0.05"'


def test_a_metric_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(RecipeError) as caught:
        Condition.parse("accuracy > 0.5").holds({"miou": 0.5, "format": 1.0})
    assert "'accuracy'" in caught.value.what
    assert caught.value.do == "known: format, miou"
