"""Recipe files to one tree of plain values: what a file extends, the file, `--set` on top, and where each value came from.

Mappings merge key by key; an empty mapping, a list and any other value replace what was there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rft.errors import RecipeError
from rft.plugins import find_file
from rft.strict import join, nearest


def stack(path: Path, sets: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """(values, dotted key -> origin) of a recipe file and of `a.b=c` overrides on top.

    Raises:
        RecipeError: a file cannot be found or read, extends itself, or an override cannot be read.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file, layer in _layers(path, ()).items():
        _overlay(values, origins, layer, file.name)
    for text in sets:
        key, value = _parse_set(text)
        _refuse_new_phase(key, values)
        for part in reversed(key):
            value = {part: value}
        _overlay(values, origins, value, "--set")
    return values, origins


def _layers(path: Path, below: tuple[Path, ...]) -> dict[Path, dict[str, Any]]:
    """Every file once, the ones extended first: of two that extend the same file, neither undoes the other."""
    if path in below:
        chain = " -> ".join(p.name for p in (*below[below.index(path) :], path))
        raise RecipeError(str(path), f"extends itself: {chain}", "take one `extends` out")
    values = _read_yaml(path)
    parents = values.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise RecipeError(str(path), f"extends: {parents!r} is no file name", "name a recipe, or a list of recipes")
    layers: dict[Path, dict[str, Any]] = {}
    for parent in parents:
        try:
            found = find_file(parent, near=path.parent)
        except RecipeError as error:
            raise RecipeError(f"{path}, extends: {parent}", error.what, error.do) from error
        layers |= {file: layer for file, layer in _layers(found, (*below, path)).items() if file not in layers}
    return {**layers, path: values}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), f"not YAML: {error}", "correct the file; `key: value` needs the blank") from error
    if not isinstance(values, dict):
        raise RecipeError(str(path), f"a recipe is a mapping, this is {type(values).__name__}", "write key: value lines")
    return values


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys and says nothing; here they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, mark = self.construct_object(key_node, deep=True), key_node.start_mark
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key!r} is already on line {seen[key]}", mark)
            seen[key] = mark.line + 1
        return super().construct_mapping(node, deep)


def _parse_set(text: str) -> tuple[list[str], Any]:
    key, equals, raw = text.partition("=")
    if not equals or not all(parts := key.strip().split(".")):
        raise RecipeError("--set", f"{text!r} is not a.b=c", "write e.g. --set phases.grpo.steps=10")
    try:
        return parts, yaml.load(raw, _UniqueKeys) if raw else ""
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {key}", f"{raw!r} is not a YAML value: {error}", "quote it for the shell") from error


def _refuse_new_phase(key: Sequence[str], values: Mapping[str, Any]) -> None:
    """A misspelt phase would be one more phase, with defaults for all the rest."""
    if key[0] == "phases" and len(key) > 2 and key[1] not in (phases := values.get("phases") or {}):
        raise RecipeError(f"--set {'.'.join(key)}", f"the recipe has no phase {key[1]!r}", nearest(key[1], phases))


def _overlay(base: dict[str, Any], origins: dict[str, str], over: Mapping[str, Any], origin: str, at: str = "") -> None:
    for key, value in over.items():
        here = join(at, key)
        if isinstance(value, Mapping) and value:
            if not isinstance(base.get(key), dict):
                base[key] = {}
            origins.pop(here, None)
            _overlay(base[key], origins, value, origin, here)
        else:
            for below in [o for o in origins if o.startswith(f"{here}.")]:
                del origins[below]
            base[key] = {} if isinstance(value, Mapping) else value
            origins[here] = origin
