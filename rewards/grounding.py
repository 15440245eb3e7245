"""When did it happen: spans of time against the annotated moment."""

from rft import Rollout, Sample, geometry, parsing


def temporal_iou(rollout: Rollout, sample: Sample) -> float | None:
    """Overlap of the answered span with the annotated moment; 0 when no span can be read, None without an annotated one.

    Where the annotation has `valid_spans` too, the one that is answered best counts.
    """
    if "span" not in sample.answer:
        return None
    span = parsing.time_span(rollout.answer)
    return geometry.right_span_iou(span, sample.answer) if span else 0.0


def temporal_set_iou(rollout: Rollout, sample: Sample, tag: str = "answer", max_spans: int | None = None) -> float | None:
    """Overlap of the union of the listed spans with the union of the annotated ones; None without annotated `spans`.

    `tag` is where the list stands in the last turn (VideoChat-R1 writes its evidence in `<glue>`). No list, an empty one,
    which would be right about an empty annotation, and more than `max_spans` earn 0.
    """
    if "spans" not in sample.answer:
        return None
    spans = parsing.time_spans(parsing.tagged(rollout.text, tag))
    if not spans or (max_spans is not None and len(spans) > max_spans):
        return 0.0
    return geometry.spans_iou(spans, sample.answer["spans"])
