"""Arguments that several commands have: a recipe, a way to share the work, whole numbers, and commands below a command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds `recipe` and `--set`, which is read into `sets`."""
    parser.add_argument("recipe", help="a YAML file: a path, or recipes/... of the package")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="sets", help="override one value")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds `--config`, which says how several processes share the work."""
    known = "ddp (default), zero2, zero3, zero3_offload, fsdp2, or a YAML file"
    parser.add_argument("--config", default="ddp", metavar="NAME", help=known)


def add_actions(commands: Any, name: str, about: str) -> Callable[[str, Any, str], argparse.ArgumentParser]:
    """Adds the command `name`, which is one of several actions; returns what adds an action: (name, what runs it, about)."""
    actions = commands.add_parser(name, help=about, description=about).add_subparsers(metavar="ACTION", required=True)

    def action(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = actions.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    return action


def number(text: str) -> int:
    """A whole number from 1 on, as the `type` of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)
