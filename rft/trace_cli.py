"""The `rft trace` command: one trajectory as the run logged it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Adds `trace` to the subcommands of a parser."""
    about = "Print a run's rollouts of one sample turn by turn: authors, masks, looks, times, tokens, rewards."
    sub = commands.add_parser("trace", help=about, description=about)
    sub.add_argument("folder", metavar="RUN", help="the folder of a run, e.g. runs/quickstart")
    sub.add_argument("--sample", required=True, metavar="ID", help="the sample's id")
    sub.add_argument("--step", type=_index, metavar="N", help="as the log counts, from 0; default: the last that met it")
    sub.add_argument("--rollout", type=_index, metavar="K", help="only this one of the group, from 0; default: all")
    sub.add_argument("--phase", default="", metavar="NAME", help="default: the last that met it")
    sub.set_defaults(run=_trace)


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _trace(options: argparse.Namespace) -> None:
    from rft.report.trace import trace

    given = {"step": options.step, "rollout": options.rollout, "phase": options.phase}
    for line in trace(Path(options.folder), options.sample, **given):
        print(line)
