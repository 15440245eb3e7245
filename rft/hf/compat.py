"""Repairs of installed libraries. Each says which fault it repairs and does nothing where the fault is absent."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch

from rft.errors import CompatError

_LIBRARIES: list[torch.library.Library] = []  # an operator lives as long as the library that defines it


def ensure_torchvision() -> Literal["native", "shim"]:
    """Make `import torchvision` work; call it before anything imports transformers or qwen_vl_utils. Once per process.

    The published torchvision wheel is linked against CUDA. Beside a CPU build of torch its compiled half does not load,
    and `torchvision/_meta_registrations.py` fails on `operator torchvision::nms does not exist` (pytorch/vision#9085).
    transformers reports that as an AutoProcessor that "could not be imported". Declaring the two operators is enough
    for the Python half, the only one used here: transforms work, `torchvision.ops.nms` itself still cannot run.
    Raises CompatError when torchvision fails for another reason.
    """
    try:
        import torchvision

        return "native"
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise CompatError("torchvision", str(error), "install the torchvision that belongs to this torch") from error
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half-imported
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)
    import torchvision  # noqa: F401

    return "shim"


def reload_weights(model: torch.nn.Module, folder: str) -> bool:
    """Load a full checkpoint strictly into a live model; False when it is an adapter, DeepSpeed or sharded by FSDP.

    Qwen2.5-VL is saved under hub names (`visual.*`) and lives under others (`model.visual.*`); `Trainer` reloads with
    strict=False and so restores nothing, with a warning only (huggingface/transformers#43701).
    """
    files = {p.name for p in Path(folder).iterdir()}
    if "adapter_config.json" in files or not any(f.endswith(".safetensors") for f in files):
        return False
    fresh = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(fresh.state_dict(), strict=True)
    return True


def keep_used_names(model: torch.nn.Module) -> None:
    """Forget the renamings that loading did not use, so that saving reverts those that it did.

    The library does so itself, except where DeepSpeed's stage 3 partitions the model as it is loaded: it then saves
    Qwen2.5-VL under names that only its own loader can still read (`model.model.*`).
    """
    renamings = getattr(model, "_weight_conversions", None)
    if renamings:
        model._weight_conversions = [renaming for renaming in renamings if renaming.was_used()]
