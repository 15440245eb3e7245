"""Models whose parameters are spread over ranks, made whole for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether parameters are spread over ranks, by ZeRO-3 or FSDP2."""
    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters())


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Inside, parameters sharded by FSDP2 are whole, and a forward asks no other rank for anything.

    A rollout needs that: ranks decode different numbers of tokens, and one that gathers alone waits for ever. ZeRO-3 has
    its own way (TRL's `unwrap_model_for_generation`); a model that is not sharded stays as it is.
    """
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()  # root first, or a part that is asked alone takes itself for the root
    shards = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for shard in shards:
        shard.unshard()
        shard.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for shard in shards:
            shard.set_reshard_after_forward(shard is not model, recurse=False)  # the root is needed again at once
            shard.reshard()
