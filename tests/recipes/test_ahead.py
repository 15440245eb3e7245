"""Who decodes, and when, changes nothing that is trained on."""

from __future__ import annotations

import json
from pathlib import Path

from rft.train import train
from tests.recipes.test_recipes import ROOT, shortened


def is_clock(name: str) -> bool:
    return "time" in name or "seconds" in name or "per_second" in name


def test_decoding_ahead_gives_the_same_run(tmp_path: Path) -> None:
    """Workers, and a second run over the frames of the first: the same rewards, losses and gradient norms."""
    (tmp_path / "r.py").write_text("def total(rollout, sample):\n    return float(sum(map(ord, rollout.text)) % 97)\n")
    own = [f"rewards.own.use={tmp_path / 'r.py'}:total", "rewards.own.maximum=null", f"data.frame_cache={tmp_path / 'frames'}"]
    logs, frames = {}, {}
    for name, workers in (("ahead", 1), ("again", 0)):
        sets = [*shortened("recipes/quickstart.yaml", None), *own, f"data.workers={workers}"]
        train(str(ROOT / "recipes/quickstart.yaml"), sets, str(tmp_path / name))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        logs[name] = [{k: v for k, v in line.items() if not is_clock(k)} for line in lines]
        frames[name] = json.loads((tmp_path / name / "state.json").read_text())["frames"]
        # one entry per clip, whatever the number of rows, phases and epochs: 8 + 4 + 4, the last two cut to 2
        assert len([p for p in (tmp_path / "frames").iterdir() if not p.name.startswith(".")]) <= 12 * (len(logs))
    assert any(line.get("grad_norm", 0) > 0 for line in logs["ahead"] if line["phase"] == "grpo")
    assert logs["ahead"] == logs["again"]
    assert frames["ahead"]["decoders_replaced"] == 0
