"""A step whose position is read from the device, as a CUDA graph replays it, is the plain step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rft.hf.decode import Branches, Graphed
from rft.hf.generate import ModelPolicy
from rft.hf.together import Together
from rft.rollout.policy import Context, Limits
from tests.stages import opened, phase_of, stage_of


@pytest.fixture
def by_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every step reads a clock on the device and has the shapes of its bucket; rows met are noted."""
    rows: list[int] = []

    def call(self: Graphed, token_B: Tensor, next_B: Tensor) -> Tensor:
        branches: Branches = self._branches
        branches.make_room()
        rows.append(branches.num_rows)
        with branches.by_clock(torch.tensor([branches.position])):
            logits_BV = self._step(token_B, next_B)
        branches.position += 1
        return logits_BV

    monkeypatch.setattr(Graphed, "__call__", call)
    yield rows


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_steps_by_the_clock_are_plain_steps(
    family: str, tiny_folders: dict[str, Path], world: Path, by_clock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 tokens pass two buckets; rows end at different places, so that rows are given up as well."""
    monkeypatch.setattr("rft.hf.decode.BUCKET", 8)
    phase = phase_of()
    policy = opened(tiny_folders[family], phase)
    stage = stage_of(policy, phase, world)
    _, prompts = stage.open([0, 1], 0)
    contexts = [Context(segments=(prompt,), key=17 * i + j) for i, prompt in enumerate(prompts) for j in range(6)]
    eos = tuple(range(40, 80))
    clocked = ModelPolicy(policy.model, stage.lens, eos).extend(contexts, Limits(max_tokens=20))
    monkeypatch.undo()
    plain = ModelPolicy(policy.model, stage.lens, eos).extend(contexts, Limits(max_tokens=20))
    assert [r.ids for r in clocked] == [r.ids for r in plain]
    assert all(np.allclose(a.logprobs, b.logprobs, atol=1e-4) for a, b in zip(clocked, plain, strict=True))
    assert max(len(r.ids) for r in plain) > 16 and by_clock[-1] < by_clock[0]


def test_the_sampler_of_a_step_is_close_to_the_forward_that_is_trained(tiny_folders: dict[str, Path], world: Path) -> None:
    """The gap that every step logs: rounding only, in float32."""
    phase = phase_of()
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = stage_of(policy, phase, world)
    batches, agreed, _ = stage.step([0, 1, 2, 3], model=policy.model, reference=None, step=0, together=Together())
    _, metrics = stage.loss(policy.model, batches, agreed, Together())
    assert 0 < metrics["sampler_gap"] < 1e-5
