"""Several answers to every sample, one per prompt: the best in hindsight, and the one that the policy was surest of.

The first is an oracle, since it looks at the annotation; no one who asks the model has it. The second looks at nothing but
what the policy wrote.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from rft.evaluation.metrics import measure
from rft.types import Rollout, Sample

AGREEMENTS = ("miou", "box_iou", "accuracy", "mr_map", "hl_map")  # each is a mean over samples of how right one answer is
Text = Callable[[Sequence[int]], str]


def agreement(sample: Sample, rollout: Rollout) -> float:
    """How right one answer is, in [0, 1]: the mean of the metrics that apply to its annotation; 0 where none does."""
    metrics = measure([sample], [rollout])
    return fmean([metrics[name] for name in AGREEMENTS if name in metrics] or [0.0])


def confidence(rollout: Rollout, text: Text) -> float:
    """Mean log-prob of the tokens of the answer: those that reach into the last `<answer>` block, without its tags.

    The log-probs are the sampler's, so the policy's own at temperature 1 for greedy answers. `text` decodes ids. An answer
    that is missing or empty has -inf, and so has one that nobody sampled.
    """
    if rollout.answer is None:
        return float("-inf")
    written = rollout.segments[-1]
    begin = written.text.rfind("<answer>", 0, written.text.rfind("</answer>")) + len("<answer>")
    end = written.text.find("</answer>", begin)
    if written.logprobs is None or begin == end:
        return float("-inf")

    def length(tokens: int) -> int:
        return len(text(written.ids[:tokens]))

    counts = range(len(written.ids) + 1)
    first = bisect_right(counts, begin, key=length) - 1  # the last count of tokens that does not reach into the block
    last = bisect_left(counts, end, key=length)  # the first that fills it
    return fmean(written.logprobs[first:last])


def surest(rollouts: Mapping[str, Sequence[Rollout]], text: Text) -> list[str]:
    """Per sample the prompt (a key of `rollouts`) whose answer has the highest `confidence`; of equals the first."""
    return _highest(rollouts, lambda place, rollout: confidence(rollout, text))


def best(samples: Sequence[Sample], rollouts: Mapping[str, Sequence[Rollout]]) -> list[str]:
    """Per sample the prompt whose answer has the highest `agreement` with the annotation: an oracle. Of equals the first."""
    return _highest(rollouts, lambda place, rollout: agreement(samples[place], rollout))


def picked(rollouts: Mapping[str, Sequence[Rollout]], names: Sequence[str]) -> list[Rollout]:
    """The rollout of sample i under the prompt `names[i]`, in order."""
    return [rollouts[name][place] for place, name in enumerate(names)]


def _highest(rollouts: Mapping[str, Sequence[Rollout]], worth: Callable[[int, Rollout], float]) -> list[str]:
    num = len(next(iter(rollouts.values())))
    return [max(rollouts, key=lambda name: worth(place, rollouts[name][place])) for place in range(num)]
