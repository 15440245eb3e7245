"""The policy behind `rollout.policy.Policy`: our own decoding loop over the public model.

*Packed*: contexts are a prefix tree; every node is run over once, its keys and values are there once, and each branch attends
to them and to its own. *Expanded*: a padded row and a copy of the cache per branch; the oracle, and the way out where trees
cannot go. Tokens by inverse CDF from stateless uniforms. Nothing is read from the model's generation config: only the recipe
sets sampling. Shapes: `C` contexts, `B` rows, `V` vocabulary, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rft.data.clock import modalities, rope_positions
from rft.data.tree import grow
from rft.hf.decode import Branches, Graphed, Keeper, Layer, Prefix
from rft.hf.head import policy_logits
from rft.hf.kept import Kept, hold, remainder
from rft.hf.logprobs import Lens, placement, row_inputs
from rft.rollout.policy import Context, Limits, Reply, uniforms
from rft.types import Node

PREFILL = 32_768  # tokens of one prefill forward, where one tree alone is not longer
Forward = Callable[[Tensor, np.ndarray, int], Tensor]  # ids [B], which rows, position -> logits [B, V]


class ModelPolicy:
    """Extends contexts with a transformers model; `weights` is the version that its replies carry.

    `room` is the memory that keys and values may take, in bytes; by default 60 % of what the GPU has free, or 4 GiB. With
    `keeps`, those of the contexts and of their replies are held until the next `extend`, which runs only over what is new
    behind them; a packed call of one wave leaves them, and `extend([], limits)` lets them go. The weights must not change
    in between. `prefilled` counts the tokens that forwards of a prefill have run over.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        lens: Lens,
        eos_ids: Sequence[int],
        *,
        weights: int = 0,
        room: int | None = None,
        keeps: bool = False,
    ) -> None:
        self._model, self._lens, self._eos, self._weights = model, lens, tuple(eos_ids), weights
        self._room, self._keeps = room, keeps and lens.sharing == "packed"
        self._kept = Kept()
        self.prefilled = 0

    @torch.no_grad()
    def extend(self, contexts: Sequence[Context], limits: Limits) -> list[Reply]:
        """One reply per context, in order. The model must be in eval mode, gradient checkpointing off."""
        replies: list[Reply] = []
        waves = list(self._waves(contexts, limits))
        kept, self._kept = self._kept, Kept()
        for wave, fits in waves:
            if self._lens.memory is not None:
                self._lens.memory.encode(self._model, dict.fromkeys(v for c in wave for s in c.segments for v in s.views))
            if self._lens.sharing == "packed":
                found, left = self._packed(wave, limits, kept, self._keeps and fits and len(waves) == 1)
                kept, self._kept = Kept(), left
            else:
                found = self._expanded(wave, limits)
            replies += found
        return replies

    def _waves(self, contexts: Sequence[Context], limits: Limits) -> Iterator[tuple[Sequence[Context], bool]]:
        """Runs of contexts, one at least, and whether their keys and values have room. What contexts share counts once."""
        room = self._tokens()
        begin = tokens = 0
        met: set[tuple[int, ...]] = set()
        for end, context in enumerate(contexts):
            sizes = {tuple(map(id, context.segments[: i + 1])): len(s.ids) for i, s in enumerate(context.segments)}
            shared = met if self._lens.sharing == "packed" else ()
            cost = limits.max_tokens + sum(size for prefix, size in sizes.items() if prefix not in shared)
            if end > begin and tokens + cost > room:
                yield contexts[begin:end], tokens <= room
                begin, tokens, met = end, 0, set()
                cost = limits.max_tokens + sum(sizes.values())
            tokens += cost
            met.update(sizes)
        if contexts:
            yield contexts[begin:], tokens <= room

    def _tokens(self) -> int:
        """Tokens whose keys and values have room."""
        text = self._model.config.text_config
        device, dtype = placement(self._model)
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        each = 2 * text.num_hidden_layers * text.num_key_value_heads * head * dtype.itemsize
        room = self._room
        if room is None and device.type == "cuda":
            spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # the allocator's, unused
            room = int(0.6 * (torch.cuda.mem_get_info(device)[0] + spare + self._kept.num_bytes))
        elif room is None:
            room = 4 << 30
        return max(room // each, 1)

    def _packed(self, contexts: Sequence[Context], limits: Limits, kept: Kept, keeps: bool) -> tuple[list[Reply], Kept]:
        """Prefill what `kept` does not know of the tree of all contexts, then decode all of them together."""
        lens = self._lens
        order = sorted(range(len(contexts)), key=lambda i: sum(len(s.ids) for s in contexts[i].segments))
        runs = [[(np.asarray(s.ids, np.int64), s.views) for s in contexts[i].segments if s.ids] for i in order]
        nodes, paths = grow(runs, family=lens.family, image_pad_id=lens.image_pad_id, video_pad_id=lens.video_pad_id)
        known = kept.known(nodes, runs, paths)
        ends, layers, positions_E, spans = self._prefill(nodes, sorted({path[-1] for path in paths}), kept, known)
        order_B = sorted(range(len(paths)), key=lambda i: paths[i][-1])  # rows in the order of the tree
        runs_B, paths_B = [runs[i] for i in order_B], [paths[i] for i in order_B]
        end_B = np.searchsorted(sorted({path[-1] for path in paths}), [path[-1] for path in paths_B])
        keys_B = np.array([contexts[order[i]].key for i in order_B], dtype=np.uint64)
        branches = Branches(layers, spans, paths_B, limits.max_tokens, keeps=keeps)
        del layers  # they are the branches' alone
        index_B = torch.from_numpy(end_B).to(ends.device)
        next_B = positions_E[index_B]

        def step(token_B: Tensor, next_B: Tensor) -> Tensor:
            outputs = self._model(
                input_ids=token_B[:, None],
                position_ids=next_B[None, :, None].expand(3, -1, -1),
                use_cache=False,
                tree=branches,
            )
            return outputs.logits[:, -1]

        graphed = Graphed(step, branches)

        def forward(token_B: Tensor, alive_B: np.ndarray, position: int) -> Tensor:
            if len(alive_B) < branches.num_rows:
                branches.keep(alive_B)
            return graphed(token_B, next_B[torch.from_numpy(alive_B).to(next_B.device)] + position)

        replies = self._decode(ends[index_B], forward, keys_B, limits)
        found: list[Any] = [None] * len(contexts)
        for reply, i in zip(replies, order_B, strict=True):
            found[order[i]] = reply
        return found, hold(branches, runs_B, paths_B, [r.ids for r in replies]) if keeps else Kept()

    def _prefill(
        self, nodes: Sequence[Node], ends: Sequence[int], kept: Kept, known: Sequence[np.ndarray]
    ) -> tuple[Tensor, list[Layer], Tensor, np.ndarray]:
        """Logits [E, V] behind the end nodes, layers over all nodes, next position [E], and where each node lies in T."""
        stops = np.cumsum([len(n.ids_T) for n in nodes])
        spans = np.stack([stops - [len(n.ids_T) for n in nodes], stops], axis=1)
        known_N = np.array([len(k) for k in known])
        rest_N = np.diff(spans, axis=1)[:, 0] - known_N
        prefix = Prefix(kept.layers, known, spans, placement(self._model)[0])
        logits, begin = [], 0
        while begin < len(nodes):
            stop = begin + 1
            while stop < len(nodes) and (nodes[stop].parent >= 0 or rest_N[begin : stop + 1].sum() <= PREFILL):
                stop += 1
            trees = [replace(n, parent=n.parent - begin if n.parent >= 0 else -1) for n in nodes[begin:stop]]
            row, places_R = remainder(trees, known_N[begin:stop])
            last = [row.stops[e - begin] - 1 for e in ends if begin <= e < stop]
            inputs = row_inputs(self._model, row, self._lens)
            keeper = Keeper(inputs["tree"], prefix, spans[begin, 0], spans[stop - 1, 1], places_R)
            only = {"logits_to_keep": torch.tensor(last, device=inputs["input_ids"].device), "tree": keeper}
            logits.append(self._model(use_cache=False, **{**inputs, **only}).logits[0])
            self.prefilled += len(row.ids_T)
            begin = stop
        last_E = torch.tensor([int(nodes[e].positions_3T[0, -1]) + 1 for e in ends], device=logits[0].device)
        return torch.cat(logits), prefix.layers, last_E, spans

    def _expanded(self, contexts: Sequence[Context], limits: Limits) -> list[Reply]:
        slots: dict[tuple[int, ...], int] = {}
        heads: list[Context] = []
        slot_B = []
        for context in contexts:
            shared = tuple(map(id, context.segments))
            if shared not in slots:
                slots[shared] = len(heads)
                heads.append(context)
            slot_B.append(slots[shared])
        logits_CV, cache, mask_CT, next_C = self._prefill_padded(heads)
        index_B = torch.tensor(slot_B, device=logits_CV.device)
        cache.batch_select_indices(index_B)
        mask_BT, next_B = mask_CT[index_B], next_C[index_B]
        rows = np.arange(len(contexts))

        def forward(token_B: Tensor, alive_B: np.ndarray, position: int) -> Tensor:
            nonlocal rows, mask_BT, next_B
            if len(alive_B) < len(rows):
                kept = torch.from_numpy(np.searchsorted(rows, alive_B)).to(mask_BT.device)
                cache.batch_select_indices(kept)
                rows, mask_BT, next_B = alive_B, mask_BT[kept], next_B[kept]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
            outputs = self._model(
                input_ids=token_B[:, None],
                attention_mask=mask_BT,
                position_ids=(next_B + position)[None, :, None].expand(3, -1, -1),
                past_key_values=cache,
                use_cache=True,
            )
            return outputs.logits[:, -1]

        keys_B = np.array([c.key for c in contexts], dtype=np.uint64)
        return self._decode(logits_CV[index_B], forward, keys_B, limits)

    def _prefill_padded(self, heads: Sequence[Context]) -> tuple[Tensor, object, Tensor, Tensor]:
        """Last logits [C, V], cache, attention mask [C, T] (left padded) and next position [C]."""
        lens = self._lens
        device, _ = placement(self._model)
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
            **lens.media_inputs(self._model, [v for shown in views for v in shown]),
        )
        self.prefilled += int(mask_CT.sum())
        return outputs.logits[:, -1], outputs.past_key_values, mask, positions[0, :, -1] + 1

    def _decode(self, logits_BV: Tensor, forward: Forward, keys_B: np.ndarray, limits: Limits) -> list[Reply]:
        """Token by token, all rows together. Rows that are done give their place up once they are a quarter of all.

        `forward(token_B, alive_B, position)` takes the rows that are left, by their first number, and gives their logits.
        """
        eos = torch.tensor(self._eos, device=logits_BV.device)
        alive_B, done_B = np.arange(len(keys_B)), np.zeros(len(keys_B), bool)
        ids_BT = np.zeros((len(keys_B), limits.max_tokens), np.int64)
        logprobs_BT, length_B = np.zeros(ids_BT.shape), np.zeros(len(keys_B), np.int64)
        for position in range(limits.max_tokens):
            token_B, logprob_B = self._choose(logits_BV, keys_B[alive_B], position, limits)
            ids_BT[alive_B, position] = token_B.cpu().numpy()
            logprobs_BT[alive_B, position] = logprob_B.cpu().numpy()
            ends_B = torch.isin(token_B, eos).cpu().numpy()
            if limits.until is not None:
                ends_B |= [limits.until(ids_BT[row, : position + 1].tolist()) for row in alive_B]
            length_B[alive_B[ends_B & ~done_B]] = position + 1
            done_B |= ends_B
            if position + 1 == limits.max_tokens or done_B.all():
                break
            if done_B.sum() * 4 >= len(done_B):
                token_B, alive_B, done_B = (
                    token_B[torch.from_numpy(~done_B).to(token_B.device)],
                    alive_B[~done_B],
                    done_B[~done_B],
                )
            logits_BV = forward(token_B, alive_B, position)
        return [
            Reply(
                ids=tuple(ids_T[: length or position + 1].tolist()),
                logprobs=tuple(logprobs_T[: length or position + 1].tolist()),
                stop="answered" if length else "length",
                weights=self._weights,
            )
            for ids_T, logprobs_T, length in zip(ids_BT, logprobs_BT, length_B, strict=True)
        ]

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
