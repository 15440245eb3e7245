"""A trajectory is logged so that all of it can be told, and told so that nothing a model wrote can speak for us."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rft.algo.advantages import grpo
from rft.algo.credit import credit
from rft.cli import main
from rft.data.budget import Budget
from rft.data.views import Look
from rft.errors import DataError, RecipeError
from rft.families import FAMILIES
from rft.hf.tiny import make_tokenizer
from rft.report.rollout_log import RolloutLog
from rft.report.trace import trace
from rft.rollout.loop import opening, roll_out
from rft.rollout.perceive import Allowance, Final, Looking, State, Turn
from rft.rollout.policy import Limits, Scripted
from rft.rollout.reference import reference_rollout
from rft.rollout.render import Prompt, Renderer
from rft.run.history import cut_back
from rft.types import Group, Media, Rollout, Sample, Scored, Segment, View
from tests.videos import spaced, write_video

SHOWN = View(
    media=0, kind="video", source="/far/away/clip.mp4", frames=(0, 8, 17, 25), seconds=(0.0, 1.0, 2.12345, 3.1),
    pair_seconds=(0.0, 2.12345), size=(28, 56), original=(480, 960), grid=(2, 2, 4), tokens=4, duration=4.0,
)  # fmt: skip
NEAR = replace(
    SHOWN, frames=(8, 8), seconds=(1.0, 1.0), pair_seconds=(1.0,), tokens=2, grid=(1, 1, 2), crop=(0.5, 0, 100, 80), pool=2
)
PART = replace(NEAR, crop=None, pool=1, region=(0, 1, 2, 3), tokens=4)
PAD = "<|video_pad|>"


def world(text: str, *views: View, fresh: bool = False, tokens: int = 9) -> Segment:
    return Segment(author="world", text=text, ids=tuple(range(tokens)), views=views, is_fresh=fresh)


def said(text: str, author: str = "policy", tokens: int = 3) -> Segment:
    return Segment(author=author, text=text, ids=tuple(range(100, 100 + tokens)))


PROMPT = world(f"user\n<|vision_start|>{PAD * 4}<|vision_end|>When?", SHOWN, tokens=12)


def logged(run: Path, groups: Sequence[Group], *, step: int = 0, file: str = "grpo-0", per: str = "turn") -> list[dict]:
    """Writes the groups as a step does; the lines of the file."""
    (run / "rollouts").mkdir(parents=True, exist_ok=True)
    path = run / "rollouts" / f"{file}.jsonl"
    examples = [credit(g, grpo, per=per, std="none", mask_over_turns=True) for g in groups]
    RolloutLog(path=path).write(step, groups, examples, prompts=["phase"] * len(groups))
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def plain(sample: str, *texts: str) -> Group:
    members = [
        Scored(rollout=Rollout(sample_id=sample, segments=(PROMPT, said(text))), reward=float(i), parts={"r": float(i)})
        for i, text in enumerate(texts)
    ]
    return Group(sample=Sample(id=sample), members=tuple(members))


def looked() -> Group:
    """The policy looks again in a new prompt; the annotation begins, is shown a part, and the policy ends."""
    anew = world(f"<|vision_start|>{PAD * 2}<|vision_end|>Closer:", NEAR, fresh=True)
    first = Rollout(
        sample_id="a", segments=(PROMPT, said("<clue>[0, 1]</clue>"), anew, said("<answer>1</answer>", tokens=4)),
        stop="turns", refused=("outside", "context"),
    )  # fmt: skip
    there = world(PAD * 4, PART, tokens=4)
    second = Rollout(sample_id="a", segments=(PROMPT, said("so", "reference", 2), said(" see\n"), there, said("1")))
    scored = (
        Scored(rollout=first, reward=0.75, parts={"iou": 0.5, "calls": None}, turns=(0.25, 0.75), notes={"iou": "near"}),
        Scored(rollout=second, reward=0.5, parts={"iou": 0.5, "calls": 0.0}, turns=(0.75, 0.25)),
    )
    return Group(sample=Sample(id="a"), members=scored)


TOLD = """\
sample a, step 3 of grpo (rollouts/grpo-0.jsonl): 2 rollouts

