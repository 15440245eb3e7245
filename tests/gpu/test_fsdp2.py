"""FSDP2 as `launch/accelerate/fsdp2.yaml` asks for it, on GPUs: parameters are sharded, and the gradient is DDP's.

Run with `pytest -m gpu`. `python -m tests.gpu.test_fsdp2 OUT MODEL DATA` is one rank of a launch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import rft.hf  # noqa: F401  # isort: skip  (makes torchvision importable for transformers)
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from rft.cluster.launch import launcher
from rft.hf.arguments import arguments
from rft.hf.models import open_policy
from rft.hf.nonfinite import Guard
from rft.hf.together import Together
from rft.hf.trainer import GroupTrainer
from tests.equivalence.test_ranks import run_alone
from tests.stages import phase_of, recipe_of, relative, stage_of

pytestmark = pytest.mark.gpu


class Look(TrainerCallback):
    """Gradients of every optimizer step, whole, and which parameters this rank holds only a part of."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.parts: dict[str, tuple[int, int, bool]] = {}  # numbers here, numbers in all, is sharded

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        whole = []
        for name, p in model.named_parameters():
            is_sharded = isinstance(p, DTensor)
            self.parts[name] = ((p.to_local() if is_sharded else p).numel(), p.numel(), is_sharded)
            if p.grad is not None:
                whole.append((p.grad.full_tensor() if is_sharded else p.grad).flatten().float().cpu())
        self.gradients.append(torch.cat(whole))


def main(out: Path, model: str, data: Path) -> None:
    together = Together.join()
    phase = phase_of(groups_per_device=1, learning_rate=1e-5)
    recipe = recipe_of(phase)
    policy = open_policy(model, recipe, train=True)
    guard, look = Guard(out / "nonfinite", "stop", together), Look()
    args = arguments(recipe, "only", out / "run", world=together.size)
    trainer = GroupTrainer(policy, stage_of(policy, phase, data), args, together=together, guard=guard, callbacks=[guard, look])
    trainer.train()
    trainer.save_model(str(out / "saved"))
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    torch.save({"gradients": look.gradients, "parts": look.parts, "logs": logs}, out / f"{together.rank}.pt")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_fsdp2(family: str, processes: int, tiny_folders: dict[str, Path], mixed: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    ranks = {}
    for name in ("ddp", "fsdp2"):
        (tmp_path / name).mkdir()
        words = [*launcher(name, processes=processes), "tests.gpu.test_fsdp2"]
        done = run_alone(*words, str(tmp_path / name), str(tiny_folders[family]), str(mixed))
        assert done.returncode == 0, done.stderr[-6000:]
        ranks[name] = [torch.load(tmp_path / name / f"{k}.pt") for k in range(processes)]
    ddp, fsdp = ranks["ddp"], ranks["fsdp2"]
    assert not any(is_sharded for _, _, is_sharded in ddp[0]["parts"].values())
    assert all(is_sharded for _, _, is_sharded in fsdp[0]["parts"].values())
    for name, (_, total, _) in fsdp[0]["parts"].items():
        assert sum(rank["parts"][name][0] for rank in fsdp) == total
    here, total = (sum(column) for column in list(zip(*fsdp[0]["parts"].values(), strict=True))[:2])
    assert here <= 0.6 * total or processes == 1
    for one, two in zip(ddp[0]["gradients"], fsdp[0]["gradients"], strict=True):
        assert one.norm() > 1e-4
        assert relative(two, one) <= 1e-4
    for one, two in zip(ddp[0]["logs"], fsdp[0]["logs"], strict=True):
        assert two["reward"] == pytest.approx(one["reward"], rel=1e-5)  # the same rollouts: they ran on whole parameters
    saved = [load_file(tmp_path / name / "saved" / "model.safetensors") for name in ("ddp", "fsdp2")]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        assert relative(saved[1][name].float(), tensor.float()) <= 1e-3, name


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
