"""What the overrides rely on in TRL, and what the trainer does with it. A new TRL minor is admitted when this is green."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from rft.errors import RftError, RolloutError
from rft.hf.arguments import arguments
from rft.hf.generate import ModelPolicy
from rft.hf.logprobs import token_logprobs
from rft.hf.models import LoadedModel, open_policy
from rft.hf.nonfinite import Guard
from rft.hf.together import Together
from rft.hf.trainer import GroupTrainer
from rft.recipe import KL, Lora, Phase
from rft.rollout.policy import Context, Limits
from tests.stages import flat_gradient, length_reward, opened, phase_of, recipe_of, relative, stage_of


def trainer_of(
    folder: Path, phase: Phase, world: Path, out: Path, *, callbacks: Any = (), reward: Any = length_reward, **changes: Any
) -> tuple[GroupTrainer, LoadedModel]:
    recipe = recipe_of(phase, **changes)
    policy = open_policy(str(folder), recipe, train=True)
    stage = stage_of(policy, phase, world, reward=reward)
    together = Together()
    guard = Guard(out / "nonfinite", phase.nonfinite, together)
    args = arguments(recipe, "only", out, world=1)
    return GroupTrainer(policy, stage, args, together=together, guard=guard, callbacks=[guard, *callbacks]), policy


def weights(policy: LoadedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in policy.model.parameters()])


def test_the_overridden_methods_are_there() -> None:
    assert list(inspect.signature(GRPOTrainer._generate_and_score_completions).parameters) == ["self", "inputs"]
    assert list(inspect.signature(GRPOTrainer._compute_loss).parameters) == ["self", "model", "inputs"]
    assert "resume_from_checkpoint" in inspect.signature(GRPOTrainer._load_from_checkpoint).parameters
    assert "self.current_gradient_accumulation_steps" in inspect.getsource(GRPOTrainer.training_step)
    assert "loss_is_scaled_for_ga = True" in inspect.getsource(GRPOTrainer)


def test_list_rows_survive_shuffle_and_split() -> None:
    rows = {"sample": torch.arange(6), "batch": [f"group {i}" for i in range(6)]}
    shuffled = shuffle_sequence_dict(rows)
    assert [f"group {i}" for i in shuffled["sample"].tolist()] == shuffled["batch"]
    parts = split_tensor_dict(shuffled, 3)
    assert [len(p["batch"]) for p in parts] == [2, 2, 2]
    assert [f"group {i}" for p in parts for i in p["sample"].tolist()] == [g for p in parts for g in p["batch"]]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_accumulation_in_the_trainer_is_one_trajectory(
    family: str, tiny_folders: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    """Two steps with 4 micro-steps of 1 group equal two steps with 1 of 4, through TRL's buffer and AdamW."""
    ends = []
    for per_device in (1, 4):
        phase = phase_of(groups_per_device=per_device, learning_rate=1e-3)
        trainer, policy = trainer_of(tiny_folders[family], phase, world, tmp_path / str(per_device))
        start = weights(policy)
        trainer.train()
        assert trainer.state.global_step == 2
        ends.append(weights(policy) - start)
    assert relative(ends[0], ends[1]) < 1e-3  # AdamW divides by sqrt(v): rounding of tiny gradients grows


def test_updates_reuse_a_generation_and_the_ratio_moves(tiny_folders: dict[str, Path], world: Path, tmp_path: Path) -> None:
    phase = phase_of(updates=2, steps=4, learning_rate=1e-3)
    trainer, _ = trainer_of(tiny_folders["qwen2_5_vl"], phase, world, tmp_path)
    trainer.train()
    ratios = [log["ratio"] for log in trainer.state.log_history if "ratio" in log]
    assert [abs(r - 1) < 1e-6 for r in ratios] == [True, False, True, False]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_starts_at_zero_and_moves(estimator: str, tiny_folders: dict[str, Path], world: Path, tmp_path: Path) -> None:
    phase = phase_of(kl=KL(weight=0.1, estimator=estimator), steps=3, learning_rate=1e-3)
    trainer, _ = trainer_of(tiny_folders["qwen2_5_vl"], phase, world, tmp_path)
    trainer.train()
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert abs(kl[0]) < 1e-6 and abs(kl[2]) > 1e-6
    assert trainer.ref_model is not None and trainer.ref_model is not trainer.model


def test_lora_reference_is_the_model_without_its_adapter(tiny_folders: dict[str, Path], world: Path, tmp_path: Path) -> None:
    phase = phase_of(kl=KL(weight=0.1), steps=3, learning_rate=1e-2)
    trainer, policy = trainer_of(tiny_folders["qwen2_5_vl"], phase, world, tmp_path, lora=Lora(rank=4, alpha=8))
    base = {n: p.clone() for n, p in policy.model.named_parameters() if "lora" not in n}
    trainer.train()
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert abs(kl[0]) < 1e-6 and kl[2] > 1e-6
    assert trainer.ref_model is None
    assert all(torch.equal(p, base[n]) for n, p in policy.model.named_parameters() if n in base)


def test_frozen_parts_do_not_move(tiny_folders: dict[str, Path], world: Path, tmp_path: Path) -> None:
    from rft.recipe import Trainable

    phase = phase_of(steps=1, learning_rate=1e-2)
    trainer, policy = trainer_of(
        tiny_folders["qwen3_vl"], phase, world, tmp_path, trainable=Trainable(vision=False, projector=True, language=False)
    )
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("merger" in n for n in moved)


