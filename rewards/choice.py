"""Which option: a letter against the annotated letter."""

from rft import Rollout, Sample, parsing

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def accuracy(rollout: Rollout, sample: Sample) -> float | None:
    """1 when the answered letter is the annotated `choice` ("C" or "(C)"), else 0; None without an annotated one.

    Letters are those of the row's `options`, A to D when it lists none. No letter never equals no letter.
    """
    if "choice" not in sample.answer:
        return None
    letters = _LETTERS[: len(sample.row.get("options") or "ABCD")]
    answered = parsing.choice(rollout.answer, letters)
    return float(answered is not None and answered == parsing.choice(str(sample.answer["choice"]), letters))
