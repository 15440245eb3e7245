"""Files and functions that live outside the package."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from rft.errors import RecipeError
from rft.plugins import find_file, load_object, shipped_root


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(recipe folder, working directory), both empty."""
    recipe, cwd = tmp_path / "recipe", tmp_path / "cwd"
    recipe.mkdir()
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    return recipe, cwd


def test_the_recipe_folder_comes_before_the_working_directory(folders: tuple[Path, Path]) -> None:
    recipe, cwd = folders
    (cwd / "data.jsonl").write_text("cwd")
    assert find_file("data.jsonl", near=recipe) == cwd / "data.jsonl"
    (recipe / "data.jsonl").write_text("recipe")
    assert find_file("data.jsonl", near=recipe) == recipe / "data.jsonl"
    assert find_file("data.jsonl") == cwd / "data.jsonl"
    assert find_file(str(cwd / "data.jsonl"), near=recipe) == cwd / "data.jsonl"


def test_shipped_files_are_found_from_anywhere_and_nothing_else_of_the_package(folders: tuple[Path, Path]) -> None:
    recipe, _ = folders
    assert find_file("launch/constraints.txt", near=recipe) == shipped_root() / "launch" / "constraints.txt"
    with pytest.raises(RecipeError, match="not found"):
        find_file("rft/types.py", near=recipe)


def test_own_files_shadow_shipped_ones(folders: tuple[Path, Path]) -> None:
    recipe, _ = folders
    (recipe / "launch").mkdir()
    (recipe / "launch" / "constraints.txt").write_text("mine")
    assert find_file("launch/constraints.txt", near=recipe).read_text() == "mine"


def test_a_missing_file_lists_the_places_and_the_nearest_name(folders: tuple[Path, Path]) -> None:
    recipe, cwd = folders
    (recipe / "grounding.py").touch()
    with pytest.raises(RecipeError) as caught:
        find_file("groundin.py", near=recipe)
    assert str(recipe / "groundin.py") in caught.value.what
    assert str(cwd / "groundin.py") in caught.value.what
    assert caught.value.do == "did you mean grounding.py?"
    with pytest.raises(RecipeError) as caught:
        find_file("lanch/constraint.txt", near=recipe)
    assert caught.value.do == "did you mean launch/constraints.txt?"
    with pytest.raises(RecipeError, match=r"did you mean .*/recipe/grounding\.py"):
        find_file(str(recipe / "grouding.py"))


def test_two_files_with_one_stem_do_not_collide_and_each_runs_once(folders: tuple[Path, Path]) -> None:
    recipe, cwd = folders
    log = cwd / "runs.txt"
    for folder, value in ((recipe, 1), (cwd, 2)):
        (folder / "mine.py").write_text(
            f"from pathlib import Path\nwith Path({str(log)!r}).open('a') as f:\n    f.write('{value}')\n"
            f"def reward(rollout, sample):\n    return {value}\ndef other():\n    return reward\n"
        )
    one, two = load_object("mine.py:reward", near=recipe), load_object("mine.py:reward")
    assert (one(None, None), two(None, None)) == (1, 2)
    assert load_object(f"{recipe}/mine.py:other")() is one
    assert log.read_text() == "12"
    assert inspect.getsource(one) == "def reward(rollout, sample):\n    return 1\n"


def test_a_file_may_define_dataclasses(folders: tuple[Path, Path]) -> None:
    recipe, _ = folders
    (recipe / "records.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass(slots=True)\nclass Pair:\n    a: int\n    b: int = 2\n"
    )
    assert load_object("records.py:Pair", near=recipe)(1).b == 2


def test_a_module_can_be_named_with_dots() -> None:
    assert load_object("json.decoder:JSONDecoder")().decode("[1]") == [1]
    with pytest.raises(RecipeError, match=r"ModuleNotFoundError: No module named 'json\.nothing'"):
        load_object("json.nothing:x")


def test_a_missing_name_says_the_nearest(folders: tuple[Path, Path]) -> None:
    recipe, _ = folders
    (recipe / "mine.py").write_text("def temporal_iou(rollout, sample):\n    return 0.0\n")
    with pytest.raises(RecipeError) as caught:
        load_object("mine.py:temporl_iou", near=recipe)
    assert caught.value.where == "'mine.py:temporl_iou'"
    assert str(recipe / "mine.py") in caught.value.what
    assert caught.value.do == "did you mean temporal_iou?"


@pytest.mark.parametrize("spec", ["mine.py", "mine.py:", ":f", "mine.py:f()", ""])
def test_a_spec_must_be_a_file_and_a_name(spec: str) -> None:
    with pytest.raises(RecipeError, match=r"is not file\.py:name"):
        load_object(spec)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\nimport not_a_module_at_all\n", "ModuleNotFoundError: No module named 'not_a_module_at_all'"),
        ("x = 1\n\nx = {}['seven']\n", "KeyError: 'seven'"),
        ("def f(:\n", "SyntaxError: invalid syntax"),
        ("x = [].f\n", "AttributeError: 'list' object has no attribute 'f'"),
    ],
)
def test_a_file_that_fails_says_its_last_line_and_can_be_loaded_once_mended(
    folders: tuple[Path, Path], source: str, said: str
) -> None:
    recipe, _ = folders
    (recipe / "broken.py").write_text(source)
    with pytest.raises(RecipeError) as caught:
        load_object("broken.py:f", near=recipe)
    assert said in caught.value.what
    assert caught.value.__cause__ is not None
    (recipe / "broken.py").write_text("def f():\n    return 'mended, and longer than before'\n")
    assert load_object("broken.py:f", near=recipe)() == "mended, and longer than before"


def test_a_failing_line_is_quoted_with_its_number(folders: tuple[Path, Path]) -> None:
    recipe, _ = folders
    (recipe / "broken.py").write_text("x = 1\n\nx = {}['seven']\n")
    with pytest.raises(RecipeError, match=r"broken\.py:3 `x = \{\}\['seven'\]`"):
        load_object("broken.py:f", near=recipe)
