"""More rounds at the same cost: what they show, and what is told of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from rft.data.budget import Budget
from rft.evaluation.rounds import CONTROLS, at_rounds, describe, report, spent, widened
from rft.families import FAMILIES
from rft.hf.tiny import make_tiny
from rft.recipe import Tiny
from rft.rollout.perceive import Looking
from rft.rollout.render import Renderer
from rft.types import Media
from tests.conftest import SMALL
from tests.looks import ANSWER, asking, film, looks, renderer, rolled

WRONG = "<answer>1 to 2</answer><clue>15 to 18</clue>"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("films") / "a.mp4")


def shared(how: Looking, rounds: int, tokens: int, render: Renderer) -> Looking:
    return at_rounds(how, rounds, render, {"s": tokens})


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("context", ["append", "fresh"])
def test_any_number_of_rounds_shows_as_much_as_the_recipe_s_own(context: str, family: str, path: Path) -> None:
    """Whatever the recipe's own rounds are made of: a coarse look and a fine one take 4 + 16 tokens here."""
    render, clue = renderer(family), "<answer>1 to 2</answer><clue>4 to 10</clue>"
    own = looks("iterative", context, rule="window", rounds=2, coarse=784, fine=4 * 784, visual_tokens=24)
    rollout, _ = rolled(asking(path), [clue, ANSWER], own, render)
    tokens = spent([rollout])["s"]
    assert [v.tokens for v in rollout.views] != [tokens // 2] * 2  # shared out as it likes
    for rounds in (1, 2, 3, 4):
        how = shared(own, rounds, tokens, widened(render))
        rollout, _ = rolled(asking(path), [clue] * rounds, how, widened(render))
        assert len(rollout.turns) == len(rollout.views) == rounds and rollout.refused == ()
        share = tokens // rounds
        assert all(v.tokens <= share for v in rollout.views)
        assert rollout.views[0].tokens >= share - 2  # filled, up to a pair of frames, with the whole film
        assert (rollout.views[0].seconds[0], rollout.views[0].seconds[-1]) == (0.0, 19.75)
    assert own.make().budget.visual_tokens == 24  # the one it was made from is as it was


def test_each_sample_has_a_budget_of_its_own(path: Path, tmp_path: Path) -> None:
    """One budget for all would let the short film show as much as the long one."""
    render = replace(renderer(), budget=Budget(fps=1, min_frames=2, min_pixels=784, max_pixels=784))
    samples = [asking(path), replace(asking(film(tmp_path / "long.mp4", 320)), id="long")]
    single = [rolled(sample, [ANSWER], Looking(), render)[0] for sample in samples]
    tokens = spent(single)
    assert tokens == {"s": 10, "long": 40}
    for rounds in (2, 3, 4):
        how = at_rounds(looks("iterative", "fresh"), rounds, render, tokens)
        for sample in samples:
            rollout, _ = rolled(sample, ["<clue>4 to 10</clue>"] * rounds, how, render)
            most = tokens[sample.id]
            assert len(rollout.turns) == rounds and most - 2 * rounds <= sum(v.tokens for v in rollout.views) <= most


@pytest.mark.parametrize("use", ["zoom", "frames", "replay"])
def test_perceptions_that_know_of_no_budget_share_it_too(use: str, path: Path) -> None:
    call = "<zoom>[0, 0, 1000, 1000]</zoom><frames>[1, 3]</frames><sot>[0, 0, 1, 1]<eot>"
    for rounds, tokens in ((2, 16), (2, 8), (2 if use == "frames" else 3, 24)):  # of a strip frames are named once
        said, how = [*[call] * (rounds - 1), ANSWER], shared(looks(use), rounds, tokens, renderer())
        rollout, _ = rolled(asking(path), said, how, renderer())
        assert len(rollout.views) == rounds and rollout.refused == ()
        assert all(view.tokens <= tokens // rounds for view in rollout.views)
    once, met = rolled(asking(path), [call], shared(looks(use), 1, 20, renderer()), renderer())
    assert (once.stop, once.refused, [v.tokens for v in once.views]) == ("answered", (), [20])  # nobody waits for a look
    assert "when?" in met[0].segments[0].text and once.views[0].pool == 1


def test_pictures_leave_what_they_do_not_need(path: Path, tmp_path: Path) -> None:
    Image.new("RGB", (56, 28)).save(tmp_path / "a.png")
    sample = asking(Media(kind="image", source=str(tmp_path / "a.png")), path)
    rollout, _ = rolled(sample, [ANSWER], shared(looks("iterative"), 1, 34, renderer()), renderer())
    assert [v.tokens for v in rollout.views] == [2, 32]


def test_a_share_that_is_small_is_shown_smaller(path: Path) -> None:
    """Chosen frames give up frames, and every look its least pixels, before it is refused."""
    render = replace(renderer(), budget=Budget(nframes=16, min_pixels=3136, max_pixels=12544))  # 4 tokens a pair at least
    for rule in ("two_streams", "window"):
        how = shared(looks("iterative", rule=rule, frames=16), 3, 9, render)
        rollout, _ = rolled(asking(path), ["<clue>4 to 10</clue>"] * 3, how, render)
        assert rollout.refused == () and [v.tokens <= 3 for v in rollout.views] == [True] * 3


def test_described_by_hand(path: Path) -> None:
    how, render = looks("iterative", rule="window", rounds=2), renderer()
    good, _ = rolled(asking(path), [WRONG, ANSWER], how, render)  # 8 + 8 tokens
    bad, _ = rolled(asking(path), ["<clue>50 to 60</clue>"], how, render)
    none, _ = rolled(asking(path), [ANSWER], how, render)
    told = describe([good, bad, none, good], rounds=2)
    assert told == {"visual_tokens": 12.0, "turns": 1.5, "valid_clues": pytest.approx(2 / 3), "refused": 0.0}
    assert describe([none], rounds=2)["valid_clues"] == 0.0  # nobody was asked
    kept, _ = rolled(asking(path), [WRONG, "<clue>gone</clue>", ANSWER], looks("iterative"), render)
    assert describe([kept], rounds=3)["valid_clues"] == 0.5 and describe([kept], rounds=3)["refused"] == 1.0
    call = "<zoom>[0, 0, 28, 14]</zoom>"
    zoomed, _ = rolled(asking(path), [call, "<zoom>left</zoom>", ANSWER], looks("zoom"), render)
    assert describe([zoomed], rounds=3)["valid_clues"] == 0.5
    assert report({"iou": 0.25}, [good, good], 2, seconds=8.0) == {
        "iou": 0.25, "visual_tokens": 16.0, "turns": 2.0, "valid_clues": 1.0, "refused": 0.0,
        "seconds": 4.0, "seconds_per_round": 2.0,
    }  # fmt: skip
    assert report({}, [good, good], 2, seconds=4.0, ranks=2)["seconds"] == 4.0  # as much work, shared by two


def test_a_clue_counts_where_something_was_shown_for_it(path: Path) -> None:
    def valid(said: Sequence[str], how: Looking, rounds: int) -> float:
        return describe([rolled(asking(path), said, how, renderer())[0]], rounds)["valid_clues"]

    bad, call = "<zoom>[5000, 5000, 6000, 6000]</zoom>", "<zoom>[0, 0, 28, 14]</zoom>"
    for context in ("append", "fresh"):
        assert valid([bad, ANSWER], looks("zoom", context), 3) == 0.0  # refused, and shown what stood there
        assert valid([call, ANSWER], looks("zoom", context), 3) == 1.0
        assert valid([call, bad, ANSWER], looks("zoom", context), 3) == 0.5
        assert valid([f"{call}{ANSWER}"], looks("zoom", context), 3) == 0.0  # a call beside an answer is none
        how = looks("iterative", context, rule="window", rounds=2)
        assert valid([WRONG, ANSWER], how, 2) == 1.0
        assert valid([WRONG, ANSWER], replace(how, budget=replace(how.budget, looks=1, frames=15)), 2) == 0.0
    once = looks("iterative", rounds=1)
    assert valid([WRONG], once, 1) == 1.0 and valid(["<clue>50 to 60</clue>"], once, 1) == 0.0


def test_rows_of_one_checkpoint(tmp_path: Path) -> None:
    """The recipe's own number stands there unasked; every row decodes for itself, in a store that starts empty."""
    rows = evaluated(tmp_path, "single", [2])
    assert list(rows["rounds"]) == ["1", "2"] and (rows["own"], rows["controls_at"]) == (1, 2)
    assert list(rows["controls"]) == list(CONTROLS) and rows["visual_tokens"] == 7.5  # 5 and 10
    assert rows["rounds"]["1"]["visual_tokens"] == 7.5 >= rows["rounds"]["2"]["visual_tokens"]
    assert all(row["seconds"] > 0 and "miou" in row for row in (*rows["rounds"].values(), *rows["controls"].values()))
    assert len(rows["stores"]) == 6 and all(count >= 2 for count in rows["stores"])  # the warm-up, 2 rows, 3 controls
    zoomed = evaluated(tmp_path, "zoom", [1])
    assert list(zoomed["rounds"]) == ["1", "2"] and zoomed["own"] == 2 and zoomed["controls"] == {}  # spans, and no box


def evaluated(folder: Path, use: str, rounds: list[int]) -> dict:
    """The rows of `rft eval --rounds`, and how many views were decoded into each store that it opened."""
    import rft.evaluate as room
    from rft.data.frames import FrameStore

    made: list = []
    opened = room.FrameStore

    class Counted(FrameStore):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            made.append(self)

    write_rows(folder, use)
    room.FrameStore = Counted
    try:
        found = room.evaluate_rounds(str(folder / "r.yaml"), (), str(folder / "model"), rounds, output=str(folder / "out.json"))
    finally:
        room.FrameStore = opened
    assert json.loads((folder / "out.json").read_text()) == found
    return {**found, "stores": [store.misses for store in made if store.misses or store.hits]}


def write_rows(folder: Path, use: str) -> None:
    if not (folder / "model").exists():
        make_tiny(folder / "model", Tiny(family="qwen2_5_vl", **SMALL), seed=1)
    rows = []
    for i, count in enumerate((40, 80)):
        film(folder / f"v{i}.mp4", count)
        rows.append({"id": f"r{i}", "video": f"v{i}.mp4", "question": "when?", "answer": {"span": [2.0, 6.0]}})
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.yaml").write_text(f"""
name: rows
model: {folder / "model"}
data: {{train: train.jsonl, validation: "", test: test.jsonl, workers: 0}}
media: {{fps: 1, min_frames: 2, min_pixels: 784, max_pixels: 784}}
prompts: {{default: {{question: "{{question}}", answer: "<answer>{{span[0]:.0f}} to {{span[1]:.0f}}</answer>"}}}}
perception: {{use: {use}}}
rewards: {{iou: {{use: "rewards/grounding.py:temporal_iou"}}}}
evaluation: {{max_tokens: 4}}
phases: {{grpo: {{steps: 1, groups_per_step: 1}}}}
""")