rollout 0 by policy: reward 0.75 (iou 0.5, calls does not apply), advantage by turn -0.25, +0.25, \
stop: turns, left out of the loss
  note of iou: near
  refused: outside, context
  turn 1, world, masked: 12 tokens (4 visual)
    look at video 0 (clip.mp4), 4 frames, 0.000 to 3.100 s, 28 x 56 pixels (height x width), 4 tokens
      at 0.000 1.000 2.123 3.100
    | user
    | <|vision_start|><|video_pad|>*4<|vision_end|>When?
  turn 1, policy, trained: 3 tokens, reward 0.25, advantage -0.25
    | <clue>[0, 1]</clue>
  turn 2, world, masked, a new prompt: 9 tokens (2 visual)
    look at video 0 (clip.mp4), 2 frames (1 different), 1.000 to 1.000 s, 28 x 56 pixels (height x width), 2 tokens, \
crop (0.5, 0) to (100, 80), pooled by 2
    | <|vision_start|><|video_pad|>*2<|vision_end|>Closer:
  turn 2, policy, trained: 4 tokens, reward 0.75, advantage +0.25
    | <answer>1</answer>
  in all: 2 rounds of 2 prompts, 6 visual tokens, 7 text tokens written

rollout 1 by reference and policy: reward 0.5 (iou 0.5, calls 0), advantage by turn +0.25, -0.25, stop: answered
  turn 1, world, masked: 12 tokens (4 visual)
    look at video 0 (clip.mp4), 4 frames, 0.000 to 3.100 s, 28 x 56 pixels (height x width), 4 tokens
      at 0.000 1.000 2.123 3.100
    (the same words as in rollout 0)
  turn 1, reference, trained: 2 tokens, reward 0.75, advantage +0.25
    | so
  turn 1, policy, trained: 3 tokens
    |  see
    |
  turn 2, world, masked: 4 tokens (4 visual)
    look at video 0 (clip.mp4), 2 frames (1 different), 1.000 to 1.000 s, 28 x 56 pixels (height x width), 4 tokens, \
rows 0 to 2 and columns 1 to 3 of its tokens
    | <|video_pad|>*4
  turn 2, policy, trained: 3 tokens, reward 0.25, advantage -0.25
    | 1
  in all: 2 rounds, 8 visual tokens, 8 text tokens written (2 reference + 6 policy)