def test_gradient_checkpointing_changes_nothing(tiny_folders: dict[str, Path], world: Path, tmp_path: Path) -> None:
    ends = []
    for on in (False, True):
        trainer, policy = trainer_of(
            tiny_folders["qwen2_5_vl"],
            phase_of(steps=1, learning_rate=1e-3),
            world,
            tmp_path / str(on),
            gradient_checkpointing=on,
        )
        start = weights(policy)
        trainer.train()
        ends.append(weights(policy) - start)
    assert relative(ends[1], ends[0]) < 1e-4


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_loss_that_is_not_a_number(action: str, tiny_folders: dict[str, Path], world: Path, tmp_path: Path) -> None:
    """The batch is saved; `stop` ends the run with its place, `skip` leaves the weights alone."""
    phase = phase_of(steps=1, nonfinite=action)
    trainer, policy = trainer_of(tiny_folders["qwen2_5_vl"], phase, world, tmp_path)
    before = weights(policy)
    loss = type(trainer.stage).loss
    poisoned = lambda stage, *args: (loss(stage, *args)[0] * float("nan"), {})  # noqa: E731
    type(trainer.stage).loss = poisoned
    try:
        if action == "stop":
            with pytest.raises(RftError, match="not finite"):
                trainer.train()
        else:
            trainer.train()
            assert trainer.guard.num_skipped == 1
    finally:
        type(trainer.stage).loss = loss
    assert torch.equal(weights(policy), before)
    assert len(list((tmp_path / "nonfinite").glob("step_0_rank_0.pt"))) == 1


def test_a_saved_phase_reloads_whole(tiny_folders: dict[str, Path], world: Path, tmp_path: Path) -> None:
    """Qwen2.5-VL is saved under other names than it lives under: both ways back give the trained weights."""
    phase = phase_of(steps=2, learning_rate=1e-2)
    trainer, policy = trainer_of(tiny_folders["qwen2_5_vl"], phase, world, tmp_path / "run")
    trainer.train()
    trained = weights(policy)
    trainer.save_model(str(tmp_path / "run" / "saved"))
    fresh = opened(tmp_path / "run" / "saved", phase)
    assert torch.equal(weights(fresh), trained)
    again, other = trainer_of(tiny_folders["qwen2_5_vl"], phase, world, tmp_path / "again")
    assert not torch.equal(weights(other), trained)
    again._load_from_checkpoint(str(tmp_path / "run" / "saved"))
    assert torch.equal(weights(other), trained)


def test_a_hostile_generation_config_changes_nothing_but_eos(
    tiny_folders: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    """Repetition penalty, top-k 1 and a near-zero temperature in the model folder are not heard; EOS ids are."""
    import shutil

    hostile = tmp_path / "hostile"
    shutil.copytree(tiny_folders["qwen2_5_vl"], hostile)
    path = hostile / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "repetition_penalty": 9.0, "top_k": 1, "top_p": 0.01, "temperature": 1e-4,
                                "do_sample": True, "suppress_tokens": [5, 6]}))  # fmt: skip
    phase = phase_of()
    texts = []
    for folder in (tiny_folders["qwen2_5_vl"], hostile):
        policy = opened(folder, phase)
        stage = stage_of(policy, phase, world)
        batches, _, _ = stage.step([0, 1], model=policy.model, reference=None, step=0, together=Together())
        texts.append([e.ids_T.tolist() for b in batches for e in b.pack.examples])
    assert texts[0] == texts[1]
    path.write_text(json.dumps({**config, "eos_token_id": [7]}))
    assert opened(hostile, phase).eos_ids == (policy.tokenizer.eos_token_id, 7)


def test_group_rows_that_do_not_fill_micro_steps_are_refused(
    tiny_folders: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    trainer, _ = trainer_of(tiny_folders["qwen2_5_vl"], phase_of(groups_per_device=2), world, tmp_path)
    with pytest.raises(RolloutError, match="do not fill"):
        trainer._generate_and_score_completions([{"sample": 0}] * 4 * 3)
    with pytest.raises(RolloutError, match="without groups"):
        trainer._compute_loss(trainer.model, {"batch": [], "agreed": []})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_blindness(family: str, tiny_folders: dict[str, Path], world: Path, tmp_path: Path) -> None:
    """Other pixels under the same tokens move rollout, old, reference and training log-probs, and the gradient."""
    phase = phase_of(updates=2, kl=KL(weight=0.1))
    trainer, policy = trainer_of(tiny_folders[family], phase, world, tmp_path)
    stage, model = trainer.stage, policy.model.eval()
    batches, agreed, _ = stage.step([0, 1], model=model, reference=trainer._reference, step=0, together=Together())
    packs = [b.pack for b in batches]

    def seen() -> dict[str, torch.Tensor]:
        prompts = [Context(segments=(stage.renderer.prompt(s),), key=0) for s in stage.samples[:2]]
        replies = ModelPolicy(model, stage.lens, policy.eos_ids).extend(prompts, Limits(max_tokens=1, temperature=0))
        model.zero_grad()
        loss, _ = stage.loss(model, batches, agreed, Together())
        loss.backward()
        return {
            "rollout": torch.tensor([r.logprobs[0] for r in replies]),
            "old": torch.cat(stage.log_probs(model, packs, agreed.kinds, Together())),
            "reference": torch.cat(trainer._reference(packs, agreed.kinds)),
            "training": token_logprobs(model, packs, stage.lens)[0].detach(),
            "gradient": flat_gradient(model),
        }

    true = seen()
    assert torch.equal(true["old"], torch.cat([b.old_N for b in batches]))
    assert torch.equal(true["reference"], torch.cat([b.ref_N for b in batches]))
    original = stage.lens.frames.get
    stage.lens.frames.get = lambda view: 255 - original(view)  # type: ignore[method-assign]
    inverted = seen()
    for name in true:
        assert relative(inverted[name], true[name]) > 1e-4, name
