"""The configuration tree: what a recipe may say, and how a file, what it extends and `--set a.b=c` become one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from rft.algo import ESTIMATORS, OBJECTIVES
from rft.algo.losses import KL
from rft.condition import Condition
from rft.data.media import Budget
from rft.errors import RecipeError
from rft.families import FAMILIES
from rft.plugins import find_file
from rft.rollout.render import Prompt
from rft.strict import build, nearest


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
    fps: float = 4.0  # of the file
    size: int = 28  # pixels per side
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """JSONL files (paths relative to the recipe), or a synthetic world in their place."""

    train: str = ""
    validation: str = ""
    test: str = ""
    synthetic: World | None = None
    max_bad_share: float = 0.01  # rows and media that may be quarantined before the run stops
    frame_cache_gb: float = 2.0  # decoded frames kept in memory


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
    clip: Clip = field(default_factory=Clip)
    kl: KL = field(default_factory=KL)
    mask_truncated: bool = False
    refill: int = 0  # times that silent groups are replaced by other samples
    sampling: Sampling = field(default_factory=Sampling)
    prompts: Mapping[str, Prompt] = field(default_factory=dict)  # replace those of the recipe, by task
    rewards: tuple[str, ...] = ()  # names; empty is all of the recipe's
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
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    trainable: Trainable = field(default_factory=Trainable)
    lora: Lora | None = None
    tiny: Tiny = field(default_factory=Tiny)
    data: Data = field(default_factory=Data)
    media: Budget = field(default_factory=Budget)
    max_prompt_tokens: int = 8192
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    rewards: Mapping[str, RewardSpec] = field(default_factory=dict)
    phases: Mapping[str, Phase] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    output: str = "runs/{name}"
    save_steps: int = 0  # optimizer steps between checkpoints inside a phase; 0 saves at its end only
    log_rollouts: bool = True

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise RecipeError("family", f"unknown family {self.family!r}", nearest(self.family, FAMILIES))
        if not self.phases:
            raise RecipeError("phases", "a recipe needs at least one phase")
        for name, phase in self.phases.items():
            _check_phase(f"phases.{name}", phase, self)

    def rewards_of(self, phase: Phase) -> dict[str, RewardSpec]:
        """The rewards of a phase, by name."""
        return {n: s for n, s in self.rewards.items() if not phase.rewards or n in phase.rewards}

    def prompts_of(self, phase: Phase | None) -> dict[str, Prompt]:
        """The prompts of a phase, by task."""
        return {**self.prompts, **(phase.prompts if phase else {})}


def _check_phase(at: str, phase: Phase, recipe: Recipe) -> None:
    if phase.objective not in OBJECTIVES:
        raise RecipeError(f"{at}.objective", f"unknown objective {phase.objective!r}", nearest(phase.objective, OBJECTIVES))
    if phase.estimator not in ESTIMATORS:
        raise RecipeError(f"{at}.estimator", f"unknown estimator {phase.estimator!r}", nearest(phase.estimator, ESTIMATORS))
    if phase.until:
        Condition.parse(phase.until, f"{at}.until")
    if phase.steps < 1 or phase.groups_per_step < 1 or phase.groups_per_device < 1 or phase.updates < 1:
        raise RecipeError(at, "steps, groups_per_step, groups_per_device and updates are at least 1")
    if phase.groups_per_step % phase.groups_per_device:
        raise RecipeError(
            f"{at}.groups_per_step", f"{phase.groups_per_step} groups do not fill forwards of {phase.groups_per_device}",
            "make groups_per_step a multiple of groups_per_device x devices",
        )  # fmt: skip
    for name in phase.rewards:
        if name not in recipe.rewards:
            raise RecipeError(f"{at}.rewards", f"unknown reward {name!r}", nearest(name, recipe.rewards))
    if phase.supervised:
        return
    if phase.group_size < 2:
        raise RecipeError(f"{at}.group_size", "a group needs at least 2 rollouts to compare", "use 8, or objective: nll")
    if not recipe.rewards_of(phase):
        raise RecipeError(f"{at}.rewards", "a phase that samples needs a reward", "add one under rewards")
    if phase.sampling.temperature <= 0:
        raise RecipeError(f"{at}.sampling.temperature", "sampling at 0 gives identical rollouts", "use 1.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A recipe, the folder its relative paths start from, and where each value came from (dotted key -> origin)."""

    recipe: Recipe
    folder: Path
    origins: Mapping[str, str]

    def path(self, name: str) -> Path:
        """A data file named by the recipe: relative to the recipe's folder, then to the working directory."""
        near = (self.folder / name).expanduser()
        return near if near.exists() else Path(name).expanduser().absolute()


def load(name: str, sets: Sequence[str] = ()) -> Loaded:
    """Read a recipe, what it extends, and `a.b=c` overrides on top.

    Raises:
        RecipeError: a file, a key or a value is wrong; the message names it.
    """
    path = find_file(name, near=None)
    values, origins = _read(path, ())
    for text in sets:
        _set(values, origins, text)
    recipe = build(Recipe, values)
    return Loaded(recipe=recipe, folder=path.parent, origins=origins)


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    if path in seen:
        raise RecipeError(str(path), f"extends itself through {' -> '.join(p.name for p in (*seen, path))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise RecipeError(str(path), f"not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(str(path), "a recipe is a mapping")
    base: dict[str, Any] = {}
    origins: dict[str, str] = {}
    parents = values.pop("extends", [])
    for parent in [parents] if isinstance(parents, str) else parents:
        below, below_origins = _read(find_file(parent, near=path.parent), (*seen, path))
        _merge(base, below)
        origins |= below_origins
    _merge(base, values)
    origins |= dict.fromkeys(_leaves(values), path.name)
    return base, origins


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Mappings merge key by key; anything else is replaced."""
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _set(values: dict[str, Any], origins: dict[str, str], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise RecipeError("--set", f"{text!r} is not a.b=c")
    node = values
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[last] = yaml.safe_load(raw) if raw else ""
    origins[key] = "--set"


def _leaves(values: Any, at: str = "") -> list[str]:
    if not isinstance(values, Mapping) or not values:
        return [at]
    return [leaf for key, value in values.items() for leaf in _leaves(value, f"{at}.{key}" if at else str(key))]


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The whole tree as plain values, defaults included; `build(Recipe, resolved(r)) == r`."""
    return _plain(asdict(recipe))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def show(loaded: Loaded) -> str:
    """The resolved recipe as YAML with the origin of every value behind it."""
    text = yaml.safe_dump(resolved(loaded.recipe), sort_keys=False, allow_unicode=True, width=100)
    lines, path = [], []
    for line in text.splitlines():
        stripped = line.lstrip()
        depth = (len(line) - len(stripped)) // 2
        if not stripped.startswith("- ") and ":" in stripped:
            path = [*path[:depth], stripped.split(":", 1)[0].strip("'\"")]
            dotted = ".".join(path)
            if not stripped.endswith(":"):
                origin = _origin(dotted, loaded.origins)
                line = f"{line:<60} # {origin}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _origin(dotted: str, origins: Mapping[str, str]) -> str:
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        if (found := origins.get(".".join(parts[:size]))) is not None:
            return found
    return "default"


__all__ = [
    "Clip", "Data", "Evaluation", "Loaded", "Lora", "Phase", "Recipe", "RewardSpec", "Sampling", "Tiny", "Trainable",
    "World", "load", "resolved", "show",
]  # fmt: skip
