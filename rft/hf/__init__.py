"""The only room that imports transformers, trl, accelerate, peft and deepspeed. Entering it makes torchvision importable."""

import os

# Before any library reads them: no telemetry, no fork warning from tokenizers that were used before a fork.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rft.hf.compat import ensure_torchvision

ensure_torchvision()
