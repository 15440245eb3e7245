"""What is read, what is refused, and that no text raises or takes long."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from rft import parsing

N = 100_000
HOSTILE = {
    "empty": "",
    "blank": " \n\t\u00a0",
    "no tag": "2.0 to 4.0",
    "unclosed": "<answer>2.0 to 4.0",
    "closed before open": "</answer>2.0 to 4.0<answer>",
    "nested": "<answer>" * 50 + "1 to 2" + "</answer>" * 50,
    "reversed": "<answer>9 to 2</answer>",
    "nan": "nan to nan, [(nan, inf)], [nan, inf, 0, 1]",
    "overflow": f"{'9' * 400} to {'9' * 401}, [(1, {'9' * 400})], [{'9' * 400}, 1, 2, 3]",
    "arabic digits": "\u0663 to \u0665, [(\u0661, \u0662)], [\u0661, \u0662, \u0663, \u0664]",
    "full-width": "\uff13 to \uff15 \uff21 (\uff22)",
    "superscript": "\u00b2 to \u00b3",
    "long s": "1 \u017f to 2 \u017fec",  # folds to s when the case is ignored
    "dotted capital i": "\u0130 1 to 2 \u0130",
    "null byte": "\x00",
    "surrogate": "\ud800 to \udfff",
    "code": "__import__('os').system('echo') to exec('1')",
    "expression": "[(1+1, 2**9)] [1+1, 2, 3, 4] 1/0 to 2",
    "digits": "1" * N,
    "digit blank": "1 " * (N // 2),
    "digit blanks": "1" + " " * N,
    "digit blanks to": "1 s" + " " * N + "to",
    "many to": "1 to " * (N // 5),
    "units": "1 h 1 m 1 s " * (N // 12),
    "glued units": "1m" * (N // 2),
    "clocks": "1:00" * (N // 4),
    "points": "1." * (N // 2),
    "commas": "1," * (N // 2),
    "parentheses": "(" * N,
    "brackets": "[" * N,
    "half pairs": "[(1," * (N // 4),
    "pairs without end": "[(1,2)," + "(1,2)," * (N // 6),
    "pair and commas": "[(1,2)" + "," * N,
    "pair and blanks": "[(1,2)" + " " * N,
    "half boxes": "[1,2,3," * (N // 7),
    "minus": "[-" * (N // 2),
    "fences": "```json\n" * (N // 8),
    "long fence": "```" + "a" * N,
    "open tags": "<answer>" * (N // 8),
    "closed tags": "</answer>" * (N // 9),
    "empty blocks": "<think></think><answer></answer>" * (N // 32),
    "letters": "A " * (N // 2),
    "letter blanks": "A" + " " * N,
    "word": "A" * N,
    "answers": "answer is " * (N // 10),
    "answer blanks": "answer" + " " * N,
    "punctuation": "!" * N,
    "newlines": "\n" * N,
}
PARSERS: dict[str, Callable[[str | None], object]] = {
    "tagged": lambda text: parsing.tagged(text, "answer"),
    "time_span": parsing.time_span,
    "time_spans": parsing.time_spans,
    "boxes": parsing.boxes,
    "choice": lambda text: parsing.choice(text, "ABCDEFGHIJ"),
}


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<answer> 1 to 2\n</answer>", "1 to 2"),
        ("<answer>a</answer> and <answer>b</answer>", "b"),
        ("<answer>a</answer><answer>b", "a"),  # the last complete one
        ("<answer>x<answer>a</answer>y</answer>", "a"),  # the innermost
        ("<answer>a</answer></answer>", "a"),
        ("<answer></answer>", ""),
        ("<Answer>a</Answer>", None),
        ("</answer>a<answer>", None),
        ("<answer>a", None),
        ("", None),
        (None, None),
    ],
)
def test_tagged(text: str | None, inside: str | None) -> None:
    assert parsing.tagged(text, "answer") == inside


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("12.54 to 17.83", (12.54, 17.83)),
        ("between 3 AND 9 seconds", (3, 9)),
        ("2. to 4.", (2, 4)),
        ("2.0  to\n4.0", (2, 4)),
        ("[2 to 4]", (2, 4)),
        ("Answer:2 to 4", (2, 4)),
        ("9 to 4", (9, 4)),  # as read
        ("1 to 2, then 5 to 9.", (5, 9)),  # the last
        ("12.54s to 17.83s", (12.54, 17.83)),
        ("2 sec to 4 Seconds", (2, 4)),
        ("2 to 3 minutes", (120, 180)),  # the unit holds for both
        ("30 s to 1 min", (30, 60)),
        ("1 to 5 shots, or 9", (1, 5)),  # the s is no unit
        ("1 h to 2 hrs", (3600, 7200)),
        ("1 minute 5 seconds to 1m10s", (65, 70)),
        ("1 h 1 min 1 s to 2 h 30 s", (3661, 7230)),
        ("0:02 to 0:04", (2, 4)),
        ("00:00:18.5 to 1:00:00", (18.5, 3600)),
        ("75:30 to 76:00", (4530, 4560)),
        ("30 to 1:10", (30, 70)),
        ("0:75 to 1:80", None),  # no clock shows 75 seconds
        ("1:2 to 3:4", None),
        ("1:02:03:04 to 2", None),
        ("-2.0 to 4.0", None),
        ("\u22122 to 4", None),
        ("2 to -4", None),
        ("2.0 - 4.0", None),
        ("(2, 4)", None),
        ("1e1 to 20", None),
        ("1 to 2e1", None),
        (".5 to 2", None),
        ("1,625 to 1,700", None),
        ("1 to 2.5.1", None),
        ("1+1 to 3", None),
        ("10% to 20%", None),
        ("10 to 20%", None),
        ("5 ms to 9 ms", None),
        ("frame12 to 14", None),
        ("12to 14", None),
        ("one to two", None),
        ("12.5", None),
        (None, None),
    ],
)
def test_time_span(text: str | None, span: tuple | None) -> None:
    assert parsing.time_span(text) == (pytest.approx(span) if span else None)


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("[(1.0, 2.0), (3.5, 4)]", [(1, 2), (3.5, 4)]),
        ("[[1,2],[3,4]]", [(1, 2), (3, 4)]),
        ("((1.0, 2.0), (3.0, 4.0))", [(1, 2), (3, 4)]),
        ("((1.0, 2.0),)", [(1, 2)]),
        ("(1,2)", [(1, 2)]),
        ("[1, 2]", [(1, 2)]),
        ("(1,2), (3,4)", [(1, 2), (3, 4)]),
        ("\n[ ( 1.0 , 2.0 ) , ]\n", [(1, 2)]),
        ("```json\n[[1, 2]]\n```", [(1, 2)]),
        ("[(4, 2)]", [(4, 2)]),  # as read
        ("[]", []),
        ("[ ]", []),
        ("[(1, 2, 3)]", None),
        ("[(1, 2), (3)]", None),
        ("[(1, 2), (x, 4)]", None),
        ("[(-1, 2)]", None),
        ("[(1s, 2s)]", None),
        ("[(1e1, 20)]", None),
        ("[(1., .5)]", None),
        ("[(1, 2)(3, 4)]", None),
        ("[(1, 2]]", None),
        ("[(1, 2)", None),
        ("[,]", None),
        ("1, 2, 3, 4", None),
        ("[1, 2, 3, 4]", None),
        ("see [(1, 2)]", None),
        ("1 to 2", None),  # time_span's to read
        ("", None),
        (None, None),
    ],
)
def test_time_spans(text: str | None, spans: list | None) -> None:
    assert parsing.time_spans(text) == spans


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[0, 1.5, 2, 3]", [(0, 1.5, 2, 3)]),
        ("(0, 1, 2, 3)", [(0, 1, 2, 3)]),
        ("[[0, 1, 2, 3],\n [4, 5, 6, 7]]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]\n```', [(1, 2, 3, 4)]),
        ("It is at [-3, -1.5, 2, 4].", [(-3, -1.5, 2, 4)]),
        ("[3, 4, 1, 2]", [(3, 4, 1, 2)]),  # as read
        ("[0, 1, 2]", None),
        ("[0, 1, 2, 3, 4]", None),
        ("[0 1 2 3]", None),
        ("0, 1, 2, 3", None),
        ("[0, 1, 2, 3)", None),
        ("[0, 1, 2, 'x']", None),
        ("[1+1, 0, 1, 1]", None),
        ("[1e1, 0, 20, 20]", None),
        ("[]", None),
        (None, None),
    ],
)
def test_boxes(text: str | None, boxes: list | None) -> None:
    assert parsing.boxes(text) == boxes


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("(C)", "C"),
        ("C.", "C"),
        ("C) dogs", "C"),
        ("**C** dogs", "C"),
        ("A: a man", "A"),
        ("(A): because B is wrong", "A"),
        ("Answer: C", "C"),
        ("The correct answer is (B).", "B"),
        ("(A) is tempting, but the answer is (C)", "C"),  # the stronger claim
        ("Based on the video, the answer is (D)", "D"),
        ("Because of C", "C"),
        ("Because of D and then A", "D"),  # the first of equals
        ("I think it is B because A", "B"),
        ("I think A cat is there, so (C)", "C"),
        ("A or C", "A"),
        ("A is right", "A"),
        ("A", "A"),
        ("<answer>C</answer>", "C"),
        ("A man runs", None),
        ("The answer is A man", None),
        ("I think so", None),
        ("A-frame, vitamin-C, D'Artagnan", None),
        ("none of them", None),
        ("b", None),
        ("K", None),  # not an option
        ("", None),
        (None, None),
    ],
)
def test_choice(text: str | None, letter: str | None) -> None:
    assert parsing.choice(text, "ABCDEFGHI") == letter


@pytest.mark.parametrize("name", PARSERS)
def test_hostile_text_neither_raises_nor_takes_long(name: str) -> None:
    for label, text in HOSTILE.items():
        start = time.perf_counter()
        PARSERS[name](text)
        assert time.perf_counter() - start < 1.0, label


@pytest.mark.parametrize(
    "label", ["nan", "overflow", "arabic digits", "full-width", "superscript", "long s", "surrogate", "code", "expression"]
)
def test_hostile_text_says_nothing(label: str) -> None:
    text = HOSTILE[label]
    assert parsing.time_span(text) is parsing.time_spans(text) is parsing.boxes(text) is parsing.choice(text, "AB") is None


def test_random_text_gives_a_value_or_none() -> None:
    rng = random.Random(0)
    pieces = [*"0123456789.,:-+()[]{}<>/ \n'\"ABCI", " to ", " and ", "answer is", "min", " s", "h", "<answer>", "</answer>"]
    pieces += ["```", "\u0663", "\u017f", "\u00a0", "(1, 2)", "[1, 2, 3, 4]", "1:02", "9" * 310]
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randrange(30)))
        for parse in PARSERS.values():
            parse(text)
        numbers = [*(parsing.time_span(text) or ()), *(x for span in parsing.time_spans(text) or () for x in span)]
        assert all(0 <= x < float("inf") for x in numbers), text


def test_calls_name_a_media_or_none() -> None:
    box = "[1, 2, 3, 4]"
    for more, media in (("", None), (', "image": 0', 0), (', "video": 1', 1)):
        ((tool, inside, named),) = parsing.calls(f'{{"name": "zoom", "arguments": {{"box": {box}{more}}}}}', ("zoom",))
        assert (tool, named, box in inside) == ("zoom", media, True)
    assert parsing.calls(f"<zoom>{box}</zoom>", ("zoom",)) == [("zoom", box, None)]
    assert parsing.calls("<tool_call>zoom</tool_call>", ("zoom",)) == [("", "zoom", None)]
