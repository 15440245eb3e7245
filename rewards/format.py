"""Whether a completion has the layout that its prompt asked for. It says nothing about the answer being right."""

import re

from rft import Rollout, Sample

_TAG = re.compile(r"</?(?:think|answer)>")
_ANSWER = ["<answer>", "</answer>"]
_THINK_ANSWER = ["<think>", "</think>", *_ANSWER]


def tagged_answer(rollout: Rollout, sample: Sample, think: bool = False) -> float:
    """1 when the last turn is one `<answer>..</answer>`, after one `<think>..</think>` with `think`, and nothing else.

    Blanks around and between the blocks are free. A repeated, nested or missing tag and an answer of blanks earn 0.
    """
    if _TAG.findall(rollout.text) != (_THINK_ANSWER if think else _ANSWER):
        return 0.0
    parts = _TAG.split(rollout.text)  # outside, inside, outside, ...; the answer is the last inside
    return float(bool(parts[-2].strip()) and not "".join(parts[::2]).strip())
