"""`rft check`: what would go wrong, found before anything trains, without model files.

Media tokens come from the family's arithmetic on file headers. Text tokens come from the tokenizer when the model is a
folder on disk, else from an upper bound: a token is at least one byte of text.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rft.condition import Condition
from rft.data.samples import BadRow, read_samples
from rft.errors import RftError
from rft.evaluation.contract import HOSTILE, Finding, check_rewards
from rft.evaluation.metrics import measure
from rft.families import FAMILIES, Family, family_of
from rft.hf.compat import ensure_torchvision
from rft.loaded import Loaded, load
from rft.recipe import SPLITS, Phase
from rft.report.words import in_words, looks_in_words
from rft.rollout.loop import opening
from rft.rollout.perceive import ONCE, Looking
from rft.rollout.reference import reference_rollout
from rft.rollout.render import Prompt, Renderer
from rft.synthetic.world import make_world
from rft.types import Rollout, Sample, Segment

CHECKED_REWARDS = 16  # rows on which every reward meets the hostile corpus
RENDERED = 8  # clips of a synthetic world that are made to look at
SHOWN = 2  # findings printed of one kind
EXCERPT = 700  # characters of the first prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A sample that could be shown, with its annotation as a rollout."""

    split: str
    sample: Sample
    reference: Rollout

    @property
    def prompt(self) -> Segment:
        """The world's segment."""
        return self.reference.segments[0]


def check(name: str, sets: Sequence[str] = (), *, num_samples: int = 64) -> int:
    """Print what was looked at and what was found; 1 when something is an error, else 0.

    `num_samples` rows of each split have their media opened; 0 is all.
    """
    ensure_torchvision()
    loaded = load(name, sets)
    loaded.check_perceptions()
    print(f"{loaded.recipe.name}\n\n{_model(loaded)}")
    findings = list(_model_findings(loaded))
    with tempfile.TemporaryDirectory() as scratch:
        splits = _splits(loaded, Path(scratch), findings)
        seen: dict[str, str] = {}  # prompts, and the phase that showed them first
        for phase_name, phase in loaded.recipe.phases.items():
            print(f"\nphase {phase_name}")
            looks = looks_in_words(loaded.recipe.perception_of(phase))
            scored = [f"scored otherwise: {looks_in_words(phase.eval_perception)}"] if phase.eval_perception else []
            for line in (*in_words(phase, loaded.recipe.rewards_of(phase)), looks, *scored):
                print(f"  {line}")
            findings += _phase(loaded, phase_name, splits, num_samples, seen)
    return _report(findings)


def _model(loaded: Loaded) -> str:
    recipe = loaded.recipe
    family = _family(loaded).name
    if recipe.model == "tiny":
        parts = [part for part in ("vision", "projector", "language") if getattr(recipe.trainable, part)]
        return f"model  a small random {family}; trained: {', '.join(parts) or 'nothing'}"
    from rft.hf.architectures import ARCHITECTURES, describe_architecture

    table = f"\n{describe_architecture(recipe)}" if recipe.model in ARCHITECTURES else ""
    counted = (
        "" if _has_tokenizer(loaded) else "\n  its tokenizer is not on disk: text tokens are counted in bytes, an upper bound"
    )
    return f"model  {recipe.model}, family {family}{table}{counted}"


def _model_findings(loaded: Loaded) -> Iterator[Finding]:
    recipe = loaded.recipe
    config = Path(recipe.model, "config.json")
    if recipe.model != "tiny" and config.is_file():
        try:
            found = family_of(json.loads(config.read_text(encoding="utf-8")).get("model_type", ""))
        except RftError as error:
            yield _finding("error", error)
            return
        if found.name != recipe.family:
            what = f"the recipe says {recipe.family} and {config} is {found.name}"
            yield Finding(level="error", where="family", what=what, do=f"set family: {found.name}")


def _splits(loaded: Loaded, scratch: Path, findings: list[Finding]) -> dict[str, list[Sample]]:
    """Usable rows of every split; of a synthetic world a few clips are rendered."""
    data = loaded.recipe.data
    if data.synthetic:
        few = {split: min(RENDERED, getattr(data.synthetic, split)) for split in SPLITS}
        make_world(scratch, replace(data.synthetic, **few), seed=loaded.recipe.seed)
    splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    sizes: dict[str, int] = dict.fromkeys(SPLITS, 0)
    bad: list[BadRow] = []
    for split in SPLITS:
        named, size = getattr(data, split), getattr(data.synthetic, split) if data.synthetic else 0
        if not named and not size:
            if split != "validation":
                findings.append(_missing(split))
            continue
        try:
            splits[split], wrong = read_samples(scratch / f"{split}.jsonl" if data.synthetic else loaded.path(named))
        except RftError as error:
            findings.append(_finding("error", error, f"data.{split}, {error.where}"))
            continue
        bad += wrong
        sizes[split] = size or len(splits[split])
    print(
        "data   " + (", ".join(f"{split} {size} rows" for split, size in sizes.items() if size) or "nothing that can be used")
    )
    if data.synthetic:
        print(f"  a synthetic world: {sum(map(len, splits.values()))} of its clips were rendered to look at")
    findings += _bad_rows(bad, sum(sizes.values()), data.max_bad_share)
    return splits


