"""One prompt, one pass: the packed forward is the expanded one, in log-probs and in gradients.

Equal is a relative L2 distance of 1e-5 or less in float32, over every parameter that learns. The controls show that the
comparison would see each mistake, and that the loss alone would not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rft.algo import ESTIMATORS
from rft.algo.credit import credit, examples
from rft.algo.losses import KL
from rft.data.budget import Budget
from rft.data.clock import modalities
from rft.data.frames import FrameStore
from rft.data.samples import read_samples
from rft.errors import RecipeError
from rft.hf import generate, head
from rft.hf.generate import ModelPolicy
from rft.hf.head import policy_logits
from rft.hf.kernels import Plan
from rft.hf.logprobs import Lens, token_logprobs
from rft.hf.models import LoadedModel, open_policy, sharing_of
from rft.hf.pixels import patchify
from rft.hf.step import Agreement, Stage
from rft.hf.together import Together
from rft.recipe import Lora, Phase, Trainable
from rft.rollout.policy import Context, Limits
from rft.rollout.reference import reference_rollout
from rft.types import WORLD, Batch, Example, Group, Pack, Rollout, Sample, Scored, Segment, View
from tests.stages import length_reward, opened, phase_of, recipe_of, relative, stage_of

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
WIDE = Budget(fps=1.0, min_pixels=4 * 784, max_pixels=4 * 1024)  # pairs of 2 x 2 tokens: places and positions part
ALONE = Together()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    logprobs_N: Tensor
    entropy_N: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]  # by name, of every parameter that has one


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A model of which everything learns, and a stage over the synthetic clips."""

    policy: LoadedModel
    stage: Stage

    @property
    def model(self) -> Any:
        return self.policy.model


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest, tiny_folders: dict[str, Path], world: Path) -> Bench:
    policy = opened(tiny_folders[request.param], phase_of())
    assert policy.sharing == "packed"
    return Bench(policy=policy, stage=staged(policy, phase_of(), world))


def staged(policy: LoadedModel, phase: Phase, folder: Path, **changes: Any) -> Stage:
    stage = stage_of(policy, phase, folder, **changes)
    return replace(stage, renderer=replace(stage.renderer, budget=WIDE))


def expanded(lens: Lens) -> Lens:
    """The oracle's: pixels in every forward, a row per example."""
    return replace(lens, sharing="expanded", memory=None)


def run(model: Any, packs: Sequence[Pack], lens: Lens, kinds: frozenset[str] = frozenset()) -> Run:
    """Forward and backward of a loss that every token moves in its own way."""
    model.zero_grad()
    logprobs_N, entropy_N = token_logprobs(model, packs, lens, kinds=kinds)
    weights_N = torch.sin(1 + 1.7 * torch.arange(len(logprobs_N)))
    loss = (logprobs_N * weights_N).mean()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Run(logprobs_N=logprobs_N.detach(), entropy_N=entropy_N, loss=loss.detach(), gradients=gradients)


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for _, g in sorted(gradients.items())])


