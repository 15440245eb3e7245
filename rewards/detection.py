"""Where is it: a box against the annotated one, which is in pixels of the file."""

from rft import Rollout, Sample, geometry, parsing


def box_iou(rollout: Rollout, sample: Sample, pixels: str = "file") -> float | None:
    """Overlap of the only box answered with the annotated one; None without an annotated one.

    With `pixels="shown"` the model answers in pixels of the resized picture that it sees, as Qwen2.5-VL was trained to.
    Several boxes earn 0: otherwise a policy learns to spray them.
    """
    if "box" not in sample.answer:
        return None
    boxes = parsing.boxes(rollout.answer)
    if not boxes or len(boxes) != 1:
        return 0.0
    box, views = boxes[0], rollout.views
    if pixels == "shown":
        box = geometry.rescale_box(box, views[-1].size, views[-1].original)
    return geometry.box_iou(box, sample.answer["box"])
