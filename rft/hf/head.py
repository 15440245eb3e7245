"""Log-probs at the head of the model, a stretch of tokens at a time: no [tokens, vocabulary] tensor is ever whole.

The head module itself is asked, inside the model's own forward, so that whoever gathers its weights (ZeRO-3, FSDP) does so
as always. Shapes: `N` trained tokens, `C` tokens of a chunk, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 1 << 28  # of float32 logits held at a time


def policy_logits(logits: Tensor, suppressed: Sequence[int], temperature: float) -> Tensor:
    """Logits of the distribution that is sampled and trained: float32, suppressed ids at -inf, over the temperature."""
    logits = logits.float() / temperature
    if suppressed:
        ids = torch.tensor(suppressed, device=logits.device)
        logits = logits.index_fill(-1, ids, float("-inf"))
    return logits


@contextmanager
def scoring(
    model: Any, rows_N: Tensor, columns_N: Tensor, ids_N: Tensor, suppressed: Sequence[int], temperature: float
) -> Iterator[None]:
    """Inside, a forward's `logits` are float32 [1, N, 2]: log-prob and entropy of `ids_N`.

    `rows_N` and `columns_N` say where, in what `logits_to_keep` keeps, the hidden state stands that predicts each id. The
    entropy carries no gradient.
    """
    head = plain(model).get_output_embeddings()

    def forward(hidden_BKh: Tensor) -> Tensor:
        hidden_Nh = hidden_BKh[rows_N, columns_N]
        chunk = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
        if len(ids_N) <= chunk or not torch.is_grad_enabled():
            parts = [score(h, i) for h, i in zip(hidden_Nh.split(chunk), ids_N.split(chunk), strict=True)]
        else:  # the logits of a chunk are made again when its gradient is due
            parts = [
                checkpoint(score, h, i, use_reentrant=False)
                for h, i in zip(hidden_Nh.split(chunk), ids_N.split(chunk), strict=True)
            ]
        return torch.cat(parts)[None]

    def score(hidden_Ch: Tensor, ids_C: Tensor) -> Tensor:
        logits_CV = policy_logits(linear(hidden_Ch, head.weight, head.bias), suppressed, temperature)
        full_CV = logits_CV.log_softmax(-1)
        with torch.no_grad():
            # what is suppressed has probability 0 and log-prob -inf, and counts for nothing
            entropy_C = -(full_CV.exp() * full_CV.clamp(min=torch.finfo(full_CV.dtype).min)).sum(-1)
        return torch.stack([full_CV.gather(-1, ids_C[:, None])[:, 0], entropy_C], dim=-1)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def plain(model: Any) -> Any:
    """The model inside the wrappers of DDP and DeepSpeed."""
    while hasattr(model, "module"):
        model = model.module
    return model
