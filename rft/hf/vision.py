"""The vision tower runs once per frame pair; every forward of a step reads what it made.

Both families encode each pair of frames (temporal patch) apart from all others: attention, windows and positions stay
inside it. So the pair is the unit of memory, under its pixels, its size and the revision of the weights, and a second
look, the rollout, the old and reference log-probs and the training forward share it. So do all views of one whole: the
pooled map of a picture and the regions of it that are shown later are one encoding.

`Level` says how far the shared work reaches. "features": the whole tower, mergers included; nothing there learns or
carries an adapter. "states": up to the mergers, which learn (or are adapted) and run in every forward, with gradient.

Shapes: `P` patches, `S` placeholder tokens (merge**2 patches each), `D` channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import groupby
from typing import Any, Literal, Protocol

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from rft.data.cells import whole
from rft.data.media import stamp
from rft.errors import DataError, RolloutError
from rft.families import Family
from rft.hf.pixels import patchify
from rft.hf.replay import EncoderOutputs, Levels, wholes_of
from rft.types import View

Level = Literal["features", "states"]
Key = tuple[bytes, tuple[int, int], str]  # digest of a pair's pixels, (height, width) in pixels, revision of the weights
Kept = tuple[Tensor, ...]  # the merger's, then each deepstack merger's: features [S, D] or states [S, merge**2, D]

PATCHES = 16_384  # of one tower call: bounds its activations and the pixels in flight
VIEWS = 8_192  # whose digests are remembered, unless one encode asks for more


class Frames(Protocol):
    """Where pixels are found."""

    def get(self, view: View) -> np.ndarray:
        """uint8 [frames, height, width, 3]."""
        ...


def shared_level(model: torch.nn.Module, family: Family) -> Level | None:
    """What forwards may share of the vision tower's work; ask before any engine wraps the model and renames its parameters.

    "features" when no parameter of tower or mergers requires a gradient and no adapter sits there, "states" when that
    holds of the tower alone, else None: pixels then go through every forward. An adapter that does not learn counts too,
    because the reference runs without it.
    """
    plain = plain_model(model)
    touched = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    touched |= {f"{n}." for n, m in plain.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)}
    touched = {name for name in touched if name.startswith(family.vision_prefixes)}
    if not touched:
        return "features"
    return "states" if all(name.startswith(family.projector_prefixes) for name in touched) else None


def plain_model(model: torch.nn.Module) -> Any:
    """The library's own model, whose modules have the names of `Family`; adapters stay in place inside it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def mergers_of(model: torch.nn.Module, family: Family) -> list[torch.nn.Module]:
    """The modules that make tokens of states: the merger, then the deepstack mergers from the shallowest on."""
    parts = [plain_model(model).get_submodule(prefix.removesuffix(".")) for prefix in family.projector_prefixes]
    return [m for part in parts for m in (part if isinstance(part, torch.nn.ModuleList) else [part])]


