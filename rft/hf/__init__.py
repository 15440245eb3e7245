"""The only room that imports transformers, trl, accelerate, peft and deepspeed. Entering it makes torchvision importable."""

from rft.hf.compat import ensure_torchvision

ensure_torchvision()