def assert_equal(ours: Run, theirs: Run) -> None:
    assert (ours.logprobs_N - theirs.logprobs_N).abs().max() <= 1e-5
    assert (ours.entropy_N - theirs.entropy_N).abs().max() <= 1e-5
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert relative(flat(ours.gradients), flat(theirs.gradients)) <= 1e-5
    least = 1e-5 * flat(theirs.gradients).norm()
    for name, gradient in theirs.gradients.items():  # small parameters would drown in the whole
        assert (ours.gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + least, name


def assert_packed_is_expanded(model: Any, packs: Sequence[Pack], lens: Lens, **given: Any) -> Run:
    assert lens.sharing == "packed"
    ours = run(model, packs, lens, **given)
    assert_equal(ours, run(model, packs, expanded(lens), **given))
    return ours


@contextmanager
def counting(model: Any, met: list[int]) -> Iterator[None]:
    """Inside, `met` gets the tokens of every forward, padding included."""
    hook = model.register_forward_pre_hook(lambda m, args, given: met.append(given["input_ids"].numel()), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def learns(model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def answer(draw: np.random.Generator, length: int) -> Segment:
    return Segment(author="policy", text="", ids=tuple(map(int, draw.integers(20, 250, length))))


def examples_of(sample: Sample, prompt: Segment, lengths: Sequence[int], seed: int = 0) -> list[Example]:
    """One answer per length; advantages that differ and sum to 0."""
    draw = np.random.default_rng(seed)
    rollouts = [Rollout(sample_id=sample.id, segments=(prompt, answer(draw, length))) for length in lengths]
    given = np.linspace(-1, 1, len(rollouts)) + (len(rollouts) == 1)
    return [one for r, a in zip(rollouts, given, strict=True) for one in examples(r, [a])]


def packs_of(stage: Stage, groups: dict[int, Sequence[int]]) -> list[Pack]:
    """A group per sample index, with answers of these lengths."""
    opened_at = zip(groups.items(), *stage.open(list(groups), 0), strict=True)
    return [stage.pack(examples_of(s, p, lengths, index)) for (index, lengths), s, p in opened_at]


RAGGED = {0: (9, 1, 4, 17), 1: (3, 3), 2: (12, 2, 6)}


def test_ragged_groups_in_one_row(bench: Bench) -> None:
    packs = packs_of(bench.stage, RAGGED)
    assert packs[0].num_tokens == len(packs[0].nodes[0].ids_T) + 31
    ours = assert_packed_is_expanded(bench.model, packs, bench.stage.lens)
    assert ours.gradients.keys() == learns(bench.model)
    one = run(bench.model, packs[1:2], bench.stage.lens)
    assert (one.logprobs_N - ours.logprobs_N[31:37]).abs().max() <= 1e-5  # neighbours in the row are not seen


def test_identical_answers_are_one_branch_with_all_their_weight(bench: Bench) -> None:
    ((sample, prompt),) = zip(*bench.stage.open([0], 0), strict=True)
    different = examples_of(sample, prompt, (5, 1, 9))
    pack = bench.stage.pack([*different, different[1], different[0]])
    assert len(pack.nodes) == 4 and pack.paths[3:] == pack.paths[1::-1]
    assert_packed_is_expanded(bench.model, [pack], bench.stage.lens)


def losses(model: Any, stage: Stage, batches: Sequence[Batch], agreed: Agreement) -> Run:
    """Of the stage's own objective."""
    model.zero_grad()
    loss, metrics = stage.loss(model, batches, agreed, ALONE)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found = torch.tensor([float(v) for v in metrics.values()])
    return Run(logprobs_N=found, entropy_N=found, loss=loss.detach(), gradients=gradients)


def assert_stages_equal(model: Any, stage: Stage, batches: Sequence[Batch], agreed: Agreement) -> Run:
    ours = losses(model, stage, batches, agreed)
    theirs = losses(model, replace(stage, lens=expanded(stage.lens), max_tokens_per_pass=0), batches, agreed)
    assert_equal(ours, theirs)
    assert abs(ours.loss - theirs.loss) <= 1e-5
    return ours


def test_a_group_of_one(bench: Bench, world: Path) -> None:
    """Supervised: the annotation alone. Nothing is shared, and nothing is different."""
    stage = staged(bench.policy, phase_of(objective="nll"), world)
    batches, agreed, _ = stage.step([0, 1, 2], model=bench.model, reference=None, step=0, together=ALONE)
    assert [len(b.pack.nodes) for b in batches] == [1, 1, 1]
    ours = assert_stages_equal(bench.model, stage, batches, agreed)
    assert ours.loss > 1 and ours.gradients.keys() == learns(bench.model)


def test_an_injected_row_is_a_branch_of_its_group(bench: Bench) -> None:
    """The annotation among sampled answers: no sampler log-probs, a length of its own, the group's statistics."""
    stage, draw = bench.stage, np.random.default_rng(1)
    ((sample, prompt),) = zip(*stage.open([3], 0), strict=True)
    sampled = [Rollout(sample_id=sample.id, segments=(prompt, answer(draw, n))) for n in (6, 2, 11)]
    rollouts = [*sampled, reference_rollout(sample, stage.renderer, prompt)]
    members = tuple(Scored(rollout=r, reward=x, parts={}) for r, x in zip(rollouts, (0.1, 0.4, 0.0, 1.0), strict=True))
    pack = stage.pack(credit(Group(sample=sample, members=members), ESTIMATORS["grpo"]))
    assert len(pack.nodes) == 5 and [n.parent for n in pack.nodes] == [-1, 0, 0, 0, 0]
    assert_stages_equal(bench.model, stage, [Batch(pack=pack)], stage.agree([pack], ALONE))


def test_videos_images_and_text_in_one_row(bench: Bench, mixed: Path) -> None:
    stage = staged(bench.policy, phase_of(), mixed)
    packs = packs_of(stage, {1: (4, 2), 0: (3, 8, 1), 2: (5, 5), 4: (2, 7)})
    kinds = [{v.kind for n in p.nodes for v in n.views} for p in packs]
    assert kinds == [{"image"}, {"video"}, set(), {"image"}]
    assert_packed_is_expanded(bench.model, packs, stage.lens)
    text = run(bench.model, packs[2:3], stage.lens)
    assert not any("visual" in n for n in text.gradients)
    filled = assert_packed_is_expanded(bench.model, packs[2:3], stage.lens, kinds=frozenset({"image", "video"}))
    assert filled.gradients.keys() == learns(bench.model)  # other ranks wait for them
    assert relative(filled.logprobs_N, text.logprobs_N) <= 1e-6
    assert all(not g.any() for n, g in filled.gradients.items() if "visual" in n)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_and_off(family: str, tiny_folders: dict[str, Path], world: Path) -> None:
    policy = opened(tiny_folders[family], phase_of(), lora=Lora(rank=4, alpha=8))
    with torch.no_grad():  # they start at zero, and would agree with no adapter
        for i, (name, parameter) in enumerate(policy.model.named_parameters()):
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
    stage = staged(policy, phase_of(), world)
    packs = packs_of(stage, RAGGED)
    ours = assert_packed_is_expanded(policy.model, packs, stage.lens)
    assert ours.gradients.keys() == learns(policy.model) and all("lora" in n for n in ours.gradients)
    with torch.no_grad(), policy.model.disable_adapter():
        reference, oracle = (token_logprobs(policy.model, packs, lens)[0] for lens in (stage.lens, expanded(stage.lens)))
    assert (reference - oracle).abs().max() <= 1e-5
    assert (reference - ours.logprobs_N).abs().max() > 1e-2


@contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def test_checkpointed_layers_find_their_tree_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree is an argument: when a layer is run again in the backward pass, it is there, and it is the same one."""
    packs, lens, attend, met = packs_of(bench.stage, RAGGED), bench.stage.lens, Plan.attend, []
    plain = run(bench.model, packs, lens)

    def spy(plan: Plan, layer: int, *rest: Any) -> Tensor:
        if len(plan.sweeps) > 1:  # the text's; the tower's windows are no tree
            met.append((layer, plan))
        return attend(plan, layer, *rest)

    monkeypatch.setattr(Plan, "attend", spy)
    with checkpointing(bench.model):
        ours = assert_packed_is_expanded(bench.model, packs, lens)
    assert [layer for layer, _ in met] == [0, 1, 1, 0] and len({plan for _, plan in met}) == 1
    assert_equal(ours, plain)


@pytest.mark.parametrize("projector", [False, True], ids=["features", "states"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_frozen_tower_made_is_shared(family: str, projector: bool, tiny_folders: dict[str, Path], mixed: Path) -> None:
    """Packed and from memory against expanded and from pixels."""
    policy = opened(tiny_folders[family], phase_of(), trainable=Trainable(vision=False, projector=projector))
    stage, frames = staged(policy, phase_of(), mixed), FrameStore(2**28)
    packs = packs_of(stage, {0: (3, 8), 1: (2, 4), 3: (5, 1)})
    memory = policy.memory(frames, 2**28)
    memory.encode(policy.model, [v for p in packs for n in p.nodes for v in n.views])
    calls: list[int] = []
    hook = policy.model.model.visual.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    lens = policy.lens(frames, memory=memory)
    ours = run(policy.model, packs, lens)
    assert not calls  # the tower was not asked
    hook.remove()
    assert_same_words(policy, lens, contexts_of(stage, (0, 1, 3), 2), Limits(max_tokens=6))
    assert_equal(ours, run(policy.model, packs, expanded(lens)))
    assert ours.gradients.keys() == learns(policy.model)
    assert any("merger" in n for n in ours.gradients) == projector


@pytest.mark.parametrize("forwards", [9, 4, 2])
def test_forwards_cut_by_tokens_are_one_gradient(bench: Bench, forwards: int) -> None:
    """A forward per example; the largest group in two packs of the same prefix; two groups together and one alone."""
    stage = bench.stage
    packs = packs_of(stage, RAGGED)
    sizes = [p.num_tokens for p in packs]
    limit = {9: 1, 4: sizes[0] - 1, 2: sizes[0] + sizes[1]}[forwards]
    batches, agreed, met = [Batch(pack=p) for p in packs], stage.agree(packs, ALONE), []
    with counting(bench.model, met):
        whole = losses(bench.model, stage, batches, agreed)
        cut = losses(bench.model, replace(stage, max_tokens_per_pass=limit), batches, agreed)
    assert met[0] == sum(sizes) and len(met[1:]) == 2 * forwards - 1  # all but the last are run again in the backward
    assert limit == 1 or max(met[1:]) <= limit
    assert_equal(cut, whole)
    assert_stages_equal(bench.model, replace(stage, max_tokens_per_pass=limit), batches, agreed)


def test_forwards_cut_by_tokens_keep_less(bench: Bench) -> None:
    """Bytes that wait for the backward: those of one forward, and not of all."""
    kept = []
    for limit in (0, 60):
        stage = replace(bench.stage, max_tokens_per_pass=limit)
        batches = [Batch(pack=p) for p in packs_of(bench.stage, RAGGED)]
        agreed = stage.agree([b.pack for b in batches], ALONE)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = stage.loss(bench.model, batches, agreed, ALONE)
        loss.backward()
        weights = {p.untyped_storage().data_ptr() for p in bench.model.parameters()}
        kept.append(sum(size for place, size in sizes.items() if place not in weights))
    assert kept[1] < 0.7 * kept[0]


def test_groups_without_signal_are_spared_and_still_count(bench: Bench, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not run over, and the step is still divided by their rows and tokens."""

    def reward(rollout: Rollout, sample: Sample) -> float:
        return 0.5 if sample.id in ("train_00000", "train_00002") else length_reward(rollout, sample)

    for objective in ("grpo", "dapo"):
        stage = staged(bench.policy, phase_of(objective=objective), world, reward=reward)
        batches, agreed, _ = stage.step([0, 1, 2, 3], model=bench.model, reference=None, step=0, together=ALONE)
        packs = [b.pack for b in batches]
        assert [stage.teaches(p) for p in packs] == [False, True, False, True]
        met: list[int] = []
        with counting(bench.model, met):
            spared = losses(bench.model, stage, batches, agreed)
            with monkeypatch.context() as patch:
                patch.setattr(Stage, "teaches", lambda self, pack: True)
                everyone = stage.agree(packs, ALONE)
                whole = losses(bench.model, stage, batches, everyone)
        assert met == [sum(packs[i].num_tokens for i in (1, 3)), sum(p.num_tokens for p in packs)]
        assert (agreed.normaliser.rows, agreed.normaliser.tokens) == (everyone.normaliser.rows, everyone.normaliser.tokens)
        assert agreed.normaliser.rows == 16
        assert spared.gradients.keys() == whole.gradients.keys()
        assert relative(flat(spared.gradients), flat(whole.gradients)) <= 1e-5
        assert abs(spared.loss - whole.loss) <= 1e-6
        two = stage.agree([packs[1], packs[3]], ALONE)
        other = losses(bench.model, stage, [batches[1], batches[3]], two)
        assert relative(flat(other.gradients), flat(whole.gradients)) > 0.1  # a normaliser of what is left is another step
        silent = losses(bench.model, stage, [batches[0], batches[2]], agreed)
        assert silent.gradients.keys() == learns(bench.model) and not flat(silent.gradients).any()
        pulled = replace(stage, phase=replace(stage.phase, kl=KL(weight=0.1)))
        assert all(map(pulled.teaches, packs))


class Widest(TorchDispatchMode):
    """The most rows of a tensor of logits that any operation, of the backward pass too, gave out."""

    def __init__(self, vocabulary: int, but: int) -> None:
        super().__init__()
        self.vocabulary, self.but, self.rows = vocabulary, but, 0  # the head's weight has `but` rows when it is transposed

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and one.ndim and one.shape[-1] == self.vocabulary:
                rows = one.numel() // self.vocabulary
                self.rows = max(self.rows, rows if rows != self.but else 0)
        return out


def test_no_tensor_holds_the_logits_of_all_tokens(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    packs, weight = packs_of(bench.stage, RAGGED), bench.model.get_output_embeddings().weight
    assert sum(p.num_trained for p in packs) == 57 and weight.shape[1] == 64
    runs, rows = [], []
    for chunk in (57, 5):
        monkeypatch.setattr(head, "CHUNK_BYTES", 4 * len(weight) * chunk)
        with Widest(len(weight), 64) as widest:
            runs.append(run(bench.model, packs, bench.stage.lens))
        rows.append(widest.rows)
    assert rows == [57, 5]
    assert_equal(runs[1], runs[0])
    assert_equal(runs[1], run(bench.model, packs, expanded(bench.stage.lens)))


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
def test_further_updates_on_what_was_sampled(bench: Bench, objective: str, world: Path) -> None:
    """Old log-probs are those of the weights that sampled, and the second update's ratios are off 1."""
    stage = staged(bench.policy, phase_of(objective=objective, updates=2), world)
    model = deepcopy(bench.model)
    batches, agreed, _ = stage.step([0, 1, 2], model=model, reference=None, step=0, together=ALONE)
    packs = [b.pack for b in batches]
    oracle = stage.log_probs(model, packs, agreed.kinds, ALONE, expanded(stage.lens))
    for batch, theirs in zip(batches, oracle, strict=True):
        assert len(batch.old_N) == batch.pack.num_trained
        assert (batch.old_N - theirs).abs().max() <= 1e-5
    losses_before = assert_stages_equal(model, stage, batches, agreed)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    losses_after = assert_stages_equal(model, stage, batches, agreed)
    assert abs(losses_before.loss - losses_after.loss) > 1e-3


def test_an_answer_that_counts_places_is_caught(bench: Bench) -> None:
    """Positions that go on from P, the number of tokens, where the clock stands at P + rope_delta."""
    packs = packs_of(bench.stage, {0: (9, 1, 4)})
    nodes = list(packs[0].nodes)
    count = len(nodes[0].ids_T)
    assert nodes[0].positions_3T[0, -1] + 1 != count
    for i in range(1, len(nodes)):
        places = count + np.arange(len(nodes[i].ids_T))
        nodes[i] = replace(nodes[i], positions_3T=np.broadcast_to(places, (3, len(places))))
    wrong = run(bench.model, [replace(packs[0], nodes=tuple(nodes))], bench.stage.lens)
    right = run(bench.model, packs, bench.stage.lens)
    assert relative(flat(wrong.gradients), flat(right.gradients)) > 1e-3


def test_a_prompt_cut_off_from_its_answers_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of the prompt without gradient: the loss is the very same."""
    packs, attend = packs_of(bench.stage, RAGGED), Plan.attend
    right = run(bench.model, packs, bench.stage.lens)

    def detached(plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        whole = attend(plan, layer, q, k, v, scale)
        if len(plan.sweeps) == 1:
            return whole
        is_prompt = torch.zeros(q.shape[2], 1, dtype=torch.bool)
        for start, stop in plan.sweeps[1].keys_S2:
            is_prompt[start:stop] = True
        cut = attend(plan, layer, q, *(torch.where(is_prompt, x.detach(), x) for x in (k, v)), scale)
        return torch.where(is_prompt, whole, cut)

    monkeypatch.setattr(Plan, "attend", detached)
    wrong = run(bench.model, packs, bench.stage.lens)
    assert torch.equal(wrong.loss, right.loss)
    assert relative(flat(wrong.gradients), flat(right.gradients)) > 1e-3


def test_a_last_state_cut_off_from_the_first_tokens_is_caught(bench: Bench) -> None:
    """The prompt's last hidden state feeds the first token of every answer; without its gradient the loss is the same."""
    packs = packs_of(bench.stage, {0: (9, 1, 4)})
    right = run(bench.model, packs, bench.stage.lens)

    def detached(module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (hidden_BKh,) = args  # the prompt's last token is the first that is kept
        return (torch.cat([hidden_BKh[:, :1].detach(), hidden_BKh[:, 1:]], dim=1),)

    hook = bench.model.get_output_embeddings().register_forward_pre_hook(detached)
    wrong = run(bench.model, packs, bench.stage.lens)
    hook.remove()
    assert torch.equal(wrong.loss, right.loss)
    assert relative(flat(wrong.gradients), flat(right.gradients)) > 1e-3


def test_positions_left_behind_by_a_rollout_change_nothing(bench: Bench) -> None:
    packs, lens = packs_of(bench.stage, RAGGED), bench.stage.lens
    runs = [run(bench.model, packs, one) for one in (lens, expanded(lens))]
    bench.model.model.rope_deltas = torch.full((1, 1), 777)
    try:
        for one, before in zip((lens, expanded(lens)), runs, strict=True):
            after = run(bench.model, packs, one)
            assert torch.equal(after.logprobs_N, before.logprobs_N)
            assert relative(flat(after.gradients), flat(before.gradients)) <= 1e-6
    finally:
        bench.model.model.rope_deltas = None


def test_what_draws_a_mask_per_row_is_not_shared(bench: Bench, tiny_folders: dict[str, Path]) -> None:
    folder = str(tiny_folders[bench.policy.family.name])
    dropped = {"lora": Lora(rank=2, alpha=4, dropout=0.1)}
    policy = open_policy(folder, recipe_of(phase_of(), **dropped), train=True)
    assert policy.sharing == policy.lens(bench.stage.lens.frames).sharing == "expanded"
    with pytest.raises(RecipeError, match=r"sharing: packed is not possible: lora.dropout"):
        open_policy(folder, recipe_of(phase_of(), sharing="packed", **dropped), train=True)
    assert sharing_of(bench.model, recipe_of(phase_of(), sharing="packed")) == ("packed", "")
    assert sharing_of(bench.model, recipe_of(phase_of(), sharing="expanded"))[0] == "expanded"
    assert sharing_of(bench.model, recipe_of(phase_of(), attention="eager"))[0] == "expanded"
    noisy = deepcopy(bench.model)
    noisy.config.text_config.attention_dropout = 0.1
    assert sharing_of(noisy, recipe_of(phase_of()))[0] == "expanded"
    with pytest.raises(RecipeError, match="attention_dropout"):
        sharing_of(noisy, recipe_of(phase_of(), sharing="packed"))


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bfloat16_is_no_further_from_float32_than_expanded(bench: Bench, way: str) -> None:
    packs, lens = packs_of(bench.stage, {0: (30, 20, 25, 9), 1: (40, 13, 21), 2: (28, 30)}), bench.stage.lens
    exact = run(bench.model, packs, expanded(lens))
    model = deepcopy(bench.model).bfloat16() if way == "weights" else bench.model
    errors = {}
    for one in (lens, expanded(lens)):
        with torch.autocast("cpu", torch.bfloat16) if way == "autocast" else nullcontext():
            rounded = run(model, packs, one)
        rms = (rounded.logprobs_N - exact.logprobs_N).square().mean().sqrt()
        errors[one.sharing] = (float(rms), relative(flat(rounded.gradients).float(), flat(exact.gradients)))
    assert 1e-4 < errors["packed"][0] <= 1.2 * errors["expanded"][0]
    assert 1e-4 < errors["packed"][1] <= 1.2 * errors["expanded"][1]


def look(stage: Stage, view: View, question: str) -> Segment:
    """The world's second word: it shows an image and asks on."""
    family = stage.lens.family
    shown = f"{family.vision_start}{family.placeholder_text('image', view.grid, ())}{family.vision_end}"
    text = f"<|im_end|>\n<|im_start|>user\n{shown}{question}<|im_end|>\n<|im_start|>assistant\n"
    return Segment(author="world", text=text, ids=tuple(stage.renderer.encode(text)), views=(view,))


def looks(stage: Stage, mixed: Path) -> tuple[Segment, list[Rollout]]:
    """A clip, an answer, an image, an answer. Two share all but the last answer, a third the first answer, all the prompt."""
    samples, (prompt,) = stage.open([0], 0)
    images = [s for s in read_samples(mixed / "train.jsonl")[0] if s.media and s.media[0].kind == "image"]
    one, two = (replace(stage.renderer.view(s, 0), media=1) for s in images[:2])
    draw = np.random.default_rng(4)
    first, other = answer(draw, 5), answer(draw, 3)
    branches = [
        (prompt, first, look(stage, one, "Which option?"), answer(draw, 7)),
        (prompt, first, look(stage, one, "Which option?"), answer(draw, 2)),
        (prompt, first, look(stage, two, "Which option?"), answer(draw, 4)),
        (prompt, other),
    ]
    return prompt, [Rollout(sample_id=samples[0].id, segments=segments) for segments in branches]


@contextmanager
def library(model: Any) -> Iterator[None]:
    """Attention, of text and of windows, as transformers has it."""
    parts = (model.config.text_config, model.config.vision_config)
    names = [p._attn_implementation for p in parts]
    for part in parts:
        part._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for part, name in zip(parts, names, strict=True):
            part._attn_implementation = name


def alone(model: Any, one: Example, lens: Lens) -> Tensor:
    """Log-probs of the trained tokens by a plain forward: one row, no padding, the library's own positions."""
    kinds_T = modalities(one.ids_T, lens.image_pad_id, lens.video_pad_id)
    media: dict[str, Any] = {}
    for kind, pixels, grid in (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")):
        if views := [v for v in one.views if v.kind == kind]:
            media[pixels] = torch.cat([patchify(torch.tensor(lens.frames.get(v)), v, lens.family) for v in views])
            media[grid] = torch.tensor([v.grid for v in views])
            if kind == "video" and lens.family.clock == "axis":
                media["second_per_grid_ts"] = torch.tensor([v.pair_seconds[1] - v.pair_seconds[0] for v in views])
    ids = torch.from_numpy(one.ids_T)
    model.model.rope_deltas = None
    logits = model(
        input_ids=ids[None], mm_token_type_ids=torch.from_numpy(kinds_T)[None].int(), use_cache=False, **media
    ).logits
    logprobs = policy_logits(logits[0, :-1], lens.suppressed, lens.temperature).log_softmax(-1)
    return logprobs.gather(-1, ids[1:, None])[torch.from_numpy(one.authors_T[1:] != WORLD), 0]


def test_looking_again_is_a_branch_like_any_other(bench: Bench, mixed: Path) -> None:
    """Images in branches below a clip, deepstack included: packed, expanded, and the library row by row."""
    stage, model = bench.stage, bench.model
    _, rollouts = looks(stage, mixed)
    pack = stage.pack([one for r, a in zip(rollouts, (1.0, -1.0, 0.5, -0.5), strict=True) for one in examples(r, [a] * 3)])
    assert [n.parent for n in pack.nodes] == [-1, 0, 1, 2, 2, 1, 0]
    assert [[v.kind for v in n.views] for n in pack.nodes] == [["video"], [], ["image"], [], [], ["image"], []]
    ours = assert_packed_is_expanded(model, [pack], stage.lens)
    assert ours.gradients.keys() == learns(model)
    assert any("deepstack" in n and g.norm() > 1e-6 for n, g in ours.gradients.items()) == ("deepstack" in str(learns(model)))
    model.zero_grad()
    with library(model):
        logprobs_N = torch.cat([alone(model, e, stage.lens) for e in pack.examples])
        (logprobs_N * torch.sin(1 + 1.7 * torch.arange(len(logprobs_N)))).mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert_equal(ours, replace(ours, logprobs_N=logprobs_N.detach(), gradients=gradients))
    beside = run(model, [pack, *packs_of(stage, {1: (3, 5)})], stage.lens)
    assert (beside.logprobs_N[: pack.num_trained] - ours.logprobs_N).abs().max() <= 1e-5


def contexts_of(stage: Stage, indices: Sequence[int], size: int) -> list[Context]:
    """Ragged prompts: every further one has words of its own at its end."""
    _, prompts = stage.open(indices, 0)
    words = [tuple(stage.renderer.encode("which option is right? " * i)) for i in range(len(prompts))]
    longer = [replace(p, ids=(*p.ids, *more)) for p, more in zip(prompts, words, strict=True)]
    return [Context(segments=(p,), key=1000 * i + j) for i, p in enumerate(longer) for j in range(size)]


def assert_same_words(
    policy: LoadedModel, lens: Lens, contexts: Sequence[Context], limits: Limits, eos: Sequence[int] = (), **given: Any
) -> list[Any]:
    ours = ModelPolicy(policy.model, lens, eos or policy.eos_ids, **given).extend(contexts, limits)
    theirs = ModelPolicy(policy.model, expanded(lens), eos or policy.eos_ids).extend(contexts, limits)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.ids, mine.stop) == (other.ids, other.stop)
        assert np.abs(np.subtract(mine.logprobs, other.logprobs)).max() <= 1e-5
    return ours


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_several_ragged_prompts_are_continued_alike(bench: Bench, temperature: float) -> None:
    contexts = contexts_of(bench.stage, (0, 1, 2), 3)
    assert len({len(c.ids) for c in contexts}) == 3
    replies = assert_same_words(bench.policy, bench.stage.lens, contexts, Limits(max_tokens=10, temperature=temperature))
    assert len({r.ids for r in replies}) == (3 if temperature == 0 else 9)


def test_rows_leave_when_they_are_done(bench: Bench) -> None:
    """With a fifth of all tokens as ends of a turn, rows finish at any time, at the first token too."""
    eos = range(0, 500, 5)
    contexts = contexts_of(bench.stage, (0, 1, 2), 8)
    replies = assert_same_words(bench.policy, bench.stage.lens, contexts, Limits(max_tokens=16), eos)
    lengths = {len(r.ids) for r in replies}
    assert 1 in lengths and len(lengths) >= 5
    assert {r.stop for r in replies} >= {"answered"}
    backwards = assert_same_words(bench.policy, bench.stage.lens, contexts[::-1], Limits(max_tokens=16), eos)
    assert [r.ids for r in backwards[::-1]] == [r.ids for r in replies]


def test_little_room_makes_several_waves(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts, limits = contexts_of(bench.stage, (0, 1, 2), 3), Limits(max_tokens=6)
    together = assert_same_words(bench.policy, bench.stage.lens, contexts, limits)
    met: list[int] = []
    plain = ModelPolicy._packed
    monkeypatch.setattr(ModelPolicy, "_packed", lambda self, wave, *rest: met.append(len(wave)) or plain(self, wave, *rest))
    for room, waves in ((1, [1] * 9), (2**30, [9])):
        del met[:]
        assert [r.ids for r in assert_same_words(bench.policy, bench.stage.lens, contexts, limits, room=room)] == [
            r.ids for r in together
        ]
        assert met == waves
    del met[:]
    assert_same_words(bench.policy, bench.stage.lens, contexts, limits, room=130 * 512)
    assert 1 < len(met) < 9 and sum(met) == 9
    monkeypatch.setattr(generate, "PREFILL", 1)  # a forward per tree
    assert [r.ids for r in assert_same_words(bench.policy, bench.stage.lens, contexts, limits)] == [r.ids for r in together]


def test_contexts_of_several_segments_share_what_they_have_in_common(bench: Bench, mixed: Path) -> None:
    """Three prompts deep: some end where others go on, and their media come in different places."""
    prompt, rollouts = looks(bench.stage, mixed)
    begun = [r.segments[:3] for r in rollouts[:1] + rollouts[2:3]]
    segments = [begun[0], (prompt,), begun[1], begun[0], rollouts[3].segments, (prompt,), begun[0][:2]]
    contexts = [Context(segments=s, key=i) for i, s in enumerate(segments)]
    assert_same_words(bench.policy, bench.stage.lens, contexts, Limits(max_tokens=7))
    assert_same_words(bench.policy, bench.stage.lens, contexts[1:3], Limits(max_tokens=7))  # one ends on the other's way
    replies = assert_same_words(bench.policy, bench.stage.lens, contexts, Limits(max_tokens=7, temperature=0))
    assert replies[0].ids == replies[3].ids and replies[1].ids == replies[5].ids
