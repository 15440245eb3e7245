"""Where the work is done: one model, one optimizer, and runners that take turns on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rft.bench.arms import ARMS, Runner
from rft.bench.shapes import SHAPES, build
from rft.bench.work import Material, Work, make_material

TRL = ("trl", "trl-fair")
DEFAULT = (*TRL, *(name for name in ARMS if name != "expanded-fair"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stand:
    """A model with the work in front of it. Stands may share the model."""

    shape: str
    model: Any
    optimizer: torch.optim.Optimizer
    material: Material
    folder: Path

    def runner(self, name: str) -> Any:
        """The runner of an arm, TRL's included."""
        if name in ARMS:
            return Runner(ARMS[name], self.model, self.material, self.optimizer)
        from rft.bench.trl_arms import TRL_ARMS, TrlRunner, make_trainer

        trainer = make_trainer(self.model, self.material, self.optimizer, self.folder / name)
        return TrlRunner(TRL_ARMS[name], trainer, self.material, self.optimizer)

    def with_work(self, work: Work) -> Stand:
        """The same model before another work."""
        folder = self.folder / f"{work.frames}-{work.group}-{work.completion}-{work.text}"
        folder.mkdir(parents=True, exist_ok=True)
        return replace(self, material=make_material(work, SHAPES[self.shape].architecture, folder), folder=folder)


def open_stand(shape: str, work: Work, device: torch.device, folder: Path) -> Stand:
    """Build the model and the work. float32 on the CPU, bfloat16 on a GPU."""
    architecture = SHAPES[shape].architecture
    model = build(architecture, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Stand(
        shape=shape,
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0),
        material=make_material(work, architecture, folder),
        folder=folder,
    )


def has_trl() -> bool:
    """Whether TRL is installed; asking does not load it."""
    return find_spec("trl") is not None
