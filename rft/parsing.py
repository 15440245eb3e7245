"""Text that a model wrote -> a value, or None. Nothing here raises on a string, evaluates it, or needs more than linear time.

Numbers are ASCII decimals without exponent. A number that is only a piece of something else (`frame12`, `1,625`, `1e1`,
`1+1`) is not read: a wrong number is worse than none. Quantifiers are possessive (`++`), so that no text, however hostile,
makes a pattern try again.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from math import ceil, isfinite

_DECIMAL = r"[0-9]++(?:\.[0-9]++)?+"

_NUMBER = r"[0-9]++(?:\.[0-9]*+)?+"  # a sentence may end in "to 4."
_HOURS, _MINUTES, _SECONDS = (
    rf"\s*+(?:{words})(?![^\W0-9])" for words in ("hours?|hrs?|h", "minutes?|mins?|m", "seconds?|secs?|s")
)
_TIME = (
    r"[0-9]++:[0-5][0-9](?::[0-5][0-9])?+(?:\.[0-9]*+)?+"
    rf"|{_NUMBER}{_HOURS}(?:\s*+{_NUMBER}{_MINUTES})?+(?:\s*+{_NUMBER}{_SECONDS})?+"
    rf"|{_NUMBER}{_MINUTES}(?:\s*+{_NUMBER}{_SECONDS})?+"
    rf"|{_NUMBER}(?:{_SECONDS})?+"
)
_PHRASE = re.compile(
    r"(?<![\w.+*/^\u2212\u2013-])(?<![0-9][:,])"  # no sign (minus and en dash included), no tail of a longer number
    rf"({_TIME})\s++(?:to|and)\s++({_TIME})(?![\w%]|[.,:][0-9])"
)
_PIECE = re.compile(r"([0-9.]++)\s*+([hms]?)")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}

_PAIR = rf"(?:\(\s*+{_DECIMAL}\s*+,\s*+{_DECIMAL}\s*+\)|\[\s*+{_DECIMAL}\s*+,\s*+{_DECIMAL}\s*+\])"
_PAIRS = rf"{_PAIR}(?:\s*+,\s*+{_PAIR})*+(?:\s*+,)?+"
_SPANS = re.compile(rf"\[\s*+(?:{_PAIRS})?+\s*+\]|\(\s*+(?:{_PAIRS})?+\s*+\)|{_PAIRS}")
_FENCED = re.compile(r"```[a-z]*+\s([^`]*+)```")

_FOUR = r"\s*+,\s*+".join([f"-?+{_DECIMAL}"] * 4)
_BOX = re.compile(rf"\[\s*+{_FOUR}\s*+\]|\(\s*+{_FOUR}\s*+\)")

_INNERMOST = re.compile(r"[\[({]([^\[\](){}]*+)[\])}]")
_TAIL = r"(?![\w%]|[.:][0-9])"  # the number does not go on
_JOIN = r"(?:\s*+[,;~\u2013\u2014-]\s*+|\s++(?:to|and|until)\s++)"
_QUOTE = r"[\"']?+"
_TWO = re.compile(rf"\s*+{_QUOTE}(-?+)({_TIME}){_TAIL}{_QUOTE}{_JOIN}{_QUOTE}(-?+)({_TIME}){_TAIL}{_QUOTE}\s*+,?+\s*+")
_RANGE = re.compile(
    rf"(?<![\w.+*/^\u2212\u2013-])(?<![0-9][:,])({_TIME})"
    rf"(?:\s++(?:to|and|until)\s++|\s*+[~\u2013\u2014-]\s*+)({_TIME})(?![\w%]|[.,:][0-9]|\s*+[~\u2013\u2014-])"
)
_FROM, _UNTIL = (
    re.compile(rf"\b(?:{words})(?:_?(?:time|sec|seconds?|s))?[\"']?\s*+[:=]\s*+[\"']?(-?+)({_TIME}){_TAIL}")
    for words in ("start|begin|from", "end|stop|to|until")
)

CALL = "tool_call"
_CALLED = re.compile(r"""["']name["']\s*+:\s*+["']([^"']{0,64})["']""")
_MEDIA = re.compile(r"""["'](?:video|image|media)["']\s*+:\s*+([0-9]{1,4})(?![0-9.])""")

_LIST = rf"({_DECIMAL}(?:\s*+,\s*+(?:and\s++)?+{_DECIMAL}|\s++and\s++{_DECIMAL})*+)"
_HIGHLIGHTS = re.compile(
    rf"the\s++highlight\s++timestamps\s++are\s++in\s++the\s++{_LIST}\s++seconds?\."
    rf"\s++their\s++saliency\s++scores\s++are\s++{_LIST}\s*+\.?+"
)

# "A man" and "I think" are English; "A is right" and "A or B" speak of an option.
_ENGLISH = r"\s++(?!(?:or|and|is|because)\b)\w"
_LETTER = rf"(?<!\w)(?<!\w['\u2019-])([B-HJ-Z]|[AI](?!{_ENGLISH}))(?!\w)(?!['\u2019-]\w)"
_CLAIMS = (
    re.compile(rf"(?i:\banswer(?:\s++is|\s*+:))\W{{0,4}}{_LETTER}"),
    re.compile(r"\A\W{0,8}([A-Z])(?:\W*+\Z|[.):\]*])"),
    re.compile(r"[(\[]([A-Z])[)\]]"),
    re.compile(_LETTER),
)


def tagged(text: str | None, tag: str) -> str | None:
    """The stripped inside of the last complete `<tag>..</tag>`, the innermost one when they are nested.

    Tags are case-sensitive; a block that is never closed does not count.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.rfind(opening, 0, max(0, text.rfind(closing))) if text else -1
    if start < 0:
        return None
    start += len(opening)
    return text[start : text.find(closing, start)].strip()


def time_span(text: str | None) -> tuple[float, float] | None:
    """The last "a to b" or "a and b" of the text, in seconds and in the order read: judging a reversed span is not ours.

    A time is a number with or without a unit (`2.`, `12.54s`, `1 min 5 s`) or a clock (`m:ss`, `h:mm:ss`, with decimals).
    Without a unit it means seconds, but the first takes the unit of the second ("2 to 3 minutes"). Blanks may be newlines,
    words have any case. A dash is not read as "to", and nothing in a video has a negative time: "-2.0 to 4.0" is None.
    """
    phrases = _PHRASE.findall((text or "").lower())
    if not phrases:
        return None
    first, second = phrases[-1]
    span = (_seconds(first, unit=_PIECE.findall(second)[-1][1] or "s"), _seconds(second, unit="s"))
    return span if all(map(isfinite, span)) else None


def time_spans(text: str | None) -> list[tuple[float, float]] | None:
    """Spans in seconds from a text that is a list of pairs and nothing else; None when any part of it is not.

    Pairs are tuples or lists, with or without brackets around them all: `[(1.0, 2.0), (3.5, 4)]`, `[[1, 2]]`, `(1, 2)`.
    Blanks, a trailing comma and a code fence are allowed; signs, units, clocks and bare points (`1.`, `.5`) are not. The
    empty list is an answer of its own: `[]` gives [].
    """
    text = (text or "").strip()
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1].strip()
    numbers = [float(number) for number in re.findall(_DECIMAL, text)] if _SPANS.fullmatch(text) else [float("nan")]
    return list(zip(numbers[::2], numbers[1::2])) if all(map(isfinite, numbers)) else None


def windows(text: str | None) -> list[tuple[float, float]] | None:
    """Every pair of times of a text that should be a list of spans, in seconds and as written; None when there is none.

    What `time_spans` reads, it reads; `[]` gives []. Otherwise each innermost bracket counts that holds two times, with
    units or clocks, and each JSON object with a start and an end: `[[00:10, 00:20]]`, `(3s - 5s)`, `{"start": 3, "end": 5}`.
    Without such brackets it is the text as a whole, then every "a to b", "a and b", "a - b" of it. Inside brackets a minus
    is read: a clue may reach out of its video. Brackets that hold anything else are passed over.
    """
    exact = time_spans(text)
    if exact is not None:
        return exact
    text = (text or "").lower()
    found = [span for group in _INNERMOST.findall(text) if (span := _window(group))]
    if not found:
        whole = _window(text)
        found = [whole] if whole else [_pair(*phrase) for phrase in _RANGE.findall(text)]
    return [span for span in found if all(map(isfinite, span))] or None


def indices(text: str | None) -> list[int] | None:
    """The whole numbers of a text that is one list of them, with or without brackets: `[1, 4]`, `frames 1, 4 and 7`.

    `[]` gives []; words, signs, decimals, numbers of ten digits and several lists give None. Prose around brackets is free.
    """
    text = (text or "").lower()
    groups = _INNERMOST.findall(text)
    if len(groups) > 1:
        return None
    words = re.sub(r"\bframes?\b:?|\band\b|[,;]", " ", groups[0] if groups else text).split()
    if not (groups or words) or not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
        return None
    return list(map(int, words))


def objects(text: str | None) -> list[str]:
    """The outermost `{..}` of a text, in order. Braces inside of strings count; one that is never closed is left out."""
    found, depth, start = [], 0, 0
    for brace in re.finditer("[{}]", text or ""):
        if brace[0] == "{":
            start = start if depth else brace.start()
            depth += 1
        elif depth:
            depth -= 1
            if not depth:
                found.append(text[start : brace.end()])
    return found


def blocks(text: str | None, tags: Sequence[str]) -> list[tuple[str, str]]:
    """(tag, stripped inside) of every complete block of one of the tags, in order; of nested ones the innermost."""
    found, opened = [], None
    for mark in re.finditer(rf"<(/?)({'|'.join(map(re.escape, tags))})>", text or "") if tags else ():
        if not mark[1]:
            opened = (mark[2], mark.end())
        elif opened and opened[0] == mark[2]:
            found.append((mark[2], text[opened[1] : mark.start()].strip()))
            opened = None
    return found


def calls(text: str | None, tools: Sequence[str]) -> list[tuple[str, str, int | None]]:
    """(tool, its arguments, number of the media that it names or None) of every call in a text, in order.

    A call is a tag of its own (`<zoom>[10, 20, 60, 80]</zoom>`), JSON in a `<tool_call>`, or where no tag is JSON by itself:
    `{"name": "zoom", "arguments": {"box": [10, 20, 60, 80], "video": 1}}`. JSON may name any tool; without a name it is "".
    """
    found = blocks(text, (*tools, CALL)) or [(CALL, body) for body in objects(text) if _CALLED.search(body)]
    return [_called(body) if tag == CALL else (tag, *_addressed(body)) for tag, body in found]


def highlights(text: str | None, grid: float = 2.0) -> list[tuple[float, float]] | None:
    """(second, saliency) pairs, in the order given, from a text that is these two sentences and nothing else.

    `The highlight timestamps are in the 82, 84 seconds. Their saliency scores are 1.3, 1.7` (words in any case, "and" before
    the last, a full stop at the end or none). Every second is moved to the nearest multiple of `grid`, the middle between
    two to the earlier, so that 82 and 83 both name the clip from 82 to 84; two that meet there stay two. Lists of different
    lengths, signs, and anything that is not finite give None.
    """
    found = _HIGHLIGHTS.fullmatch((text or "").strip().lower())
    if not found:
        return None
    seconds, scores = ([float(number) for number in re.findall(_DECIMAL, part)] for part in found.groups())
    if len(seconds) != len(scores) or not all(map(isfinite, (*seconds, *scores))):
        return None
    return [(grid * ceil(second / grid - 0.5), score) for second, score in zip(seconds, scores)]


def boxes(text: str | None) -> list[tuple[float, float, float, float]] | None:
    """Every `[x0, y0, x1, y1]` or `(x0, y0, x1, y1)` of the text, in order, or None when there is none.

    Lists of lists, JSON (`{"bbox_2d": [..]}`), code fences and prose around them need no rule of their own. A minus is read:
    a box may reach out of its frame. Brackets that hold anything but four numbers are passed over.
    """
    found = [tuple(map(float, re.findall(f"-?{_DECIMAL}", box))) for box in _BOX.findall(text or "")]
    return [box for box in found if all(map(isfinite, box))] or None


def choice(text: str | None, letters: Container[str]) -> str | None:
    """The option that the text claims, one of the capital `letters`, or None.

    The strongest claim wins, and of equal claims the first: "answer is C" or "answer: C"; then the letter that the text
    opens with, alone or marked (`C`, `C.`, `C)`, `C:`, `(C)`); then `(C)` anywhere; then a letter that stands as a word of
    its own. "A" and "I" before a further word are English and claim nothing.
    """
    for claim in _CLAIMS:
        for match in claim.finditer(text or ""):
            if match[1] in letters:
                return match[1]
    return None


def _called(text: str) -> tuple[str, str, int | None]:
    named = _CALLED.search(text)
    return (named[1], *_addressed(text[: named.start()] + text[named.end() :])) if named else ("", text, None)


def _addressed(text: str) -> tuple[str, int | None]:
    media = _MEDIA.search(text)
    return (text[: media.start()] + text[media.end() :], int(media[1])) if media else (text, None)


def _window(text: str) -> tuple[float, float] | None:
    """Two times and nothing else, or the start and the end that a text names."""
    if two := _TWO.fullmatch(text):
        sign, first, minus, second = two.groups()
    elif (start := _FROM.search(text)) and (end := _UNTIL.search(text)):
        (sign, first), (minus, second) = start.groups(), end.groups()
    else:
        return None
    start, end = _pair(first, second)
    return (-start if sign else start, -end if minus else end)


def _pair(first: str, second: str) -> tuple[float, float]:
    """Seconds of two times; the first takes the unit of the second where it has none of its own."""
    return _seconds(first, unit=_PIECE.findall(second)[-1][1] or "s"), _seconds(second, unit="s")


def _seconds(time: str, *, unit: str) -> float:
    """The seconds of a `_TIME`; `unit` is that of a number which has none."""
    if ":" in time:
        return sum(float(part) * 60**place for place, part in enumerate(reversed(time.split(":"))))
    return sum(float(number) * _UNITS[own or unit] for number, own in _PIECE.findall(time))
