"""Plain rollouts with a scripted policy: who wrote what, in which order, from which stream."""

from __future__ import annotations

from rft.families import FAMILIES
from rft.hf.tiny import make_tokenizer
from rft.rollout.loop import roll_out
from rft.rollout.policy import Context, Limits, Scripted
from rft.rollout.render import Prompt, Renderer
from rft.types import Sample


def rolled(samples: list[Sample], size: int, limit: int = 40) -> tuple[list, list[Context]]:
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer=tokenizer, family=FAMILIES["qwen2_5_vl"], prompts={"default": Prompt()})
    met: list[Context] = []

    def script(index: int, context: Context) -> str:
        met.append(context)
        return f"<answer>{index}</answer>"

    policy = Scripted(script, renderer.encode, renderer.eos)
    asked = [Sample(id=s.id, task=s.task, row={"question": f"what is {s.id}?"}) for s in samples]
    prompts = [renderer.prompt(s) for s in asked]
    limits = Limits(max_tokens=limit)
    return roll_out(asked, prompts, [size] * len(asked), policy=policy, renderer=renderer, limits=limits, draw=(0, "t", 7)), met


def test_rollouts_come_in_groups_and_in_order() -> None:
    groups, _ = rolled([Sample(id="a"), Sample(id="b")], 2)
    assert [[r.answer for r in g] for g in groups] == [["0", "1"], ["2", "3"]]
    assert [[r.sample_id for r in g] for g in groups] == [["a", "a"], ["b", "b"]]
    world, spoken = groups[1][0].segments
    assert (world.author, spoken.author, groups[1][0].stop) == ("world", "policy", "answered")
    assert "what is b?" in world.text and len(spoken.logprobs) == len(spoken.ids)


def test_a_reply_without_an_end_is_cut_and_says_so() -> None:
    groups, _ = rolled([Sample(id="a")], 1, limit=2)
    assert groups[0][0].stop == "length" and groups[0][0].answer is None and groups[0][0].num_tokens == 2


def test_every_rollout_has_a_stream_of_its_own_also_when_a_sample_comes_twice() -> None:
    _, met = rolled([Sample(id="a"), Sample(id="b"), Sample(id="a")], 2)
    assert len({c.key for c in met}) == 6
    _, alone = rolled([Sample(id="a")], 2)
    assert [c.key for c in alone] == [c.key for c in met[:2]]
