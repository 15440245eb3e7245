"""How a rollout looked: was the clue right, was the call one, what did the looks cost, what did they show.

They judge looks and not answers: weigh them below the answer's reward, or let them count where the answer is right.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rft import Rollout, Sample, Score, Segment, geometry, parsing

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TAGS = ("clue", "glue")
_TOOLS = {"zoom": "boxes"}
_READERS = {"boxes": parsing.boxes, "windows": parsing.windows, "indices": parsing.indices}


def clue_iou(
    rollout: Rollout,
    sample: Sample,
    round: int = 0,
    max_windows: int = 3,
    kind: str | None = None,
    boxes: str = "file",
    per_turn: bool = False,
    rounds: int | None = None,
) -> float | Score | None:
    """Overlap of the clue of one turn (-1 is the last) with the annotation; None without one that a clue could match.

    Windows against the union of the annotated `clue`, else of `spans`, else against `span` and what else is right; without
    these, or with `kind: boxes`, a box against `clue_box`, else `box`. `boxes` says what the model's coordinates are: those
    of the annotation (`file`), or `pixels` of the resized picture or `thousandths` of its sides (see rft/families.py); these
    two are about the last view before the turn, and the annotation is then in pixels of the file. 0 earn: a turn that did
    not come, no clue or one that names nothing, more than `max_windows` windows or one box, and reversed values alone. A
    clue is not cut to the video, so that a window without end is worth nothing.

    With `per_turn` it is the mean over the turns that were to give one (all but the last, the first in any case), and each
    turn is worth its own. `rounds` is how many turns there may be: then rounds - 1 were to give one (one at least), and those
    that did not come count 0. Without it a rollout that ends behind its best clue earns more than one that goes on.
    """
    truth = _clue_of(sample.answer, kind)
    if truth is None:
        return None
    if not per_turn:
        return _overlap(rollout, truth, round, max_windows, boxes)
    asked = range(max((len(rollout.turns) if rounds is None else rounds) - 1, 1))
    values = [_overlap(rollout, truth, turn, max_windows, boxes) for turn in asked]
    turns = (*values, 0.0)[: len(rollout.turns)]
    return Score(value=sum(values) / len(values), turns=turns)


def improvement(rollout: Rollout, sample: Sample) -> float | None:
    """How much better the last turn's answer is than the first's, in [-1, 1]: by span, spans, box or choice.

    0 for one turn; None without such an annotation. A bad start pays here: weigh it well below the answer's own reward.
    """
    answers = [parsing.tagged(turn, "answer") for turn in rollout.turns[:1] + rollout.turns[-1:]] or [None, None]
    first, last = (_agreement(answer, sample) for answer in answers)
    return None if last is None else last - first


def look_cost(rollout: Rollout, sample: Sample, max_tokens: int = 4096) -> float:
    """Visual tokens shown after the first turn as a share of `max_tokens`, at most 1; give it a negative weight.

    0 is a rollout that did not look, or was refused. What the first prompt shows costs nothing: nobody chose it.
    """
    return min(1.0, sum(view.tokens for view in _looked(rollout)) / max_tokens)


def valid_call(
    rollout: Rollout, sample: Sample, tools: Mapping[str, str] = _TOOLS, max_calls: int = 8, clue: bool = False
) -> float:
    """Share of the calls that could be read, were not made before and were answered with something to see.

    `tools` says by name what a call takes: boxes, windows or indices; with `clue`, `<clue>` and `<glue>` of windows are
    calls too. A view answers one call, so that two calls for one view are one that paid. 0 earn: no call, more than
    `max_calls`, calls of the last turn, of tools that do not exist, and repetitions. Making more calls does not earn more.
    """
    known = {**tools, **(dict.fromkeys(_TAGS, "windows") if clue else {})}
    made, valid, seen = 0, 0, set()
    for text, views in _rounds(rollout):
        called = parsing.calls(text, tuple(known))
        made += len(called)
        read = [(name, media or 0, _READERS[known[name]](body)) for name, body, media in called if name in known]
        fresh = {(name, media, tuple(values)) for name, media, values in read if values} - seen
        seen |= fresh
        valid += min(len(fresh), len(views))
    return valid / made if 0 < made <= max_calls else 0.0


def completeness(rollout: Rollout, sample: Sample, bins: int = 4) -> float | None:
    """How well the frames of the looks stand for the annotated time: `clue`, else `spans`, else `span`; None without these.

    The harmonic mean of two shares: of the `bins` equal parts of each annotated span, those in which a frame was shown;
    of the frames shown, each counted once, those inside. Looking at everything is paid for by the second, at one frame by
    the first. 0 earn: no look, and looks that miss. It says where the frames are, not that they suffice for the answer.
    Where looks hold frames of the whole film on purpose the most is below 1, for all rollouts alike.
    """
    known = sample.answer
    spans = known.get("clue") or known.get("spans") or ([known["span"]] if "span" in known else None)
    if not spans:
        return None
    seconds = {s for view in _looked(rollout) for s in view.seconds}
    inside = {s for s in seconds if any(start <= s <= end for start, end in spans)}
    if not inside:
        return 0.0
    width = [(start, (end - start) / bins) for start, end in spans]
    parts = [(start + k * w, start + (k + 1) * w) for start, w in width for k in range(bins)]
    recall = sum(any(low <= s <= high for s in inside) for low, high in parts) / len(parts)
    precision = len(inside) / len(seconds)
    return 2 * precision * recall / (precision + recall)


def _clue_of(answer: Mapping[str, Any], kind: str | None) -> tuple[str, Any] | None:
    """(what is compared, the annotation): windows of which all or the best one count, or a box."""
    if kind != "boxes":
        if answer.get("clue") or "spans" in answer:
            return "all", answer.get("clue") or answer["spans"]
        if "span" in answer:
            return "any", (answer["span"], *answer.get("valid_spans", ()))
    box = next((answer[key] for key in ("clue_box", "box") if key in answer), None)
    return None if box is None else ("box", box)


def _overlap(rollout: Rollout, truth: tuple[str, Any], round: int, max_windows: int, boxes: str) -> float:
    by, right = truth
    if by == "box":
        return _box_iou(rollout, right, round, boxes)
    windows = parsing.windows(_last_clue(_turn(rollout, round)))
    if not windows or len(windows) > max_windows:
        return 0.0
    return max(geometry.spans_iou(windows, spans) for spans in ([right] if by == "all" else [[one] for one in right]))


def _agreement(text: str | None, sample: Sample) -> float | None:
    """How right an answer is; None where the annotation has nothing that it could be compared with."""
    truth = sample.answer
    if "span" in truth:
        span = parsing.time_span(text)
        return geometry.right_span_iou(span, truth) if span else 0.0
    if "spans" in truth:
        spans = parsing.time_spans(text)
        return geometry.spans_iou(spans, truth["spans"]) if spans else 0.0
    if "box" in truth:
        found = parsing.boxes(text)
        return geometry.box_iou(found[0], truth["box"]) if found and len(found) == 1 else 0.0
    if "choice" in truth:
        letters = _LETTERS[: len(sample.row.get("options") or "ABCD")]
        said = parsing.choice(text, letters)
        return float(said is not None and said == parsing.choice(str(truth["choice"]), letters))
    return None


def _box_iou(rollout: Rollout, truth: Sequence[float], round: int, unit: str) -> float:
    found = parsing.boxes(_last_clue(_turn(rollout, round)))
    if not found or len(found) > 1:
        return 0.0
    if unit == "file":
        return geometry.box_iou(found[0], truth)
    shown = _shown_before(rollout, round)
    if shown is None:
        return 0.0
    (height, width), (rows, columns) = shown.original, shown.size
    extent = {"pixels": (columns, rows), "thousandths": (1000, 1000)}[unit]
    box = geometry.carried(found[0], (0, 0, *extent), shown.crop or (0, 0, width, height))
    return geometry.box_iou(box, truth)


def _last_clue(text: str) -> str | None:
    found = parsing.blocks(text, _TAGS)
    return found[-1][1] if found else None


def _turn(rollout: Rollout, round: int) -> str:
    turns = rollout.turns
    return turns[round] if -len(turns) <= round < len(turns) else ""


def _runs(rollout: Rollout) -> list[tuple[bool, list[Segment]]]:
    return [(world, list(run)) for world, run in groupby(rollout.segments, key=lambda s: s.author == "world")]


def _rounds(rollout: Rollout) -> list[tuple[str, list]]:
    """(text, views that the world answered with) of each turn.

    A new prompt behind a refusal shows what was shown last: what stands there again answers nothing.
    """
    runs, after, shown = _runs(rollout), [], []
    for world, run in runs:
        views = [v for s in run for v in s.views]
        after.append([] if not world or (run[0].is_fresh and views == shown) else views)
        shown = views or shown
    after = [*after[1:], []]
    return [("".join(s.text for s in run), views) for (world, run), views in zip(runs, after) if not world]


def _looked(rollout: Rollout) -> list:
    return [view for _, views in _rounds(rollout) for view in views]


def _shown_before(rollout: Rollout, round: int):
    """The view that stands last before a turn: the one that its boxes are about."""
    before, turns = [], []
    for world, run in _runs(rollout):
        before += [v for s in run for v in s.views]
        turns += [] if world else [before[-1] if before else None]
    return turns[round] if -len(turns) <= round < len(turns) else None
