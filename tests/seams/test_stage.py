"""What a stage does when groups are silent or samples cannot be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rft.algo.filters import mute
from rft.errors import DataError
from rft.hf.together import Together
from rft.quarantine import Quarantine
from rft.scoring import Reward, score
from rft.types import Rollout, Sample, Segment
from tests.stages import length_reward, opened, phase_of, stage_of


def test_refill_replaces_silent_groups_up_to_n_times(tiny_folders: dict[str, Path], world: Path) -> None:
    """The first two samples never differ in reward; a refill draws others, and the log still describes the first draw."""
    silent = {"train_00000", "train_00001"}

    def reward(rollout: Rollout, sample: Sample) -> float:
        return 0.0 if sample.id in silent else length_reward(rollout, sample)

    shares, trained = {}, {}
    for refill in (0, 3):
        phase = phase_of(refill=refill)
        policy = opened(tiny_folders["qwen2_5_vl"], phase)
        stage = stage_of(policy, phase, world, reward=reward)
        batches, _, metrics = stage.step([0, 1, 2, 3], model=policy.model, reference=None, step=0, together=Together())
        assert len(batches) == 4
        shares[refill] = sum(metrics["muted"]) / 4
        trained[refill] = [b.pack.examples[0].sample_id for b in batches]
    assert shares == {0: 0.5, 3: 0.5}
    assert trained[0] == [f"train_0000{i}" for i in range(4)]
    assert not set(trained[3]) & silent and trained[3][2:] == trained[0][2:]


def test_a_rank_with_nothing_to_refill_waits_for_the_others(tiny_folders: dict[str, Path], world: Path) -> None:
    class Elsewhere(Together):
        def any(self, value: bool) -> bool:
            return True  # another rank has a silent group

    phase = phase_of(refill=2)
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = stage_of(policy, phase, world)
    for sharing in ("packed", "expanded"):
        one = replace(stage, lens=replace(stage.lens, sharing=sharing))
        batches, _, _ = one.step([0, 1], model=policy.model, reference=None, step=0, together=Elsewhere())
        assert len(batches) == 2


def test_equal_totals_of_different_accuracy_are_a_signal(tiny_folders: dict[str, Path], world: Path) -> None:
    """What is muted follows the estimator: right and untagged against wrong and tagged, 1 + 0 and 0 + 1."""
    for estimator, muted in (("grpo", True), ("nonlinear", False)):
        phase = phase_of(estimator=estimator, accuracy=("length",))
        stage = stage_of(opened(tiny_folders["qwen2_5_vl"], phase), phase, world)
        right = Reward(name="length", function=lambda rollout, sample: float(len(rollout.text) % 2))
        rest = Reward(name="rest", function=lambda rollout, sample: 1.0 - len(rollout.text) % 2)
        stage = replace(stage, rewards=[right, rest])
        rollouts = [Rollout(sample_id=stage.samples[0].id, segments=(Segment(author="policy", text="x" * n),)) for n in (1, 2)]
        (group,), _ = score([(stage.samples[0], rollouts)], stage.rewards)
        assert bool(mute([group], stage.advantages)[0].muted) == muted


def test_an_unreadable_sample_is_quarantined_and_another_drawn(
    tiny_folders: dict[str, Path], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phase = phase_of()
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = stage_of(policy, phase, world)
    broken = [replace(m, source=str(tmp_path / "gone.mp4")) for m in stage.samples[0].media]
    samples = [replace(stage.samples[0], media=tuple(broken)), *stage.samples[1:]]
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", total=12, max_share=0.1)
    stage = replace(stage, samples=samples, quarantine=quarantine)
    opened_samples, prompts = stage.open([0, 1], 0)
    assert len(opened_samples) == len(prompts) == 2
    assert opened_samples[0].id != samples[0].id and opened_samples[1].id == samples[1].id
    assert [s.id for s in stage.open([0, 1], 0)[0]] == [s.id for s in opened_samples]  # the same one again
    line = (tmp_path / "quarantine.jsonl").read_text()
    assert samples[0].id in line and "gone.mp4" in line and line.count("\n") == 1
    assert "quarantined 1 of 12" in capsys.readouterr().out
    strict = replace(stage, quarantine=Quarantine(None, total=12, max_share=0.0))
    with pytest.raises(DataError, match="max_bad_share"):
        strict.open([0], 0)


def test_a_batch_wide_standard_deviation_is_over_all_groups(tiny_folders: dict[str, Path], world: Path) -> None:
    advantages = {}
    for std in ("none", "batch"):
        phase = phase_of(estimator_args={"std": std, "eps": 0.0})
        policy = opened(tiny_folders["qwen2_5_vl"], phase)
        stage = stage_of(policy, phase, world)
        batches, _, _ = stage.step([0, 1, 2], model=policy.model, reference=None, step=0, together=Together())
        advantages[std] = [float(e.advantages_T[-1]) for b in batches for e in b.pack.examples]
    ratios = {round(a / b, 3) for a, b in zip(advantages["none"], advantages["batch"], strict=True) if b}
    assert len(ratios) == 1 and ratios != {1.0}