"""


def test_a_group_is_told_turn_by_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(tmp_path, [plain("b", "x", "y"), looked()], step=3)
    assert main(["trace", str(tmp_path), "--sample", "a"]) == 0
    assert capsys.readouterr().out == TOLD
    assert main(["trace", str(tmp_path), "--sample", "a", "--rollout", "1"]) == 0
    alone = capsys.readouterr().out
    assert "rollout 0 by" not in alone and "    | user\n    | <|vision_start|><|video_pad|>*4" in alone, "its words are told"


def test_what_a_line_holds(tmp_path: Path) -> None:
    one, two = logged(tmp_path, [looked()], step=3)
    assert (one["step"], one["sample"], one["author"], one["text"], one["tokens"]) == (
        3,
        "a",
        "policy",
        "<answer>1</answer>",
        7,
    )
    assert (one["advantage"], one["advantages"], one["turns"], one["weight"]) == (-0.25, [-0.25, 0.25], [0.25, 0.75], 0.0)
    assert (two["author"], two["text"], two["refused"]) == ("reference", "1", []) and "weight" not in two
    prompt, clue, anew, _ = one["segments"]
    assert prompt == {
        "author": "world", "text": f"user\n<|vision_start|>{PAD}*4<|vision_end|>When?", "tokens": 12,
        "views": [{
            "media": 0, "kind": "video", "source": "clip.mp4", "first": 0.0, "last": 3.1, "seconds": [0.0, 1.0, 2.123, 3.1],
            "size": [28, 56], "tokens": 4,
        }],
    }  # fmt: skip
    assert clue == {"author": "policy", "text": "<clue>[0, 1]</clue>", "tokens": 3}
    assert anew["fresh"] is True and anew["views"][0]["pool"] == 2 and anew["views"][0]["crop"] == [0.5, 0, 100, 80]
    assert two["segments"][0] == {"author": "world", "same": True}
    assert two["segments"][3]["views"][0]["region"] == [0, 1, 2, 3]
    single, _ = logged(tmp_path / "single", [plain("b", "x", "y")])
    assert single["advantage"] == -0.5 and not {"advantages", "turns", "weight"} & set(single)


def test_what_a_policy_writes_is_exact_and_pads_of_the_world_alone_are_counted(tmp_path: Path) -> None:
    text = f"{PAD * 3} \u2028and\x85 \x1b[2J\t\r\n| no"
    (line,) = logged(tmp_path, [plain("a", text)])
    assert line["segments"][1]["text"] == line["text"] == text
    path = tmp_path / "rollouts" / "grpo-0.jsonl"
    assert len(path.read_text().splitlines()) == 1, "nothing a model writes ends a line, for whoever splits"
    assert cut_back(tmp_path, ["grpo"], "grpo", 1, tmp_path / "aside") == 0
    printed = list(trace(tmp_path, "a"))
    assert printed[-3:-1] == [f"    | {PAD * 3} \\u2028and\\x85 \\x1b[2J\\t\\r", "    | | no"]
    assert all(line.isprintable() for line in printed)


def test_ids_notes_and_refusals_are_escaped_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollout = Rollout(sample_id="\x1ba", segments=(PROMPT, said("x")), refused=("\x1b[31m\nrollout 9",))
    member = Scored(rollout=rollout, reward=0.0, parts={"r\x07": 1.0}, notes={"r\x07": "bad\u202e"})
    logged(tmp_path, [Group(sample=Sample(id="\x1ba"), members=(member,), muted="equal\x9b")])
    printed = list(trace(tmp_path, "\x1ba"))
    assert all(line.isprintable() for line in printed)
    assert printed[0].startswith("sample \\x1ba, ") and printed[0].endswith("1 rollout, muted: equal\\x9b")
    assert "  refused: \\x1b[31m\\nrollout 9" in printed and "  note of r\\x07: bad\\u202e" in printed
    assert main(["trace", str(tmp_path), "--sample", "a\x1b"]) == 1
    assert "\x1b" not in capsys.readouterr().err


class Again:
    """Looks into what the last clue names, at most as often as there are rounds."""

    def start(self, sample: Sample, media: tuple[View, ...]) -> Turn:
        return Turn()

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        if "<clue>" not in reply:
            return Final()
        first, last = map(float, reply.partition("<clue>")[2].partition("</clue>")[0].split(","))
        return Turn(text="Again?", looks=[Look(span=(first, last), frames=2)])

    def teach(self, answer: str, media: tuple[View, ...], state: State) -> str:
        return "<clue>1,3</clue>" if state.round == 0 else answer


@pytest.mark.parametrize("context", ["append", "fresh"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_rollouts_that_look_are_logged_as_they_went(context: str, family: str, tmp_path: Path) -> None:
    """Real files, real tokens: a refusal, a rollout that does not look, and the annotation as the last member."""
    clip = write_video(tmp_path / "clip.mp4", spaced(4, 32))
    renderer = Renderer(
        tokenizer=make_tokenizer(), family=FAMILIES[family], prompts={"default": Prompt(question="When?", answer="A")},
        budget=Budget(nframes=4, min_pixels=784, max_pixels=4096),
    )  # fmt: skip
    sample = Sample(id="a", media=(Media(kind="video", source=str(clip)),), answer={"text": "A"})
    looking = Looking(make=Again, context=context, budget=Allowance(rounds=2))
    prompt = opening(sample, renderer, looking)
    replies = iter(["<clue>2,4</clue>", "C", "<clue>90,99</clue>", "B", "D"])
    policy = Scripted(lambda index, context: next(replies), renderer.encode, renderer.eos)
    given = {"policy": policy, "renderer": renderer, "limits": Limits(max_tokens=40), "draw": (0,), "looking": looking}
    (rollouts,) = roll_out([sample], [prompt], [3], **given)
    rollouts = (*rollouts, reference_rollout(sample, renderer, prompt, looking=looking))
    group = Group(sample=sample, members=tuple(Scored(rollout=r, reward=float(i), parts={}) for i, r in enumerate(rollouts)))
    lines = logged(tmp_path / "run", [group], per="rollout")
    assert [line["refused"] for line in lines] == [[], [], ["outside"], []]
    assert [line["text"] for line in lines] == ["B", "C", "D", "A"]
    assert [[s["author"][0] for s in line["segments"]] for line in lines] == [[*"wpwp"], [*"wp"], [*"wpwp"], [*"wrwr"]]
    assert [line["advantage"] for line in lines] == [-1.5, -0.5, 0.5, 1.5]
    assert lines[3]["advantages"] == [1.5, 1.5] and "advantages" not in lines[1]
    assert all(line["segments"][0] == {"author": "world", "same": True} for line in lines[1:])
    assert [sum(s.get("tokens", 0) for s in line["segments"] if s["author"] != "world") for line in lines] == [
        r.num_tokens for r in rollouts
    ]
    again = lines[0]["segments"][2]
    assert again.get("fresh", False) == (context == "fresh")
    assert len(again["views"][0]["seconds"]) == 2 and 2.0 <= again["views"][0]["first"] < again["views"][0]["last"] <= 4.0
    assert again["text"].replace(f"{PAD}*{again['views'][0]['tokens']}", PAD * again["views"][0]["tokens"]) == (
        rollouts[0].segments[2].text
    )
    told = "\n".join(trace(tmp_path / "run", "a"))
    assert told.count("    (the same words as in rollout 0)") == 3
    visual = sum(v.tokens for v in rollouts[3].views)
    prompts = " of 2 prompts" if context == "fresh" else ""
    assert told.endswith(f"in all: 2 rounds{prompts}, {visual} visual tokens, {rollouts[3].num_tokens} text tokens written")
    assert told.count(", a new prompt: ") == (3 if context == "fresh" else 0)
    assert "  refused: outside\n" in told and "turn 2, reference, trained: " in told


def test_which_group_is_told(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("phases: {warm: {}, a-later: {}}\n")
    logged(tmp_path, [plain("a", "w5")], step=5, file="warm-0")
    logged(tmp_path, [plain("a", "l1"), plain("b", "b"), plain("a", "l1 again")], step=1, file="a-later-0")
    logged(tmp_path, [plain("b", "b")], step=3, file="a-later-0")
    logged(tmp_path, [plain("a", "l2", "l2 too")], step=2, file="a-later-1")

    def words(**asked: object) -> list[str]:
        lines = list(trace(tmp_path, "a", **asked))
        return [line.removeprefix("    | ") for i, line in enumerate(lines) if "policy, trained" in lines[i - 1]]

    assert words() == ["l2", "l2 too"], "the last step of the last phase, on any rank"
    assert words(step=1) == ["l1", "l1 again"], "a sample may be met twice in a step"
    assert words(rollout=1) == ["l2 too"]
    assert words(phase="warm") == words(step=5) == ["w5"]
    for asked, what, do in (
        ({"step": 3}, "was not met at step 3", "it was at: 1, 2, 5"),
        ({"phase": "later"}, "was not met in phase 'later'", "it was in: a-later, warm"),
        ({"rollout": 2}, "has no rollout 2 at step 2 of a-later", "there are: 0, 1"),
    ):
        with pytest.raises(RecipeError) as caught:
            words(**asked)
        assert (caught.value.where, caught.value.what, caught.value.do) == ("sample a", what, do)


def no_run(run: Path) -> None:
    run.rmdir()


def no_log(run: Path) -> None:
    (run / "rollouts").mkdir()


def emptied(run: Path) -> None:
    no_log(run)
    (run / "rollouts" / "grpo-0.jsonl").write_text("")


def other(run: Path) -> None:
    logged(run, [plain(name, "x") for name in ("clip_1", "clip_12", "film", "clip_13")])


@pytest.mark.parametrize(
    ("prepare", "what", "do"),
    [
        (no_run, "there is no such folder", "name the folder of a run"),
        (lambda run: None, "is not the folder of a run", "name the folder that was trained in"),
        (no_log, "no rollouts were logged", "log_rollouts: true"),
        (emptied, "no rollouts were logged", "log_rollouts: true"),
        (other, "sample clip_14: is in no rollout of", "the nearest that are: clip_1, clip_13, clip_12\n"),
    ],
)
def test_what_is_not_there_is_said(
    prepare: Callable[[Path], None], what: str, do: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    prepare(run)
    assert main(["trace", str(run), "--sample", "clip_14"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("\nRecipeError: ") and what in err and do in err


def test_a_log_that_was_cut_is_told_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(tmp_path, [plain("a", "one", "two")])
    path = tmp_path / "rollouts" / "grpo-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert main(["trace", str(tmp_path), "--sample", "a"]) == 1
    out, err = capsys.readouterr()
    assert "    | one\n" in out and "two" not in out
    assert err.startswith(f"\nDataError: {path}:2: is not a line of a rollout log\n  what to do: ")
    with pytest.raises(RecipeError, match="is damaged"):
        list(trace(tmp_path, "b"))
    first, second = whole.splitlines(keepends=True)
    path.write_bytes(first[:50] + b"\n" + b"[1]\n" + second)
    with pytest.raises(DataError, match="and 1 more"):
        list(trace(tmp_path, "a"))
    main(["trace", str(tmp_path), "--sample", "a"])
    out = capsys.readouterr().out
    assert (
        "turn 1, world, masked: as in rollout 0, whose line is damaged\n  turn 1, policy, trained: 3 tokens\n    | two\n" in out
    )
    assert "in all but for what is lost: 1 round, 0 visual tokens, 3 text tokens" in out


@pytest.mark.parametrize("argv", [(), ("--sample", "a", "--step", "-1"), ("--sample", "a", "--rollout", "x")])
def test_what_cannot_be_asked(argv: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["trace", str(tmp_path), *argv])
