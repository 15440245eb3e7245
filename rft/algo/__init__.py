"""Arithmetic on groups and tokens; torch and the nouns, nothing else. The closed sets are the two dicts here."""

from rft.algo import advantages
from rft.algo.losses import OBJECTIVES

ESTIMATORS = {
    "grpo": advantages.grpo,
    "leave_one_out": advantages.leave_one_out,
}

__all__ = ["ESTIMATORS", "OBJECTIVES"]
