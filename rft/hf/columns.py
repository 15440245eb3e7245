"""Batches and their new log-probs as the flat columns that a loss sees. Shapes: `N` trained tokens, `R` rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rft.algo.credit import by_rollout
from rft.algo.losses import Columns
from rft.types import REFERENCE, WORLD, Batch


def columns_of(batches: Sequence[Batch], logprobs_N: Tensor, *, guided: bool = False) -> Columns:
    """The flat columns of a forward over these batches; with `guided` they say what the annotation wrote."""
    device = logprobs_N.device
    examples = [e for b in batches for e in b.pack.examples]
    rows = by_rollout(examples)
    lengths = [sum(int((e.authors_T != WORLD).sum()) for e in row) for row in rows]

    def known(name: str) -> Tensor | None:
        values = [value for b in batches if (value := getattr(b, name)) is not None]
        return torch.cat(values).to(device) if values else None

    return Columns(
        logprobs_N=logprobs_N,
        advantages_N=torch.from_numpy(_trained(batches, "advantages_T")).to(device),
        row_N=torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)).to(device),
        weight_R=torch.tensor([row[0].weight for row in rows], dtype=torch.float32, device=device),
        old_N=known("old_N"),
        ref_N=known("ref_N"),
        sampler_N=torch.from_numpy(_trained(batches, "sampler_T")).to(device),
        is_reference_N=torch.from_numpy(_trained(batches, "authors_T") == REFERENCE).to(device) if guided else None,
    )


def _trained(batches: Sequence[Batch], column: str) -> np.ndarray:
    parts = [getattr(e, column)[e.authors_T != WORLD] for b in batches for e in b.pack.examples]
    return np.concatenate([*parts, np.zeros(0, np.float32)])
