"""The annotation in groups, from the rollout to the gradient."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rft.algo.guidance import Guidance
from rft.algo.losses import OffPolicy
from rft.errors import DataError
from rft.evaluation.contract import reference_earns_maximum
from rft.hf.step import Stage
from rft.hf.together import Together
from rft.plugins import load_object
from rft.rollout.guided import Guide
from rft.rollout.loop import roll_out
from rft.rollout.perceive import ONCE
from rft.rollout.policy import Context, Scripted
from rft.rollout.reference import reference_rollout, variants
from rft.scoring import Reward, score
from rft.train import train
from rft.types import POLICY, REFERENCE, Group, Rollout, Sample
from tests.recipes.test_recipes import ROOT, shortened
from tests.stages import gradients, length_reward, opened, phase_of, relative, stage_of

EVERY = [0, 1, 2, 3]


def guided(folder: Path, world: Path, guidance: Guidance | None, reward=length_reward, **changes) -> tuple[object, Stage]:
    phase = phase_of(guidance=guidance, **changes)
    policy = opened(folder, phase)
    return policy, stage_of(policy, phase, world, reward=reward)


def groups_of(policy: object, stage: Stage) -> tuple[list[list[list[int]]], dict[str, list[float]]]:
    """Authors of every example of every group, and what is logged."""
    batches, _, metrics = stage.step(EVERY, model=policy.model, reference=None, step=0, together=Together())
    return [[sorted(set(e.authors_T.tolist()) - {0}) for e in b.pack.examples] for b in batches], metrics


def test_a_certain_seat_is_the_last_and_the_policy_samples_one_fewer(tiny_folders: dict[str, Path], world: Path) -> None:
    policy, stage = guided(tiny_folders["qwen2_5_vl"], world, Guidance())
    authors, metrics = groups_of(policy, stage)
    assert authors == [[[POLICY], [POLICY], [POLICY], [REFERENCE]]] * 4
    assert metrics["reference/seats"] == [1.0] * 4
    assert len(metrics["completion_tokens"]) == 12  # three rollouts of four groups: the annotation is not the policy


def test_a_gate_is_open_only_where_nobody_passes(tiny_folders: dict[str, Path], world: Path) -> None:
    """Two samples whose rollouts all pass, two whose rollouts all fail: a drawn member of the failing groups gives way."""

    def reward(rollout: Rollout, sample: Sample) -> float:
        passes = sample.id in ("train_00000", "train_00001")
        return 1.0 if rollout.is_reference or passes else 0.1 * (len(rollout.text) % 3)

    policy, stage = guided(tiny_folders["qwen2_5_vl"], world, Guidance(gate=0.5), reward, group_size=8)
    authors, metrics = groups_of(policy, stage)
    seats = [[a == [REFERENCE] for a in group] for group in authors]
    assert [sum(s) for s in seats] == [0, 0, 1, 1]
    assert all(len(group) == 8 for group in authors)
    assert len(metrics["reward"]) == 4 and len(metrics["completion_tokens"]) == 32  # as the policy left them
    assert all(group[-1] == [REFERENCE] for group in authors[2:])
    _, plain = guided(tiny_folders["qwen2_5_vl"], world, None, reward, group_size=8)
    drawn = []
    for seed in range(6):
        wrote = []
        for one in (plain, stage):
            again = replace(one, seed=seed)
            batches, _, _ = again.step(EVERY, model=policy.model, reference=None, step=0, together=Together())
            wrote.append([[e.ids_T.tolist() for e in b.pack.examples] for b in batches])
        for alone, joined in zip(wrote[0][2:], wrote[1][2:], strict=True):
            (gone,) = [i for i in range(8) if alone[:i] + alone[i + 1 :] == joined[:-1]][:1]
            drawn.append(gone)
    assert len(set(drawn)) > 3  # any member, not the worst or the last


def test_hints_give_away_more_and_more(tiny_folders: dict[str, Path], world: Path) -> None:
    """Everybody fails, so the last hint is tried: half of the annotation by the reference, the rest by the policy."""
    policy, stage = guided(tiny_folders["qwen2_5_vl"], world, Guidance(gate=2.0, hints=(0.25, 0.5)))
    batches, _, metrics = stage.step(EVERY, model=policy.model, reference=None, step=0, together=Together())
    assert metrics["reference/seats"] == [4.0] * 4 and len(metrics["reward"]) == 4
    for batch, sample in zip(batches, stage.samples, strict=False):
        whole = reference_rollout(sample, stage.renderer).segments[-1].ids
        for example in batch.pack.examples:
            hint = example.ids_T[example.authors_T == REFERENCE]
            assert hint.tolist() == list(whole[: len(whole) // 2])
            assert np.isnan(example.sampler_T[example.authors_T == REFERENCE]).all()
            assert (example.authors_T == POLICY).sum() >= 1


def test_guidance_that_never_comes_is_plain_grpo(tiny_folders: dict[str, Path], world: Path) -> None:
    plain = gradients(*guided(tiny_folders["qwen2_5_vl"], world, None), EVERY, [EVERY])
    for never in (Guidance(probability=0.0), Guidance(until=3, fill="off"), Guidance(gate=1e-9)):
        assert torch.equal(gradients(*guided(tiny_folders["qwen2_5_vl"], world, never), EVERY, [EVERY]), plain)
    assert relative(gradients(*guided(tiny_folders["qwen2_5_vl"], world, Guidance()), EVERY, [EVERY]), plain) > 1e-2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_groups_with_and_without_the_annotation_share_a_batch(family: str, tiny_folders: dict[str, Path], world: Path) -> None:
    """Cut in micro-steps, and packed or expanded: one gradient."""
    for off in (OffPolicy(), OffPolicy(ratio="luffy")):
        policy, stage = guided(tiny_folders[family], world, Guidance(probability=0.5), estimator="nonlinear", off_policy=off)
        authors, metrics = groups_of(policy, stage)
        assert 0 < sum(metrics["reference/seats"]) < 4
        assert {len(group) for group in authors} == {4}
        whole = gradients(policy, stage, EVERY, [EVERY])
        assert whole.norm() > 1e-4
        assert relative(gradients(policy, stage, EVERY, [[2], [0, 3], [1]]), whole) <= 1e-5
        expanded = replace(stage, lens=replace(stage.lens, sharing="expanded"))
        assert relative(gradients(policy, expanded, EVERY, [EVERY]), whole) <= 1e-5


def test_the_annotation_has_curves_of_its_own(tiny_folders: dict[str, Path], world: Path) -> None:
    policy, stage = guided(tiny_folders["qwen2_5_vl"], world, Guidance(), estimator="nonlinear")
    batches, agreed, _ = stage.step(EVERY, model=policy.model, reference=None, step=0, together=Together())
    _, sums = stage.loss(policy.model, batches, agreed, Together())
    assert sums["reference/logprob"] < -1  # nobody sampled it
    assert 0 < sums["reference/pull"] < sums["pull"]
    assert sums["sampler_gap"] < 1e-5 and sums["ratio"] == pytest.approx(1)


def test_thoughts_are_taken_over_token_by_token(tiny_folders: dict[str, Path], world: Path) -> None:
    _, stage = guided(tiny_folders["qwen2_5_vl"], world, None)
    samples, prompts = stage.open([0], 0)
    says = "<think>it appears at 2</think>\n<answer>9 to 9</answer>"
    engine = Scripted(lambda i, c: says, stage.renderer.encode, stage.renderer.eos)
    limits = replace(stage.limits, max_tokens=99)
    (best,) = roll_out(samples, prompts, [1], policy=engine, renderer=stage.renderer, limits=limits, draw=(0,))[0]
    alone = reference_rollout(samples[0], stage.renderer, prompts[0])
    made = reference_rollout(samples[0], stage.renderer, prompts[0], fill="splice_think", best=best)
    assert made.text == "<think>it appears at 2</think>\n" + alone.text
    thought, answer = made.segments[1:]
    assert (thought.author, answer.author) == ("policy", "reference") and answer.ids == alone.segments[1].ids
    assert thought.ids == best.segments[1].ids[: len(thought.ids)] and len(thought.logprobs) == len(thought.ids)
    # without the line break one token is the end of the thought and the begin of the answer: the reference writes it
    glued = replace(best, segments=(prompts[0], stage.renderer.reply("policy", stage.renderer.encode(says.replace("\n", "")))))
    made = reference_rollout(samples[0], stage.renderer, prompts[0], fill="splice_think", best=glued)
    assert made.text == "<think>it appears at 2</think>" + alone.text
    assert made.segments[1].text == "<think>it appears at 2</think" and made.segments[2].author == "reference"
    unthinking = replace(best, segments=(prompts[0], stage.renderer.reply("policy", stage.renderer.encode("no idea"))))
    assert reference_rollout(samples[0], stage.renderer, prompts[0], fill="splice_think", best=unthinking) == alone
    empty = reference_rollout(samples[0], stage.renderer, prompts[0], fill="empty_think")
    assert empty.text == "<think></think>" + alone.text
    told = replace(samples[0], row={**samples[0].row, "why": "a square"})
    written = reference_rollout(told, stage.renderer, prompts[0], fill="from_field", field="why")
    assert written.text == "<think>a square</think>" + alone.text


def test_an_annotation_that_does_not_earn_the_maximum_is_refused_by_name(world: Path, tmp_path: Path) -> None:
    """One span is reversed. It would be the lesson of every group that it joins."""
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()][:6]
    for row in rows:
        row["video"] = str(world / row["video"])
    rows[3]["answer"]["span"] = rows[3]["answer"]["span"][::-1]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sets = [
        *shortened("recipes/charades_sta/tempsamp.yaml", tmp_path / "train.jsonl"),
        "data.test=",
        "data.max_bad_share=0.5",
        "phases.answer.groups_per_step=1",
    ]
    train(str(ROOT / "recipes/charades_sta/tempsamp.yaml"), sets, str(tmp_path / "run"))
    refused = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert len(refused) == 1 and rows[3]["id"] in json.dumps(refused[0])


def test_a_missing_rationale_is_known_before_training(world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()][:4]
    for row in rows:
        row["video"] = str(world / row["video"])
    rows[0]["why"] = "a square"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sets = [
        *shortened("recipes/charades_sta/tempsamp.yaml", tmp_path / "train.jsonl"),
        "data.test=",
        "phases.answer.guidance={fill: from_field, field: why}",
    ]
    with pytest.raises(DataError, match=r"3 samples cannot be used.*'why' holds no rationale"):
        train(str(ROOT / "recipes/charades_sta/tempsamp.yaml"), sets, str(tmp_path / "run"))
    assert (tmp_path / "run" / "quarantine.jsonl").read_text().count("holds no rationale") == 3


IOU = Reward(name="iou", function=load_object("rewards/grounding.py:temporal_iou"))


def joined(stage: Stage, samples: list[Sample], guidance: Guidance, *draw: object, heard: list[str]) -> list[Group]:
    """The groups after the annotation joined them. The policy is always wrong; `heard` gets what each reply goes on from."""

    def says(index: int, context: Context) -> str:
        heard.append("".join(s.text for s in context.segments[1:]))
        return "no idea"

    policy = Scripted(says, stage.renderer.encode, stage.renderer.eos)
    prompts = [stage.renderer.prompt(s) for s in samples]
    limits = replace(stage.limits, max_tokens=99)

    def judged(pairs):
        return score(pairs, [IOU])[0]

    rollouts = roll_out(samples, prompts, [3] * len(samples), policy=policy, renderer=stage.renderer, limits=limits, draw=draw)
    guide = Guide(
        guidance=guidance, size=4, policy=policy, renderer=stage.renderer, looking=ONCE, limits=limits, judge=judged,
        compares_siblings=False,
        accuracy=lambda member: member.parts["iou"], draw=draw, put_aside=lambda sample_id, error: None,
    )  # fmt: skip
    return guide.join(judged(list(zip(samples, rollouts, strict=True))), prompts, [True] * len(samples))


def test_a_jittered_annotation_earns_what_it_earns(tiny_folders: dict[str, Path], world: Path) -> None:
    """Each group has its own, whatever stands beside it, and the reward function says what it is worth."""
    _, stage = guided(tiny_folders["qwen2_5_vl"], world, None)
    samples = [replace(stage.samples[i], answer={"span": (0.5 * i, 7.0)}) for i in range(4)]
    jittered = Guidance(spans="jittered", jitter=0.8)
    groups = [joined(stage, samples, jittered, "seed", step, heard=[]) for step in range(20)]
    rewards = [group.members[-1].reward for step in groups for group in step]
    assert all(group.members[-1].rollout.is_reference for step in groups for group in step)
    assert all(0.8 <= reward <= 1 for reward in rewards) and len(set(rewards)) > 30
    for group in groups[0]:
        start, end = map(float, group.members[-1].rollout.answer.split(" to "))
        a, b = group.sample.answer["span"]
        shared, union = min(end, b) - max(start, a), max(end, b) - min(start, a)
        assert group.members[-1].reward == pytest.approx(shared / union) and end <= 8
        assert [m.reward for m in group.members[:-1]] == [0.0] * 3
    assert joined(stage, samples, jittered, "seed", 0, heard=[]) == groups[0]
    (alone,) = joined(stage, samples[2:3], jittered, "seed", 0, heard=[])
    assert alone == groups[0][2]  # the same on whatever rank it comes


def test_any_valid_span_takes_the_seat_and_earns_everything(tiny_folders: dict[str, Path], world: Path) -> None:
    _, stage = guided(tiny_folders["qwen2_5_vl"], world, None)
    sample = replace(stage.samples[0], answer={"span": (1.0, 3.0), "valid_spans": ((4.0, 5.0), (6.0, 8.0))})
    steps = [joined(stage, [sample], Guidance(spans="valid"), "seed", step, heard=[])[0] for step in range(30)]
    assert {g.members[-1].rollout.answer for g in steps} == {"1.0 to 3.0", "4.0 to 5.0", "6.0 to 8.0"}
    assert [g.members[-1].reward for g in steps] == [1.0] * 30
    annotated = [joined(stage, [sample], Guidance(), "seed", step, heard=[])[0] for step in range(30)]
    assert {g.members[-1].rollout.answer for g in annotated} == {"1.0 to 3.0"}


def test_hints_of_one_group_are_of_one_span(tiny_folders: dict[str, Path], world: Path) -> None:
    _, stage = guided(tiny_folders["qwen2_5_vl"], world, None)
    sample = replace(stage.samples[0], answer={"span": (1.0, 7.0)})
    told = set()
    for step in range(10):
        heard: list[str] = []
        joined(stage, [sample], Guidance(spans="jittered", gate=0.5, hints=(0.25, 0.5, 0.9)), "seed", step, heard=heard)
        assert heard[:3] == [""] * 3 and len(heard) == 3 + 3 * 4
        low, middle, high = heard[3], heard[7], heard[11]
        assert len(low) < len(middle) < len(high) and high.startswith(middle) and middle.startswith(low)
        told.add(high)
    assert len(told) > 3


def test_every_valid_span_has_to_earn_the_maximum(tiny_folders: dict[str, Path], world: Path) -> None:
    """A reward that knows of the annotated span only would punish the others."""
    _, stage = guided(tiny_folders["qwen2_5_vl"], world, None)
    sample = replace(stage.samples[0], answer={"span": (1.0, 3.0), "valid_spans": ((4.0, 5.0),)})

    def narrow(rollout: Rollout, sample: Sample) -> float:
        return IOU.function(rollout, replace(sample, answer={"span": sample.answer["span"]}))

    def findings(reward: Reward, guidance: Guidance) -> list[str]:
        references = [reference_rollout(told, stage.renderer) for told in variants(sample, guidance)]
        return [f.what for f in reference_earns_maximum([reward], [sample], references, {})]

    assert findings(IOU, Guidance(spans="valid")) == findings(replace(IOU, function=narrow), Guidance()) == []
    (what,) = findings(replace(IOU, function=narrow), Guidance(spans="valid"))
    assert what.startswith("the annotation earns 0 and not the maximum 1") and "4.0 to 5.0" in what


def test_a_valid_span_that_its_completion_does_not_reach_is_refused_by_name(world: Path, tmp_path: Path) -> None:
    """Two decimals say 0.00 to 0.50 of 0.004 to 0.5: with `spans: valid` it would take the seat, else it never does."""
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()][:6]
    for row in rows:
        row["video"] = str(world / row["video"])
        row["answer"]["valid_spans"] = [[0.0, 0.5]]
    rows[3]["answer"]["valid_spans"] = [[0.004, 0.5]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for spans in ("valid", "annotated"):
        sets = [
            *shortened("recipes/charades_sta/tempsamp.yaml", tmp_path / "train.jsonl"),
            "data.test=",
            "data.max_bad_share=0.5",
            "phases.answer.groups_per_step=1",
            f"phases.answer.guidance={{spans: {spans}}}",
        ]
        train(str(ROOT / "recipes/charades_sta/tempsamp.yaml"), sets, str(tmp_path / spans))
    (refused,) = [json.loads(line) for line in (tmp_path / "valid" / "quarantine.jsonl").read_text().splitlines()]
    assert rows[3]["id"] in json.dumps(refused) and "0.00 to 0.50" in json.dumps(refused)
    assert not (tmp_path / "annotated" / "quarantine.jsonl").exists()
