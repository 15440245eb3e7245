"""Which seconds matter, and how much: timestamps with saliency against the annotated clips (QVHighlights)."""

from rft import Rollout, Sample, parsing


def highlights(rollout: Rollout, sample: Sample, max_ratio: float | None = None) -> float | None:
    """0.6 F2 + 0.4 / (1 + WMSE) (TempSamp-R1, arXiv:2509.18056); None without annotated `highlights` [[second, score], ..].

    The paper leaves the matching open. Here a timestamp is right when it is an annotated one, after moving it to the 2-s grid:

    F2    = 5 P R / (4 P + R), 0 when nothing is right. P is the share of the listed timestamps that are right, R the share
            of the annotated ones that are listed. A repeated timestamp is right once and wrong every further time.
    WMSE  = sum of s^2 (s' - s)^2 / sum of s^2 over the annotated timestamps; s' is the score that was first given to it, 0
            when it is not listed. Where all s are 0 nothing can be weighed: the term is 0.4 if every score given is 0, else 0.

    An answer that cannot be read earns 0, lists of different lengths and scores with a sign or without end included, and so
    does one that lists more than `max_ratio` times as many timestamps as are annotated (no limit by default, as published).
    """
    truth = {float(second): float(score) for second, score in sample.answer.get("highlights") or ()}
    if not truth:
        return None
    listed = parsing.highlights(rollout.answer)
    if not listed or (max_ratio is not None and len(listed) > max_ratio * len(truth)):
        return 0.0
    given = dict(reversed(listed))  # of a repeated timestamp the first score stays
    right = len(given.keys() & truth.keys())
    precision, recall = right / len(listed), right / len(truth)
    f2 = 5 * precision * recall / (4 * precision + recall) if right else 0.0
    return 0.6 * f2 + 0.4 * _closeness(given, truth)


def _closeness(given: dict[float, float], truth: dict[float, float]) -> float:
    """1 / (1 + WMSE), in [0, 1]."""
    weight = sum(score * score for score in truth.values())
    if not weight:
        return float(not any(given.values()))
    gaps = {second: given.get(second, 0.0) - score for second, score in truth.items()}
    error = sum(truth[second] * gap * truth[second] * gap for second, gap in gaps.items()) / weight
    return 1 / (1 + error)
