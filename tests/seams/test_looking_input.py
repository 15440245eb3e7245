"""Media and recipes that looking again cannot use: told before training, or set aside by name, and never the end of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rft.algo.guidance import Guidance
from rft.check import check
from rft.errors import DataError, RecipeError
from rft.loaded import load
from rft.perceiving import looking
from rft.rollout.loop import opening
from rft.rollout.perceive import Allowance, Looking, PerceptionSpec
from rft.rollout.reference import reference_rollout
from rft.train import train
from rft.types import Segment, View
from tests.looking import ALONE
from tests.stages import opened, phase_of, stage_of

ROOT = Path(__file__).parents[2]
WINDOW = PerceptionSpec(use="iterative", args={"rule": "window"}, context="fresh", budget=Allowance(rounds=2))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def short_sighted(broken: str) -> Looking:
    """What is looked at again of one video cannot be decoded."""

    def fetch(view: View) -> None:
        if broken in str(view.source):
            raise DataError(str(view.source), "the stream is damaged", "copy it again")

    return looking(WINDOW, "perception", fetch=fetch)


def test_a_look_of_the_annotation_that_cannot_be_decoded_sets_its_sample_aside(
    tiny_folders: dict[str, Path], world: Path
) -> None:
    """Supervised: another sample is drawn in its place, and the step goes on."""
    phase = phase_of(objective="nll", group_size=1)
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = stage_of(policy, phase, world)
    stage = replace(stage, looking=short_sighted(Path(stage.samples[0].media[0].source).name))
    batches, _, _ = stage.step([0, 1], model=policy.model, reference=None, step=0, together=ALONE)
    assert list(stage.quarantine.reasons) == [stage.samples[0].id]
    assert stage.samples[0].id not in {b.pack.examples[0].sample_id for b in batches} and len(batches) == 2


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(gate=2.0, hints=(0.5,))], ids=["seat", "hints"])
def test_the_same_annotation_stays_out_of_its_group(guidance: Guidance, tiny_folders: dict[str, Path], world: Path) -> None:
    phase = phase_of(guidance=guidance, accuracy=("length",))
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = stage_of(policy, phase, world)
    stage = replace(stage, looking=short_sighted(Path(stage.samples[0].media[0].source).name))
    batches, _, _ = stage.step([0, 1], model=policy.model, reference=None, step=0, together=ALONE)
    authors = [{code for e in b.pack.examples for code in e.authors_T.tolist()} for b in batches]
    assert [2 in found for found in authors] == [False, True]  # REFERENCE
    assert list(stage.quarantine.reasons) == [stage.samples[0].id]


def test_thoughts_about_another_window_are_not_put_before_the_annotations_answer(
    tiny_folders: dict[str, Path], world: Path
) -> None:
    phase = phase_of()
    stage = stage_of(opened(tiny_folders["qwen2_5_vl"], phase), phase, world)
    sees, renderer = looking(WINDOW, "perception"), stage.renderer
    sample = stage.samples[0]
    prompt = opening(sample, renderer, sees)
    own = reference_rollout(sample, renderer, prompt, looking=sees)
    thought = renderer.reply("policy", renderer.encode("<think>there</think><answer>1 to 2</answer>"))
    same = replace(own, segments=(*own.segments[:-1], thought))
    spliced = reference_rollout(sample, renderer, prompt, looking=sees, fill="splice_think", best=same)
    assert spliced.text.startswith("<think>there</think>") and spliced.answer == own.answer
    elsewhere = replace(own.segments[-2], views=(replace(own.segments[-2].views[0], seconds=(0.0,)),))
    other = replace(same, segments=(*own.segments[:-2], elsewhere, thought))
    assert reference_rollout(sample, renderer, prompt, looking=sees, fill="splice_think", best=other) == own
    assert isinstance(elsewhere, Segment)


def test_a_perception_that_only_the_scoring_has_is_tried_before_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe, wrong = str(ROOT / "recipes/quickstart.yaml"), "phases.grpo.eval_perception={use: nope}"
    with pytest.raises(RecipeError, match=r"phases\.grpo\.eval_perception\.use.*nope"):
        check(recipe, [wrong])
    small = ["data.synthetic={train: 8, validation: 4, test: 4}", "phases.warmup.steps=1", "phases.grpo.steps=1"]
    with pytest.raises(RecipeError, match=r"phases\.grpo\.eval_perception\.use"):
        train(recipe, [*small, wrong], str(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    load(recipe, [wrong.replace("nope", "iterative")]).check_perceptions()


def test_check_says_what_is_looked_at_and_counts_a_turn_and_not_all_of_them(capsys: pytest.CaptureFixture) -> None:
    """In two rounds the annotation writes 27 and 11 tokens: 30 are enough for each, and 26 are not."""
    sets = ["data.synthetic={train: 4, validation: 2, test: 2, seconds: 32, fps: 2, tick: 2, longest: 4, mark: 2, size: 56}"]
    recipe = str(ROOT / "recipes/study/look_twice.yaml")
    assert check(recipe, sets) == 0
    told = capsys.readouterr().out
    assert "looks again: iterative, each round a new prompt; up to 2 rounds, 8 looks, 24 visual tokens" in told
    assert "</clue><answer>" in told.replace("\n    | ", "") and told.count("pixels, ") >= 2  # the first look, and the window
    assert check(recipe, [*sets, "evaluation.max_tokens=20"]) == 1
    assert "20 cut the annotation" in capsys.readouterr().out


def test_a_perception_that_cannot_be_taught_is_refused_where_it_has_to_be(tmp_path: Path) -> None:
    """Once, before any row is read; a phase that only samples may have it."""
    (tmp_path / "own.py").write_text("class Own:\n    def start(self, s, m): ...\n    def observe(self, r, m, s): ...\n")
    recipe, use = str(ROOT / "recipes/quickstart.yaml"), f"{{use: '{tmp_path}/own.py:Own'}}"
    with pytest.raises(RecipeError, match=r"phases\.warmup.*has no `teach`"):
        load(recipe, [f"perception={use}"]).check_perceptions()
    load(recipe, [f"phases.grpo.perception={use}"]).check_perceptions()
    with pytest.raises(RecipeError, match=r"phases\.grpo\.perception\.use.*required"):
        load(recipe, ["phases.grpo.perception={budget: {rounds: 3}}"])
