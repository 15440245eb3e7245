"""Rollouts that look again, from the look to the gradient, with small real models of both families in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rft.algo import OBJECTIVES
from rft.algo.credit import by_rollout
from rft.algo.diagnostics import shares
from rft.algo.guidance import Guidance
from rft.algo.losses import KL, Columns, token_weights
from rft.hf.columns import columns_of
from rft.hf.logprobs import token_logprobs
from rft.hf.models import LoadedModel
from rft.hf.step import Agreement, Stage
from rft.recipe import Phase, Sampling, Trainable
from rft.rollout.perceive import Allowance
from rft.rollout.perceptions import Iterative
from rft.rollout.reference import reference_rollout
from rft.scoring import Reward, score
from rft.types import POLICY, REFERENCE, WORLD, Batch, Example, Group, Pack, Rollout, Sample, Score, Scored, Segment
from tests.looking import (
    ALONE,
    ENDS,
    EVERY,
    Generation,
    Taught,
    expanded,
    generation,
    looking_stage,
    pointing,
    taught_by,
    wandering,
)
from tests.stages import opened, phase_of, relative

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
CONTEXTS = ("append", "fresh")
CLOSE = 1e-5
BOTH = pytest.mark.parametrize("context", CONTEXTS)
LANGUAGE = Trainable(vision=False, projector=False, language=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request: pytest.FixtureRequest, tiny_folders: dict[str, Path]) -> LoadedModel:
    """Everything learns."""
    return opened(tiny_folders[request.param], phase_of())


@pytest.fixture(scope="module", params=FAMILIES)
def blind(request: pytest.FixtureRequest, tiny_folders: dict[str, Path]) -> LoadedModel:
    """The language model learns, and what tower and mergers made is remembered."""
    return opened(tiny_folders[request.param], phase_of(), trainable=LANGUAGE)


def phase(**changes: Any) -> Phase:
    return phase_of(**{"sampling": Sampling(max_tokens=8), **changes})


def columns(batches: Sequence[Batch]) -> list[tuple]:
    return [
        (*(getattr(e, name).tobytes() for name in ("ids_T", "authors_T", "advantages_T", "sampler_T")), e.views, e.weight)
        for b in batches
        for e in b.pack.examples
    ]


def lengths(found: Generation) -> list[int]:
    """Turns of every rollout."""
    return [len(r.turns) for r in found.rollouts]


def assert_same_gradients(ours: Taught, theirs: Taught) -> None:
    assert abs(ours.loss - theirs.loss) <= CLOSE * max(1, abs(theirs.loss))
    assert theirs.flat.norm() > 1e-3
    assert relative(ours.flat, theirs.flat) <= CLOSE
    least = CLOSE * theirs.flat.norm()
    for name, gradient in theirs.gradients.items():  # small parameters would drown in the whole
        assert (ours.gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + least, name


@BOTH
def test_a_perception_that_never_looks_is_the_plain_rollout(policy: LoadedModel, context: str, world: Path) -> None:
    """Rollouts, examples, loss and gradient to the last bit: a random model names no clue."""
    budget = Allowance(rounds=3)
    never = (lambda: Iterative(budget=budget), budget)
    plain, other = (looking_stage(policy, phase(), world, how, context) for how in (None, never))
    assert not other.looking.is_single
    one, two = generation(policy.model, plain), generation(policy.model, other)
    assert one.groups == two.groups and columns(one.batches) == columns(two.batches)
    first, second = (taught_by(policy.model, s, g.batches, g.agreed) for s, g in ((plain, one), (other, two)))
    assert first.flat.norm() > 1e-3
    assert torch.equal(first.loss, second.loss) and torch.equal(first.flat, second.flat)


def test_one_round_is_the_same_appended_and_asked_anew(policy: LoadedModel, world: Path) -> None:
    """To the last bit; and with a second one the first is still the same, token for token."""
    for rounds in (1, 2):
        stages = [looking_stage(policy, phase(), world, wandering(rounds), context) for context in CONTEXTS]
        append, fresh = (generation(policy.model, s) for s in stages)
        if rounds == 1:
            assert append.groups == fresh.groups and columns(append.batches) == columns(fresh.batches)
            results = [taught_by(policy.model, s, g.batches, g.agreed) for s, g in zip(stages, (append, fresh), strict=True)]
            assert torch.equal(results[0].flat, results[1].flat) and results[0].flat.norm() > 1e-3
            continue
        assert set(lengths(append)) == set(lengths(fresh)) == {1, 2}
        for one, two in zip(append.rollouts, fresh.rollouts, strict=True):
            assert one.segments[:2] == two.segments[:2]
            assert one.views == two.views  # what is looked at depends on what was said
            assert len(one.contexts) == 1 and len(two.contexts) == len(two.turns)


SEVERAL = {
    "append": (wandering(blank=True), "append"),
    "windows": (wandering(rule="window", blank=True), "append"),
    "fresh": (wandering(blank=True), "fresh"),
    "replay": (pointing(), "append"),
}


@pytest.fixture(params=SEVERAL)
def several(request: pytest.FixtureRequest, policy: LoadedModel, world: Path) -> tuple[Stage, Generation]:
    """Groups whose members have one, two and three rounds."""
    stage = several_stage(policy, request.param, world)
    return stage, generation(policy.model, stage)


def several_stage(policy: LoadedModel, name: str, world: Path, **changes: Any) -> Stage:
    ends = range(0, 400, 20) if name == "replay" else ENDS  # most are cut before they end
    return looking_stage(policy, phase(**changes), world, *SEVERAL[name], ends=ends)


def test_trees_of_several_rounds_are_rows_of_several_rounds(policy: LoadedModel, several: tuple[Stage, Generation]) -> None:
    """In loss and gradient, of every parameter; and so in passes between which the rounds of a rollout part."""
    stage, found = several
    assert {1, 3} <= set(lengths(found)) <= {1, 2, 3}
    is_fresh = stage.looking.context == "fresh"
    assert 0 < sum(bool(r.refused) for r in found.rollouts) < len(found.rollouts)  # some turns show nothing new
    for batch in found.batches:
        pack = batch.pack
        roots = sum(n.parent < 0 for n in pack.nodes)
        asked = {(e.ids_T[: np.flatnonzero(e.authors_T)[0]].tobytes(), e.views if is_fresh else ()) for e in pack.examples}
        assert roots == len(asked) and (roots > 1) == is_fresh
    rows = expanded(stage)
    theirs = taught_by(policy.model, rows, found.batches, found.agreed)
    assert_same_gradients(taught_by(policy.model, stage, found.batches, found.agreed), theirs)
    limit = max(len(e.ids_T) for b in found.batches for e in b.pack.examples)
    small = replace(stage, max_tokens_per_pass=limit)
    passes = small.passes([b.pack for b in found.batches], ALONE)
    assert len(passes) > 4 and any(one[0].examples[0].continues for one in passes) == is_fresh
    assert_same_gradients(taught_by(policy.model, small, found.batches, found.agreed), theirs)
    if is_fresh:  # the comparison would see another normalisation: a row per prompt
        apart = [replace(b, pack=replace(b.pack, examples=tuple(replace(e, continues=False) for e in b.pack.examples)))
                 for b in found.batches]  # fmt: skip
        assert relative(taught_by(policy.model, stage, apart, found.agreed).flat, theirs.flat) > 1e-2


def test_what_was_sampled_is_what_the_packed_forward_gives(policy: LoadedModel, several: tuple[Stage, Generation]) -> None:
    """Every trained token of every turn, where keys and values were kept from turn to turn and where they were not."""
    stage, found = several
    packs = [b.pack for b in found.batches]
    sampler_N = torch.from_numpy(np.concatenate([e.sampler_T[e.authors_T == POLICY] for p in packs for e in p.examples]))
    assert not sampler_N.isnan().any() and sampler_N.std() > 0.1
    for lens in (stage.lens, expanded(stage).lens):
        with torch.no_grad():
            logprobs_N, _ = token_logprobs(policy.model, packs, lens)
        assert (logprobs_N - sampler_N).abs().max() <= CLOSE
    assert 0 < taught_by(policy.model, stage, found.batches, found.agreed).metrics["sampler_gap"] < CLOSE


@pytest.mark.parametrize("context", CONTEXTS)
def test_remembered_vision_changes_nothing(blind: LoadedModel, context: str, world: Path) -> None:
    """Rollouts, and the gradient against rows with pixels of their own."""
    stages = [looking_stage(blind, phase(), world, wandering(), context, room=room) for room in (None, 2**24, 0)]
    plain, *remembered = [generation(blind.model, stage) for stage in stages]
    assert set(lengths(plain)) == {1, 2, 3}
    theirs = taught_by(blind.model, expanded(stages[0]), plain.batches, plain.agreed)
    for stage, found in zip(stages[1:], remembered, strict=True):
        assert stage.lens.memory is not None
        for one, two in zip(found.rollouts, plain.rollouts, strict=True):
            assert [(s.ids, s.views) for s in one.segments] == [(s.ids, s.views) for s in two.segments]
        assert_same_gradients(taught_by(blind.model, stage, found.batches, found.agreed), theirs)


@BOTH
def test_the_annotation_looks_too_and_joins_the_group(policy: LoadedModel, context: str, world: Path) -> None:
    """Its clue is the look of every round but the last, its answer the last turn; the gradient is that of rows."""
    stage = looking_stage(policy, phase(guidance=Guidance(), estimator="nonlinear"), world, wandering(rule="window"), context)
    found = generation(policy.model, stage)
    for group, batch in zip(found.groups, found.batches, strict=True):
        *others, last = [m.rollout for m in group.members]
        assert [r.is_reference for r in others] == [False] * 3 and last.is_reference
        begin, end = group.sample.answer["span"]
        answer = stage.renderer.answer_text(group.sample)
        assert last.turns == (*[f"{answer}<clue>{begin:g} to {end:g}</clue>"] * 2, answer)
        margin = 0.1 * (end - begin) + 1e-6
        assert len(last.views) == 3 and last.views[0].frames == others[0].views[0].frames
        for view in last.views[1:]:
            assert all(begin - margin <= s <= end + margin for s in view.seconds)
        rows = by_rollout(batch.pack.examples)
        assert [len(row) for row in rows] == [len(m.rollout.contexts) for m in group.members]
        given = {float(a) for e in rows[-1] for a in e.advantages_T[e.authors_T == REFERENCE]}
        assert len(given) == 1 and given != {0.0}  # shared by all of its rounds
        assert not any((e.authors_T == POLICY).any() for e in rows[-1])
    assert set(lengths(found)) == {1, 2, 3}
    ours = taught_by(policy.model, stage, found.batches, found.agreed)
    assert_same_gradients(ours, taught_by(policy.model, expanded(stage), found.batches, found.agreed))
    assert 0 < shares(ours.metrics)["reference/gradient_share"] < 1
    reference = sum(m.rollout.num_tokens for g in found.groups for m in g.members if m.rollout.is_reference)
    assert found.agreed.normaliser.reference == reference


@BOTH
def test_hints_go_on_behind_the_first_turn(policy: LoadedModel, context: str, world: Path) -> None:
    """Half of the annotation's first turn is given away; what is looked at next follows from hint and reply together."""
    guidance = Guidance(gate=99.0, hints=(0.25, 0.5))
    stage = looking_stage(policy, phase(guidance=guidance), world, wandering(), context)
    found = generation(policy.model, stage)
    assert set(lengths(found)) == {1, 2, 3}
    for group in found.groups:
        whole = reference_rollout(group.sample, stage.renderer, group.members[0].rollout.segments[0], looking=stage.looking)
        for rollout in (m.rollout for m in group.members):
            authors = [s.author for s in rollout.segments]
            assert authors == ["world", "reference", "policy"] + ["world", "policy"] * (len(rollout.turns) - 1)
            given = whole.segments[1].ids
            assert rollout.segments[1].ids == given[: len(given) // 2]
    ours = taught_by(policy.model, stage, found.batches, found.agreed)
    assert_same_gradients(ours, taught_by(policy.model, expanded(stage), found.batches, found.agreed))
    packs = [b.pack for b in found.batches]
    with torch.no_grad():
        logprobs_N, _ = token_logprobs(policy.model, packs, stage.lens)
    sampler_N = torch.from_numpy(np.concatenate([e.sampler_T[e.authors_T != WORLD] for p in packs for e in p.examples]))
    is_policy_N = ~sampler_N.isnan()
    assert (logprobs_N - sampler_N)[is_policy_N].abs().max() <= CLOSE and not is_policy_N.all()


@BOTH
def test_supervised_phases_teach_the_look_and_the_answer(
    context: str, tiny_folders: dict[str, Path], world: Path, policy: LoadedModel
) -> None:
    model = deepcopy(policy.model)
    stage = looking_stage(policy, phase(objective="nll", group_size=1), world, wandering(2), context, keep=range(4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = generation(model, stage, range(4))
    for (member,), batch in zip((g.members for g in found.groups), found.batches, strict=True):
        assert len(member.rollout.turns) == 2 and "<clue>" in member.rollout.turns[0] and member.rollout.answer
        trained = np.concatenate([e.ids_T[e.authors_T == REFERENCE] for e in batch.pack.examples])
        assert "".join(member.rollout.turns) == policy.tokenizer.decode(trained).replace(policy.tokenizer.eos_token, "")
    assert found.agreed.normaliser.rows == 4
    losses = []
    for _ in range(16):
        optimizer.zero_grad()
        loss, metrics = stage.loss(model, found.batches, found.agreed, ALONE)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert metrics["nll"] == pytest.approx(losses[-1])
    assert losses[-1] < 0.5 * losses[0], losses
    with torch.no_grad():
        each = [token_logprobs(model, [b.pack], stage.lens, temperature=1.0)[0] for b in found.batches]
    assert -torch.cat(each).mean() < 0.5 * losses[0]


@BOTH
def test_later_updates_and_the_penalty_see_every_round(policy: LoadedModel, context: str, world: Path) -> None:
    """Old log-probs are the first forward's; the reference's are its own; afterwards ratios and KL are those of rows."""
    stage = looking_stage(policy, phase(updates=2, kl=KL(weight=0.5), objective="grpo"), world, wandering(), context)
    model, reference = deepcopy(policy.model), deepcopy(policy.model)
    stir(reference, 1)

    def asked(packs: Sequence[Pack], kinds: frozenset[str]) -> list[torch.Tensor]:
        return stage.log_probs(reference, packs, kinds, ALONE)

    batches, agreed, _ = stage.step(EVERY, model=model, reference=asked, step=0, together=ALONE)
    assert sum(e.continues for b in batches for e in b.pack.examples) > 3 or context == "append"
    for batch in batches:
        with torch.no_grad():
            first, other = (token_logprobs(m, [batch.pack], expanded(stage).lens)[0] for m in (model, reference))
        assert (batch.old_N - first).abs().max() <= CLOSE and (batch.ref_N - other).abs().max() <= CLOSE
        assert (first - other).abs().max() > 1e-2
    before = taught_by(model, stage, batches, agreed)
    assert before.metrics["ratio"] == pytest.approx(1, abs=CLOSE) and before.metrics["kl"] > 1e-3
    assert_same_gradients(before, taught_by(model, expanded(stage), batches, agreed))
    stir(model, 2)
    after = taught_by(model, stage, batches, agreed)
    assert after.metrics["clipped"] > 0
    theirs = taught_by(model, expanded(stage), batches, agreed)
    assert_same_gradients(after, theirs)
    for name in ("ratio", "kl", "clipped", "entropy"):
        assert after.metrics[name] == pytest.approx(theirs.metrics[name], abs=1e-4)
    small = replace(stage, max_tokens_per_pass=max(len(e.ids_T) for b in batches for e in b.pack.examples))
    assert_same_gradients(taught_by(model, small, batches, agreed), theirs)
    again, _, _ = small.step(EVERY, model=policy.model, reference=asked, step=0, together=ALONE)
    for one, two in zip(again, batches, strict=True):
        assert (one.old_N - two.old_N).abs().max() <= CLOSE and (one.ref_N - two.ref_N).abs().max() <= CLOSE


def stir(model: torch.nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))


@contextmanager
def noise(model: Any, where: Callable[[Tensor], Tensor]) -> Iterator[list[tuple[int, ...]]]:
    """Before the head, states [B, K, h] have noise added at the places [B, K] that `where` names; the shapes met."""
    met: list[tuple[int, ...]] = []

    def added(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        (hidden_BKh,) = args
        met.append(tuple(hidden_BKh.shape[:2]))
        draw = torch.Generator().manual_seed(0)
        return (hidden_BKh + torch.randn(hidden_BKh.shape, generator=draw) * where(hidden_BKh)[..., None],)

    hook = model.get_output_embeddings().register_forward_pre_hook(added)
    try:
        yield met
    finally:
        hook.remove()


def test_what_the_world_says_is_not_predicted(policy: LoadedModel, several: tuple[Stage, Generation]) -> None:
    """Other logits before every token of the world, and behind the end, leave loss and gradient to the last bit."""
    stage, found = several
    rows = expanded(stage)
    examples = [e for b in found.batches for e in b.pack.examples]
    width = max(len(e.ids_T) for e in examples)
    authors_BT = np.full((len(examples), width), WORLD)
    for row, one in zip(authors_BT, examples, strict=True):
        row[: len(one.ids_T)] = one.authors_T
        assert not one.advantages_T[one.authors_T == WORLD].any() and np.isnan(one.sampler_T[one.authors_T == WORLD]).all()
    first = min(int(np.flatnonzero(row)[0]) for row in authors_BT)
    is_world_BK = torch.from_numpy(authors_BT[:, first:] == WORLD)  # what stands at k predicts the token behind it
    assert is_world_BK[:, : width - first - 8].any() and not is_world_BK.all()
    right = taught_by(policy.model, rows, found.batches, found.agreed)
    with noise(policy.model, lambda h: is_world_BK.float()) as met:
        same = taught_by(policy.model, rows, found.batches, found.agreed)
    assert met == [tuple(is_world_BK.shape)]
    assert torch.equal(same.loss, right.loss) and torch.equal(same.flat, right.flat)
    one = torch.zeros(is_world_BK.shape)
    one[tuple((~is_world_BK).nonzero()[-1])] = 1  # a single token of the policy
    with noise(policy.model, lambda h: one):
        other = taught_by(policy.model, rows, found.batches, found.agreed)
    assert relative(other.flat, right.flat) > 1e-3
    pads = (stage.lens.image_pad_id, stage.lens.video_pad_id)
    before = set()  # what is known where a trained token is predicted
    for i, batch in enumerate(found.batches):
        for e in batch.pack.examples:
            ends = np.cumsum([v.tokens for v in e.views])
            for t in np.flatnonzero(e.authors_T):
                shown = int((ends <= np.isin(e.ids_T[:t], pads).sum()).sum())
                before.add((i, e.ids_T[:t].tobytes(), e.views[:shown]))
    with noise(policy.model, lambda h: torch.zeros(h.shape[:2])) as met:
        taught_by(policy.model, stage, found.batches, found.agreed)
    assert met == [(1, len(before))]  # packed, the head is asked for nothing else


SAMPLE = Sample(id="s")


def spoken(*parts: int, stop: str = "answered", fresh: bool = True, first: int = 20) -> Rollout:
    """A turn of so many tokens each; the world says three before each of them."""
    segments = []
    for turn, length in enumerate(parts):
        segments.append(Segment(author="world", text="?", ids=(1, 2, 3 + turn), is_fresh=fresh and turn > 0))
        ids = tuple(range(first, first + length))
        segments.append(Segment(author="policy", text=f"{turn}", ids=ids, logprobs=(-1.0,) * length))
    return Rollout(sample_id="s", segments=tuple(segments), stop=stop)


def by_hand(policy: LoadedModel, world: Path, group: Group, **changes: Any) -> tuple[list[Example], Agreement, Columns]:
    """Examples, what is agreed on, and the columns of a loss in which every log-prob is -1."""
    stage = looking_stage(policy, phase(**changes), world, wandering(), "fresh")
    (found,) = stage.credit([group], ALONE)
    batch = Batch(pack=stage.pack(found))
    agreed = stage.agree([batch.pack], ALONE)
    return list(found), agreed, columns_of([batch], torch.full((batch.pack.num_trained,), -1.0))


def members(*given: tuple[Rollout, float, tuple[float, ...]]) -> Group:
    scored = [Scored(rollout=r, reward=reward, parts={"length": reward}, turns=turns) for r, reward, turns in given]
    return Group(sample=SAMPLE, members=tuple(scored))


@pytest.mark.parametrize("fresh", [True, False], ids=CONTEXTS[::-1])
def test_a_rollout_is_a_row_however_many_prompts_it_had(fresh: bool, policy: LoadedModel, world: Path) -> None:
    """Turns of 3 and 5 tokens are a row of 8; the other rollout is one of 4. Rewards 1 and 0: advantages are -+1/sqrt 2."""
    group = members((spoken(3, 5, fresh=fresh), 1.0, ()), (spoken(4, first=60), 0.0, ()))
    found, agreed, columns = by_hand(policy, world, group, estimator_args={"eps": 0.0})
    assert [e.continues for e in found] == ([False, True, False] if fresh else [False, False])
    assert (agreed.normaliser.rows, agreed.normaliser.tokens, agreed.normaliser.seen) == (2, 12, 12)
    assert columns.row_N.tolist() == [0] * 8 + [1] * 4
    wanted = {"grpo": [1 / 16] * 8 + [1 / 8] * 4, "dapo": [1 / 12] * 12, "bnpo": [1 / 12] * 12}
    wanted["dr_grpo"] = [1 / (2 * 8 * 3)] * 12  # the limit is that of three rounds of 8 tokens
    for name, weights in wanted.items():
        assert token_weights(columns, agreed.normaliser, name).tolist() == pytest.approx(weights)
    half = 0.5**0.5
    assert columns.advantages_N.tolist() == pytest.approx([half] * 8 + [-half] * 4)
    loss, _ = OBJECTIVES["grpo"](columns, agreed.normaliser)
    assert float(loss) == pytest.approx(-(8 * half / 16 - 4 * half / 8), abs=1e-7)  # 0: rows weigh the same
    loss, _ = OBJECTIVES["dapo"](columns, agreed.normaliser)
    assert float(loss) == pytest.approx(-(8 - 4) * half / 12)
    # one ratio for all turns of a row: the mean of 3 x 0.1 and 5 x 0.2 is 0.1625
    moved = replace(columns, old_N=columns.logprobs_N - torch.tensor([0.1] * 3 + [0.2] * 5 + [0.0] * 4))
    loss, _ = OBJECTIVES["gspo"](moved, agreed.normaliser, clip_high=9.0)
    assert float(loss) == pytest.approx(-half * (math.exp(0.1625) - 1) / 2)


@pytest.mark.parametrize("fresh", [True, False], ids=CONTEXTS[::-1])
def test_turns_are_compared_with_turns_where_they_are_known(fresh: bool, policy: LoadedModel, world: Path) -> None:
    """First turns are worth 1, 0 and 0.5, the second ones 0 and 2, the only third one stands alone.

    Means are 0.5 and 1, deviations are not divided by. Shared, rewards 3, 1 and 2 give 1, -1 and 0 to every turn.
    """
    group = members(
        (spoken(2, 1, 3, fresh=fresh), 3.0, (1.0, 0.0, 7.0)),
        (spoken(1, 2, fresh=fresh, first=60), 1.0, (0.0, 2.0)),
        (spoken(2, first=90), 2.0, (0.5,)),
    )
    plain = {"estimator_args": {"std": "none"}}
    _, _, columns = by_hand(policy, world, group, credit="turn", **plain)
    assert columns.advantages_N.tolist() == pytest.approx([0.5, 0.5, -1, 0, 0, 0, -0.5, 1, 1, 0, 0])
    _, _, columns = by_hand(policy, world, group, **plain)
    assert columns.advantages_N.tolist() == pytest.approx([1] * 6 + [-1] * 3 + [0] * 2)


@pytest.mark.parametrize("fresh", [True, False], ids=CONTEXTS[::-1])
def test_rollouts_that_would_have_looked_further_can_be_left_out(fresh: bool, policy: LoadedModel, world: Path) -> None:
    """It keeps its place among the rows and in the group's mean; its tokens weigh nothing, in any of its prompts."""
    group = members((spoken(3, 5, stop="turns", fresh=fresh), 1.0, ()), (spoken(4, first=60), 0.0, ()))
    for is_masked, weights, tokens in ((True, [0.0] * 8 + [1 / 8] * 4, 4), (False, [1 / 16] * 8 + [1 / 8] * 4, 12)):
        changes = {"mask_over_turns": is_masked, "estimator_args": {"std": "none"}}
        found, agreed, columns = by_hand(policy, world, group, **changes)
        assert {e.weight for e in found[:-1]} == {1.0 - is_masked} and found[-1].weight == 1
        assert (agreed.normaliser.rows, agreed.normaliser.tokens) == (2, tokens)
        assert token_weights(columns, agreed.normaliser, "grpo").tolist() == pytest.approx(weights)
        assert columns.advantages_N.tolist() == pytest.approx([0.5] * 8 + [-0.5] * 4)


def test_a_reward_may_wait_for_another(policy: LoadedModel, world: Path) -> None:
    """`look` counts, twice, only where `right` gives 0.5 at least: totals 1 + 2 x 0.25, 0.25 alone, and 0.5 + 2 x 1."""

    def right(rollout: Rollout, sample: Sample) -> float:
        return {3: 1.0, 4: 0.25, 5: 0.5}[rollout.num_tokens]

    def look(rollout: Rollout, sample: Sample) -> Score:
        return Score(value={3: 0.25, 4: 1.0, 5: 1.0}[rollout.num_tokens], turns=tuple(map(float, range(len(rollout.turns)))))

    rewards = [Reward(name="look", function=look, weight=2.0, only_if={"right": 0.5}), Reward(name="right", function=right)]
    (group,), _ = score([(SAMPLE, [spoken(3), spoken(4), spoken(4, 1)])], rewards)
    assert [m.reward for m in group.members] == [1.5, 0.25, 2.5]
    assert [m.parts["look"] for m in group.members] == [0.25, 1.0, 1.0]  # what it gave is in the log either way
    assert [m.turns for m in group.members] == [(1.0,), (), (0.5, 2.5)]
    _, _, columns = by_hand(policy, world, group, credit="turn", estimator_args={"std": "none"})
    first = (1.0 + 0.25 + 0.5) / 3  # without turns of its own, a member's reward is that of its turn
    wanted = [1 - first] * 3 + [0.25 - first] * 4 + [0.5 - first] * 4 + [0.0]
    assert columns.advantages_N.tolist() == pytest.approx(wanted)