class VisionMemory:
    """What a vision tower made of the frame pairs it has seen, for one set of tower weights. For one thread at a time.

    What the last `encode` asked for is held; all else goes, least recently used first, while `bytes` is over `max_bytes`.
    `revision` names the weights: whoever changes them changes it, and nothing made before is found again. A memory of
    features is of one model; one of states also serves models whose mergers alone differ. `hits` and `misses` count pairs:
    one that two views share is one miss.
    """

    def __init__(self, family: Family, frames: Frames, level: Level, max_bytes: int, revision: str = "") -> None:
        self.family, self.frames, self.level, self.max_bytes, self.revision = family, frames, level, max_bytes, revision
        self.hits = self.misses = self.bytes = 0
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._held: set[Key] = set()
        self._digests: OrderedDict[View, tuple[Any, tuple[bytes, ...]]] = OrderedDict()  # after the versions of its files

    @torch.no_grad()
    def encode(self, model: torch.nn.Module, views: Iterable[View]) -> None:
        """Run the tower, as in evaluation, over the pairs of `views` that are not kept, and hold all pairs of `views`.

        What is encoded is the whole of each view, once for all that share it.

        `model` is the plain or the PEFT model at rest, its parameters whole: ranks may need different numbers of tower
        calls. The tower's own dtype decides the arithmetic, and an autocast that is active here is active there: where
        the training forward runs under one, call this under the same, or its features differ by rounding. The grey
        picture of a filler is encoded as well, with no views too.

        Raises:
            DataError: a view's pixels cannot be read; the others may not all be encoded, so encode them again.
        """
        views = list(dict.fromkeys(whole(view, self.family) for view in views))
        grey = self._grey
        self._held = {grey, *(key for view in views for key in self._keys(view))}
        if grey not in self._kept:
            side = self.family.merge
            patches_PD = torch.zeros(side**2, 3 * self.family.temporal_patch * self.family.patch**2)
            self._run(model, [grey], patches_PD, [(1, side, side)])
        batch: list[tuple[Key, View, np.ndarray]] = []
        room = PATCHES
        for key, view, pair in self._missing(views):
            patches = view.grid[1] * view.grid[2]
            if batch and patches > room:
                self._run_pairs(model, batch)
                batch, room = [], PATCHES
            batch.append((key, view, pair))
            room -= patches
        if batch:
            self._run_pairs(model, batch)
        self._evict()
        while len(self._digests) > max(VIEWS, len(views)):
            self._digests.popitem(last=False)

    def outputs(self, model: torch.nn.Module, views: Sequence[View], filler: bool = False) -> EncoderOutputs:
        """`mm_encoder_outputs[kind]` for the views of one kind, in order; `filler` appends the one token of a grey picture.

        `model` is the one whose forward will read it: with states, its mergers run then. At least one view or the filler.

        Raises:
            RolloutError: a view was not encoded, or was not held and has gone.
        """
        full, shown = wholes_of(views, self.family)
        pairs = [self._found(view) for view in full]
        if filler:
            if self._grey not in self._kept:
                raise RolloutError("vision memory", "a filler is wanted and nothing was encoded", "call encode first")
            shown.append((len(pairs), None))
            pairs.append([self._kept[self._grey]])
        mergers = mergers_of(model, self.family) if self.level == "states" else ()

        def encoded() -> Levels:
            levels = []
            for level in range(len(pairs[0][0])):
                tokens_SD = torch.cat([pair[level] for own in pairs for pair in own])
                if mergers:
                    tokens_SD = mergers[level](tokens_SD.flatten(0, 1))
                levels.append(tokens_SD.split([sum(len(pair[level]) for pair in own) for own in pairs]))
            return levels

        return EncoderOutputs(shown, encoded, self.family)

    @property
    def _grey(self) -> Key:
        return (b"grey", (self.family.unit, self.family.unit), self.revision)

    def _keys(self, view: View) -> list[Key]:
        """Of its pairs, in order; none while its pixels were not hashed."""
        _, digests = self._digests.get(view, (None, ()))
        return [(digest, view.size, self.revision) for digest in digests]

    def _found(self, view: View) -> list[Kept]:
        keys = self._keys(view)
        pairs = [self._kept[key] for key in keys if key in self._kept]
        if not keys or len(pairs) < len(keys):
            name = view.source if isinstance(view.source, str) else view.source[0]
            what = f"{len(pairs)} of {view.grid[0]} pairs of the {view.kind} are here at {view.size[0]}x{view.size[1]} pixels"
            raise RolloutError(f"vision memory, {name}", what, "call encode with every view that the next forwards show")
        return pairs

    def _missing(self, views: Sequence[View]) -> Iterator[tuple[Key, View, np.ndarray]]:
        """Pairs the tower has to see, uint8 [temporal_patch, height, width, 3], each once; counts, and holds every pair."""
        asked: set[Key] = set()
        for view in views:
            version, pairs, known = _version(view), None, self._digests.get(view)
            if known is None or known[0] != version:
                try:
                    pairs = self._pairs(view)
                except DataError:  # the file has gone away; what was made of it may be here
                    if known is None or not all(key in self._kept for key in self._keys(view)):
                        raise
                else:
                    self._digests[view] = (version, tuple(blake2b(pair, digest_size=16).digest() for pair in pairs))
            self._digests.move_to_end(view)
            for i, key in enumerate(self._keys(view)):
                self._held.add(key)
                if key in self._kept or key in asked:
                    self.hits += 1
                    if key in self._kept:
                        self._kept.move_to_end(key)
                    continue
                self.misses += 1
                asked.add(key)
                pairs = self._pairs(view) if pairs is None else pairs
                yield key, view, pairs[i]

    def _pairs(self, view: View) -> np.ndarray:
        """What `patchify` makes patches of: the last frame of an odd number, or an image, is repeated."""
        pixels, size = self.frames.get(view), self.family.temporal_patch
        if missing := -len(pixels) % size:
            pixels = np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])
        return np.ascontiguousarray(pixels).reshape(-1, size, *pixels.shape[1:])

    def _run_pairs(self, model: torch.nn.Module, batch: Sequence[tuple[Key, View, np.ndarray]]) -> None:
        device = next(plain_model(model).model.visual.parameters()).device
        blocks, grids = [], []
        for (h, w), same in groupby(batch, key=lambda item: item[1].grid[1:]):
            same = list(same)
            frames_FHWC = torch.from_numpy(np.concatenate([pair for _, _, pair in same])).to(device)
            blocks.append(patchify(frames_FHWC, same[0][1], self.family))
            grids += [(1, h, w)] * len(same)
        self._run(model, [key for key, _, _ in batch], torch.cat(blocks), grids)

    def _run(self, model: torch.nn.Module, keys: Sequence[Key], patches_PD: Tensor, grids: Sequence[tuple]) -> None:
        """One call of the tower; each pair's part is copied out, so that dropping a pair frees its memory."""
        plain = plain_model(model)
        visual = plain.model.visual
        device = next(visual.parameters()).device
        with _in_eval(visual), _handing_on(mergers_of(model, self.family) if self.level == "states" else (), self.family.merge):
            made = plain.get_video_features(patches_PD.to(device), torch.tensor(grids, device=device), return_dict=True)
        for key, *levels in zip(keys, made.pooler_output, *(getattr(made, "deepstack_features", None) or ()), strict=True):
            self._kept[key] = tuple(tokens.clone() for tokens in levels)
            self.bytes += _size(self._kept[key])
        self._evict()

    def _evict(self) -> None:
        for key in [key for key in self._kept if key not in self._held]:
            if self.bytes <= self.max_bytes:
                break
            self.bytes -= _size(self._kept.pop(key))


def _size(kept: Kept) -> int:
    return sum(tokens.nbytes for tokens in kept)


def _version(view: View) -> tuple[tuple[int, int], ...] | None:
    """Of a view's files; None where a store has what the disk does not (any more)."""
    try:
        return tuple(stamp(path) for path in ((view.source,) if isinstance(view.source, str) else view.source))
    except DataError:
        return None


@contextmanager
def _in_eval(module: torch.nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _handing_on(mergers: Sequence[torch.nn.Module], merge: int) -> Iterator[None]:
    """Mergers that give the states of each token in its place, which the tower then puts in order like tokens.

    A hook could not keep the merger from running, for nothing; and a learning one, in float32, refuses the states of a
    bfloat16 tower where no autocast is active.
    """
    own = [vars(merger).get("forward") for merger in mergers]
    for merger in mergers:
        merger.forward = lambda states_PD: states_PD.unflatten(0, (-1, merge**2))
    try:
        yield
    finally:
        for merger, forward in zip(mergers, own, strict=True):
            if forward is None:
                del merger.forward
            else:
                merger.forward = forward
