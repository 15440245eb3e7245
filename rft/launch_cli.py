"""The `rft launch` command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rft.options import add_config, add_recipe


def add(commands: Any) -> None:
    """Adds `launch` to the subcommands of a parser."""
    about = "Train a recipe with several processes, on one machine or many."
    sub = commands.add_parser("launch", help=about, description=about)
    sub.set_defaults(run=_launch)
    add_recipe(sub)
    sub.add_argument("--output", metavar="DIR", help="folder of the run; default: the recipe's, numbered")
    sub.add_argument("--processes", type=int, metavar="N", help="on each machine; default: one per GPU")
    sub.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    add_config(sub)
    many = sub.add_argument_group("many machines", "Run the command on every one of them.")
    many.add_argument("--machine-rank", metavar="K", help="number of this machine, from 0 on")
    many.add_argument("--address", default="", metavar="HOST", help="machine 0, as the others reach it")
    many.add_argument("--port", type=int, default=0, metavar="PORT", help="a free port of machine 0 (default 29500)")
    sub.add_argument("--dry-run", action="store_true", help="print the command of every machine, and start nothing")


def _launch(options: argparse.Namespace) -> int:
    from rft.cluster.launch import PORT, check_machine, command, count_gpus, quoted, run
    from rft.errors import ClusterError
    from rft.loaded import load

    load(options.recipe, options.sets)  # one process says what is wrong, and not each of many
    arguments = [word for value in options.sets for word in ("--set", value)]
    arguments += ["--output", options.output] if options.output else []
    processes = options.processes if options.processes is not None else max(1, count_gpus())
    port = options.port or (PORT if options.nodes > 1 else 0)

    def of(machine: str) -> list[str]:
        return command(
            options.recipe,
            config=options.config,
            processes=processes,
            nodes=options.nodes,
            machine_rank=machine,
            address=options.address,
            port=port,
            arguments=arguments,
        )

    if options.dry_run:
        machines = [options.machine_rank] if options.machine_rank is not None else [str(k) for k in range(options.nodes)]
        for machine in machines:
            line = quoted(of(machine or "0"))
            print(f"# on machine {machine}\n{line}" if options.nodes > 1 else line)
        return 0
    if options.nodes > 1 and options.machine_rank is None:
        do = "run this on every machine, with --machine-rank 0 on the first, 1 on the next..; --dry-run prints all commands"
        raise ClusterError("launch", f"which of the {options.nodes} machines is this?", do)
    words = of(options.machine_rank or "0")
    check_machine(options.config, processes)
    return run(words, Path(options.output) if options.output else None)
