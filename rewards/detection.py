"""Where is it: a box against the annotated one, in whatever frame of reference the data set's boxes are."""

from rft import Rollout, Sample, geometry, parsing


def box_iou(rollout: Rollout, sample: Sample) -> float | None:
    """Overlap of the only box answered with the annotated one; None without an annotated one.

    Several boxes earn 0: otherwise a policy learns to spray them.
    """
    if "box" not in sample.answer:
        return None
    boxes = parsing.boxes(rollout.answer)
    return geometry.box_iou(boxes[0], sample.answer["box"]) if boxes and len(boxes) == 1 else 0.0
