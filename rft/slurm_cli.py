"""The `rft slurm` commands."""

from __future__ import annotations

import argparse
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from rft.cluster.submission import Request
from rft.options import add_actions, add_config, add_recipe
from rft.run.state import STATE


def add(commands: Any) -> None:
    """Adds `slurm` to the subcommands of a parser."""
    action = add_actions(commands, "slurm", "Train on a Slurm cluster: submit, watch, cancel, resume.")
    about = "Submit a recipe as a job that stops in time, goes back into the queue and resumes."
    sub = action("submit", _submit, about)
    add_recipe(sub)
    sub.add_argument("--output", metavar="RUN", help="folder of the run; default: the recipe's, numbered")
    add_request(sub)
    sub = action("status", _status, "What the runs' folders say, and what Slurm says.")
    sub.add_argument("runs", nargs="*", metavar="RUN", help="run folders; default: those in runs/")
    sub = action("logs", _logs, "Print what a run has printed.")
    sub.add_argument("folder", metavar="RUN")
    sub.add_argument("--rank", type=int, metavar="K", help="only this rank; default: the job, the nodes and rank 0")
    sub.add_argument("--attempt", type=int, metavar="N", help="default: the last one")
    sub.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    sub = action("cancel", _cancel, "End a run's job. The run can be resumed.")
    sub.add_argument("folder", metavar="RUN")
    sub = action("resume", _resume, "Submit an unfinished run again, as it was submitted.")
    sub.add_argument("folder", metavar="RUN")
    sub.add_argument("--allow-drift", action="store_true", help="go on although recipe, data or rewards have changed")
    sub.add_argument("--dry-run", action="store_true", help="print the script, and submit nothing")


def add_request(sub: argparse.ArgumentParser) -> None:
    """Adds what a job can be asked for; `request_of` reads it."""
    sub.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    sub.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="GPUs on each (default 0)")
    sub.add_argument("--processes-per-node", type=int, default=0, metavar="N", help="default: one per GPU")
    sub.add_argument("--cpus-per-task", type=int, default=0, metavar="N", help="CPUs on each machine; default: the cluster's")
    sub.add_argument("--time", default="", metavar="LIMIT", help="e.g. 4:00:00; default: the partition's")
    sub.add_argument("--partition", default="", metavar="NAME")
    sub.add_argument("--account", default="", metavar="NAME")
    sub.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help='one more option of sbatch: --sbatch="--constraint=h100"',
    )
    sub.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help='before the launch: --setup "module load cuda"'
    )
    sub.add_argument(
        "--signal-lead", type=int, default=300, metavar="SECONDS",
        help="save so long before the time limit; more than a step and a save take (default 300)",
    )  # fmt: skip
    sub.add_argument("--max-restarts", type=int, default=20, metavar="N", help="after that it stays stopped (default 20)")
    add_config(sub)
    sub.add_argument("--template", default="", metavar="FILE", help="instead of launch/slurm/job.sbatch")
    sub.add_argument("--dry-run", action="store_true", help="print the script, and submit nothing")


def request_of(options: argparse.Namespace) -> Request:
    """What the options of `add_request` ask for."""
    return Request(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        processes_per_node=options.processes_per_node,
        cpus_per_task=options.cpus_per_task,
        time=options.time,
        partition=options.partition,
        account=options.account,
        sbatch=tuple(options.sbatch),
        setup=tuple(options.setup),
        signal_lead=options.signal_lead,
        max_restarts=options.max_restarts,
        config=options.config,
        template=options.template,
    )


def _submit(options: argparse.Namespace) -> None:
    from rft.cluster.slurm import check, refuse_taken, submit
    from rft.errors import ClusterError

    request = request_of(options)
    if not options.dry_run:
        check(request)

    from rft.loaded import load  # seconds, for torch

    loaded = load(options.recipe, options.sets)
    folder = folder_of(loaded.recipe, options.output)
    if options.dry_run:
        submit([folder], request, folder=folder, dry_run=True, name=loaded.recipe.name)
        return
    if options.output and (folder / STATE).exists():
        refuse_taken(folder)
        raise ClusterError(str(folder), "holds a run already", f"rft slurm resume {folder}, or another --output")
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        prepare(folder, loaded)
        job = submit([folder], request, folder=folder, name=loaded.recipe.name)
    except BaseException:
        if folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in made[folder in made :]:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    print(f"job {job}: {folder}")


def folder_of(recipe: Any, output: str | None) -> Path:
    """The folder asked for, or the next free one of the recipe's."""
    if output:
        return Path(output).absolute()
    base = Path(recipe.output.format(name=recipe.name)).absolute()
    tries = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 10_000))
    return next(folder for folder in tries if not (folder / STATE).exists())


def prepare(folder: Path, loaded: Any) -> None:
    """Make a run's folder with its recipe, standing alone. Raises ClusterError when it cannot be written."""
    import yaml

    from rft.errors import ClusterError
    from rft.files import write_whole
    from rft.loaded import resolved

    text = yaml.safe_dump(resolved(loaded.standing_alone()), sort_keys=False, allow_unicode=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "recipe.yaml", text)
    except OSError as error:
        raise ClusterError(str(folder), f"cannot be written: {error.strerror}", "choose another --output") from error


def _status(options: argparse.Namespace) -> None:
    from rft.cluster.status import lines

    runs = [Path(run) for run in options.runs]
    for line in lines(runs or sorted(p.parent for p in Path("runs").glob(f"*/{STATE}")), strict=bool(runs)):
        print(line)


def _logs(options: argparse.Namespace) -> None:
    from rft.cluster.status import is_over, log_files

    run, seen = Path(options.folder).absolute(), dict[Path, int]()
    log_files(run, rank=options.rank, attempt=options.attempt, strict=not options.follow)
    last, last_look = None, False
    while True:
        over = is_over(run)
        for path in log_files(run, rank=options.rank, attempt=options.attempt, strict=False):
            last = _print_new(path, seen, last)
        if not options.follow or last_look:
            return
        last_look = over  # the job has a word to say after its trainer
        time.sleep(1.0)


def _print_new(path: Path, seen: dict[Path, int], last: Path | None) -> Path | None:
    """What a file has since the last look, under its name where another file came before. Returns the file printed last."""
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(seen.get(path, 0))
        text = file.read()
        seen[path] = file.tell()
    if not text:
        return last
    if path != last:
        print(f"==> {path} <==")
    print(text, end="" if text.endswith("\n") else "\n", flush=True)
    return path


def _cancel(options: argparse.Namespace) -> None:
    from rft.cluster.slurm import cancel

    run = Path(options.folder).absolute()
    job = cancel(run)
    print(f"job {job} is cancelled" if job else "no job was queued; the run is marked as cancelled")
    print(f"to go on later: rft slurm resume {shlex.quote(options.folder)}")


def _resume(options: argparse.Namespace) -> None:
    from rft.cluster.slurm import resume

    run = Path(options.folder).absolute()
    if job := resume(run, allow_drift=options.allow_drift, dry_run=options.dry_run):
        print(f"job {job}: {run}")