def _missing(split: str) -> Finding:
    if split == "train":
        return Finding(level="error", where="data.train", what="there is nothing to train on", do="set data.train")
    what = "there is no test split: the run will end without a table"
    return Finding(level="warning", where="data.test", what=what, do="set data.test")


def _bad_rows(bad: Sequence[BadRow], usable: int, max_share: float) -> Iterator[Finding]:
    """Rows that a run would quarantine; an error when they are more than it puts up with."""
    share = len(bad) / max(usable + len(bad), 1)
    if bad:
        print(f"  {len(bad)} rows cannot be used ({share:.1%}, allowed {max_share:.1%})")
    for row in bad:
        yield _finding("error" if share > max_share else "warning", row.reason)


def _phase(
    loaded: Loaded, name: str, splits: Mapping[str, list[Sample]], num_samples: int, seen: dict[str, str]
) -> list[Finding]:
    """Prompts, media, budgets, rewards and the end of one phase, on the first rows of every split."""
    recipe, phase = loaded.recipe, loaded.recipe.phases[name]
    opened, findings = _asked(loaded, name, phase, splits, num_samples, seen)
    if phase.mixed:
        print(f"  {phase.mix.share:g} of its groups are asked otherwise:")
        findings += _asked(loaded, f"{name}.mix", phase.mixed, splits, num_samples, seen)[1]
    if opened:
        findings += _limits(loaded, name, opened)
    if not recipe.data.synthetic and 0 < len(splits["train"]) < phase.groups_per_step:
        what = f"a step takes {phase.groups_per_step} samples and data.train has {len(splits['train'])}: they repeat in it"
        findings.append(Finding(level="warning", where=f"phases.{name}.groups_per_step", what=what, do="lower it"))
    if phase.until:
        findings += _until(f"phases.{name}.until", phase, [o for o in opened if o.split == "validation"])
    return findings


def _asked(
    loaded: Loaded, name: str, phase: Phase, splits: Mapping[str, list[Sample]], num_samples: int, seen: dict[str, str]
) -> tuple[list[Opened], list[Finding]]:
    """What the prompts of a phase, or those that it mixes in, make of the first rows, and how the rewards like it."""
    renderer, allowed = _renderer(loaded, phase), loaded.recipe.max_prompt_tokens
    looking = loaded.looking(phase)
    must_teach = phase.supervised or phase.guidance is not None
    taught = looking if looking.is_teachable or must_teach else ONCE  # one without `teach` is only shown its answer
    opened, findings = _open(splits, renderer, looking, taught, num_samples, loaded.recipe.data.max_bad_share)
    findings += _prompt_findings(f"phases.{name}", renderer.prompts, [s for samples in splits.values() for s in samples])
    if opened:
        _print_prompts(name, opened, allowed, renderer.family, seen)
    if not phase.supervised:
        findings += _rewards(loaded, phase, opened[:CHECKED_REWARDS], renderer, taught)
    return opened, findings


def _open(
    splits: Mapping[str, list[Sample]],
    renderer: Renderer,
    looking: Looking,
    taught: Looking,
    num_samples: int,
    max_share: float,
) -> tuple[list[Opened], list[Finding]]:
    """What can be shown, and what cannot: of the training split a run puts up with a share, elsewhere with none."""
    opened, findings = [], []
    for split, samples in splits.items():
        chosen, errors = samples[: num_samples or None], []
        for sample in chosen:
            try:
                prompt = opening(sample, renderer, looking)
                reference = reference_rollout(sample, renderer, prompt, looking=taught)
                opened.append(Opened(split=split, sample=sample, reference=reference))
            except RftError as error:
                errors.append(error)
        is_borne = split == "train" and len(errors) <= max_share * len(chosen)
        findings += [_finding("warning" if is_borne else "error", error) for error in errors]
    return opened, findings


