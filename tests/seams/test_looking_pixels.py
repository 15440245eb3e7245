"""What was looked at while rolling out is what is learned from: pixels and features, token by token; and files that go away."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rft.data.budget import Budget
from rft.data.frames import FrameStore
from rft.data.media import read
from rft.families import Family
from rft.hf import logprobs
from rft.hf.logprobs import Lens
from rft.hf.models import LoadedModel
from rft.hf.pixels import patchify
from rft.hf.replay import through_tower
from rft.hf.step import Stage
from rft.hf.vision import plain_model
from rft.quarantine import Quarantine
from rft.recipe import Sampling, Trainable
from rft.rollout.perceive import Final, State, Turn
from rft.types import Batch, Rollout, Sample, View
from tests.looking import ALONE, EVERY, Wandering, generation, looking_stage, pointing, taught_by, wandering, worth
from tests.seams.test_looking import FAMILIES, one_thread  # noqa: F401  (a fixture)
from tests.stages import opened, phase_of
from tests.videos import mark, spaced, write_video

LARGE = Budget(fps=2.0, min_pixels=8 * 784, max_pixels=12 * 784)  # marks can be read
LANGUAGE, PROJECTOR, TOWER = Trainable(projector=False), Trainable(), Trainable(vision=True)
PHASE = phase_of(sampling=Sampling(max_tokens=8))


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_marked(tmp_path_factory.mktemp("marked"))


def write_marked(folder: Path) -> Path:
    """Three clips whose frames carry their number, counted on from clip to clip."""
    rows = []
    for i in range(3):
        write_video(folder / f"{i}.mp4", spaced(8, 64 + 8 * i))
        row = {"id": f"m{i}", "video": f"{i}.mp4", "question": "When?", "answer": {"span": [1.0, 3.0]}, "task": "grounding"}
        rows.append(json.dumps(row) + "\n")
    (folder / "train.jsonl").write_text("".join(rows))
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Ids of a row [T], and of each placeholder in it the view, its number in the view, and a digest of what stood there."""

    ids_T: np.ndarray
    tokens: Sequence[tuple[View, int, bytes]]
    numbers: Sequence[tuple[View, list[int]]]  # the frames that can be read in the pixels of each view


@contextmanager
def recording(policy: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Forward]]:
    """Every forward of the model that shows anything."""
    found: list[Forward] = []
    asked: list[list[View]] = []
    given_tower: list[Mapping[View, Tensor]] = []
    family, plain = policy.family, Lens.media_inputs

    def listening(lens: Lens, model: Any, views: Sequence[View], fillers: Sequence[str] = ()) -> dict[str, Any]:
        asked.append(list(views))
        return plain(lens, model, views, fillers)

    def inside(model: Any, views: Sequence[View], patches: Mapping[View, Tensor], *rest: Any) -> Any:
        given_tower.append(patches)
        return through_tower(model, views, patches, *rest)

    def hook(module: Any, args: tuple, given: dict[str, Any]) -> None:
        if "pixel_values_videos" not in given and "mm_encoder_outputs" not in given:
            return
        views, numbers = asked.pop(), []
        ids_T = given["input_ids"].flatten().numpy()
        if given_tower or "pixel_values_videos" in given:
            sizes = [4 * v.tokens for v in views]
            patches = given_tower.pop() if given_tower else None
            pixels = given["pixel_values_videos"].split(sizes) if patches is None else [patches[v] for v in views]
            numbers = [(v, [mark(f) for f in frames_of(p, v, family)]) for v, p in zip(views, pixels, strict=True)]
            parts = [p.unflatten(0, (-1, 4)) for p in pixels]
        else:
            with torch.no_grad():
                parts = given["mm_encoder_outputs"]["video"].pooler_output[: len(views)]
        tokens = [(v, k, digest(t)) for v, part in zip(views, parts, strict=True) for k, t in enumerate(part)]
        found.append(Forward(ids_T=ids_T, tokens=tokens, numbers=numbers))

    monkeypatch.setattr(Lens, "media_inputs", listening)
    monkeypatch.setattr(logprobs, "through_tower", inside)
    handle = plain_model(policy.model).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
        monkeypatch.undo()


