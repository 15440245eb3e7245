"""What a recipe may say, what it says back when it is wrong, and where each value came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rft.errors import RecipeError
from rft.loaded import load, resolved, show
from rft.recipe import Phase, Recipe, RewardSpec
from rft.strict import build, nearest

WHOLE = """
name: whole
model: tiny
lora: {rank: 8}
media: {nframes: 8, max_pixels: 784}
prompts:
  grounding: {question: "{question}", answer: "<answer>{span[0]}</answer>", system: "Two lines:\\n  # the second\\n"}
  "odd.name": {question: "a: b # c"}
rewards:
  iou: {use: "rewards/grounding.py:temporal_iou", args: {tags: [a, b], nested: {x: 1.5}}}
phases:
  grpo: {kl: {weight: 0.04, estimator: k1}, estimator_args: {std: none}, prompts: {grounding: {question: "no yes: {question}"}}}
  warmup: {objective: nll, betas: [0.9, 0.98]}
"""
OTHER = {"default": {"question": "Think first: {question}"}}
LEAST = {"name": "x", "model": "tiny", "phases": {"p": {"objective": "nll"}}}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """write(name, text) puts a file into the working directory."""
    monkeypatch.chdir(tmp_path)

    def put(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return put


def refused(values: dict | str, *sets: str) -> RecipeError:
    """The error of a recipe, given as a tree or as the name of a file."""
    with pytest.raises(RecipeError) as caught:
        load(values, sets) if isinstance(values, str) else build(Recipe, values)
    assert caught.value.do, "every message says what to do"
    return caught.value


def with_phase(**changes: object) -> dict:
    rewards = {"iou": {"use": "a.py:b"}}
    return {**LEAST, "rewards": rewards, "phases": {"p": {"groups_per_step": 4, **changes}}}


@pytest.mark.parametrize(
    ("values", "where", "do"),
    [
        ({"seeed": 1}, "seeed", "did you mean seed?"),
        ({"phases": {"p": {"grup_size": 4}}}, "phases.p.grup_size", "did you mean group_size?"),
        ({"phases": {"p": {"clip": {"hihg": 0.3}}}}, "phases.p.clip.hihg", "did you mean high?"),
        ({"rewards": {"r": {"use": "a.py:b", "wieght": 1}}}, "rewards.r.wieght", "did you mean weight?"),
        ({"trainable": {"xyzzy": True}}, "trainable.xyzzy", "known: language, projector, vision"),
    ],
)
def test_an_unknown_key_names_the_nearest(values: dict, where: str, do: str) -> None:
    error = refused({**LEAST, **values})
    assert (error.where, error.what, error.do) == (where, "unknown key", do)


def test_nearest_lists_what_is_known_when_nothing_is_near() -> None:
    assert nearest("qqqq", ["b", "a"]) == "known: a, b"
    assert nearest("qqqq", []) == "known: none"


@pytest.mark.parametrize(
    ("values", "where", "what"),
    [
        ({"seed": "one"}, "seed", "expected a whole number, got 'one'"),
        ({"seed": 1.5}, "seed", "expected a whole number, got 1.5"),
        ({"seed": True}, "seed", "expected a whole number, got True"),
        ({"name": 2024}, "name", "expected text, got 2024"),
        ({"log_rollouts": 1}, "log_rollouts", "expected true or false, got 1"),
        ({"trainable": None}, "trainable", "expected a mapping, got None"),
        ({"dtype": "float16"}, "dtype", "'float16' is not one of auto, float32, bfloat16"),
        ({"phases": {"p": {"betas": 0.9}}}, "phases.p.betas", "expected a list, got 0.9"),
        ({"phases": {"p": {"betas": [0.9, "x"]}}}, "phases.p.betas.1", "expected a number, got 'x'"),
        ({"phases": {"p": {"learning_rate": float("nan")}}}, "phases.p.learning_rate", "expected a number, got nan"),
        ({"phases": [1]}, "phases", "expected a mapping, got [1]"),
        ({"rewards": {"r": {}}}, "rewards.r.use", "this key is required"),
        ({"lora": {"rank": "big"}}, "lora.rank", "expected a whole number, got 'big'"),
        ({"media": {"fps": 2, "nframes": 8}}, "media", "fps=2.0 and nframes=8 are both set"),
        ({"media": {"fps": -1}}, "media", "fps=-1.0 is not positive"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_was_expected(values: dict, where: str, what: str) -> None:
    error = refused({**LEAST, **values})
    assert (error.where, error.what) == (where, what)


def test_yaml_reads_exponents_as_text_and_we_do_not(write) -> None:
    assert yaml.safe_load("3e-4") == "3e-4"
    name = write(
        "r.yaml", "name: x\nmodel: tiny\nphases: {p: {objective: nll, learning_rate: 3e-4, steps: 1e3, max_grad_norm: .inf}}"
    )
    phase = load(name).recipe.phases["p"]
    assert (phase.learning_rate, phase.steps, phase.max_grad_norm) == (3e-4, 1000, float("inf"))
    assert isinstance(phase.steps, int)


def test_null_is_a_value_where_one_may_be_missing() -> None:
    values = {**LEAST, "lora": None, "rewards": {"r": {"use": "a.py:b", "maximum": None, "timeout": 2}}}
    recipe = build(Recipe, values)
    assert recipe.lora is None
    assert recipe.rewards["r"] == RewardSpec(use="a.py:b", maximum=None, timeout=2.0)


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({**LEAST, "phases": {}}, "phases"),
        ({**LEAST, "family": "qwen9"}, "family"),
        ({**LEAST, "tiny": {"family": "qwen9"}}, "tiny.family"),
        ({**LEAST, "max_prompt_tokens": 0}, "max_prompt_tokens"),
        ({**LEAST, "data": {"max_bad_share": 1.5}}, "data.max_bad_share"),
        ({**LEAST, "data": {"synthetic": {"train": 0}}}, "data.synthetic.train"),
        ({**LEAST, "data": {"synthetic": {}, "train": "my.jsonl"}}, "data.synthetic and data.train"),
        ({**LEAST, "phases": {"p": {"objective": "ppo"}}}, "phases.p.objective"),
        (with_phase(estimator="gae"), "phases.p.estimator"),
        (with_phase(estimator_args={"std": "mean"}), "phases.p.estimator_args"),
        (with_phase(estimator_args={"sdt": "none"}), "phases.p.estimator_args"),
        (with_phase(estimator="leave_one_out", estimator_args={"std": "none"}), "phases.p.estimator_args"),
        (with_phase(kl={"estimator": "k2", "weight": 0.1}), "phases.p.kl.estimator"),
        (with_phase(kl={"weight": -0.1}), "phases.p.kl.weight"),
        (
            {
                **LEAST,
                "lora": {},
                "rewards": {"r": {"use": "a.py:b"}},
                "phases": {"p": {"objective": "nll"}, "q": {"kl": {"weight": 0.1}}},
            },
            "phases.q.kl.reference",
        ),
        (with_phase(kl={"reference": "start"}), "phases.p.kl.reference"),
        (with_phase(mix={"share": 1.5, "prompts": OTHER}), "phases.p.mix.share"),
        (with_phase(mix={"share": -0.5, "prompts": OTHER}), "phases.p.mix.share"),
        (with_phase(mix={"prompts": {}}), "phases.p.mix.prompts"),
        (with_phase(prompts=OTHER, mix={"prompts": OTHER}), "phases.p.mix.prompts"),
        (with_phase(mix={"prompts": OTHER, "rewards": ["iuo"]}), "phases.p.mix.rewards"),
        (
            {
                **LEAST,
                "rewards": {"iou": {"use": "a.py:b"}, "layout": {"use": "a.py:b"}},
                "phases": {"p": {"rewards": ["iou"], "mix": {"prompts": OTHER, "rewards": ["layout"]}}},
            },
            "phases.p.mix.rewards",
        ),
        (with_phase(betas=[0.9]), "phases.p.betas"),
        (with_phase(steps=0), "phases.p.steps"),
        (with_phase(learning_rate=-1e-6), "phases.p.learning_rate"),
        (with_phase(sampling={"temperature": 0}), "phases.p.sampling.temperature"),
        (with_phase(sampling={"top_p": 0}), "phases.p.sampling.top_p"),
        (with_phase(sampling={"max_tokens": 0}), "phases.p.sampling.max_tokens"),
        (with_phase(group_size=1), "phases.p.group_size"),
        (with_phase(groups_per_device=3), "phases.p.groups_per_step"),
        (with_phase(rewards=["iuo"]), "phases.p.rewards"),
        ({**LEAST, "phases": {"p": {}}}, "phases.p.rewards"),
        (with_phase(until="miou >= 0.5"), "phases.p.until"),
        ({**with_phase(until="miou is good"), "data": {"validation": "v.jsonl"}}, "phases.p.until"),
        ({**with_phase(until="miou > 0", check_every=0), "data": {"validation": "v.jsonl"}}, "phases.p.check_every"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_by_key(values: dict, where: str) -> None:
    assert refused(values).where == where


def test_a_batch_wide_deviation_needs_no_number_from_the_recipe() -> None:
    recipe = build(Recipe, with_phase(estimator_args={"std": "batch"}))
    assert recipe.phases["p"].estimator_args == {"std": "batch"}


def test_a_supervised_phase_needs_neither_group_nor_reward() -> None:
    assert build(Recipe, {**LEAST, "phases": {"p": {"objective": "nll", "group_size": 1}}}).phases["p"].supervised


def test_adapters_may_be_held_to_the_start_of_the_run_in_any_phase() -> None:
    """The model without its adapter is the run's start throughout, and the phase's only in the first one."""
    rewards = {"r": {"use": "a.py:b"}}
    for first, second in (("phase", "run"), ("run", "run")):
        phases = {name: {"kl": {"weight": 0.1, "reference": to}} for name, to in (("p", first), ("q", second))}
        recipe = build(Recipe, {**LEAST, "lora": {}, "rewards": rewards, "phases": phases})
        assert [p.kl.reference for p in recipe.phases.values()] == [first, second]


def test_a_phase_that_mixes_has_two_sets_of_prompts() -> None:
    values = {
        **LEAST,
        "prompts": {"default": {"question": "recipe"}, "a": {"question": "a"}},
        "rewards": {"iou": {"use": "a.py:b"}, "layout": {"use": "a.py:b"}},
        "phases": {
            "p": {"rewards": ["iou"], "mix": {"prompts": OTHER, "rewards": ["iou", "layout"]}},
            "q": {"accuracy": ["iou"], "prompts": {"b": {"question": "b"}}, "mix": {"prompts": OTHER}},
            "r": {"objective": "nll"},
        },
    }
    recipe = build(Recipe, values)
    asked = {name: {t: p.question for t, p in recipe.prompts_of(phase).items()} for name, phase in recipe.asked.items()}
    think = OTHER["default"]["question"]
    assert asked == {
        "p": {"default": "recipe", "a": "a"},
        "p.mix": {"default": think, "a": "a"},
        "q": {"default": "recipe", "a": "a", "b": "b"},
        "q.mix": {"default": think, "a": "a", "b": "b"},
        "r": {"default": "recipe", "a": "a"},
    }
    rewards = {name: list(recipe.rewards_of(phase)) for name, phase in recipe.asked.items()}
    both = ["iou", "layout"]
    assert rewards == {"p": ["iou"], "p.mix": both, "q": both, "q.mix": both, "r": both}
    assert recipe.accuracy_of(recipe.phases["p"]) == recipe.accuracy_of(recipe.phases["q"]) == ("iou",)
    assert recipe.phases["r"].mixed is None and recipe.asked["p.mix"].mix is None
    assert build(Recipe, resolved(recipe)) == recipe


def test_extends_merges_mappings_and_replaces_lists_and_scalars(write) -> None:
    write(
        "base.yaml",
        "name: base\nmodel: tiny\nphases: {a: {objective: nll, steps: 7, betas: [0.5, 0.6]}}\ntrainable: {vision: true}",
    )
    child = "extends: base.yaml\nname: child\nphases: {a: {betas: [0.1, 0.2]}, b: {objective: nll}}\n"
    recipe = load(write("child.yaml", child)).recipe
    assert recipe.name == "child"
    assert recipe.trainable.vision
    assert recipe.phases == {"a": Phase(objective="nll", steps=7, betas=(0.1, 0.2)), "b": Phase(objective="nll")}


def test_an_empty_mapping_clears_and_null_takes_away(write) -> None:
    base = (
        "name: b\nmodel: tiny\nlora: {rank: 8}\nmedia: {nframes: 8}\nphases: {p: {objective: nll, estimator_args: {std: none}}}"
    )
    write("base.yaml", base)
    child = write("c.yaml", "extends: base.yaml\nlora: null\nphases: {p: {estimator_args: {}}}\n")
    recipe = load(child).recipe
    assert recipe.lora is None
    assert recipe.phases["p"].estimator_args == {}
    assert recipe.media.nframes == 8
    assert load(child, ["lora.alpha=3"]).recipe.lora.rank == 64, "nothing is left of the rank that was taken away"


def test_later_parents_win_and_a_shared_grandparent_undoes_neither(write) -> None:
    write("root.yaml", "name: root\nmodel: tiny\nseed: 1\nmax_prompt_tokens: 100\nphases: {p: {objective: nll}}")
    write("left.yaml", "extends: root.yaml\nseed: 2\nname: left")
    write("right.yaml", "extends: root.yaml\nname: right")
    loaded = load(write("both.yaml", "extends: [left.yaml, right.yaml]"))
    assert (loaded.recipe.name, loaded.recipe.seed, loaded.recipe.max_prompt_tokens) == ("right", 2, 100)
    assert loaded.origins["seed"] == "left.yaml"


def test_extends_is_found_beside_the_file_that_says_it(write) -> None:
    write("deep/base.yaml", "name: deep\nmodel: tiny\nphases: {p: {objective: nll}}")
    write("deep/middle.yaml", "extends: base.yaml")
    assert load(write("top.yaml", "extends: deep/middle.yaml")).recipe.name == "deep"


def test_a_circle_is_told_file_by_file(write) -> None:
    write("a.yaml", "extends: b.yaml")
    write("b.yaml", "extends: a.yaml")
    error = refused(write("top.yaml", "extends: a.yaml"))
    assert error.what == "extends itself: a.yaml -> b.yaml -> a.yaml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: nothing.yaml", "not found"),
        ("extends: 3", "is no file name"),
        ("extends:", "is no file name"),
        ("[1, 2]", "a recipe is a mapping, this is list"),
        ("name: [", "not YAML"),
        ("name: x\n? [1]\n: 2", "unhashable key"),
        ("name: x\nseed: 1\nname: y", "the key 'name' is already on line 1"),
        ("phases:\n  p: {steps: 1}\n  p: {steps: 2}", "the key 'p' is already on line 2"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(write, text: str, said: str) -> None:
    error = refused(write("bad.yaml", text))
    assert "bad.yaml" in error.where
    assert said in error.what


def test_a_file_that_is_no_text_is_named(write, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff\xfe")
    assert "not YAML" in refused("bad.yaml").what


def test_merge_keys_of_yaml_work(write) -> None:
    text = "name: x\nmodel: tiny\nphases:\n  a: &a {objective: nll, steps: 3}\n  b: {<<: *a, steps: 5}\n"
    recipe = load(write("m.yaml", text)).recipe
    assert [p.steps for p in recipe.phases.values()] == [3, 5]


def test_set_reaches_into_phases_lists_and_what_is_not_there_yet(write) -> None:
    name = write("r.yaml", WHOLE)
    sets = [
        "phases.grpo.steps=5",
        "phases.grpo.clip.high=0.28",
        "lora=null",
        "phases.warmup.betas=[0.8, 0.9]",
        "tiny.hidden=32",
    ]
    recipe = load(name, sets).recipe
    assert (recipe.phases["grpo"].steps, recipe.phases["grpo"].clip.high, recipe.phases["grpo"].kl.weight) == (5, 0.28, 0.04)
    assert recipe.lora is None
    assert recipe.phases["warmup"].betas == (0.8, 0.9)
    assert recipe.tiny.hidden == 32
    assert load(name, ["media.nframes=null", "media.fps=1"]).recipe.media.fps == 1.0
    assert load(name, ["phases.warmup.until="]).recipe.phases["warmup"].until == ""


def test_set_values_may_hold_equals_signs(write) -> None:
    assert load(write("r.yaml", WHOLE), ["prompts.grounding.question=a=b"]).recipe.prompts["grounding"].question == "a=b"


@pytest.mark.parametrize(
    ("text", "where", "do"),
    [
        ("phases.gropo.steps=5", "--set phases.gropo.steps", "did you mean grpo?"),
        ("phases.grpo.step=5", "phases.grpo.step", "did you mean steps?"),
        ("seed", "--set", "write e.g. --set phases.grpo.steps=10"),
        ("=5", "--set", "write e.g. --set phases.grpo.steps=10"),
        ("a..b=5", "--set", "write e.g. --set phases.grpo.steps=10"),
        ("seed=[1", "--set seed", "quote it for the shell"),
        ("phases.warmup=null", "phases.warmup", None),
        ("phases.warmup.betas.0=0.5", "phases.warmup.betas", None),
    ],
)
def test_a_set_that_says_nothing_known_is_refused(write, text: str, where: str, do: str | None) -> None:
    error = refused(write("r.yaml", WHOLE), text)
    assert error.where == where
    assert do in (None, error.do)


def test_resolved_builds_the_same_recipe(write) -> None:
    recipe = load(write("r.yaml", WHOLE)).recipe
    assert build(Recipe, resolved(recipe)) == recipe
    again = load(write("again.yaml", yaml.safe_dump(resolved(recipe)))).recipe
    assert again == recipe


def test_show_is_the_resolved_recipe_in_yaml(write) -> None:
    loaded = load(write("r.yaml", WHOLE), ["seed=4"])
    assert yaml.safe_load(show(loaded)) == resolved(loaded.recipe)


def test_show_tells_where_each_value_came_from(write) -> None:
    write(
        "base.yaml",
        "name: base\nmodel: tiny\ntrainable: {vision: true, language: false}\nphases: {p: {objective: nll, steps: 3}}",
    )
    loaded = load(
        write("r.yaml", "extends: base.yaml\nname: mine\nphases: {p: {betas: [0.9, 0.95]}}"), ["trainable={vision: false}"]
    )
    origins = {}
    for line in show(loaded).splitlines():
        text, _, origin = line.partition("  # ")
        origins[text.strip()] = origin.strip()
    assert origins["name: mine"] == "r.yaml"
    assert origins["model: tiny"] == "base.yaml"
    assert origins["vision: false"] == "--set"
    assert origins["language: false"] == "base.yaml"
    assert origins["projector: true"] == "", "a default has no origin"
    assert origins["steps: 3"] == "base.yaml"
    assert origins["betas: [0.9, 0.95]"] == "r.yaml"
    assert origins["trainable:"] == ""


def test_data_and_rewards_are_found_beside_the_recipe(write, tmp_path: Path) -> None:
    write("sub/rows.jsonl", "")
    write("sub/mine.py", "def one(rollout, sample, scale=1.0):\n    return scale\n")
    reward = "rewards: {one: {use: 'mine.py:one', args: {scale: 0.5}, weight: 2, maximum: 0.5}}"
    loaded = load(write("sub/r.yaml", f"name: x\nmodel: tiny\n{reward}\nphases: {{p: {{}}}}"))
    assert loaded.path("rows.jsonl") == tmp_path / "sub" / "rows.jsonl"
    (found,) = loaded.rewards(loaded.recipe.phases["p"])
    assert (found.name, found.weight, found.maximum, found.args) == ("one", 2.0, 0.5, {"scale": 0.5})
    assert found.function(None, None, **found.args) == 0.5
    with pytest.raises(RecipeError, match=r"did you mean .*rows\.jsonl\?"):
        loaded.path("row.jsonl")
