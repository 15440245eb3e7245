"""Rollout, library and training forwards tell one story."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rft.hf.generate import ModelPolicy, inverse_cdf, truncate
from rft.hf.logprobs import token_logprobs
from rft.hf.pixels import patchify
from rft.hf.together import Together
from rft.rollout.loop import roll_out
from rft.rollout.policy import Context, Limits, stream_key, uniforms
from tests.stages import opened, phase_of, stage_of

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def rolled(stage, policy, indices=(0, 1), limits=None):
    samples, prompts = stage.open(indices, 0)
    engine = ModelPolicy(policy.model, stage.lens, policy.eos_ids)
    return roll_out(
        samples,
        prompts,
        [3] * len(samples),
        policy=engine,
        renderer=stage.renderer,
        limits=limits or stage.limits,
        draw=(0, "t", 0),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_training_log_probs_agree(family: str, tiny_folders: dict[str, Path], world: Path) -> None:
    """Left-padded cached decoding and the right-padded training forward: same tokens, same probabilities."""
    phase = phase_of()
    policy = opened(tiny_folders[family], phase)
    stage = stage_of(policy, phase, world)
    batches, _, _ = stage.step([0, 1, 2], model=policy.model, reference=None, step=0, together=Together())
    logprobs_N, _ = token_logprobs(policy.model, [b.pack for b in batches], stage.lens)
    sampler_N = np.concatenate([e.sampler_T[e.authors_T != 0] for b in batches for e in b.pack.examples])
    assert np.abs(logprobs_N.detach().numpy() - sampler_N).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_the_library_generate(family: str, tiny_folders: dict[str, Path], world: Path) -> None:
    """Our loop, placeholders, clock and pixels against the processor and `model.generate` of transformers."""
    phase = phase_of()
    policy = opened(tiny_folders[family], phase)
    stage = stage_of(policy, phase, world)
    ours = rolled(stage, policy, [0], Limits(max_tokens=8, temperature=0))[0][0]
    sample = stage.samples[0]
    view = ours.views[0]
    frames = torch.from_numpy(stage.lens.frames.get(view).copy()).permute(0, 3, 1, 2)
    fps = 1.0 / (view.seconds[1] - view.seconds[0])
    from transformers.video_utils import VideoMetadata

    inputs = policy.processor(
        text=[policy.processor.apply_chat_template(list(sample.messages), add_generation_prompt=True)],
        videos=[frames],
        video_metadata=[VideoMetadata(total_num_frames=len(frames), fps=fps, frames_indices=list(range(len(frames))))],
        do_sample_frames=False,
        do_resize=False,
        **({"fps": fps} if family == "qwen2_5_vl" else {}),
        return_tensors="pt",
    )
    assert inputs["input_ids"][0].tolist() == list(ours.segments[0].ids)
    pixels = patchify(frames.permute(0, 2, 3, 1), view, policy.family)
    assert torch.allclose(pixels, inputs["pixel_values_videos"], atol=1e-5)
    theirs = policy.model.generate(
        **inputs, max_new_tokens=8, do_sample=False, suppress_tokens=list(stage.lens.suppressed), repetition_penalty=1.0
    )
    assert theirs[0, inputs["input_ids"].shape[1] :].tolist() == list(ours.segments[1].ids)


def test_draws_depend_on_the_key_and_on_nothing_else(tiny_folders: dict[str, Path], world: Path) -> None:
    """Two samples alone and together, and after other random numbers were drawn, give the same tokens."""
    phase = phase_of()
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = stage_of(policy, phase, world)
    together = rolled(stage, policy, [0, 1])
    torch.rand(7)
    alone = rolled(stage, policy, [1])
    assert [r.segments[1].ids for r in together[1]] == [r.segments[1].ids for r in alone[0]]
    assert len({r.segments[1].ids for r in together[0]}) > 1


def test_uniforms_are_uniform_and_inverse_cdf_draws_the_distribution() -> None:
    keys = np.array([stream_key("seed", i) for i in range(40_000)], dtype=np.uint64)
    u = uniforms(keys, 3)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(u, uniforms(keys, 4))[0, 1]) < 0.02
    probs = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.3])
    drawn = inverse_cdf(probs.expand(len(u), -1), torch.from_numpy(u))
    shares = torch.bincount(drawn, minlength=5) / len(u)
    assert torch.allclose(shares, probs, atol=0.01)
    assert shares[0] == shares[3] == 0


def test_top_k_and_top_p_keep_what_they_should() -> None:
    """p = 0.5, 0.3, 0.15, 0.05: top-k 2 keeps two; top-p 0.75 keeps 0.5 and 0.3, whose sum first passes it."""
    logprobs = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    kept = truncate(logprobs, Limits(max_tokens=1, top_k=2)).isfinite()
    assert kept.tolist() == [[False, True, False, True]]
    kept = truncate(logprobs, Limits(max_tokens=1, top_p=0.75)).isfinite()
    assert kept.tolist() == [[False, True, False, True]]
    kept = truncate(logprobs, Limits(max_tokens=1, top_p=1e-9)).isfinite()
    assert kept.tolist() == [[False, True, False, False]]


def test_placeholders_are_never_written(tiny_folders: dict[str, Path], world: Path) -> None:
    """A model whose head prefers the video pad above all still cannot say it."""
    phase = phase_of()
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = stage_of(policy, phase, world)
    pad = stage.lens.video_pad_id
    policy.model.lm_head.register_forward_hook(
        lambda m, i, out: out.index_add(-1, torch.tensor([pad]), torch.full_like(out[..., :1], 50.0))
    )
    for group in rolled(stage, policy):
        for rollout in group:
            assert not set(rollout.segments[1].ids) & set(stage.lens.suppressed)


def test_contexts_of_different_length_do_not_touch_each_other(tiny_folders: dict[str, Path], world: Path) -> None:
    phase = phase_of()
    policy = opened(tiny_folders["qwen2_5_vl"], phase)
    stage = stage_of(policy, phase, world)
    samples, prompts = stage.open([0, 1], 0)
    longer = stage.renderer.prompt(replace(samples[1], messages=(*samples[1].messages, *samples[0].messages[:0])))
    text = tuple(stage.renderer.encode("which option is right?"))
    longer = replace(longer, ids=(*longer.ids, *text), text=longer.text)
    engine = ModelPolicy(policy.model, stage.lens, policy.eos_ids)
    limits = Limits(max_tokens=6)
    alone = engine.extend([Context(segments=(prompts[0],), key=5)], limits)[0]
    mixed = engine.extend([Context(segments=(longer,), key=9), Context(segments=(prompts[0],), key=5)], limits)[1]
    assert alone.ids == mixed.ids
    assert np.allclose(alone.logprobs, mixed.logprobs, atol=1e-5)
