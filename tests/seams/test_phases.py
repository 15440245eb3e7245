"""Phases: prompts mixed per sample, what the KL pulls towards, and evaluation with the prompts of more than one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rft.algo.credit import examples
from rft.algo.guidance import Guidance
from rft.algo.losses import k3
from rft.cli import main
from rft.data.frames import FrameStore
from rft.errors import DataError
from rft.evaluate import evaluate
from rft.hf.generate import ModelPolicy
from rft.hf.logprobs import token_logprobs
from rft.hf.models import open_policy
from rft.hf.step import Stage
from rft.hf.together import Together
from rft.hf.trainer import GroupTrainer
from rft.hf.voice import Voice
from rft.loaded import load
from rft.recipe import Mix, Sampling
from rft.report.rollout_log import RolloutLog
from rft.rollout.loop import roll_out
from rft.rollout.policy import Limits
from rft.rollout.render import Prompt
from rft.scoring import Reward
from rft.train import train
from rft.types import REFERENCE, Batch, Rollout, Sample
from tests.recipes.test_recipes import ROOT, shortened
from tests.stages import opened, phase_of, stage_of

EVERY = [0, 1, 2, 3, 4, 5]
THINK = {"grounding": Prompt(question="Think. {question}", answer="<think>so</think><answer>{span[0]:.1f}</answer>")}


def tail(rollout: Rollout, sample: Sample) -> float:
    return float(sum(map(ord, rollout.text)) % 11)


def spoken(policy: Any, stage: Stage, share: float | None) -> Stage:
    """The stage with thinking mixed in; None thinks always, by prompts of its own."""
    renderer = replace(stage.renderer, prompts=THINK)
    rewards = [*stage.rewards, Reward(name="tail", function=tail, maximum=None)]
    if share is None:
        return replace(stage, renderer=renderer, rewards=rewards)
    phase = replace(stage.phase, mix=Mix(share=share, prompts=THINK))
    return replace(stage, phase=phase, mixed=Voice(name="mix", renderer=renderer, rewards=rewards))


def columns(policy: Any, stage: Stage, step: int = 0) -> tuple[list[list[tuple]], dict[str, list[float]]]:
    """Ids, advantages and authors of every member of every group, and what is logged."""
    batches, _, metrics = stage.step(EVERY, model=policy.model, reference=None, step=step, together=Together())
    return [
        [(e.ids_T.tolist(), e.advantages_T.tolist(), e.authors_T.tolist()) for e in batch.pack.examples] for batch in batches
    ], metrics


@pytest.mark.parametrize("guidance", [None, Guidance(fill="answer_only"), Guidance(gate=99.0, hints=(0.5,))])
def test_a_mixed_group_is_the_group_that_its_prompt_alone_would_make(
    guidance: Guidance | None, tiny_folders: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    """Prompt, rollouts, rewards, the annotation's words and advantages: to the bit, and in the log by name."""
    phase = phase_of(guidance=guidance, accuracy=("length",), refill=1)
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = stage_of(policy, phase, world)
    stage = replace(stage, samples=[replace(s, messages=()) for s in stage.samples])
    plain, _ = columns(policy, stage)
    thinking, _ = columns(policy, spoken(policy, stage, None))
    assert columns(policy, spoken(policy, stage, 0.0))[0] == plain
    assert columns(policy, spoken(policy, stage, 1.0))[0] == thinking
    log = RolloutLog(path=tmp_path / "log.jsonl")
    half, metrics = columns(policy, replace(spoken(policy, stage, 0.5), rollout_log=log))
    is_mixed = [bool(m) for m in metrics["mixed"]]
    assert 0 < sum(is_mixed) < len(EVERY)
    assert half == [t if m else p for p, t, m in zip(plain, thinking, is_mixed, strict=True)] and plain != thinking
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    by_sample = {line["sample"]: line["prompts"] for line in lines}
    assert [by_sample[s.id] for s in stage.samples[: len(EVERY)]] == ["mix" if m else "phase" for m in is_mixed]
    assert all(("tail" in line["parts"]) == (line["prompts"] == "mix") for line in lines)
    if guidance is not None:
        for (*_, (ids, _, authors)), mixed in zip(half, is_mixed, strict=True):
            written = policy.tokenizer.decode([i for i, author in zip(ids, authors, strict=True) if author == REFERENCE])
            assert written.startswith("<think>") == mixed


def test_the_draw_is_of_step_and_sample(tiny_folders: dict[str, Path], world: Path) -> None:
    phase = phase_of()
    stage = spoken(None, stage_of(opened(tiny_folders["qwen2_5_vl"], phase), phase, world), 0.3)
    drawn = [[stage.voice(s, step).name == "mix" for s in stage.samples] for step in range(200)]
    assert sum(map(sum, drawn)) / (200 * len(stage.samples)) == pytest.approx(0.3, abs=0.04)
    assert len(set(map(tuple, drawn))) > 100
    other = replace(stage, name="another")
    assert [[other.voice(s, step).name == "mix" for s in stage.samples] for step in range(200)] != drawn


