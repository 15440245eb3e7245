"""Where phases begin and end inside code that knows nothing of them: hooks on the tower and the decoder, wrapped functions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rft.bench.measure import Stopwatch


@contextmanager
def watched(model: Any, watch: Stopwatch, group: int) -> Iterator[None]:
    """Charge the tower to `vision`, patches to `preprocess`, and a rollout's long decoder forwards to `prefill`.

    A forward over more than `group` tokens in a row while tokens are being decoded is a prefill.
    """

    def begin(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        is_prefill = watch.innermost == "decode tokens" and kwargs["inputs_embeds"].shape[1] > group
        watch.enter("prefill" if is_prefill else watch.innermost)

    tower, decoder = model.model.visual, model.model.language_model
    with ExitStack() as stack:
        for handle in (
            tower.register_forward_pre_hook(lambda *_: watch.enter("vision")),
            tower.register_forward_hook(lambda *_: watch.leave()),
            decoder.register_forward_pre_hook(begin, with_kwargs=True),
            decoder.register_forward_hook(lambda *_: watch.leave()),
        ):
            stack.callback(handle.remove)
        for module in [m for name, m in sys.modules.items() if name.startswith("rft.hf.") and hasattr(m, "patchify")]:
            stack.enter_context(charged(module, "patchify", watch, "preprocess"))
        yield


@contextmanager
def charged(owner: Any, name: str, watch: Stopwatch, phase: str, job: str | None = None) -> Iterator[None]:
    """Calls of `owner.name` are charged to a phase, and to a job as well if one is named."""
    plain = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        with watch.job(job, phase) if job else watch.phase(phase):
            return plain(*args, **kwargs)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, plain)
