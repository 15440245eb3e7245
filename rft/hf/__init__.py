"""The only room that imports transformers, trl, accelerate, peft and deepspeed. Entering it makes torchvision importable."""

import os
import warnings

import torch

# Before any library reads them: no telemetry, no fork warning from tokenizers that were used before a fork, and no search
# of DeepSpeed's for an accelerator that is not there.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# The new name is not known to every supported transformers.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)

from rft.hf.compat import ensure_torchvision  # noqa: E402

ensure_torchvision()