def _prompt_findings(at: str, prompts: Mapping[str, Prompt], samples: Sequence[Sample]) -> Iterator[Finding]:
    tasks = {sample.task for sample in samples}
    for task, prompt in prompts.items():
        if samples and task != "default" and task not in tasks:
            what = f"no row has the task {task!r}; rows have {', '.join(sorted(tasks))}"
            yield Finding(level="warning", where=f"{at}: prompts.{task}", what=what, do="correct the name, or leave it out")
        spoken = next((s for s in samples if s.messages and prompts.get(s.task, prompts.get("default")) is prompt), None)
        if spoken and prompt.question != Prompt().question:
            what = f"its question is not asked where rows bring messages of their own, e.g. {spoken.id}"
            yield Finding(level="warning", where=f"{at}: prompts.{task}", what=what, do="drop the messages or the question")


def _print_prompts(name: str, opened: Sequence[Opened], allowed: int, family: Family, seen: dict[str, str]) -> None:
    media = sorted(sum(v.tokens for v in o.prompt.views) for o in opened)
    longest = max(len(o.prompt.ids) for o in opened)
    print(f"  {len(opened)} prompts opened: {median(media):g} media tokens (up to {media[-1]}), {longest} in all, of {allowed}")
    first = opened[0]
    text = "".join(s.text for s in first.reference.segments)
    if text in seen:
        print(f"  the first reads as in phase {seen[text]}")
        return
    seen[text] = name
    print(f"  the first, sample {first.sample.id}:")
    for view in first.reference.views:
        height, width = view.size
        when = f", {view.seconds[0]:.2f} to {view.seconds[-1]:.2f} of {view.duration:.2f} s" if view.seconds else ""
        print(f"    {len(view.frames)} x {width} x {height} pixels{when}: {Path(_first(view.source)).name}")
    for line in _readable(text, family).splitlines():
        print(f"    | {line}")


def _first(source: str | tuple[str, ...]) -> str:
    return source if isinstance(source, str) else source[0]


def _readable(text: str, family: Family) -> str:
    """A prompt with its runs of placeholders counted, and its middle left out when it is long."""
    pads = {family.image_pad: "image", family.video_pad: "video"}
    runs = "|".join(f"(?:{re.escape(pad)})+" for pad in pads)

    def counted(run: re.Match[str]) -> str:
        pad = next(pad for pad in pads if run[0].startswith(pad))
        return f"[{len(run[0]) // len(pad)} {pads[pad]} tokens]"

    text = re.sub(runs, counted, text)
    return text if len(text) <= EXCERPT else f"{text[: EXCERPT * 2 // 3]} [...] {text[-EXCERPT // 3 :]}"


def _limits(loaded: Loaded, name: str, opened: Sequence[Opened]) -> Iterator[Finding]:
    """Whether the annotation itself could be said in the tokens that an answer has."""
    if not _has_tokenizer(loaded):
        return
    tokens, longest = max(((_longest_turn(o.reference), o.sample.id) for o in opened), key=lambda pair: pair[0])
    sampling = loaded.recipe.phases[name].sampling.max_tokens
    limits = {"evaluation.max_tokens": loaded.recipe.evaluation.max_tokens}
    limits |= {} if loaded.recipe.phases[name].supervised else {f"phases.{name}.sampling.max_tokens": sampling}
    for key, limit in limits.items():
        if limit < tokens:
            what = f"{limit} cut the annotation of sample {longest}, which takes {tokens} tokens"
            yield Finding(level="error", where=key, what=what, do=f"use at least {tokens}")


def _longest_turn(rollout: Rollout) -> int:
    """Tokens of the longest turn that is not the world's: a reply has a limit, not all of them together."""
    runs = groupby(rollout.segments, key=lambda s: s.author == "world")
    return max(sum(len(s.ids) for s in run) for is_world, run in runs if not is_world)


def _until(at: str, phase: Phase, opened: Sequence[Opened]) -> Iterator[Finding]:
    """Whether every metric that the condition names will be there."""
    known = measure([o.sample for o in opened], [o.reference for o in opened])
    try:
        if known:
            Condition.parse(phase.until, at).holds({"best_constant": 0.0, **known})
    except RftError as error:
        yield _finding("error", error, at)