def test_supervised_groups_are_mixed_as_well(tiny_folders: dict[str, Path], world: Path) -> None:
    phase = phase_of(objective="nll")
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = spoken(policy, stage_of(policy, phase, world), 0.5)
    stage = replace(stage, samples=[replace(s, messages=()) for s in stage.samples])
    for group, sample in zip(columns(policy, stage)[0], stage.samples, strict=False):
        ((ids, _, _),) = group
        assert ("Think. " in policy.tokenizer.decode(ids)) == ("<think>so" in policy.tokenizer.decode(ids))
        assert ("Think. " in policy.tokenizer.decode(ids)) == (stage.voice(sample, 0).name == "mix")


TWO = """
extends: {root}/recipes/quickstart.yaml
evaluation: {{max_samples: 1}}
rewards: {{own: {{use: "{here}/r.py:total", maximum: null}}}}
phases:
  warmup: {{steps: 6, learning_rate: 3.0e-3, warmup_steps: 0, until: "", check_every: 0}}
  grpo:
    check_every: 0
    kl: {{weight: 0.1}}
    steps: 2
    prompts: {{grounding: {{question: "Now: {{question}}", answer: "<answer>{{span[0]:.0f}} to {{span[1]:.0f}}</answer>"}}}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phases that ask differently; the second is held to a reference."""
    here = tmp_path_factory.mktemp("two")
    (here / "r.py").write_text("def total(rollout, sample):\n    return float(sum(map(ord, rollout.text)) % 97)\n")
    (here / "two.yaml").write_text(TWO.format(root=ROOT, here=here))
    return here / "two.yaml"


