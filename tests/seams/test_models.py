"""Models from folders: whole or refused, frozen by part, adapters merged to the same function."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rft.errors import CompatError, RecipeError
from rft.hf.logprobs import token_logprobs
from rft.hf.models import eos_ids, export, open_policy, trainable_table
from rft.hf.together import Together
from rft.recipe import Lora, Trainable
from tests.seams.test_trl import trainer_of
from tests.stages import opened, phase_of, recipe_of, stage_of


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_a_checkpoint_that_does_not_fit_is_refused(damage: str, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folders["qwen3_vl"], folder)
    weights = load_file(folder / "model.safetensors")
    if damage == "missing":
        del weights[next(k for k in weights if "self_attn.q_proj" in k)]
    else:
        weights["model.language_model.layers.0.self_attn.extra.weight"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompatError, match=f"{damage} keys"):
        opened(folder, phase_of())


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=str(tmp_path)):
        open_policy(str(tmp_path), recipe_of(phase_of()), train=False)


def test_the_table_says_what_learns(tiny_folders: dict[str, Path]) -> None:
    phase = phase_of()
    policy = opened(tiny_folders["qwen2_5_vl"], phase, trainable=Trainable(vision=False, projector=True, language=False))
    rows = {line.split()[0]: line.split()[1] for line in trainable_table(policy.model, policy.family).splitlines()}
    assert rows["vision"] == rows["language"] == "0" and rows["projector"] != "0"
    adapted = opened(tiny_folders["qwen2_5_vl"], phase, trainable=Trainable(), lora=Lora(rank=2, alpha=4))
    rows = {line.split()[0]: line.split()[1] for line in trainable_table(adapted.model, adapted.family).splitlines()}
    assert rows["vision"] == "0" and rows["language"] != "0"


def test_merged_adapters_are_the_same_function(tiny_folders: dict[str, Path], world: Path, tmp_path: Path) -> None:
    phase = phase_of(steps=2, learning_rate=1e-2)
    trainer, policy = trainer_of(tiny_folders["qwen2_5_vl"], phase, world, tmp_path / "run", lora=Lora(rank=4, alpha=8))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    policy.processor.save_pretrained(tmp_path / "adapter")
    stage = stage_of(policy, phase, world)
    policy.model.eval()
    batches, _, _ = stage.step([0, 1], model=policy.model, reference=None, step=0, together=Together())
    packs = [b.pack for b in batches]
    export(str(tmp_path / "adapter"), tmp_path / "merged", merge=True)
    before, adapted, merged = (
        token_logprobs(opened(folder, phase).model, packs, stage.lens)[0].detach()
        for folder in (tiny_folders["qwen2_5_vl"], tmp_path / "adapter", tmp_path / "merged")
    )
    assert (adapted - before).abs().max() > 1e-3
    assert (merged - adapted).abs().max() < 1e-4
    with pytest.raises(RecipeError, match="--merge"):
        export(str(tmp_path / "adapter"), tmp_path / "other", merge=False)
    with pytest.raises(RecipeError, match="not empty"):
        export(str(tmp_path / "adapter"), tmp_path / "merged", merge=True)


def test_eos_ids_are_the_tokenizers_and_the_folders(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folders["qwen2_5_vl"], folder)
    tokenizer = opened(folder, phase_of()).tokenizer
    assert eos_ids(str(folder), tokenizer) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    (folder / "generation_config.json").unlink()
    assert eos_ids(str(folder), tokenizer) == (tokenizer.eos_token_id,)


def test_a_bfloat16_base_under_adapters_stays_small(tiny_folders: dict[str, Path]) -> None:
    policy = opened(tiny_folders["qwen2_5_vl"], phase_of(), dtype="bfloat16", lora=Lora(rank=2, alpha=4))
    kinds = {(p.requires_grad, p.dtype) for p in policy.model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_bfloat16_keeps_float32_weights_where_they_learn(tiny_folders: dict[str, Path], world: Path, tmp_path: Path) -> None:
    """At learning rate 1e-5 a bfloat16 weight of 0.08 would not move at all: half its spacing is 2.4e-4."""
    phase = phase_of(steps=1, learning_rate=1e-5)
    trainer, policy = trainer_of(
        tiny_folders["qwen2_5_vl"], phase, world, tmp_path, dtype="bfloat16", trainable=Trainable(vision=False)
    )
    kinds = {n: p.dtype for n, p in policy.model.named_parameters()}
    assert {d for n, d in kinds.items() if "visual" in n and "merger" not in n} == {torch.bfloat16}
    assert {d for n, d in kinds.items() if "language_model" in n} == {torch.float32}
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    trainer.train()
    moved = [n for n, p in policy.model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])]
    assert len(moved) > 10
    assert json.loads((tiny_folders["qwen2_5_vl"] / "config.json").read_text())["dtype"] == "float32"
