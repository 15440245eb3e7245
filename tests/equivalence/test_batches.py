"""One optimizer step cut in different ways is one gradient: relative L2 of 1e-5 or less in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stages import gradients, opened, phase_of, relative, stage_of

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
CUTS = {
    "4x1 = 1x4": [[0], [1], [2], [3]],
    "2x2 = 1x4": [[0, 1], [2, 3]],
    "uneven": [[0, 1, 2], [3]],
    "shuffled groups": [[3, 1, 0, 2]],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", ["grpo", "dapo", "dr_grpo", "gspo", "nll"])
def test_cuts_of_a_step_give_one_gradient(family: str, objective: str, tiny_folders: dict[str, Path], world: Path) -> None:
    phase = phase_of(objective=objective)
    policy = opened(tiny_folders[family], phase)
    stage = stage_of(policy, phase, world)
    whole = gradients(policy, stage, [0, 1, 2, 3], [[0, 1, 2, 3]])
    assert whole.norm() > 1e-4
    for name, order in CUTS.items():
        assert relative(gradients(policy, stage, [0, 1, 2, 3], order), whole) <= 1e-5, name


def test_bnpo_depends_on_the_cut_by_definition(tiny_folders: dict[str, Path], world: Path) -> None:
    """Its weights are means over each forward's tokens: equal only when forwards have equally many."""
    phase = phase_of(objective="bnpo")
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = stage_of(policy, phase, world)
    whole = gradients(policy, stage, [0, 1, 2, 3], [[0, 1, 2, 3]])
    assert relative(gradients(policy, stage, [0, 1, 2, 3], [[3, 2, 1, 0]]), whole) <= 1e-5
    assert relative(gradients(policy, stage, [0, 1, 2, 3], CUTS["uneven"]), whole) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_order_of_samples_in_a_generation_changes_nothing(family: str, tiny_folders: dict[str, Path], world: Path) -> None:
    """Draws are keyed by sample and index, not by place."""
    phase = phase_of()
    policy = opened(tiny_folders[family], phase)
    stage = stage_of(policy, phase, world)
    one = gradients(policy, stage, [0, 1, 2, 3], [[0, 1, 2, 3]])
    other = gradients(policy, stage, [2, 0, 3, 1], [[0, 1, 2, 3]])
    assert relative(other, one) <= 1e-5


def test_a_wrong_weight_would_be_seen(tiny_folders: dict[str, Path], world: Path) -> None:
    """The comparison is sharp: dropping one micro-step, or normalising it locally, is far outside the tolerance."""
    phase = phase_of()
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = stage_of(policy, phase, world)
    whole = gradients(policy, stage, [0, 1, 2, 3], [[0, 1, 2, 3]])
    assert relative(gradients(policy, stage, [0, 1, 2, 3], [[0, 1, 2]]), whole) > 1e-2
