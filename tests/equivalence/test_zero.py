"""DeepSpeed ZeRO-2 and ZeRO-3 on two CPU processes against plain DDP: the same rewards, losses and gradient norms."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rft.hf.models import load_whole
from tests.equivalence.test_ranks import ROOT, launched, run_alone
from tests.recipes.test_recipes import shortened

pytestmark = pytest.mark.slow  # the first run compiles DeepSpeed's shared-memory collectives: most of a minute


def config(stage: int, folder: Path) -> Path:
    settings = {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,  # or a small model is never partitioned
            "stage3_model_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **dict.fromkeys(
            ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"), "auto"
        ),
    }
    (folder / "ds.json").write_text(json.dumps(settings))
    accelerate = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": str(folder / "ds.json"), "zero3_init_flag": stage == 3},
        "machine_rank": 0,
        "num_machines": 1,
        "num_processes": 2,
        "use_cpu": True,
    }
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(accelerate))
    return path


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_ddp(stage: int, tiny_folders: dict[str, Path], mixed: Path, tmp_path: Path) -> None:
    runs = {}
    for name in ("ddp", "zero"):
        out = tmp_path / name
        out.mkdir()
        module = ["-m", "tests.rank_main", str(out), str(tiny_folders["qwen2_5_vl"]), str(mixed), "{}"]
        if name == "ddp":
            command = launched(2, *module[1:])
        else:
            launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config(stage, out))]
            command = [sys.executable, *launcher, *module]
        done = run_alone(*command, timeout=280, DS_ACCELERATOR="cpu")
        assert done.returncode == 0, done.stderr[-4000:]
        runs[name] = torch.load(out / "2-0.pt")
    assert not runs["zero"]["gradients"] and runs["ddp"]["gradients"]
    for ddp, zero in zip(runs["ddp"]["logs"], runs["zero"]["logs"], strict=True):
        for key in ("reward", "entropy", "loss", "grad_norm"):
            assert zero[key] == pytest.approx(ddp[key], rel=1e-4, abs=1e-6), key


def test_both_phases_train_and_save_under_zero3(tmp_path: Path) -> None:
    """The shipped settings and the real entry point: the second phase loads what the first saved, whole or not at all."""
    accelerate = yaml.safe_load((ROOT / "launch" / "accelerate" / "zero3.yaml").read_text())
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**accelerate, "num_processes": 2, "use_cpu": True}))
    sets = [x for value in shortened("recipes/quickstart.yaml", None) for x in ("--set", value)]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "two.yaml")]
    out = tmp_path / "run"
    command = [sys.executable, *launcher, "-m", "rft.train", "recipes/quickstart.yaml", "--output", str(out), *sets]
    done = run_alone(*command, timeout=280, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((out / "state.json").read_text())["status"] == "finished"
    model = load_whole(str(out / "checkpoint"), dtype=torch.float32, attention="sdpa")
    assert all(p.numel() and p.isfinite().all() for p in model.parameters())
    names = [set(load_file(out / place / "model.safetensors")) for place in ("model", "phases/warmup", "checkpoint")]
    assert names[0] == names[1] == names[2], "a second phase is loaded in parts, and saved under the names it was loaded by"