def digest(x: Tensor) -> bytes:
    return blake2b(x.detach().contiguous().numpy().tobytes(), digest_size=16).digest()


def frames_of(patches_PD: Tensor, view: View, family: Family) -> np.ndarray:
    """What `patchify` made patches of: float [F, H, W, 3] in 0 to 255."""
    t, h, w = view.grid
    merge, size = family.merge, family.patch
    x = patches_PD.view(t, h // merge, w // merge, merge, merge, 3, family.temporal_patch, size, size)
    x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(-1, 3, h * size, w * size).permute(0, 2, 3, 1)
    return ((x * torch.tensor(family.std) + torch.tensor(family.mean)) * 255).numpy()


def along(stage: Stage, batches: Sequence[Batch], forward: Forward) -> list[list[bytes]]:
    """What stood at the placeholders of every example, in order, by where its nodes lie in the row."""
    pad = stage.lens.video_pad_id
    at = dict(zip(np.flatnonzero(forward.ids_T == pad), (d for *_, d in forward.tokens), strict=True))
    found, begin = [], 0
    for pack in (b.pack for b in batches):
        stops = begin + np.cumsum([len(n.ids_T) for n in pack.nodes])
        for example, path in zip(pack.examples, pack.paths, strict=True):
            places = np.concatenate([np.arange(stops[n] - len(pack.nodes[n].ids_T), stops[n]) for n in path])
            assert forward.ids_T[places].tolist() == example.ids_T.tolist()
            found.append([at[p] for p in places if p in at])
        begin = stops[-1]
    return found


STORES: dict[str, Callable[[], FrameStore]] = {
    "roomy": lambda: FrameStore(2**28),
    "one": lambda: FrameStore(4 * 64 * 128 * 3),  # every view makes the last one go
    "none": lambda: FrameStore(1),
}


@pytest.mark.parametrize("store", ["roomy", pytest.param("one", marks=pytest.mark.slow), "none"])
@pytest.mark.parametrize("context", ["append", "fresh"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_learner_saw_what_the_rollout_saw(
    family: str, context: str, store: str, tiny_folders: dict[str, Path], marked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels in every forward: read back as frame numbers, and by digest at every placeholder."""
    policy = opened(tiny_folders[family], PHASE, trainable=TOWER)
    stage = wide(looking_stage(policy, PHASE, marked, wandering(), context, frames=STORES[store]()))
    with recording(policy, monkeypatch) as forwards:
        found = generation(policy.model, stage)
        rolled, forwards[:] = list(forwards), []
        frames = STORES[store]()  # empty again
        learner = replace(stage, lens=replace(stage.lens, frames=frames))
        taught_by(policy.model, learner, found.batches, found.agreed)
    (taught,) = forwards
    shown = {v for r in found.rollouts for v in r.views}
    assert len(shown) > 6 and {len(r.views) for r in found.rollouts} == {1, 2, 3}
    for forward in (*rolled, taught):
        assert (forward.ids_T == stage.lens.video_pad_id).sum() == len(forward.tokens)
        for view, numbers in forward.numbers:
            assert numbers == [*view.frames, *view.frames[-1:] * (len(view.frames) % 2)]
    at = {(v, k): d for f in rolled for v, k, d in f.tokens}
    assert {v for v, _ in at} == shown
    assert at == {(v, k): d for v, k, d in taught.tokens}
    wanted = [[at[v, k] for s in said for v in s.views for k in range(v.tokens)] for r in found.rollouts for said in r.contexts]
    assert along(stage, found.batches, taught) == wanted
    assert len({tuple(w) for w in wanted}) > 6
    for forward in rolled:  # decoded by nobody's store
        for view in {v for v, *_ in forward.tokens}:
            own = patchify(torch.tensor(read(view)), view, policy.family).unflatten(0, (-1, 4))
            assert [at[view, k] for k in range(view.tokens)] == [digest(t) for t in own]


@pytest.mark.parametrize("room", [2**24, 0], ids=["roomy", "none"])
@pytest.mark.parametrize("how", ["append", "fresh", "replay"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_learner_got_the_features_that_the_rollout_got(
    family: str, how: str, room: int, tiny_folders: dict[str, Path], marked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a frozen tower, remembered or made again; regions and maps too. And they are those of the pixels."""
    policy = opened(tiny_folders[family], PHASE, trainable=LANGUAGE if room else PROJECTOR)
    make, ends = (pointing(), range(0, 400, 20)) if how == "replay" else (wandering(), range(0, 400, 3))
    context = "append" if how == "replay" else how
    given = {"frames": FrameStore(2**28 if room else 1), "room": room, "ends": ends}
    stage = wide(looking_stage(policy, PHASE, marked, make, context, **given))
    with recording(policy, monkeypatch) as forwards:
        found = generation(policy.model, stage)
        rolled, forwards[:] = list(forwards), []
        memory = policy.memory(STORES["none"](), room)
        memory.encode(policy.model, [v for r in found.rollouts for v in r.views])
        for lens in (stage.lens, replace(stage.lens, memory=memory)):
            taught_by(policy.model, replace(stage, lens=lens), found.batches, found.agreed)
    assert len(forwards) == 2 and {len(r.views) for r in found.rollouts} >= {1, 2}
    at = {(v, k): d for f in rolled for v, k, d in f.tokens}
    wanted = [[at[v, k] for s in said for v in s.views for k in range(v.tokens)] for r in found.rollouts for said in r.contexts]
    assert along(stage, found.batches, forwards[0]) == wanted
    assert len({tuple(w) for w in wanted}) > 3


def wide(stage: Stage) -> Stage:
    """Pictures so large that their marks can be read."""
    return replace(stage, renderer=replace(stage.renderer, budget=LARGE, max_prompt_tokens=4096))


class Vandal(Wandering):
    """Somebody takes the file away, or writes over it, before the second look."""

    way = "gone"

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        path = Path(state.sample.media[0].source)
        if state.sample.id == "m1":
            path.unlink(missing_ok=True)
            if self.way == "garbage":
                path.write_bytes(b"no video " * 100)
        return super().observe(reply, media, state)


@pytest.mark.parametrize("way", ["gone", "garbage"])
@pytest.mark.parametrize("trainable", [TOWER, LANGUAGE], ids=["pixels", "remembered"])
@pytest.mark.parametrize("context", ["append", "fresh"])
def test_a_video_that_goes_away_between_rounds_does_not_end_the_step(
    context: str, trainable: Trainable, way: str, tiny_folders: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The look is refused, the model is told, the reward sees why; what was seen is learned from, and then set aside."""
    marked = write_marked(tmp_path)
    monkeypatch.setattr(Vandal, "way", way)
    seen: dict[str, list[tuple[str, ...]]] = {}

    def reward(rollout: Rollout, sample: Sample) -> float:
        seen.setdefault(sample.id, []).append(rollout.refused)
        return worth(rollout, sample)

    policy = opened(tiny_folders["qwen2_5_vl"], PHASE, trainable=trainable)
    _, budget = wandering(turns={"m0": 2, "m1": 2, "m2": 2})
    make = lambda: Vandal(budget=budget, frames=4, turns={"m0": 2, "m1": 2, "m2": 2})  # noqa: E731
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", total=3, max_share=0.5)
    stage = wide(looking_stage(policy, PHASE, marked, (make, budget), context, reward=reward, quarantine=quarantine))
    batches, agreed, _ = stage.step(EVERY, model=policy.model, reference=None, step=0, together=ALONE)
    assert set(seen) == {"m0", "m1", "m2"} and not any(any(r) for r in (*seen["m0"], *seen["m2"]))
    assert {why for refused in seen["m1"] for why in refused} == {"unreadable"}
    told = ["Not shown: it cannot be read." in policy.tokenizer.decode(e.ids_T) for e in batches[1].pack.examples]
    assert sum(told) >= 2
    assert taught_by(policy.model, stage, batches, agreed).flat.norm() > 1e-3
    assert [s.id for s in stage.open([1], 1)[0]] != ["m1"] and "m1" in (tmp_path / "quarantine.jsonl").read_text()