def run(recipe: Path, out: Path, *sets: str) -> tuple[float, list[Batch]]:
    """The KL that the first step of the second phase logs, and its batches."""
    seen: list[list[Batch]] = []

    class Recording(GroupTrainer):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            made = super()._generate_and_score_completions(inputs)
            seen.append(made["batch"])
            return made

    mine = ("phases.warmup.steps", "phases.warmup.check_every", "phases.grpo.check_every", "evaluation.max_samples")
    short = [s for s in shortened("recipes/quickstart.yaml", None) if not s.startswith(mine)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rft.phase.GroupTrainer", Recording)
        train(str(recipe), [*short, *sets], str(out))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = next(r["kl"] for r in rows if r["phase"] == "grpo" and "kl" in r)
    return first, next(batches for batches in seen if batches[0].ref_N is not None)


def kl_by_hand(out: Path, batches: list[Batch], now: Path, reference: Path) -> float:
    """Mean over the policy's tokens of k3 between two checkpoints, each row run over on its own."""
    loaded = load(str(out / "recipe.yaml")).recipe
    logprobs_N = []
    for folder in (now, reference):
        policy = open_policy(str(folder), loaded, train=False)
        lens = replace(policy.lens(FrameStore(2**28), loaded.phases["grpo"].sampling.temperature), sharing="expanded")
        logprobs_N.append(token_logprobs(policy.model.eval(), [b.pack for b in batches], lens)[0])
    return float(k3(*logprobs_N).mean())


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_the_start_of_the_phase_or_of_the_run(lora: bool, recipe: Path, tmp_path: Path) -> None:
    sets = ["lora={rank: 4, alpha: 64}"] if lora else ["phases.grpo.learning_rate=0"]
    kl, batches = run(recipe, tmp_path / "run", *sets, "phases.grpo.kl.reference=run")
    now, start = tmp_path / "run" / "phases" / "warmup", tmp_path / "run" / "model"
    hand = kl_by_hand(tmp_path / "run", batches, now, start)
    assert kl == pytest.approx(hand, rel=1e-3) and hand > 1e-3
    if not lora:
        weights, config = held(tmp_path / "run" / "checkpoint")
        assert torch.equal(weights, held(now)[0])  # the policy itself began where the last phase ended, and says so
        assert "run/model" not in config
        kept, batches = run(recipe, tmp_path / "kept")
        assert abs(kept) < 1e-9
        assert kl_by_hand(tmp_path / "kept", batches, now, now) == 0.0


def held(folder: Path) -> tuple[torch.Tensor, str]:
    """All weights of a checkpoint, and its config."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), (folder / "config.json").read_text()


def test_a_mix_asks_only_what_both_prompts_can_ask(tmp_path: Path) -> None:
    """The annotation earns the maximum by the phase's own template, and by the mixed one nothing."""
    mix = 'phases.grpo.mix={prompts: {grounding: {question: "{question}", answer: "<answer>{span[1]} to {span[0]}</answer>"}}}'
    sets = [*shortened("recipes/quickstart.yaml", None), "phases.grpo.guidance={fill: answer_only}"]
    sets += ["phases.grpo.accuracy=[iou]", "phases.warmup.until=", "phases.warmup.check_every=0", "phases.warmup.steps=1"]
    with pytest.raises(DataError, match=r"phase grpo: 8 samples cannot be used.*not the maximum 1"):
        train(str(ROOT / "recipes/quickstart.yaml"), [*sets, mix], str(tmp_path / "run"))


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both phases that can answer; its first phase mixes in the prompts of a third voice."""
    out = tmp_path_factory.mktemp("finished") / "run"
    third = '{question: "Say: {question}", answer: "<answer>{span[0]} and {span[1]}</answer>"}'
    short = f"phases.warmup.mix.prompts.grounding={third}"
    run(recipe, out, "phases.warmup.steps=50", "phases.grpo.learning_rate=0", "evaluation.max_samples=4", short)
    return out


def test_every_prompt_alone_the_best_and_the_surest(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ["warmup", "warmup.mix", "grpo"]
    command = ["eval", str(finished / "recipe.yaml"), "--checkpoint", str(finished / "checkpoint")]
    assert main([*command, "--prompts", ",".join(names), "--output", str(tmp_path / "e.json")]) == 0
    printed = capsys.readouterr().out
    assert "best of three (oracle)" in printed and "surest of three" in printed and "warmup.mix" in printed
    written = json.loads((tmp_path / "e.json").read_text())
    assert list(written["prompts"]) == names and {"oracle", "selected", "baselines", "split", "samples"} <= set(written)
    assert len(written["answers"]) == written["samples"] == 4
    for name in names:
        alone = evaluate(str(finished / "recipe.yaml"), [], str(finished / "checkpoint"), prompts=[name])
        assert alone["asked"] == name
        assert {k: alone[k] for k in written["prompts"][name]} == written["prompts"][name]
        assert [a["text"] for a in alone["answers"]] == [a["prompts"][name]["text"] for a in written["answers"]]
    for answer in written["answers"]:
        given = answer["prompts"]
        assert given[answer["oracle"]]["agreement"] == max(g["agreement"] for g in given.values())
        sure = [-99.0 if g["logprob"] is None else g["logprob"] for g in given.values()]
        assert names.index(answer["selected"]) == sure.index(max(sure))
    best = [a["prompts"][a["oracle"]]["agreement"] for a in written["answers"]]
    assert written["oracle"]["miou"] == pytest.approx(sum(best) / 4)
    assert written["oracle"]["miou"] >= max([*(m["miou"] for m in written["prompts"].values()), written["selected"]["miou"]])
    default = evaluate(str(finished / "recipe.yaml"), [], str(finished / "checkpoint"))
    assert default["asked"] == "grpo" and "prompts" not in default
    assert main([*command, "--prompts", "grop"]) == 1
    assert "did you mean grpo?" in capsys.readouterr().err


def test_the_log_probs_of_greedy_answers_are_the_models_own(tiny_folders: dict[str, Path], world: Path) -> None:
    """At temperature 1, as a forward over the whole row gives them; not those of the argmax's certainty."""
    phase = phase_of(sampling=Sampling(max_tokens=6))
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = stage_of(policy, phase, world)
    samples, prompts = stage.open(EVERY, 0)
    engine = ModelPolicy(policy.model, stage.lens, policy.eos_ids)
    limits = Limits(max_tokens=6, temperature=0.0)
    rollouts = roll_out(samples, prompts, [1] * 6, policy=engine, renderer=stage.renderer, limits=limits, draw=(0,))
    sampled = [p for group in rollouts for p in group[0].segments[-1].logprobs]
    packs = [stage.pack([one for rollout in group for one in examples(rollout, [0.0])]) for group in rollouts]
    forward_N, _ = token_logprobs(policy.model, packs, replace(stage.lens, sharing="expanded"), temperature=1.0)
    assert torch.allclose(torch.tensor(sampled, dtype=torch.float32), forward_N, atol=1e-4)
    assert max(sampled) < -0.05


def test_check_reads_both_prompts_of_a_phase(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    """A layout that asks for thoughts is no fault of the annotation; a mixed prompt that turns its span round is one."""
    sets = ["data.synthetic={train: 8, validation: 4, test: 4}", "phases.grpo.rewards=[iou]"]
    layout = "rewards.layout={use: 'rewards/format.py:tagged_answer', args: {think: true}}"
    both = 'phases.grpo.mix={rewards: [iou, layout], prompts: {grounding: {question: "Think. {question}", answer: "%s"}}}'
    command = ["check", str(recipe), *(x for s in [*sets, layout] for x in ("--set", s)), "--samples", "2"]
    for spans, code in (("{span[0]} to {span[1]}", 0), ("{span[1]} to {span[0]}", 1)):
        assert main([*command, "--set", both % f"<answer>{spans}</answer>"]) == code
        said = capsys.readouterr().out
        assert "0.5 of its groups are asked otherwise" in said and "Think. " in said
        assert ("the annotation earns 0" in said) == bool(code)
