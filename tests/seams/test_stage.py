"""What a stage does when groups are silent or samples cannot be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rft.errors import DataError
from rft.hf.together import Together
from rft.quarantine import Quarantine
from rft.types import Rollout, Sample
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
