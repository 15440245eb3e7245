"""`rft check`: what would go wrong, found before anything trains, without model files.

Media tokens come from the family's arithmetic on file headers. Text tokens come from the tokenizer when the model is a
folder on disk, else from an upper bound: a token is at least one byte of text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rft.data.samples import read_samples
from rft.errors import DataError, RftError
from rft.evaluation.contract import Finding, check_rewards
from rft.families import FAMILIES
from rft.hf.architectures import describe_architecture
from rft.recipe import Loaded, Phase, load
from rft.report.words import in_words
from rft.rollout.render import Renderer
from rft.scoring import Reward
from rft.synthetic.world import SPLITS, make_world
from rft.train import rewards_for
from rft.types import Rollout, Sample, Segment

CHECKED_REWARDS = 16  # rows on which every reward meets the hostile corpus
SHOWN = 12  # findings printed of one kind


def check(name: str, sets: Sequence[str] = (), *, num_samples: int = 64) -> int:
    """Print what was looked at and what was found; 1 when something is an error, else 0."""
    loaded = load(name, sets)
    recipe = loaded.recipe
    print(f"{recipe.name}: {recipe.model}, family {recipe.family}\n{describe_architecture(recipe)}")
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as scratch:
        splits = _splits(loaded, Path(scratch), findings)
        for phase_name, phase in recipe.phases.items():
            print(f"\nphase {phase_name}: {in_words(phase)}")
            findings += _phase(loaded, phase_name, phase, splits, num_samples)
    return _report(findings)


def _splits(loaded: Loaded, scratch: Path, findings: list[Finding]) -> dict[str, list[Sample]]:
    """Usable rows of every split; of a synthetic world a few clips are rendered."""
    data = loaded.recipe.data
    if data.synthetic:
        small = replace(data.synthetic, train=8, validation=min(4, data.synthetic.validation), test=min(4, data.synthetic.test))
        make_world(scratch, small, seed=loaded.recipe.seed)
    splits: dict[str, list[Sample]] = {}
    for split in SPLITS:
        named = getattr(data, split)
        if not data.synthetic and not named:
            splits[split] = []
            continue
        try:
            splits[split], bad = read_samples(scratch / f"{split}.jsonl" if data.synthetic else loaded.path(named))
        except DataError as error:
            findings.append(_finding("error", error))
            splits[split] = []
            continue
        findings += [Finding(level="error", where=row.id, what=row.reason, do="") for row in bad]
        print(f"{split}: {len(splits[split])} rows can be used, {len(bad)} cannot")
    if not splits["train"]:
        findings.append(Finding(level="error", where="data.train", what="there is nothing to train on", do="set data.train"))
    return splits


def _phase(loaded: Loaded, name: str, phase: Phase, splits: dict[str, list[Sample]], num_samples: int) -> list[Finding]:
    """Prompts, media, budgets and rewards of one phase on the first rows of every split."""
    renderer = _renderer(loaded, phase)
    findings, opened = [], []
    for samples in splits.values():
        for sample in samples[: num_samples or None]:
            try:
                opened.append((sample, renderer.prompt(sample)))
                renderer.answer_text(sample)
            except RftError as error:
                findings.append(_finding("error", error))
    if opened:
        tokens = sorted(len(p.ids) for _, p in opened)
        media = sorted(sum(v.tokens for v in p.views) for _, p in opened)
        bound = "" if _has_tokenizer(loaded) else " at most"
        print(
            f"  {len(opened)} prompts opened: {median(media):.0f} media tokens (up to {media[-1]}), "
            f"{bound.strip() + ' ' if bound else ''}{tokens[-1]} tokens in all, of {loaded.recipe.max_prompt_tokens}"
        )
    if not phase.supervised:
        try:
            rewards = rewards_for(loaded, phase)
        except RftError as error:
            return [*findings, _finding("error", error)]
        findings += _rewards(rewards, opened[:CHECKED_REWARDS], renderer)
    return findings


def _rewards(rewards: list[Reward], opened: list[tuple[Sample, Segment]], renderer: Renderer) -> list[Finding]:
    """The annotation must earn the maximum, and no hostile text may beat it."""
    samples = [replace(s, messages=tuple(renderer.messages(s))) for s, _ in opened]
    references = []
    for sample, prompt in opened:
        try:
            answer = Segment(author="reference", text=renderer.answer_text(sample), ids=())
        except DataError:
            continue  # found above
        references.append(Rollout(sample_id=sample.id, segments=(prompt, answer), stop="answered"))
    findings = check_rewards(rewards, samples, references)
    print(f"  rewards {', '.join(r.name for r in rewards)}: tried on {len(samples)} rows, the annotation and hostile text")
    return findings


class ByteTokens:
    """Stands in for a tokenizer that is not on disk: every byte a token, every special token one. An upper bound."""

    def __init__(self, specials: Sequence[str]) -> None:
        self.all_special_tokens = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *specials]
        self.eos_token_id = 256 + 1

    def apply_chat_template(self, messages: Sequence[Any], **_: Any) -> str:
        """The ChatML form that Qwen's families use."""
        marks = {"video": "<|vision_start|><|video_pad|><|vision_end|>", "image": "<|vision_start|><|image_pad|><|vision_end|>"}
        turns = []
        for message in messages:
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            text = "".join(p["text"] if p["type"] == "text" else marks[p["type"]] for p in parts)
            turns.append(f"<|im_start|>{message['role']}\n{text}<|im_end|>\n")
        return "".join(turns) + "<|im_start|>assistant\n"

    def encode(self, text: str, **_: Any) -> list[int]:
        """Ids 0..255 are bytes, 256 and up are special tokens."""
        ids: list[int] = []
        while text:
            special = next((i for i, s in enumerate(self.all_special_tokens) if text.startswith(s)), None)
            if special is not None:
                ids.append(256 + special)
                text = text[len(self.all_special_tokens[special]) :]
                continue
            cut = min((p for s in self.all_special_tokens if (p := text.find(s)) > 0), default=len(text))
            ids.extend(text[:cut].encode())
            text = text[cut:]
        return ids

    def convert_tokens_to_ids(self, token: str) -> int:
        """Id of a special token."""
        return 256 + self.all_special_tokens.index(token)


