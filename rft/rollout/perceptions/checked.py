"""Arguments of a perception, tried before anything is rolled out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rft.errors import RecipeError


def check(given: object, *, above: Sequence[str] = (), least: Mapping[str, float] = {}, named: Sequence[str] = ()) -> None:
    """That the arguments `above` are above zero or not set, those of `least` as large as it says, and those `named` a text.

    Raises RecipeError with the name of the first that is not.
    """
    for name in above:
        if (value := getattr(given, name)) is not None and not value > 0:
            raise RecipeError(name, f"{name}={value} is not positive", f"give {name} a value above zero, or leave it out")
    for name, low in least.items():
        if not (value := getattr(given, name)) >= low:
            raise RecipeError(name, f"{name}={value} is below {low:g}", f"give {low:g} or more")
    for name in named:
        if not getattr(given, name).strip():
            raise RecipeError(name, f"{name} is empty", "give the text that the model writes")
