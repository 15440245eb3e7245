"""The `rft sweep` commands."""

from __future__ import annotations

import argparse
from typing import Any

from rft.cluster.submission import Request
from rft.cluster.trials import Swept, open_folder
from rft.errors import RecipeError
from rft.options import add_actions, number
from rft.slurm_cli import add_request, request_of


def add(commands: Any) -> None:
    """Adds `sweep` to the subcommands of a parser."""
    about = "Train a recipe with many values: one folder and one frozen recipe per trial."
    action = add_actions(commands, "sweep", about)
    sub = action("plan", _plan, "Check every trial of a sweep and write its folder.")
    sub.add_argument("sweep", help="a YAML file with `sweep:`: a path, or launch/sweeps/example.yaml of the package")
    sub.add_argument("--output", metavar="DIR", help="its folder; default: runs/NAME")
    sub.add_argument("--dry-run", action="store_true", help="check and list the trials, write nothing")
    about = "Train what is unfinished on this machine, or go on where it was cut."
    _add_slots(_of_folder(action("run", _run, about)))
    sub = _of_folder(action("submit", _submit, "Send what is unfinished to Slurm as one job array, and return at once."))
    sub.add_argument("--max-running", type=number, metavar="N", required=True, help="trials at once")
    add_request(sub)
    _of_folder(action("status", _status, "A line per trial: how far it is, its last validation, why it ended."))
    sub = _of_folder(
        action("resume", _resume, "Go on with what is unfinished, where the sweep was run before: here, or on Slurm.")
    )
    _add_slots(sub)
    sub.add_argument("--max-running", type=number, metavar="N", help="trials at once on Slurm; default: as before")
    sub.add_argument("--dry-run", action="store_true", help="print the script for Slurm, submit nothing")
    _of_folder(action("best", _best, "The best setting by the sweep's metric, over its seeds."))
    about = "Table and pictures over all trials: table.txt, report.json, curves.png, values.png."
    _of_folder(action("report", _report, about))


def _of_folder(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    sub.add_argument("folder", metavar="DIR", help="the folder that `rft sweep plan` wrote")
    return sub


def _add_slots(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--slots", type=number, metavar="N", help="trials at once; default: one per GPU, else per core")


def _plan(options: argparse.Namespace) -> None:
    from rft.cluster.plan import plan

    swept = plan(options.sweep, options.output, dry_run=options.dry_run)
    for trial in swept.trials:
        print(trial.name)
    count = f"{swept.num_wanted} trials{' will be searched' if swept.sweep.search else ''}"
    print(f"{count}; {'nothing was written' if options.dry_run else f'next: rft sweep run {swept.folder}'}")


def _run(options: argparse.Namespace) -> int:
    from rft.cluster.carry import run_here

    swept = open_folder(options.folder)
    ended = run_here(swept, slots=options.slots or 0)
    counts = {"finished": ended.finished, "stopped by a rule": ended.pruned, "failed": ended.failed}
    print(", ".join(f"{len(names)} {word}" for word, names in counts.items() if names) or "nothing was left to do")
    print(f"next: rft sweep {'resume' if ended.failed else 'report'} {swept.folder}")
    return int(bool(ended.failed))


def _submit(options: argparse.Namespace) -> None:
    _send(open_folder(options.folder), request_of(options), options.max_running, options.dry_run)


def _send(swept: Swept, request: Request, most: int, dry_run: bool) -> None:
    from rft.cluster.carry import submit

    job, num = submit(swept, request, max_running=most, dry_run=dry_run)
    if not num:
        print("nothing is left to submit: every trial has finished, was stopped by a rule, or is with Slurm")
    elif not dry_run:
        print(f"job {job}: {num} trials, at most {most} at once; look at them: rft sweep status {swept.folder}")


def _status(options: argparse.Namespace) -> None:
    from rft.cluster.report import status

    print(status(open_folder(options.folder)))


def _resume(options: argparse.Namespace) -> int:
    from rft.cluster.carry import submitted

    swept = open_folder(options.folder)
    before = None if options.slots else submitted(swept)
    if before:
        request, most = before
        _send(swept, request, options.max_running or most, options.dry_run)
        return 0
    if options.max_running or options.dry_run:
        do = "use: rft sweep submit DIR --max-running N"
        raise RecipeError(options.folder, "was not submitted to Slurm before", do)
    return _run(options)


def _best(options: argparse.Namespace) -> None:
    from rft.cluster.report import best

    print(best(open_folder(options.folder)))


def _report(options: argparse.Namespace) -> None:
    from rft.cluster.report import report

    swept = open_folder(options.folder)
    print(f"{report(swept)}\neverything is in {swept.folder}")