def _has_tokenizer(loaded: Loaded) -> bool:
    return loaded.recipe.model == "tiny" or Path(loaded.recipe.model, "tokenizer_config.json").is_file()


def _renderer(loaded: Loaded, phase: Phase) -> Renderer:
    recipe = loaded.recipe
    family = FAMILIES[recipe.tiny.family if recipe.model == "tiny" else recipe.family]
    if recipe.model == "tiny":
        from rft.hf.tiny import make_tokenizer

        tokenizer = make_tokenizer()
    elif _has_tokenizer(loaded):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    else:
        tokenizer = ByteTokens(family.placeholders)
    return Renderer(
        tokenizer=tokenizer, family=family, prompts=recipe.prompts_of(phase), budget=recipe.media,
        max_prompt_tokens=recipe.max_prompt_tokens,
    )  # fmt: skip


def _finding(level: str, error: RftError) -> Finding:
    return Finding(level=level, where=error.where, what=error.what, do=error.do)


def _report(findings: Sequence[Finding]) -> int:
    distinct = list(dict.fromkeys(findings))
    errors = sum(f.level == "error" for f in distinct)
    for level in ("error", "warning"):
        chosen = [f for f in distinct if f.level == level]
        for finding in chosen[:SHOWN]:
            print(f"\n{level}: {finding.where}: {finding.what}" + (f"\n  what to do: {finding.do}" if finding.do else ""))
        if len(chosen) > SHOWN:
            print(f"\n... and {len(chosen) - SHOWN} more of this level")
    print(f"\n{errors} errors, {len(distinct) - errors} warnings")
    return 1 if errors else 0
