"""Arithmetic on groups and tokens; torch and the nouns, nothing else. The closed sets are the two dicts here."""

from rft.algo import advantages
from rft.algo.losses import OBJECTIVES

ESTIMATORS = {
    "grpo": advantages.grpo,
    "leave_one_out": advantages.leave_one_out,
    "mixed": advantages.grpo,  # the same sum, by the name it has where the annotation is a member
    "downscale": advantages.downscale,
    "anchor": advantages.anchor,
    "nonlinear": advantages.nonlinear,
    "policy_stats": advantages.policy_stats,
}

__all__ = ["ESTIMATORS", "OBJECTIVES"]
