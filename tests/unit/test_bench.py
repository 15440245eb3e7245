"""`rft bench`: the real command on a small work, the arithmetic of its floors, and the models it builds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rft.bench.arms import ARMS, Runner
from rft.bench.floors import Arithmetic
from rft.bench.main import bench
from rft.bench.measure import PHASES, Stopwatch, abba
from rft.bench.runs import Compared
from rft.bench.shapes import SHAPES, TINY, build
from rft.bench.stand import open_stand
from rft.bench.work import Work
from rft.errors import RecipeError

CPU = torch.device("cpu")
RATIOS = {
    "train", "train_cached_vision", "logprobs", "logprobs_cached_vision", "rollout", "peak_memory", "short_prompt", "step",
}  # fmt: skip
SMALL = Work(frames=2, size=(112, 112), group=3, completion=5, text=16, ragged=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_command_measures_compares_and_draws_without_trl(tmp_path: Path) -> None:
    output = tmp_path / "new" / "small.json"
    flags = ["--frames", "2", "--group", "2", "--completion", "2", "--repeats", "1", "--arms", "expanded,ours,ours-cache"]
    program = (
        "import sys\nfrom rft.cli import main\n"
        f"code = main(['bench', '--output', {str(output)!r}, *{flags!r}])\n"
        "assert not {'trl', 'datasets'} & {*sys.modules}\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert set(found["ratios"]) == set(found["ratios_trl_fair"]) == RATIOS
    assert set(found["ideal"]) == {*RATIOS, "tokens"}
    assert all(value > 0 for value in found["ratios"].values())
    assert not any(found["ratios_trl_fair"].values())
    assert list(found["arms"]) == ["expanded", "ours", "ours-cache"]
    for name, phases in found["arms"].items():
        assert tuple(phases) == PHASES
        assert sum(phases.values()) == pytest.approx(found["jobs"][name]["step"]["min"], rel=0.02)
    assert found["equality"]["grad_rel_l2"] <= 1e-5
    assert found["equality"]["tokens_identical"] and found["equality"]["same_parameters"]
    p = found["work"]["prompt"]
    assert p == 64 + 256
    assert found["ideal"]["tokens"] == pytest.approx(2 * (p + 2) / (p + 2 * 2))
    assert "gradient rel. L2" in done.stdout and "floor" in done.stdout
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_arms_of_trl_run(tmp_path: Path) -> None:
    arms = ("trl", "trl-fair", "expanded", "ours", "ours-cache")
    found = bench(tmp_path / "trl.json", frames=2, group=2, completion=3, repeats=1, arms=arms)
    assert set(found["arms"]) == set(arms)
    assert all(value for name, value in found["ratios_trl_fair"].items() if name != "short_prompt")
    assert found["arms"]["trl"]["backward"] > 0 and found["arms"]["trl"]["old/ref"] > 0


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"arms": ["ours", "theirs"]}, "'theirs'"),
        ({"model": "qwen"}, "qwen2.5-vl-3b"),
        ({"frames": 3}, "no pairs"),
        ({"group": 1}, "two members"),
        ({"output": Path("x.png")}, "FILE.json"),
    ],
)
def test_bad_flags_are_refused_before_anything_runs(tmp_path: Path, flags: dict, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        bench(flags.pop("output", tmp_path / "x.json"), **flags)


def test_every_arm_has_the_gradient_of_the_expanded_one_and_a_wrong_one_is_seen(tmp_path: Path) -> None:
    stand = open_stand("tiny", SMALL, CPU, tmp_path)
    compared = Compared(stand.model)
    for name, arm in ARMS.items():
        outcome = Runner(arm, stand.model, stand.material, stand.optimizer).step(Stopwatch(CPU))
        seen = compared.see(outcome)
        assert seen["grad_rel_l2"] < 1e-5 and seen["tokens_identical"] and seen["same_parameters"], name
        assert all(len(ids) == SMALL.completion for ids in outcome.tokens)
    with torch.no_grad():
        next(p for p in stand.model.parameters() if p.grad is not None).grad.mul_(1.01)
    assert compared.see(outcome)["grad_rel_l2"] > 1e-4


def test_floors_count_what_the_model_multiplies(tmp_path: Path) -> None:
    """Against torch's own counter; it counts masked scores too, and at these sizes attention is a small part."""
    stand = open_stand("tiny", replace(SMALL, text=64, completion=16), CPU, tmp_path)
    count = Arithmetic(stand.model, stand.material)
    for name, packed, runs in (("expanded", False, 3), ("ours-cache", True, 1)):
        runner = stand.runner(name)
        runner.prepare()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            runner.logprobs(runner.look(Stopwatch(CPU)))
        assert counter.get_total_flops() == pytest.approx(count.forward(packed) + runs * count.vision(), rel=0.05)


@pytest.mark.parametrize("name", [n for n in SHAPES if n != "tiny"])
def test_true_sizes_are_built_whole(name: str) -> None:
    """A true architecture with fewer layers and a small vocabulary: no buffer is left empty, nothing stays on meta."""
    true = SHAPES[name].architecture
    text = true.text | {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 640}
    vision = true.vision | {"depth": 1, "intermediate_size": 64}
    deep = {"deepstack_visual_indexes": [0]} if "deepstack_visual_indexes" in vision else {"fullatt_block_indexes": [0]}
    model = build(replace(true, text=text, vision=vision | deep), CPU, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    rotary = model.model.language_model.rotary_emb.inv_freq
    theta, size = text["rope_parameters"]["rope_theta"], 128
    assert torch.allclose(rotary, theta ** (-torch.arange(0, size, 2) / size), rtol=1e-5)
    logits = model(input_ids=torch.arange(8)[None]).logits
    assert logits.isfinite().all() and 0.01 < logits.float().std() < 10


def test_the_small_shape_is_the_one_that_the_gates_are_stated_for() -> None:
    assert (TINY.text["hidden_size"], TINY.text["num_hidden_layers"], TINY.vision["hidden_size"]) == (256, 4, 160)
    assert (SHAPES["tiny"].frames, SHAPES["tiny"].size, SHAPES["tiny"].completion) == (24, (224, 224), 64)


class Scripted(Stopwatch):
    """A clock that shows the given times, one after the other."""

    def __init__(self, *times: float) -> None:
        super().__init__(CPU)
        self._times = iter(times)

    def now(self) -> float:
        return next(self._times)


def test_time_in_an_inner_phase_is_not_the_outer_ones() -> None:
    watch = Scripted(0, 1, 4, 9, 10, 12)
    with watch.job("train", "train forward"), watch.phase("vision"):
        pass
    assert dict(watch.phases) == {"train forward": 3 + 1, "vision": 5}
    assert dict(watch.jobs) == {"train": 12}


def test_arms_take_turns_there_and_back() -> None:
    assert "".join(abba("AB", 3)) == "ABBAAB"
