"""A rollout that goes on: what an earlier call has run over is not run over again, and nothing else is different.

Equal is the same tokens, and 1e-5 or less between the logits behind every context, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from rft.data.budget import Budget
from rft.data.frames import FrameStore
from rft.data.samples import read_samples
from rft.data.tree import grow
from rft.hf import generate
from rft.hf.generate import ModelPolicy
from rft.hf.kept import Kept
from rft.hf.logprobs import Lens
from rft.hf.models import LoadedModel
from rft.recipe import Trainable
from rft.rollout.policy import Context, Limits, Reply
from rft.rollout.render import Renderer
from rft.types import Segment
from tests.stages import opened, phase_of, stage_of

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
ENDS = tuple(range(0, 500, 5))  # a fifth of all tokens end a turn: rows finish at any time
LIMITS = Limits(max_tokens=12)
TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of keys and values: layers, key heads, their size, float32


class Seen(ModelPolicy):
    """Notes the logits behind every context, by its key."""

    def _decode(self, logits_BV: Tensor, forward: Any, keys_B: np.ndarray, limits: Limits) -> list[Reply]:
        self.logits: dict[int, Tensor] = getattr(self, "logits", {})
        self.logits |= dict(zip(keys_B.tolist(), logits_BV.clone(), strict=True))
        return super()._decode(logits_BV, forward, keys_B, limits)

    @property
    def held(self) -> int:
        """Tokens whose keys are held."""
        lengths = {x.shape[1] for layer in self._kept.layers.values() for x in layer}
        assert len(lengths) <= 1
        return max(lengths, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    policy: LoadedModel
    lens: Lens
    renderer: Renderer
    prompts: Sequence[Segment]  # a clip each
    images: Sequence[Segment]  # what the world says next: each shows something else
    clips: Sequence[Segment]
    text: Segment

    def seen(self, **given: Any) -> Seen:
        lens = given.pop("lens", self.lens)
        return Seen(self.policy.model, lens, ENDS, **given)

    def oracle(self) -> Seen:
        """Pixels in every forward, a row per context."""
        return self.seen(lens=replace(self.lens, sharing="expanded", memory=None), keeps=True)


def bench_of(policy: LoadedModel, mixed: Path, memory: bool = False) -> Bench:
    stage = stage_of(policy, phase_of(), mixed)
    wide = replace(stage.renderer, budget=Budget(fps=1.0, min_pixels=4 * 784, max_pixels=4 * 1024))
    samples = read_samples(mixed / "train.jsonl")[0]
    shown = {kind: [s for s in samples if s.media and s.media[0].kind == kind] for kind in ("video", "image")}
    family, frames = policy.family, FrameStore(2**28)

    def said(kind: str, number: int, renderer: Renderer) -> Segment:
        view = replace(renderer.view(shown[kind][number], 0), media=1)
        pads = family.placeholder_text(kind, view.grid, view.pair_seconds)
        text = f"<|im_end|>\n<|im_start|>user\n{family.vision_start}{pads}{family.vision_end}And?<|im_end|>\n"
        return Segment(author="world", text=text, ids=tuple(renderer.encode(text)), views=(view,))

    return Bench(
        policy=policy,
        lens=policy.lens(frames, memory=policy.memory(frames, 2**28) if memory else None),
        renderer=wide,
        prompts=[wide.prompt(replace(s, messages=tuple(wide.messages(s)))) for s in shown["video"][:2]],
        images=[said("image", i, wide) for i in range(2)],
        clips=[said("video", i, stage.renderer) for i in (2, 3)],  # pairs of one token, where the prompt's have four
        text=Segment(author="world", text="<|im_end|>\nGo on.", ids=tuple(wide.encode("<|im_end|>\nGo on."))),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest, tiny_folders: dict[str, Path], mixed: Path) -> Bench:
    policy = opened(tiny_folders[request.param], phase_of())
    assert policy.sharing == "packed"
    found = bench_of(policy, mixed)
    assert found.clips[0].views[0].grid[1:] != found.prompts[0].views[0].grid[1:]
    return found


def after(context: Context, reply: Reply, word: Segment, key: int) -> Context:
    spoken = Segment(author="policy", text="", ids=reply.ids)
    return Context(segments=(*context.segments, spoken, word), key=key)


Calls = list[tuple[list[Context], list[Reply]]]


def three_rounds(bench: Bench, policy: Seen, note: Callable[[], None] = lambda: None) -> Calls:
    """Four of one clip and two of another. Row 5 stops after the first round, row 3 after the second; rows 0 and 1 are
    shown the same picture. `note` is called after every round."""
    images, clips, text = bench.images, bench.clips, bench.text
    contexts = [Context(segments=(bench.prompts[row // 4],), key=row) for row in range(6)]
    words = [
        {0: images[0], 1: images[0], 2: clips[0], 3: text, 4: clips[1]},
        {4: images[1], 0: clips[0], 1: text, 2: images[1]},  # in another order
    ]
    calls, rows = [], list(range(6))
    for said in [*words, {}]:
        replies = policy.extend(contexts, LIMITS)
        calls.append((contexts, replies))
        note()
        by_row = dict(zip(rows, zip(contexts, replies, strict=True), strict=True))
        contexts = [after(*by_row[row], word, key=100 * len(calls) + row) for row, word in said.items()]
        rows = list(said)
    return calls


def assert_same(ours: Calls, theirs: Calls) -> None:
    for (contexts, mine), (others, other) in zip(ours, theirs, strict=True):
        assert contexts == others
        for one, two in zip(mine, other, strict=True):
            assert (one.ids, one.stop) == (two.ids, two.stop)
            assert np.abs(np.subtract(one.logprobs, two.logprobs)).max() <= 1e-5


def assert_same_logits(ours: Seen, theirs: Seen) -> None:
    assert ours.logits.keys() == theirs.logits.keys()
    for key, logits_V in ours.logits.items():
        assert (logits_V - theirs.logits[key]).abs().max() <= 1e-5, key


def test_three_rounds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rft.hf.decode.BUCKET", 4)  # rows get more room on their way
    keeping, fresh, oracle = bench.seen(keeps=True), bench.seen(), bench.oracle()
    prefilled, held, rows = [], [], []

    def note() -> None:
        prefilled.append(keeping.prefilled)
        held.append(keeping.held)

    plain = generate.Branches.keep
    monkeypatch.setattr(generate.Branches, "keep", lambda self, left: rows.append(len(left)) or plain(self, left))
    ours = three_rounds(bench, keeping, note)
    assert len(rows) >= 3  # given up on the way, more than once in some round
    theirs = three_rounds(bench, fresh)
    assert_same(ours, theirs)
    assert_same(ours, three_rounds(bench, oracle))
    assert_same_logits(keeping, fresh)
    assert_same_logits(keeping, oracle)
    lengths = [[len(r.ids) for r in replies] for _, replies in ours]
    met = {length for mine in lengths for length in mine}
    assert 1 in met and len(met) >= 5
    assert len({r.ids for r in ours[0][1]}) == 6  # nothing is shared behind the prompts

    # The prompts once; then of each row the last token of its reply and what was said.
    prompts = sum(len(p.ids) for p in bench.prompts)
    said = [[len(c.segments[-1].ids) for c in contexts] for contexts, _ in ours]
    assert prefilled == [prompts, prompts + sum(said[1]) + 5, prompts + sum(said[1]) + 5 + sum(said[2]) + 4]
    whole = [prompts + sum(len(c.ids) - len(c.segments[0].ids) for c in contexts) for contexts, _ in ours]
    assert fresh.prefilled == sum(whole) > 2 * keeping.prefilled
    assert held == [tokens + sum(mine) - len(mine) for tokens, mine in zip(whole, lengths, strict=True)]
    assert fresh.held == oracle.held == 0
    keeping.extend([], LIMITS)
    assert keeping.held == 0


def test_a_forward_per_tree(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    together = bench.seen(keeps=True)
    expected = three_rounds(bench, together)
    monkeypatch.setattr(generate, "PREFILL", 1)
    apart = bench.seen(keeps=True)
    assert_same(three_rounds(bench, apart), expected)
    assert_same_logits(apart, together)
    assert apart.prefilled == together.prefilled


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_frozen_tower_made(family: str, tiny_folders: dict[str, Path], mixed: Path) -> None:
    """Deepstack features go to the new tokens alone."""
    policy = opened(tiny_folders[family], phase_of(), trainable=Trainable(vision=False, projector=False))
    bench = bench_of(policy, mixed, memory=True)
    keeping, oracle = bench.seen(keeps=True), bench.oracle()
    assert bench.lens.memory is not None
    assert_same(three_rounds(bench, keeping), three_rounds(bench, oracle))
    assert_same_logits(keeping, oracle)
    assert keeping.prefilled < oracle.prefilled / 2


def test_little_room(bench: Bench) -> None:
    """Nothing is kept where several waves are needed, nor where the only one does not fit; the replies are the same."""
    plenty = bench.seen(keeps=True)
    expected = three_rounds(bench, plenty)
    first = sum(len(p.ids) for p in bench.prompts) + 6 * LIMITS.max_tokens
    met = []
    for room in (1, first * TOKEN - 1, first * TOKEN):
        held: list[int] = []
        policy = bench.seen(keeps=True, room=room)
        assert_same(three_rounds(bench, policy, lambda policy=policy, held=held: held.append(policy.held)), expected)
        assert_same_logits(policy, plenty)
        met.append((policy.prefilled, held))
    assert met[0] == (sum(len(c.ids) for contexts, _ in expected for c in contexts), [0, 0, 0])  # a context at a time
    assert met[1][1][0] == 0 < met[2][1][0]
    assert met[0][0] > met[1][0] > met[2][0] > plenty.prefilled

    context, reply = expected[0][0][0], expected[0][1][0]
    alone = len(context.ids) + LIMITS.max_tokens
    for room, is_held in ((alone * TOKEN - 1, False), (alone * TOKEN, True)):
        policy = bench.seen(keeps=True, room=room)
        assert [r.ids for r in policy.extend([context], LIMITS)] == [reply.ids]
        assert policy.held == (len(context.ids) + len(reply.ids) - 1 if is_held else 0)


def test_what_does_not_go_on_is_run_over(bench: Bench) -> None:
    """Each against a policy that holds nothing, with the tokens that have to be run over."""
    prompt, image = bench.prompts[0], bench.images[0]
    first = Context(segments=(prompt,), key=1)
    (reply,) = bench.seen().extend([first], LIMITS)
    spoken = Segment(author="policy", text="", ids=reply.ids)
    assert len(reply.ids) >= 3
    changed = replace(spoken, ids=(reply.ids[0] + 1, *reply.ids[1:]))
    shorter = replace(spoken, ids=reply.ids[:-1])
    elsewhere = replace(prompt, views=(replace(prompt.views[0], source=bench.prompts[1].views[0].source),))
    tail = len(image.ids)
    cases = {
        (bench.prompts[1],): len(bench.prompts[1].ids),
        (elsewhere, spoken, image): len(prompt.ids) + len(spoken.ids) + tail,  # the same ids, other pixels
        (image, prompt): tail + len(prompt.ids),
        (prompt, image): tail,
        (prompt, changed, image): len(reply.ids) + tail,
        (prompt, shorter, image): len(reply.ids) - 1 + tail,
        (prompt, spoken, image): 1 + tail,
        (prompt, spoken): 1,
        (prompt,): 1,  # the last token has logits to give
    }
    for segments, tokens in cases.items():
        policy, fresh = bench.seen(keeps=True), bench.seen()
        policy.extend([first], LIMITS)
        before = policy.prefilled
        context = Context(segments=segments, key=2)
        (mine,), (other,) = (p.extend([context], LIMITS) for p in (policy, fresh))
        assert mine.ids == other.ids
        assert (policy.logits[2] - fresh.logits[2]).abs().max() <= 1e-5
        assert policy.prefilled - before == tokens
        assert policy.held == len(context.ids) + len(mine.ids) - 1  # what did not go on has gone


def test_contexts_that_end_where_others_go_on(bench: Bench) -> None:
    """One asks for the logits behind a token that is known to the other; equal rows, and equal replies, are held once."""
    prompt, image = bench.prompts[0], bench.images[0]
    keeping, fresh = bench.seen(keeps=True), bench.seen()
    greedy = replace(LIMITS, temperature=0)
    first = [Context(segments=(prompt,), key=key) for key in (1, 2)]
    (reply, again) = keeping.extend(first, greedy)
    assert reply.ids == again.ids and keeping.held == len(prompt.ids) + len(reply.ids) - 1
    before = keeping.prefilled
    spoken = Segment(author="policy", text="", ids=reply.ids)
    paths = [(prompt, spoken, image), (prompt,), (prompt, spoken), (prompt, spoken, image), (prompt, spoken, bench.text)]
    contexts = [Context(segments=segments, key=10 + i) for i, segments in enumerate(paths)]
    assert [r.ids for r in keeping.extend(contexts, LIMITS)] == [r.ids for r in fresh.extend(contexts, LIMITS)]
    assert all((keeping.logits[key] - logits_V).abs().max() <= 1e-5 for key, logits_V in fresh.logits.items())
    assert keeping.prefilled - before == 1 + 1 + len(image.ids) + len(bench.text.ids)


def test_the_last_token_of_a_path_is_never_known(bench: Bench) -> None:
    """Whichever path comes first; and one that stands for pixels is shown with all of them."""
    short, long = (np.arange(20, 25), ()), (np.arange(30, 33), ())
    for branches in ([[short], [short, long]], [[short, long], [short]]):
        nodes, paths = grow(branches, family=bench.lens.family, image_pad_id=1, video_pad_id=2)
        kept = Kept()
        kept.add([short, long], np.array([7, 8, 9, 10, 11, 0, 1, 2]), (5,), 12)
        assert [k.tolist() for k in kept.known(nodes, branches, paths)] == [[7, 8, 9, 10], [0, 1]]
    view = bench.images[0].views[0]
    bare = Segment(author="world", text="", ids=(bench.lens.image_pad_id,) * view.tokens, views=(view,))
    context = Context(segments=(bench.prompts[0], bare), key=1)
    policy = bench.seen(keeps=True)
    (first,) = policy.extend([context], LIMITS)
    once = policy.logits[1]
    (second,) = policy.extend([context], LIMITS)
    assert first.ids == second.ids and (policy.logits[1] - once).abs().max() <= 1e-5
    assert policy.prefilled == 2 * len(context.ids)


def test_wrong_keys_would_be_seen(bench: Bench) -> None:
    """Where held keys or values are changed, the contexts that go on from them change, and only those."""
    fresh = bench.seen()
    expected = three_rounds(bench, fresh)
    contexts, _ = expected[0]
    num_prompts = sum(len(p.ids) for p in bench.prompts)
    for kind in (0, 1):
        for part in (slice(0, num_prompts), slice(num_prompts, num_prompts + 1)):
            policy = bench.seen(keeps=True)
            policy.extend(contexts, LIMITS)
            for layer in policy._kept.layers.values():
                layer[kind][:, part] = layer[kind][:, part].flip(2)
            policy.extend(expected[1][0], LIMITS)
            errors = {key: float((policy.logits[key] - fresh.logits[key]).abs().max()) for key in (100, 101, 102, 103, 104)}
            wrong = {key for key, error in errors.items() if error > 1e-3}
            right = {key for key, error in errors.items() if error <= 1e-5}
            if part.start == 0:
                assert wrong == set(errors)
            else:
                assert len(wrong) == 1 and len(right) == 4, errors  # whose reply is held first
