"""The configuration tree: what a recipe may say, and what it may not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch

from rft.algo import ESTIMATORS, OBJECTIVES
from rft.algo.advantages import HANDED
from rft.algo.guidance import Guidance
from rft.algo.losses import KL, OffPolicy
from rft.condition import Condition
from rft.data.budget import Budget
from rft.errors import RecipeError
from rft.families import FAMILIES
from rft.ranges import check_ranges
from rft.rollout.perceive import PerceptionSpec
from rft.rollout.render import Prompt
from rft.run.cadence import Cadence
from rft.strict import nearest

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """Sizes of the small model behind `model: tiny`. `init_std` scales its matrices; 0.08 learns, 0.02 barely does."""

    family: str = "qwen2_5_vl"
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    vision_hidden: int = 64
    vision_layers: int = 2
    init_std: float = 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The synthetic data set: real mp4 files in which a bright square appears from one second to another."""

    train: int = 512
    validation: int = 64
    test: int = 64
    seconds: float = 8.0
    fps: int = 4  # of the file
    tick: float = 1.0  # spans begin and end on multiples of it, in seconds
    longest: float = 0.0  # seconds that a square is visible at most; 0 is any two ticks
    objects: int = 1  # squares in a clip at most, each with its own span; from 2 on of a colour, and the question names one
    mark: float = 0.0  # seconds that a mark shows on the square at most, too fine for a coarse look; 0 is no marks
    size: int = 28  # pixels per side
    seed: int = 0

    def __post_init__(self) -> None:
        if self.longest and not self.tick <= self.longest <= self.seconds:
            what = f"{self.longest:g} s is not between a tick of {self.tick:g} s and a clip of {self.seconds:g} s"
            raise RecipeError("data.synthetic.longest", what, "use e.g. 3, or 0 for no limit")
        if self.mark:
            self._check_mark()

    def _check_mark(self) -> None:
        """Half a tick fits into the mark, a scene of more ticks than it into the clip, and a frame into half a tick."""
        at, longest = "data.synthetic.mark", self.longest or self.seconds
        if self.objects > 1:
            raise RecipeError(at, f"marks and {self.objects} objects do not go together", "set objects: 1, or mark: 0")
        if not self.tick / 2 <= self.mark < longest // self.tick * self.tick:
            what = f"{self.mark:g} s is not between half a tick of {self.tick:g} s and a scene of {longest:g} s at most"
            raise RecipeError(at, what, "use e.g. a tick, and scenes (longest) of two, or 0 for no marks")
        if self.fps * self.tick / 2 < 1:
            raise RecipeError(at, f"half a tick of {self.tick:g} s has no frame at {self.fps} fps", "raise fps or tick")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """JSONL files (paths relative to the recipe), or a synthetic world in their place."""

    train: str = ""
    validation: str = ""
    test: str = ""
    synthetic: World | None = None
    max_bad_share: float = 0.01  # rows and media that may be quarantined before the run stops
    frame_cache_gb: float = 8.0  # decoded frames kept on disk
    frame_cache: str = ""  # folder of decoded frames, which runs may share; by default the run's own
    workers: int = -1  # processes that decode ahead; -1 is 4 beside a GPU and none where a CPU does all the work

    def decoders(self, has_gpu: bool) -> int:
        """How many processes decode ahead."""
        return self.workers if self.workers >= 0 else 4 * has_gpu

    @property
    def frame_cache_folder(self) -> Path | None:
        """The folder that the recipe names, if any."""
        return Path(self.frame_cache).expanduser().absolute() if self.frame_cache else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainable:
    """Which parts learn."""

    vision: bool = False
    projector: bool = True
    language: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters on the linear layers of the language model (and of the vision tower when it is trainable)."""

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """One reward: `use` is path.py:function; `args` are handed to it."""

    use: str
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    style: Literal["rft", "trl"] = "rft"
    per: Literal["rollout", "group"] = "rollout"
    on_error: Literal["raise", "skip", "zero"] = "raise"
    timeout: float | None = None
    concurrency: int = 8
    partial: bool = False
    maximum: float | None = 1.0
    only_if: Mapping[str, float] = field(default_factory=dict)  # the least that other rewards must give before it counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How rollouts are drawn. Nothing else has a say: the model folder's generation config gives its EOS ids only."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """The ratio is kept in [1 - low, 1 + high]."""

    low: float = 0.2
    high: float = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Some groups of a phase are asked otherwise: each one by chance, all its members alike.

    What an answer must look like goes with the prompt, so the rewards may be others too. Evaluations ask as the phase does.
    """

    share: float = 0.5  # probability that a group gets these prompts; its step and sample decide, and nothing else
    prompts: Mapping[str, Prompt] = field(default_factory=dict)  # replace those of the phase, by task
    perception: PerceptionSpec | None = None  # replaces that of the phase
    rewards: tuple[str, ...] = ()  # names; empty is those of the phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stretch of training with one objective. `objective: nll` is supervised and samples nothing."""

    objective: str = "grpo"
    steps: int = 100
    until: str = ""  # e.g. "miou >= best_constant + 0.05", on the validation split; then `steps` is an upper bound
    check_every: int = 20
    groups_per_step: int = 8  # samples per optimizer step, over all devices
    groups_per_device: int = 1  # groups in one forward
    group_size: int = 8
    updates: int = 1  # optimizer steps per generated batch
    estimator: str = "grpo"
    estimator_args: Mapping[str, Any] = field(default_factory=dict)
    accuracy: tuple[str, ...] = ()  # rewards that say how right an answer is; empty is the whole reward
    shape_target: Literal["accuracy", "total"] = "accuracy"  # what nonlinear and downscale reshape
    guidance: Guidance | None = None  # the annotation joins the groups
    off_policy: OffPolicy = field(default_factory=OffPolicy)  # how its tokens are weighed
    clip: Clip = field(default_factory=Clip)
    kl: KL = field(default_factory=KL)
    credit: Literal["rollout", "turn"] = "rollout"  # turn: what each turn was worth is compared apart
    mask_truncated: bool = False
    mask_over_turns: bool = False  # rollouts that the budget stopped before they answered
    importance_cap: float = 0.0  # weigh tokens by min(p / p_sampler, cap); 0 is off
    refill: int = 0  # times that silent groups are replaced by other samples
    sampling: Sampling = field(default_factory=Sampling)
    prompts: Mapping[str, Prompt] = field(default_factory=dict)  # replace those of the recipe, by task
    perception: PerceptionSpec | None = None  # replaces that of the recipe
    eval_perception: PerceptionSpec | None = None  # what is looked at when the phase is scored, where that is something else
    rewards: tuple[str, ...] = ()  # names; empty is all of the recipe's
    mix: Mix | None = None  # other prompts for some of its groups
    learning_rate: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    nonfinite: Literal["stop", "skip"] = "stop"

    @property
    def supervised(self) -> bool:
        """True when the annotation is the whole group."""
        return self.objective == "nll"

    @property
    def mixed(self) -> Phase | None:
        """The phase as a group with the mixed-in prompts meets it; None where nothing is mixed in."""
        if self.mix is None:
            return None
        prompts, perception = {**self.prompts, **self.mix.prompts}, self.mix.perception or self.perception
        return replace(self, prompts=prompts, perception=perception, rewards=self.mix.rewards or self.rewards, mix=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How a policy is scored: greedy unless a temperature is given."""

    max_tokens: int = 64
    temperature: float = 0.0
    max_samples: int = 0  # 0 is all


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything a run depends on."""

    name: str
    model: str
    seed: int = 0
    family: str = "qwen2_5_vl"  # for checks without the model; a loaded model's own config must agree
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    attention: str = "sdpa"  # another name is handed to the library, and prompts are not shared
    sharing: Literal["auto", "packed", "expanded"] = "auto"  # packed: a group's prompt is run once; expanded: once per rollout
    max_tokens_per_pass: int = 0  # larger micro-steps are several forwards and one backward; 0 is no limit
    gradient_checkpointing: Literal["auto", True, False] = "auto"  # auto: on where the estimate says that memory is short
    vision_memory_gb: float = 4.0  # of a frozen tower's features, kept beyond what the current step needs
    trainable: Trainable = field(default_factory=Trainable)
    lora: Lora | None = None
    tiny: Tiny = field(default_factory=Tiny)
    data: Data = field(default_factory=Data)
    media: Budget = field(default_factory=Budget)
    max_prompt_tokens: int = 8192
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    perception: PerceptionSpec = field(default_factory=lambda: PerceptionSpec(use="single"))  # what rollouts look at
    rewards: Mapping[str, RewardSpec] = field(default_factory=dict)
    phases: Mapping[str, Phase] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    output: str = "runs/{name}"
    save_every: str = "30m"  # or "10 generations"; "" saves at the end of a phase only
    keep_last: int = 2  # checkpoints of a phase; 0 keeps all
    keep_best: int = 0  # as many more, and one is saved at every new best of the validation
    best_by: str = "miou"
    log_rollouts: bool = True
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()  # beside the files of the run

    def __post_init__(self) -> None:
        check_ranges(self)
        Cadence.parse(self.save_every)
        for at, family in (("family", self.family), ("tiny.family", self.tiny.family)):
            if family not in FAMILIES:
                raise RecipeError(at, f"unknown family {family!r}", nearest(family, FAMILIES))
        files = [split for split in SPLITS if getattr(self.data, split)]
        if self.data.synthetic and files:
            keys = " and ".join(["data.synthetic", *(f"data.{split}" for split in files)])
            raise RecipeError(keys, "are both set: only one of them would be used", "set data.synthetic: null, or no files")
        if not self.phases:
            raise RecipeError("phases", "a recipe needs at least one phase", "add e.g. phases: {grpo: {steps: 100}}")
        if (world := self.data.synthetic) and world.tick > world.seconds:
            raise RecipeError("data.synthetic.tick", f"{world.tick:g} s do not fit in {world.seconds:g} s", "use 1")
        for name, phase in self.phases.items():
            _check_phase(f"phases.{name}", phase, self)

    def rewards_of(self, phase: Phase) -> dict[str, RewardSpec]:
        """The rewards of a phase, by name."""
        return {n: s for n, s in self.rewards.items() if not phase.rewards or n in phase.rewards}

    def accuracy_of(self, phase: Phase) -> tuple[str, ...]:
        """Names of the rewards that say how right an answer is: those named, or the only one. Empty is the whole reward."""
        own = tuple(self.rewards_of(phase))
        return phase.accuracy or (own if len(own) == 1 else ())

    def perception_of(self, phase: Phase) -> PerceptionSpec:
        """What the rollouts of a phase look at."""
        return phase.perception or self.perception

    def prompts_of(self, phase: Phase | None) -> dict[str, Prompt]:
        """The prompts of a phase, by task."""
        return {**self.prompts, **(phase.prompts if phase else {})}

    @property
    def asked(self) -> dict[str, Phase]:
        """Every set of prompts by name: PHASE, and PHASE.mix for those that it mixes in."""
        named = {}
        for name, phase in self.phases.items():
            named |= {name: phase} | ({f"{name}.mix": phase.mixed} if phase.mixed else {})
        return named


def _check_phase(at: str, phase: Phase, recipe: Recipe) -> None:
    for key, known in (("objective", OBJECTIVES), ("estimator", ESTIMATORS)):
        if (name := getattr(phase, key)) not in known:
            raise RecipeError(f"{at}.{key}", f"unknown {key} {name!r}", nearest(name, known))
    if len(phase.betas) != 2 or not all(0 <= beta < 1 for beta in phase.betas):
        raise RecipeError(f"{at}.betas", f"{list(phase.betas)} are not two numbers in [0, 1)", "use e.g. [0.9, 0.999]")
    if phase.until:
        Condition.parse(phase.until, f"{at}.until")
        if not (recipe.data.validation or (recipe.data.synthetic and recipe.data.synthetic.validation)):
            raise RecipeError(f"{at}.until", "there is no validation split to look at", "set data.validation")
        if not phase.check_every:
            raise RecipeError(f"{at}.check_every", "at 0 nobody looks whether `until` holds", "use e.g. 20")
    if phase.groups_per_step % phase.groups_per_device:
        raise RecipeError(
            f"{at}.groups_per_step", f"{phase.groups_per_step} groups do not fill forwards of {phase.groups_per_device}",
            "make groups_per_step a multiple of groups_per_device x devices",
        )  # fmt: skip
    for name in phase.rewards:
        if name not in recipe.rewards:
            raise RecipeError(f"{at}.rewards", f"unknown reward {name!r}", nearest(name, recipe.rewards))
    for name, spec in recipe.rewards_of(phase).items():
        if strangers := [other for other in spec.only_if if other not in recipe.rewards_of(phase) or other == name]:
            do = nearest(strangers[0], set(recipe.rewards_of(phase)) - {name})
            raise RecipeError(f"rewards.{name}.only_if", f"{strangers[0]!r} is no other reward of {at}", do)
    for name in phase.accuracy:
        if name not in (own := recipe.rewards_of(phase)):
            raise RecipeError(f"{at}.accuracy", f"{name!r} is no reward of this phase", nearest(name, own))
    if phase.mix:
        _check_mix(f"{at}.mix", phase, recipe)
    if phase.supervised:
        if phase.guidance:
            what = "a supervised phase is nothing but the annotation"
            raise RecipeError(f"{at}.guidance", what, "take guidance out, or choose another objective")
        return
    shapes = phase.estimator in ("nonlinear", "downscale") and phase.shape_target == "accuracy"
    gated = phase.guidance is not None and phase.guidance.gate > 0
    if (shapes or gated) and not phase.accuracy and len(recipe.rewards_of(phase)) > 1:
        what = f"which of {', '.join(recipe.rewards_of(phase))} says how right an answer is?"
        raise RecipeError(f"{at}.accuracy", what, "name it, e.g. accuracy: [iou]; or set shape_target: total without a gate")
    if phase.credit == "turn" and phase.estimator_args.get("std") == "batch":
        what = "turns are compared apart, and std: batch is the spread of whole rollouts"
        raise RecipeError(f"{at}.credit", what, "set estimator_args.std to sample, or credit: rollout")
    if phase.group_size < 2:
        raise RecipeError(f"{at}.group_size", "a group needs at least 2 rollouts to compare", "use 8, or objective: nll")
    if not recipe.rewards_of(phase):
        raise RecipeError(f"{at}.rewards", "a phase that samples needs a reward", "add one under rewards")
    if phase.sampling.temperature == 0:
        raise RecipeError(f"{at}.sampling.temperature", "sampling at 0 gives identical rollouts", "use 1.0")
    is_first = phase is next(iter(recipe.phases.values()))
    if recipe.lora and phase.kl.weight and phase.kl.reference == "phase" and not is_first:
        raise RecipeError(
            f"{at}.kl.reference", "with adapters the reference is the model without them, not the start of this phase",
            "set it to run; or train the earlier phases apart, `rft export --merge`, and start from that folder",
        )  # fmt: skip
    _check_estimator(at, phase)


def _check_mix(at: str, phase: Phase, recipe: Recipe) -> None:
    """Prompts that are others, and rewards that say how right an answer is whatever it was asked with."""
    asks_alike = recipe.prompts_of(phase.mixed) == recipe.prompts_of(phase)
    if asks_alike and recipe.perception_of(phase.mixed) == recipe.perception_of(phase):
        raise RecipeError(f"{at}.prompts", "these are the prompts of the phase itself", "give other ones, or take mix out")
    for name in phase.mix.rewards:
        if name not in recipe.rewards:
            raise RecipeError(f"{at}.rewards", f"unknown reward {name!r}", nearest(name, recipe.rewards))
    if missing := [name for name in recipe.accuracy_of(phase) if name not in recipe.rewards_of(phase.mixed)]:
        what = f"{missing[0]} says how right an answer is, and is not among them"
        raise RecipeError(f"{at}.rewards", what, f"add {missing[0]}")


def _check_estimator(at: str, phase: Phase) -> None:
    """Tries the estimator's arguments on a group of two."""
    args = {**phase.estimator_args, **({"batch_std": 1.0} if phase.estimator_args.get("std") == "batch" else {})}
    handed = sorted(set(phase.estimator_args) & set(HANDED))
    if handed:
        raise RecipeError(f"{at}.estimator_args", f"{handed[0]} is computed, not set", "take it out")
    try:
        ESTIMATORS[phase.estimator](torch.tensor([0.0, 1.0]), torch.tensor([False, False]), **args)
    except (TypeError, ValueError) as error:
        takes = [n for n, p in signature(ESTIMATORS[phase.estimator]).parameters.items() if p.kind is p.KEYWORD_ONLY]
        known = ", ".join(n for n in takes if n not in HANDED) or "none"
        raise RecipeError(f"{at}.estimator_args", str(error), f"{phase.estimator} takes: {known}") from error


__all__ = [
    "Clip", "Data", "Evaluation", "Lora", "Mix", "Phase", "Recipe", "RewardSpec", "Sampling", "Tiny", "Trainable", "World",
]  # fmt: skip
