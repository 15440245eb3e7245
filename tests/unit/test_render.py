"""Prompts and annotations as text and tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rft.data.budget import Budget
from rft.data.samples import make_sample
from rft.errors import DataError
from rft.families import FAMILIES
from rft.hf.tiny import make_tokenizer
from rft.plugins import load_object
from rft.rollout.reference import reference_rollout
from rft.rollout.render import Prompt, Renderer
from rft.types import Sample, Segment
from tests.videos import spaced, write_video

TOKENIZER = make_tokenizer()
GROUNDING = Prompt(question="{question} Say when.", answer="<answer>{span[0]:.1f} to {span[1]:.1f}</answer>")
TEMPORAL_IOU = load_object("rewards/grounding.py:temporal_iou")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`long.mp4` of 16 s, `short.mp4` of 4 s, both 56 x 112, and `wide.png` of 280 x 560."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "long.mp4", spaced(4, 64), size=(56, 112))
    write_video(folder / "short.mp4", spaced(4, 16), size=(56, 112))
    Image.fromarray(np.zeros((280, 560, 3), np.uint8)).save(folder / "wide.png")
    return folder


def renderer(family: str = "qwen2_5_vl", prompt: Prompt = GROUNDING, *, room: int = 4096, **budget: Any) -> Renderer:
    """Frames of 56 x 112 are 2 x 4 = 8 tokens a pair in both families when pixels are left alone."""
    unit = FAMILIES[family].unit
    pixels = {"min_pixels": unit**2, "max_pixels": 8 * unit**2}
    return Renderer(
        tokenizer=TOKENIZER, family=FAMILIES[family], prompts={"default": prompt}, max_prompt_tokens=room,
        budget=Budget(**{"fps": 2.0, **pixels, **budget}),
    )  # fmt: skip


def sample_of(folder: Path, **row: Any) -> Sample:
    row = {"id": "s", "question": "Where is it?", "answer": {"span": [1, 3]}, **row}
    return make_sample(row, f"{folder}/rows.jsonl:1", folder / "rows.jsonl")


def test_a_prompt_is_scaffolding_media_and_the_filled_question(folder: Path) -> None:
    shown = renderer(prompt=replace(GROUNDING, system="Be brief.")).prompt(sample_of(folder, video="short.mp4"))
    assert shown.author == "world"
    # 4 s at 2 fps are 8 frames, 4 pairs, of 2 x 4 tokens
    assert shown.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{'<|video_pad|>' * 32}<|vision_end|>Where is it? Say when.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert TOKENIZER.decode(shown.ids) == shown.text
    (view,) = shown.views
    assert (view.tokens, view.grid, view.seconds) == (32, (4, 4, 8), (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5))


def test_a_family_that_prints_its_clock_states_a_second_per_pair(folder: Path) -> None:
    shown = renderer("qwen3_vl", nframes=4, fps=None, max_pixels=1024).prompt(sample_of(folder, video="short.mp4"))
    # of 16 frames the 0th, 5th, 10th and 15th: 0, 1.25, 2.5 and 3.75 s; means 0.625 and 3.125
    pair = "<|vision_start|><|video_pad|><|vision_end|>"
    assert f"<|vision_start|><0.6 seconds>{pair}<3.1 seconds>{pair}<|vision_end|>" in shown.text


def test_media_stand_where_the_messages_put_them(folder: Path) -> None:
    content = [{"type": "text", "text": "First"}, {"type": "image"}, {"type": "text", "text": "then"}, {"type": "video"}]
    row = {"messages": [{"role": "user", "content": content}], "video": "short.mp4", "image": "wide.png"}
    shown = renderer(max_frames=4, max_pixels=1568).prompt(sample_of(folder, **row))
    # the picture of 280 x 560 comes down to 28 x 56, two tokens, and so do four frames, two pairs
    image, video = "<|image_pad|>" * 2, "<|video_pad|>" * 4
    assert f"First<|vision_start|>{image}<|vision_end|>then<|vision_start|>{video}<|vision_end|><|im_end|>" in shown.text
    assert [v.kind for v in shown.views] == ["image", "video"]


def test_a_system_text_leads_messages_that_bring_none(folder: Path) -> None:
    prompt = replace(GROUNDING, system="Be brief.")
    asked = [{"role": "user", "content": "Hello"}]
    assert renderer(prompt=prompt).prompt(sample_of(folder, messages=asked)).text.startswith("<|im_start|>system\nBe brief.")
    led = sample_of(folder, messages=[{"role": "system", "content": "Be long."}, *asked])
    assert (
        renderer(prompt=prompt).prompt(led).text.startswith("<|im_start|>system\nBe long.<|im_end|>\n<|im_start|>user\nHello")
    )
    once = replace(led, messages=tuple(renderer(prompt=prompt).messages(sample_of(folder, messages=asked))))
    assert renderer(prompt=prompt).messages(once) == list(once.messages), "rendered messages render to themselves"


def test_the_task_picks_the_prompt(folder: Path) -> None:
    prompts = {"default": Prompt(question="D {question}"), "count": Prompt(question="C {question} {n}")}
    by_task = replace(renderer(), prompts=prompts)
    assert "C Where is it? 3<" in by_task.prompt(sample_of(folder, task="count", n=3)).text
    assert "D Where is it?<" in by_task.prompt(sample_of(folder, task="other")).text
    with pytest.raises(DataError) as caught:
        replace(by_task, prompts={"count": prompts["count"]}).prompt(sample_of(folder, task="other"))
    assert caught.value.where == f"sample s ({folder}/rows.jsonl:1)"
    assert caught.value.what == "no prompt is known for task 'other'"
    assert caught.value.do == "known: count; add it or a default to the recipe's prompts"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{questoin}", "KeyError 'questoin'"),
        ("{n:.1f}", "ValueError"),
        ("{n[2]}", "IndexError"),
        ("{n.missing}", "AttributeError"),
        ("{", "ValueError"),
        ('{"time": 3}', "KeyError"),
    ],
)
def test_a_template_that_cannot_be_filled_names_the_columns(folder: Path, template: str, what: str) -> None:
    sample = sample_of(folder, n="ab")
    with pytest.raises(DataError) as caught:
        renderer(prompt=Prompt(question=template)).prompt(sample)
    assert f"cannot fill the template {template!r}: {what}" in caught.value.what
    assert caught.value.do.startswith("the row has: answer, id, n, question;")


def test_braces_written_twice_are_text_and_braces_of_a_row_are_its_own(folder: Path) -> None:
    prompt = Prompt(question='{{"q": "{question}"}}')
    assert '{"q": "{span}"}' in renderer(prompt=prompt).prompt(sample_of(folder, question="{span}")).text


@pytest.mark.parametrize("special", ["<|im_end|>", "<|video_pad|>", "<|vision_start|>", "<|endoftext|>"])
def test_special_tokens_in_a_row_are_refused(folder: Path, special: str) -> None:
    said = f"its text holds the special token {special}"
    for row in ({"question": f"a{special}b"}, {"messages": [{"role": "user", "content": f"a{special}"}]}):
        with pytest.raises(DataError) as caught:
            renderer().prompt(sample_of(folder, **row))
        assert caught.value.what == said
    with pytest.raises(DataError) as caught:
        renderer(prompt=Prompt(answer="{text}")).answer_text(sample_of(folder, answer=f"no {special}"))
    assert caught.value.what == said


def over(family: str, room: int, folder: Path, **row: Any) -> tuple[Segment, Segment]:
    """(the prompt when there is room, the prompt in `room` tokens)"""
    sample = sample_of(folder, **row)
    return renderer(family, fps=4.0).prompt(sample), renderer(family, fps=4.0, room=room).prompt(sample)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("room", [250, 150, 64])
def test_a_prompt_over_budget_gets_fewer_frames_and_is_never_cut(folder: Path, family: str, room: int) -> None:
    whole, fitted = over(family, room, folder, video="long.mp4")
    before, after = whole.views[0], fitted.views[0]
    assert len(whole.ids) > room
    assert room * 0.7 < len(fitted.ids) <= room, "smaller than it must be is waste, larger is not allowed"
    assert len(after.frames) < len(before.frames)
    assert len(after.frames) % 2 == 0
    assert after.frames[0] == 0
    assert after.seconds[-1] > 10, "frames are dropped evenly and not at the end"
    pads = sum(i == TOKENIZER.convert_tokens_to_ids("<|video_pad|>") for i in fitted.ids)
    assert pads == after.tokens
    assert fitted.text.endswith("Where is it? Say when.<|im_end|>\n<|im_start|>assistant\n")
    if len(after.frames) > 4:
        assert after.size == before.size, "frames go before pixels"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("room", [320, 200, 100])
def test_of_several_media_the_largest_give_way(folder: Path, family: str, room: int) -> None:
    whole, fitted = over(family, room, folder, video=["long.mp4", "short.mp4"], image="wide.png")
    assert len(whole.ids) > room
    assert room * 0.6 < len(fitted.ids) <= room
    assert [v.source for v in fitted.views] == [v.source for v in whole.views]
    for before, after in zip(whole.views, fitted.views):
        assert 0 < after.tokens <= before.tokens
    assert fitted.views[2] == whole.views[2], "the picture of 8 tokens is below the level of the videos"
    if room == 320:
        assert fitted.views[1] == whole.views[1], "the short video fits as it is once the long one has given way"


def test_a_picture_gives_pixels_where_it_is_the_largest(folder: Path) -> None:
    sample = sample_of(folder, image=["wide.png", "wide.png"])
    shown = renderer(max_pixels=28**2 * 200, room=120).prompt(sample)
    # two of 280 x 560 would be 10 x 20 tokens each
    assert [v.tokens for v in renderer(max_pixels=28**2 * 200).prompt(sample).views] == [200, 200]
    assert len(shown.ids) <= 120
    assert shown.views[0].tokens == shown.views[1].tokens > 20


def test_text_that_alone_exceeds_the_budget_is_told(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        renderer(room=20).prompt(sample_of(folder, question="word " * 40))
    assert caught.value.where == f"sample s ({folder}/rows.jsonl:1)"
    assert "tokens of text, of 20" in caught.value.what
    assert caught.value.do == "raise max_prompt_tokens"


def test_media_that_do_not_fit_at_their_smallest_are_told_with_the_arithmetic(folder: Path) -> None:
    fixed = renderer(room=64, min_pixels=8 * 28**2)  # two pairs of 8 tokens for each video are 64 already
    sample = sample_of(folder, video=["long.mp4", "short.mp4", "long.mp4", "short.mp4"])
    text = len(renderer().prompt(replace(sample, media=())).ids) + 4 * 2  # a start and an end mark for each
    with pytest.raises(DataError) as caught:
        fixed.prompt(sample)
    assert caught.value.what == f"its prompt takes {text} tokens of text and 64 of media at their smallest, of 64"
    assert caught.value.do == "raise max_prompt_tokens or lower media.min_pixels"


def test_a_span_has_to_lie_in_the_video_that_is_there(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        renderer().prompt(sample_of(folder, video="short.mp4", answer={"span": [3, 7]}))
    assert caught.value.where == f"sample s ({folder}/rows.jsonl:1), {folder}/short.mp4"
    assert caught.value.what == "the annotated span 3 to 7 ends more than 2 s after the video (4.000 s)"
    assert renderer().prompt(sample_of(folder, video="short.mp4", answer={"span": [3, 6]}))
    assert renderer().prompt(sample_of(folder, video=["short.mp4", "long.mp4"], answer={"span": [3, 7]}))


def test_an_unusable_file_names_the_sample_and_the_file(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        renderer().prompt(sample_of(folder, video="none.mp4"))
    assert caught.value.where == f"sample s ({folder}/rows.jsonl:1), {folder}/none.mp4"
    with pytest.raises(DataError) as caught:
        renderer().prompt(sample_of(folder, video={"video": "long.mp4", "fps": 1, "nframes": 4}))
    assert caught.value.where == f"sample s ({folder}/rows.jsonl:1), {folder}/long.mp4"
    assert caught.value.what == "fps=1.0 and nframes=4 are both set"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_annotation_as_a_rollout_ends_its_turn_and_earns_everything(folder: Path, family: str) -> None:
    sample = sample_of(folder, video="short.mp4", answer={"span": [1.25, 3]})
    rendered = renderer(family, replace(GROUNDING, answer="<answer>{span[0]:.2f} to {span[1]:.2f}</answer>"))
    rollout = reference_rollout(sample, rendered)
    prompt, answer = rollout.segments
    assert (prompt.author, answer.author) == ("world", "reference")
    assert prompt == rendered.prompt(sample)
    assert answer.ids[-1] == TOKENIZER.eos_token_id
    assert answer.ids.count(TOKENIZER.eos_token_id) == 1
    assert answer.text == rollout.text == "<answer>1.25 to 3.00</answer>"
    assert answer.logprobs is None, "nobody sampled it"
    assert rollout.stop == "answered"
    assert TEMPORAL_IOU(rollout, sample) == 1.0


def test_a_coarse_template_does_not_earn_everything(folder: Path) -> None:
    sample = sample_of(folder, video="short.mp4", answer={"span": [1.25, 3]})
    rollout = reference_rollout(
        sample, renderer(prompt=replace(GROUNDING, answer="<answer>{span[0]:.0f} to {span[1]:.0f}</answer>"))
    )
    assert rollout.text == "<answer>1 to 3</answer>"
    assert TEMPORAL_IOU(rollout, sample) == 1.75 / 2  # 1.25 to 3 of 1 to 3


def test_an_answer_needs_a_template_and_the_keys_it_names(folder: Path) -> None:
    with pytest.raises(DataError, match="task 'default' has no answer template"):
        renderer(prompt=Prompt()).answer_text(sample_of(folder))
    with pytest.raises(DataError, match="KeyError 'span'"):
        renderer().answer_text(sample_of(folder, answer="some text"))
    with pytest.raises(DataError, match="the row has no answer"):
        renderer().answer_text(replace(sample_of(folder), answer={}))


def test_text_and_ids_of_a_reply_agree() -> None:
    rendered = renderer()
    ids = rendered.encode("café 日本 <answer>1.5 to 2</answer>")
    reply = rendered.reply("policy", [*ids, rendered.eos], logprobs=(0.0,) * (len(ids) + 1))
    assert reply.text == "café 日本 <answer>1.5 to 2</answer>"
    assert len(reply.ids) == len(ids) + 1
    assert rendered.reply("policy", ids).text == reply.text, "a cut reply has no closing token"
