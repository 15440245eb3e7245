"""The single door for code and files that live outside the package.

A recipe names both by path: `rewards/grounding.py:temporal_iou`, `recipes/quickstart.yaml`. The same name works from a
checkout and from an installed wheel, which carries `rewards/`, `recipes/` and `launch/` along.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from rft.errors import RecipeError
from rft.strict import nearest

SHIPPED = ("rewards", "recipes", "launch")


def shipped_root() -> Path:
    """The folder that holds `rewards/`, `recipes/` and `launch/`: inside a wheel, or next to `rft/` in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "_shipped" if (package / "_shipped").is_dir() else package.parent


def find_file(name: str, *, near: Path | None = None) -> Path:
    """The absolute path of the file `name`.

    Looked for in `near` (the recipe's folder), in the working directory, then among the shipped files; an absolute path
    is taken as it is. Raises RecipeError with the places tried and the nearest name found there.
    """
    path = Path(name).expanduser()
    if path.is_absolute():
        tried = [path]
    else:
        roots = [near] if near is not None else []
        roots += [Path.cwd()]
        roots += [shipped_root()] if path.parts[:1] and path.parts[0] in SHIPPED else []
        tried = list(dict.fromkeys((root / path).resolve() for root in roots))
    for candidate in tried:
        if candidate.is_file():
            return candidate.resolve()
    known = [str(path.parent / f.name) for t in tried if t.parent.is_dir() for f in t.parent.iterdir() if f.is_file()]
    if not path.is_absolute():
        known += [str(f.relative_to(shipped_root())) for top in SHIPPED for f in (shipped_root() / top).rglob("*.*")]
    places = ", ".join(str(t) for t in tried)
    close = difflib.get_close_matches(name, sorted(set(known)), n=1)
    do = f"did you mean {close[0]}?" if close else "paths are relative to the recipe or the working directory"
    raise RecipeError(f"file {name!r}", f"not found; tried {places}", do)


def load_object(spec: str, *, near: Path | None = None) -> Any:
    """The object that `path/file.py:name` or `package.module:name` names.

    A file is found by `find_file` and run once per absolute path, under a module name of its own: two files with the
    same stem do not collide. Raises RecipeError when the file or the name does not exist, and when it cannot be run.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise RecipeError(f"{spec!r}", "is not file.py:name", "write path/file.py:name or package.module:name")
    is_file = source.endswith(".py") or "/" in source
    try:
        module = _load_file(find_file(source, near=near)) if is_file else importlib.import_module(source)
        if hasattr(module, name):
            return getattr(module, name)
    except RecipeError:
        raise
    except Exception as exc:  # the file is the user's: whatever it raises is told in one line
        raise _broken(spec, source, exc) from exc
    public = [n for n in dir(module) if not n.startswith("_")]
    raise RecipeError(f"{spec!r}", f"{module.__file__} has no {name!r}", nearest(name, public))


def _load_file(path: Path) -> ModuleType:
    module_name = f"rft_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    loader_spec = importlib.util.spec_from_file_location(module_name, path)
    if loader_spec is None or loader_spec.loader is None:
        raise RecipeError(str(path), "is not a python file", "name a file that ends in .py")
    module = importlib.util.module_from_spec(loader_spec)
    sys.modules[module_name] = module  # before it runs: dataclasses and inspect look a module up by name
    try:
        loader_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _broken(spec: str, source: str, exc: Exception) -> RecipeError:
    said = traceback.format_exception_only(exc)[-1].strip()
    frames = [f for f in traceback.extract_tb(exc.__traceback__) if Path(f.filename).name == Path(source).name]
    at = f" at {frames[-1].filename}:{frames[-1].lineno} `{frames[-1].line}`" if frames else ""
    return RecipeError(f"{spec!r}", f"cannot be imported: {said}{at}", "fix what the line says, then `rft check` again")
