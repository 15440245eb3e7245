"""Downstream only: a room imports its own level and those before it, and one room alone knows the frameworks."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "rft").rglob("*.py"))
LEVELS = (
    ("types", "errors", "geometry", "parsing", "families", "strict", "condition", "files", "ranges", "run"),
    ("algo", "data"),
    ("rollout", "scoring", "quarantine"),
    ("plugins", "layers", "perceiving", "recipe", "loaded"),
    ("hf", "evaluation", "report", "synthetic", "bench"),
    (
        "attempt",
        "askable",
        "phase",
        "train",
        "train_cli",
        "evaluate",
        "check",
        "options",
        "data_cli",
        "launch_cli",
        "slurm_cli",
        "sweep_cli",
        "trace_cli",
        "cluster",
        "verify",
        "cli",
    ),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FRAMEWORKS = ("transformers", "trl", "accelerate", "peft", "deepspeed", "vllm")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "rft").with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import of a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            # `from rft import parsing` names a room, `from rft import Rollout` the top of the reward API
            is_top = node.module == "rft"
            yield from ((node.lineno, f"rft.{a.name}" if is_top else str(node.module)) for a in node.names)


def test_every_file_is_in_a_known_room() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_its_own_level_and_those_before_it(path: Path) -> None:
    room = room_of(path)
    own = 0 if room == "__init__" else LEVEL[room]  # `import rft` gives the nouns and the parsers, and costs nothing more
    upstream = []
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] == "rft" and LEVEL[parts[1]] > own:
            upstream.append(f"line {line}: {module}")
    assert not upstream, upstream


OTHERS = [p for p in FILES if room_of(p) not in ("hf", "bench")]  # the bench measures a framework


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_frameworks_are_known_to_one_room(path: Path) -> None:
    assert not [f"line {line}: {module}" for line, module in imports(path) if module.split(".")[0] in FRAMEWORKS]


def test_a_shipped_reward_imports_the_top_of_the_package_and_nothing_else_of_it() -> None:
    public = {"Rollout", "Sample", "Score", "Segment", "geometry", "parsing"}
    for path in sorted((ROOT / "rewards").glob("*.py")):
        for line, module in imports(path):
            first, _, rest = module.partition(".")
            assert first != "rft" or rest in public, f"{path.name}:{line}: {module}"


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    program = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_the_arithmetic_and_the_rollouts_load_no_framework() -> None:
    loaded = loaded_by("import rft.algo, rft.rollout.loop, rft.rollout.reference, rft.scoring, rft.quarantine")
    assert "torch" in loaded
    assert not loaded & {*FRAMEWORKS, "tokenizers", "datasets", "torchvision"}


def test_a_recipe_is_read_without_a_framework() -> None:
    assert not loaded_by("import rft.loaded, rft.report.words, rft.cli") & {*FRAMEWORKS, "torchvision", "matplotlib"}


def test_a_reward_file_costs_no_torch() -> None:
    assert not loaded_by("import rft; from rft import Rollout, Sample, geometry, parsing") & {"torch", "av", "yaml", "PIL"}


def test_what_runs_without_trl_imports_without_it() -> None:
    loaded = loaded_by("import rft.evaluate, rft.check, rft.hf.models, rft.hf.tiny")
    assert "transformers" in loaded and "trl" not in loaded
    assert "trl" in loaded_by("import rft.train")
