"""The `rft train` and `rft verify-resume` commands: what may be asked, before anything heavy is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from rft.options import add_config, add_recipe, number


def add(commands: Any) -> None:
    """Adds `train` and `verify-resume` to the subcommands of a parser."""
    about = "Train a recipe: every phase, then the table."
    sub = commands.add_parser("train", help=about, description=about)
    add_arguments(sub)
    sub.set_defaults(run=_train)
    about = "Train a few generations twice, in one go and stopped and resumed half-way, and compare bit by bit."
    sub = commands.add_parser("verify-resume", help=about, description=about)
    add_recipe(sub)
    sub.add_argument("--generations", type=number, default=2, metavar="K", help="2K a phase, stopped after K (default 2)")
    sub.add_argument("--processes", type=number, default=1, metavar="N", help="processes of each run (default 1)")
    add_config(sub)
    sub.add_argument("--output", default="", metavar="DIR", help="an empty folder for both runs; default: runs/verify-NAME")
    sub.set_defaults(run=_verify)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rft train`."""
    add_recipe(parser)
    parser.add_argument("--output", metavar="DIR", help="folder of the run; default: the recipe's, numbered")
    resume = "auto (default): an unfinished run of the same recipe, data and rewards goes on from its last checkpoint"
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help=resume)
    parser.add_argument("--allow-drift", action="store_true", help="go on although recipe, data or rewards have changed")
    parser.add_argument("--stop-after", type=number, default=0, metavar="N", help="save and stop after N generations")
    parser.add_argument("--digest-gradients", action="store_true", help="write a hash of every step's gradients")


def asked(options: argparse.Namespace) -> dict[str, Any]:
    """Parsed arguments as those of `rft.train.train`."""
    return {
        "name": options.recipe,
        "sets": options.sets,
        "output": options.output,
        "resume": options.resume,
        "allow_drift": options.allow_drift,
        "stop_after": options.stop_after,
        "digests": options.digest_gradients,
    }


def _train(options: argparse.Namespace) -> None:
    from rft.train import train

    train(**asked(options))


def _verify(options: argparse.Namespace) -> int:
    from rft.verify import verify_resume

    given = {"generations": options.generations, "processes": options.processes, "config": options.config}
    return 0 if verify_resume(options.recipe, options.sets, output=options.output, **given) else 1
