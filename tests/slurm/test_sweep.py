"""A sweep as a job array of a real Slurm."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rft.cluster import queue
from rft.cluster.carry import idle, submit, submitted
from rft.cluster.plan import plan
from rft.cluster.trials import open_folder, standing
from tests.slurm.conftest import Cluster, asking

pytestmark = pytest.mark.slurm


def test_a_sweep_is_an_array_and_resume_submits_only_the_unfinished(cluster: Cluster, tmp_path: Path) -> None:
    text = "sweep: {recipe: recipes/quickstart.yaml, values: {phases.grpo.group_size: [2, 4, 6, 8]}}\n"
    (tmp_path / "s.yaml").write_text(text)
    swept = plan(str(tmp_path / "s.yaml"), str(tmp_path / "out"))
    for trial in swept.trials:
        fails = {"fail_at": 2} if trial is swept.trials[1] else {}
        (trial.folder / "stand_in.json").write_text(json.dumps({"steps": 8, **fails}))
    began = time.monotonic()
    job, number = submit(swept, asking(), max_running=2)
    assert time.monotonic() - began < 20 and number == 4 and job  # it does not wait for them
    assert idle(swept) == [] and submit(swept, asking(), max_running=2) == ("", 0)  # all are with Slurm
    while queue.queued([job]):
        time.sleep(0.2)
    assert [standing(t.folder)[0] for t in swept.trials] == ["finished", "failed", "finished", "finished"]
    (swept.trials[1].folder / "stand_in.json").write_text('{"steps": 8}')
    request, most = submitted(swept)
    assert (request, most) == (asking(), 2)
    again, number = submit(open_folder(str(swept.folder)), request, max_running=most)
    assert number == 1 and again != job
    while queue.queued([again]):
        time.sleep(0.2)
    assert {standing(t.folder)[0] for t in swept.trials} == {"finished"}
    assert submit(swept, request, max_running=most) == ("", 0)