def _rewards(loaded: Loaded, phase: Phase, opened: Sequence[Opened], renderer: Renderer, looking: Looking) -> list[Finding]:
    """The annotation must earn the maximum, and no hostile text may beat it.

    It has no thoughts; where a reward asks for some, it stands behind an empty one.
    """
    try:
        rewards = loaded.rewards(phase)
    except RftError as error:
        return [_finding("error", error)]
    findings: list[Finding] = []
    for split in dict.fromkeys(o.split for o in opened):  # ids are one per file: another split may use them again
        chosen = [o for o in opened if o.split == split]
        samples = [replace(o.sample, messages=tuple(renderer.messages(o.sample))) for o in chosen]
        found = check_rewards(rewards, samples, [o.reference for o in chosen])
        if found:
            given = {"looking": looking, "fill": "empty_think"}
            thinking = [reference_rollout(o.sample, renderer, o.prompt, **given) for o in chosen]
            found = found if check_rewards(rewards, samples, thinking) else []
        findings += found
    rows = f"{len(opened)} rows, the annotation and {len(HOSTILE)} hostile texts of each" if opened else "no rows"
    fine = "" if findings or not opened else ": as they should be"
    print(f"  rewards {', '.join(r.name for r in rewards)} tried on {rows}{fine}")
    return findings


class ByteTokens:
    """Stands in for a tokenizer that is not on disk: every byte a token, every special token one. An upper bound."""

    def __init__(self, specials: Sequence[str]) -> None:
        self.all_special_tokens = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *specials]
        self.eos_token, self.eos_token_id = "<|im_end|>", 256 + 1
        self._special = re.compile(f"({'|'.join(map(re.escape, self.all_special_tokens))})")

    def apply_chat_template(self, messages: Sequence[Any], **_: Any) -> str:
        """The ChatML form that Qwen's families use."""
        marks = {"video": "<|vision_start|><|video_pad|><|vision_end|>", "image": "<|vision_start|><|image_pad|><|vision_end|>"}
        turns = []
        for message in messages:
            text = "".join(p["text"] if p["type"] == "text" else marks[p["type"]] for p in message["content"])
            turns.append(f"<|im_start|>{message['role']}\n{text}<|im_end|>\n")
        return "".join(turns) + "<|im_start|>assistant\n"

    def encode(self, text: str, **_: Any) -> list[int]:
        """Ids 0..255 are bytes, 256 and up are special tokens."""
        pieces = self._special.split(text)
        return [i for piece in pieces for i in ([self.convert_tokens_to_ids(piece)] if piece in self.all_special_tokens
                                                else piece.encode("utf-8", "surrogatepass"))]  # fmt: skip

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """The text of ids that `encode` made."""
        raw = b"".join(bytes([i]) if i < 256 else self.all_special_tokens[i - 256].encode() for i in ids)
        return raw.decode("utf-8", "surrogatepass")

    def convert_tokens_to_ids(self, token: str) -> int:
        """Id of a special token."""
        return 256 + self.all_special_tokens.index(token)


def _has_tokenizer(loaded: Loaded) -> bool:
    return loaded.recipe.model == "tiny" or Path(loaded.recipe.model, "tokenizer_config.json").is_file()


def _family(loaded: Loaded) -> Family:
    recipe = loaded.recipe
    return FAMILIES[recipe.tiny.family if recipe.model == "tiny" else recipe.family]


def _renderer(loaded: Loaded, phase: Phase) -> Renderer:
    recipe = loaded.recipe
    family = _family(loaded)
    if recipe.model == "tiny":
        from rft.hf.tiny import make_tokenizer

        tokenizer = make_tokenizer()
    elif _has_tokenizer(loaded):
        from rft.hf.tokenizer import open_tokenizer

        tokenizer = open_tokenizer(recipe.model)
    else:
        tokenizer = ByteTokens(family.placeholders)
    return Renderer(
        tokenizer=tokenizer, family=family, prompts=recipe.prompts_of(phase), budget=recipe.media,
        max_prompt_tokens=recipe.max_prompt_tokens,
    )  # fmt: skip


def _finding(level: Literal["error", "warning"], error: RftError, where: str = "") -> Finding:
    return Finding(level=level, where=where or error.where, what=error.what, do=error.do)


def _report(findings: Sequence[Finding]) -> int:
    """Warnings, then errors; of those that one thing would mend, the first few."""
    levels: dict[str, dict[str, list[Finding]]] = {"warning": {}, "error": {}}
    for finding in dict.fromkeys(findings):
        levels[finding.level].setdefault(finding.do, []).append(finding)
    for alike in (group for groups in levels.values() for group in groups.values()):
        for finding in alike[:SHOWN]:
            print(f"\n{finding}")
        if len(alike) > SHOWN:
            print(f"  ... and {len(alike) - SHOWN} more of this kind")
    counts = {level: sum(map(len, groups.values())) for level, groups in levels.items()}
    said = " and ".join(f"{n} {level}{'s' * (n > 1)}" for level, n in reversed(counts.items()) if n)
    print(f"\n{said or 'nothing to report: this recipe can be trained'}")
    return 1 if counts["error"] else 0
