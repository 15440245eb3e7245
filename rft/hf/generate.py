"""The policy behind `rollout.policy.Policy`: our own decoding loop over the public model.

One prefill per distinct context, branches gathered from its cache, tokens by inverse CDF from stateless uniforms. Nothing
is read from the model's generation config: only the recipe sets sampling. Shapes: `C` contexts, `B` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rft.data.clock import modalities, rope_positions
from rft.hf.logprobs import Lens, placement, policy_logits
from rft.rollout.policy import Context, Limits, Reply, uniforms


class ModelPolicy:
    """Extends contexts with a transformers model; `weights` is the version that its replies carry."""

    def __init__(
        self, model: torch.nn.Module, lens: Lens, eos_ids: Sequence[int], *, weights: int = 0, max_tokens: int = 131_072
    ) -> None:
        self._model, self._lens, self._eos, self._weights = model, lens, tuple(eos_ids), weights
        self._max_tokens = max_tokens  # 7.5 GB of keys and values for Qwen2.5-VL-7B

    @torch.no_grad()
    def extend(self, contexts: Sequence[Context], limits: Limits) -> list[Reply]:
        """One reply per context, in order. The model must be in eval mode, gradient checkpointing off."""
        replies: list[Reply] = []
        for wave in self._waves(contexts, limits):
            replies += self._wave(wave, limits)
        return replies

    def _waves(self, contexts: Sequence[Context], limits: Limits) -> Iterator[Sequence[Context]]:
        """Runs of contexts whose padded tokens, prompt and reply, stay within `max_tokens`; at least one context each."""
        begin = longest = 0
        for end, context in enumerate(contexts):
            longest = max(longest, sum(len(s.ids) for s in context.segments) + limits.max_tokens)
            if end > begin and longest * (end + 1 - begin) > self._max_tokens:
                yield contexts[begin:end]
                begin, longest = end, sum(len(s.ids) for s in context.segments) + limits.max_tokens
        yield contexts[begin:]

    def _wave(self, contexts: Sequence[Context], limits: Limits) -> list[Reply]:
        slots: dict[tuple[int, ...], int] = {}
        heads: list[Context] = []
        slot_B = []
        for context in contexts:
            shared = tuple(map(id, context.segments))
            if shared not in slots:
                slots[shared] = len(heads)
                heads.append(context)
            slot_B.append(slots[shared])
        logits_CV, cache, mask_CT, next_C = self._prefill(heads)
        if slot_B != list(range(len(heads))):
            index_B = torch.tensor(slot_B, device=logits_CV.device)
            cache.batch_select_indices(index_B)
            logits_CV, mask_CT, next_C = logits_CV[index_B], mask_CT[index_B], next_C[index_B]
        keys_B = np.array([c.key for c in contexts], dtype=np.uint64)
        return self._decode(logits_CV, cache, mask_CT, next_C, keys_B, limits)

    def _prefill(self, heads: Sequence[Context]) -> tuple[Tensor, object, Tensor, Tensor]:
        """Last logits [C, V], cache, attention mask [C, T] (left padded) and next position [C]."""
        lens = self._lens
        device, dtype = placement(self._model)
        rows = [np.asarray(c.ids, dtype=np.int64) for c in heads]
        views = [[v for s in c.segments for v in s.views] for c in heads]
        width = max(map(len, rows))
        ids_CT = np.full((len(rows), width), lens.pad_id, dtype=np.int64)
        mask_CT, kinds_CT = np.zeros_like(ids_CT), np.zeros_like(ids_CT, dtype=np.int32)
        positions_3CT = np.zeros((3, *ids_CT.shape), dtype=np.int64)
        for i, (ids_T, shown) in enumerate(zip(rows, views, strict=True)):
            kinds_T = modalities(ids_T, lens.image_pad_id, lens.video_pad_id)
            ids_CT[i, width - len(ids_T) :], mask_CT[i, width - len(ids_T) :] = ids_T, 1
            kinds_CT[i, width - len(ids_T) :] = kinds_T
            positions_3CT[:, i, width - len(ids_T) :] = rope_positions(kinds_T, shown, lens.family)
        mask = torch.from_numpy(mask_CT).to(device)
        positions = torch.from_numpy(positions_3CT).to(device)
        outputs = self._model(
            input_ids=torch.from_numpy(ids_CT).to(device),
            attention_mask=mask,
            position_ids=positions,
            mm_token_type_ids=torch.from_numpy(kinds_CT).to(device),
            logits_to_keep=1,
            use_cache=True,
            **lens.media_inputs([v for shown in views for v in shown], device, dtype),
        )
        return outputs.logits[:, -1], outputs.past_key_values, mask, positions[0, :, -1] + 1

    def _decode(
        self, logits_BV: Tensor, cache: object, mask_BT: Tensor, next_B: Tensor, keys_B: np.ndarray, limits: Limits
    ) -> list[Reply]:
        eos = torch.tensor(self._eos, device=logits_BV.device)
        ids, logprobs = [], []
        done_B = torch.zeros(len(logits_BV), dtype=torch.bool, device=logits_BV.device)
        for position in range(limits.max_tokens):
            token_B, logprob_B = self._choose(logits_BV, keys_B, position, limits)
            ids.append(token_B)
            logprobs.append(logprob_B)
            done_B = done_B | torch.isin(token_B, eos)
            if position + 1 == limits.max_tokens or bool(done_B.all()):
                break
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
            outputs = self._model(
                input_ids=token_B[:, None],
                attention_mask=mask_BT,
                position_ids=(next_B + position)[None, :, None].expand(3, -1, -1),
                past_key_values=cache,
                use_cache=True,
            )
            logits_BV = outputs.logits[:, -1]
        return self._replies(torch.stack(ids, 1).tolist(), torch.stack(logprobs, 1).tolist())

    def _choose(self, logits_BV: Tensor, keys_B: np.ndarray, position: int, limits: Limits) -> tuple[Tensor, Tensor]:
        greedy = limits.temperature == 0
        logits_BV = policy_logits(logits_BV, self._lens.suppressed, 1.0 if greedy else limits.temperature)
        logprobs_BV = logits_BV.log_softmax(-1)
        if greedy:
            token_B = logits_BV.argmax(-1)
        else:
            u_B = torch.from_numpy(uniforms(keys_B, position)).to(logits_BV.device)
            token_B = inverse_cdf(truncate(logprobs_BV, limits).exp(), u_B)
        return token_B, logprobs_BV.gather(-1, token_B[:, None])[:, 0]

    def _replies(self, ids_BT: list[list[int]], logprobs_BT: list[list[float]]) -> list[Reply]:
        replies = []
        for ids, logprobs in zip(ids_BT, logprobs_BT, strict=True):
            end = next((i + 1 for i, token in enumerate(ids) if token in self._eos), None)
            replies.append(
                Reply(
                    ids=tuple(ids[:end]),
                    logprobs=tuple(logprobs[:end]),
                    stop="length" if end is None else "answered",
                    weights=self._weights,
                )
            )
        return replies


def inverse_cdf(probs_BV: Tensor, u_B: Tensor) -> Tensor:
    """The first token whose cumulative probability passes u: [B]. `probs` need not be normalised."""
    cumulative_BV = probs_BV.double().cumsum(-1)
    target_B1 = (u_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp(max=probs_BV.shape[-1] - 1)


def truncate(logprobs_BV: Tensor, limits: Limits) -> Tensor:
    """Log-probs with what top-k and top-p leave out at -inf; the likeliest token always stays."""
    if limits.top_k:
        kth_B1 = logprobs_BV.topk(min(limits.top_k, logprobs_BV.shape[-1]), dim=-1).values[:, -1:]
        logprobs_BV = logprobs_BV.masked_fill(logprobs_BV < kth_B1, float("-inf"))
    if limits.top_p < 1:
        sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
        sorted_BV = sorted_BV.masked_fill(before_BV >= limits.top_p, float("-inf"))
        logprobs_BV = torch.empty_like(sorted_BV).scatter(-1, order_BV, sorted_BV)
    return logprobs_BV
