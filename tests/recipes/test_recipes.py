"""Every recipe of the repository trains two steps with the small model, and resolves on the true-size architecture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from rft.data.importers import IMPORTERS, import_annotations
from rft.evaluate import evaluate
from rft.families import FAMILIES
from rft.hf.architectures import ARCHITECTURES, on_meta
from rft.hf.models import freeze, part_of
from rft.loaded import load
from rft.train import main, train
from tests.videos import spaced, write_video

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    str(p.relative_to(ROOT))
    for p in (ROOT / "recipes").rglob("*.yaml")
    if p.parent.name != "_base" and "\nstudy:" not in p.read_text()  # a study names recipes and is none
)
PUBLISHED = {
    "charades_sta": ("charades_sta_train.sample.json", ("P1EK9", "HMSM8")),
    "activitynet": ("activitynet_captions_train.sample.json", ("v_fynO9wmckLA", "v_nKnsvy7-wAI")),
    "qvhighlights": ("qvhighlights_train.sample.jsonl", ("synth000000_0.0_150.0", "synth000001_60.0_210.0")),
}  # annotations of tests/data, and the videos that are stood in for
SHORT = {"steps": 2, "groups_per_step": 2, "groups_per_device": 1, "group_size": 2, "check_every": 1}


def shortened(recipe: str, rows: Path | None) -> list[str]:
    """Overrides that keep everything but the amount of work."""
    sets = ["model=tiny", "evaluation.max_samples=2", "evaluation.max_tokens=16"]
    for name, phase in load(str(ROOT / recipe)).recipe.phases.items():
        short = {**SHORT, "group_size": 1} if phase.supervised else SHORT
        sets += [f"phases.{name}.{key}={value}" for key, value in short.items()]
        sets += [f"phases.{name}.sampling.max_tokens=8"]
    if rows:
        sets += [f"data.train={rows}", f"data.test={rows}"]
    else:
        sets += ["data.synthetic={train: 8, validation: 4, test: 4}"]
    return sets


@pytest.fixture(scope="session")
def stand_ins(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows of the shape that each folder of recipes asks for."""
    root = tmp_path_factory.mktemp("stand_ins")
    clips = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()][:4]
    for clip in clips:
        clip["video"] = str(world / clip["video"])
    pictures = []
    for i in range(4):
        Image.fromarray(np.full((60, 80, 3), 40 * i, dtype=np.uint8)).save(root / f"{i}.png")
        pictures.append({"id": str(i), "image": f"{i}.png", "question": "the grey", "answer": {"box": [10, 10, 50, 40]}})
    choices = [{**c, "options": ["yes", "no"], "answer": {"choice": "A"}} for c in clips]
    named = {"grounding": clips, "choice": choices, "detection": pictures}
    named["iterative"] = [{**c, "answer": {**c["answer"], "clue": [[1, 7]]}} for c in clips]
    named["frames"] = [{**c, "answer": {"choice": "A", "clue": [[1, 7]]}} for c in choices]
    named["zoom"] = [{**c, "answer": {"choice": "B", "clue_box": [4, 4, 20, 20]}} for c in choices]
    named["replay"] = [
        {**p, "options": ["grey", "red"], "answer": {"choice": "A", "clue_box": [10, 10, 50, 40]}} for p in pictures
    ]
    for name, rows in named.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    film = write_video(root / "film.mp4", spaced(1, 151))
    for name, (published, videos) in PUBLISHED.items():
        (root / name).mkdir()
        for video in videos:
            (root / name / f"{video}.mp4").symlink_to(film)
        import_annotations(name, ROOT / "tests" / "data" / published, root / name, root / f"{name}.jsonl")
    return {name: root / f"{name}.jsonl" for name in (*named, *IMPORTERS)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_two_steps(recipe: str, stand_ins: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    rows = stand_ins.get(Path(recipe).stem if Path(recipe).parent.name == "look" else Path(recipe).parent.name)
    summary = train(str(ROOT / recipe), shortened(recipe, rows), str(out))
    assert json.loads((out / "summary.json").read_text()) == summary
    assert json.loads((out / "state.json").read_text())["status"] == "finished"
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    phases = load(str(ROOT / recipe)).recipe.phases
    assert {s["phase"] for s in steps} == set(phases)
    for name, phase in phases.items():
        lines = [json.loads(x) for x in (out / "rollouts" / f"{name}-0.jsonl").read_text().splitlines()]
        least = 2 * 2 * (1 if phase.supervised else 2)
        assert len(lines) == least or (phase.refill and len(lines) > least)  # what a refill replaced is in the log as well
        asked = phase.mixed if lines[0]["prompts"] == "mix" else phase
        wanted = set() if phase.supervised else set(load(str(ROOT / recipe)).recipe.rewards_of(asked))
        assert wanted <= set(lines[0]["parts"])
    model = AutoModelForImageTextToText.from_pretrained(out / "checkpoint")
    assert sum(p.numel() for p in model.parameters()) > 1e5
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_quickstart_leaves_what_the_readme_promises(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert (
        main([str(ROOT / "recipes/quickstart.yaml"), "--output", str(out), *_set(shortened("recipes/quickstart.yaml", None))])
        == 0
    )
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["random", "best_constant", "warmup", "final"]
    for row in summary.values():
        assert list(row) == ["miou", "r1@0.3", "r1@0.5", "r1@0.7", "format"]
    assert {p.name for p in out.iterdir()} >= {
        "recipe.yaml", "state.json", "metrics.jsonl", "rollouts", "curves.png", "checkpoint", "summary.json", "world",
    }  # fmt: skip
    resolved = load(str(out / "recipe.yaml")).recipe
    assert resolved.phases["grpo"].steps == 2
    again = evaluate(str(out / "recipe.yaml"), [], str(out / "checkpoint"), output=str(tmp_path / "eval.json"))
    assert {k: again[k] for k in summary["final"]} == summary["final"]  # the saved model is the one that was scored
    assert again["baselines"]["best_constant"] == summary["best_constant"]
    assert len(json.loads((tmp_path / "eval.json").read_text())["answers"]) == 2


def test_the_reference_of_a_phase_is_its_start(tmp_path: Path) -> None:
    """After a warm-up that moved the weights, the KL of the next phase begins at 0 and then grows."""
    (tmp_path / "r.py").write_text("def total(rollout, sample):\n    return float(sum(map(ord, rollout.text)) % 97)\n")
    more = [
        f"rewards.own.use={tmp_path / 'r.py'}:total",
        "rewards.own.maximum=null",
        "phases.warmup.steps=3",
        "phases.grpo.steps=3",
        "phases.grpo.kl.weight=0.1",
        "phases.grpo.learning_rate=1e-3",
    ]
    train(str(ROOT / "recipes/quickstart.yaml"), [*shortened("recipes/quickstart.yaml", None), *more], str(tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kl = [r["kl"] for r in rows if r["phase"] == "grpo" and "kl" in r]
    assert abs(kl[0]) < 1e-6 < kl[2]


def test_a_run_folders_recipe_stands_alone(stand_ins: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and rewards that were named relative to the recipe are found from the copy as well."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "r.py").write_text("def one(rollout, sample):\n    return float(len(rollout.text))\n")
    (tmp_path / "mine" / "rows.jsonl").write_text(stand_ins["grounding"].read_text())
    text = f"extends: {ROOT / 'recipes/grounding/grpo.yaml'}\ndata: {{train: rows.jsonl, test: rows.jsonl}}\n"
    (tmp_path / "mine" / "mine.yaml").write_text(text + 'rewards: {own: {use: "r.py:one", maximum: null}}\n')
    sets = [s for s in shortened("recipes/grounding/grpo.yaml", None) if "synthetic" not in s]
    train(str(tmp_path / "mine" / "mine.yaml"), sets, str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path / "run")
    copy = load("recipe.yaml")
    assert copy.path(copy.recipe.data.train) == tmp_path / "mine" / "rows.jsonl"
    assert {r.name for r in copy.rewards(copy.recipe.phases["grpo"])} == {"own", "iou", "format"}
    assert evaluate("recipe.yaml", [], "checkpoint")["samples"] == 2


def _set(values: list[str]) -> list[str]:
    return [x for value in values for x in ("--set", value)]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_true_size_models_resolve_on_meta(name: str) -> None:
    """Freeze names cover every parameter, and the published parameter counts come out (3.75, 8.29, 4.44, 8.77 billion)."""
    family = FAMILIES[ARCHITECTURES[name].family]
    model = on_meta(name)
    assert all(p.device == torch.device("meta") for p in model.parameters())
    parts = dict.fromkeys(("vision", "projector", "language"), 0)
    for parameter_name, parameter in model.named_parameters():
        parts[part_of(parameter_name, family)] += parameter.numel()
    assert all(parts.values())
    published = {"Qwen2.5-VL-3B": 3.75e9, "Qwen2.5-VL-7B": 8.29e9, "Qwen3-VL-4B": 4.44e9, "Qwen3-VL-8B": 8.77e9}
    assert sum(parts.values()) == pytest.approx(published[name.split("/")[1].removesuffix("-Instruct")], rel=0.01)
    config = model.config
    assert (config.video_token_id, config.image_token_id) == (151656, 151655)
    from rft.recipe import Trainable

    freeze(model, family, Trainable(vision=False, projector=True, language=False))
    assert {part_of(n, family) for n, p in model.named_parameters() if p.requires_grad} == {"projector"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_names_a_model_that_is_known(recipe: str) -> None:
    loaded = load(str(ROOT / recipe)).recipe
    assert loaded.model == "tiny" or loaded.model in ARCHITECTURES
    if loaded.model != "tiny":
        assert ARCHITECTURES[loaded.model].family == loaded.family
