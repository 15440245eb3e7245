"""The `rft` command. Heavy rooms are entered by the subcommand that needs them."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rft import data_cli, launch_cli, slurm_cli, sweep_cli, trace_cli, train_cli
from rft.errors import RecipeError, RftError
from rft.options import add_recipe, number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code. Errors of ours are printed as three short parts, without a traceback."""
    options = parser().parse_args(argv)
    try:
        code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except RftError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `rft show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would complain while flushing
        return 1


def parser() -> argparse.ArgumentParser:
    """All subcommands and their arguments."""
    top = argparse.ArgumentParser(prog="rft", description="Reinforcement fine-tuning for multimodal LLMs, video first.")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: object, help: str, recipe: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        if recipe:
            add_recipe(sub)
        return sub

    train_cli.add(commands)
    trace_cli.add(commands)
    evaluate = command("eval", _evaluate, "Score a checkpoint on a recipe's test split.")
    evaluate.add_argument("--checkpoint", required=True, metavar="DIR", help="a model or adapter folder, or a hub name")
    asked = "ask as in this phase; from two on also the best of them; PHASE.mix is what a phase mixes in; default: the last"
    evaluate.add_argument("--prompts", type=_names, default=(), metavar="PHASE[,PHASE]", help=asked)
    rounds = "look so many times, at one budget of visual tokens, with controls beside the recipe's own number"
    evaluate.add_argument("--rounds", type=_rounds, default=(), metavar="1,2,3", help=rounds)
    evaluate.add_argument("--split", default="test", choices=("train", "validation", "test"))
    evaluate.add_argument("--output", metavar="FILE.json", help="write metrics and answers here")
    check = command("check", _check, "Look for what would go wrong, without a model: keys, rewards, rows, media, budgets.")
    check.add_argument(
        "--samples", type=_count, default=64, help="rows of a split whose media are opened (default 64, 0 is all)"
    )
    command("show", _show, "Print a recipe resolved, with the origin of every value that is set.")
    bench = command("bench", _bench, "Measure what sharing a prompt is worth: the same work by several arms.", recipe=False)
    bench.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    bench.add_argument("--model", default="tiny", help="tiny, qwen2.5-vl-3b, qwen2.5-vl-7b or qwen3-vl-8b; random weights")
    bench.add_argument("--frames", type=number, help="frames of the video; default: the model's")
    bench.add_argument("--group", type=number, default=8, help="completions of the prompt (default 8)")
    bench.add_argument("--completion", type=number, help="tokens of a completion; default: the model's")
    bench.add_argument("--ragged", action="store_true", help="draw lengths between half of that and all of it")
    bench.add_argument("--repeats", type=number, help="rounds of all arms (default 2, 5 on cuda)")
    bench.add_argument("--arms", default="", metavar="A,B", help="only these; default: all but expanded-fair")
    bench.add_argument("--sweep", action="store_true", help="also the speed-up over the group size and over P / C")
    bench.add_argument("--output", default="bench.json", metavar="FILE.json", help="FILE.png goes beside it")
    study = command("study", _study, "Run recipes against each other over seeds, and judge a claim about them.", recipe=False)
    study.add_argument("study", help="a YAML file with `study:`: a path, or recipes/study/... of the package")
    study.add_argument("--seeds", type=_seeds, default=(), metavar="0,1,2", help="instead of the study's")
    study.add_argument("--smoke", action="store_true", help="its short version: everything runs, nothing is claimed")
    study.add_argument("--output", metavar="DIR", help="its folder, taken up again where it was cut; default: runs/NAME")
    export = command("export", _export, "Write a checkpoint as a plain model folder.", recipe=False)
    export.add_argument("checkpoint", help="a checkpoint folder")
    export.add_argument("output", help="the folder to write")
    export.add_argument("--merge", action="store_true", help="merge LoRA adapters into the base weights")
    copy = command("cp", _copy, "Copy a shipped file here, to edit it.", recipe=False)
    copy.add_argument("name", help="e.g. rewards/grounding.py or recipes/quickstart.yaml")
    copy.add_argument("target", help="a folder or a file name")
    data_cli.add(commands)
    launch_cli.add(commands)
    slurm_cli.add(commands)
    sweep_cli.add(commands)
    return top


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different phases, e.g. direct,think")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds, e.g. 0,1,2")
    return tuple(int(part) for part in parts)


def _rounds(text: str) -> tuple[int, ...]:
    numbers = _seeds(text)
    if 0 in numbers:
        raise argparse.ArgumentTypeError("a rollout has one round at least, e.g. 1,2,3")
    return numbers


def _evaluate(options: argparse.Namespace) -> None:
    from rft.evaluate import evaluate, evaluate_rounds

    if options.rounds:
        if options.prompts:
            raise RecipeError("--rounds", "and --prompts are two questions", "ask one of them")
        given = {"split": options.split, "output": options.output}
        evaluate_rounds(options.recipe, options.sets, options.checkpoint, options.rounds, **given)
        return
    given = {"split": options.split, "output": options.output, "prompts": options.prompts}
    evaluate(options.recipe, options.sets, options.checkpoint, **given)


def _check(options: argparse.Namespace) -> int:
    from rft.check import check

    return check(options.recipe, options.sets, num_samples=options.samples)


def _bench(options: argparse.Namespace) -> None:
    from rft.bench.main import bench

    bench(
        Path(options.output),
        device=options.device,
        model=options.model,
        frames=options.frames,
        group=options.group,
        completion=options.completion,
        ragged=options.ragged,
        repeats=options.repeats,
        arms=[name for name in options.arms.split(",") if name],
        scaling=options.sweep,
    )


def _study(options: argparse.Namespace) -> int:
    from rft.cluster.study import run_study

    return run_study(options.study, seeds=options.seeds, smoke=options.smoke, output=options.output)


def _show(options: argparse.Namespace) -> None:
    from rft.loaded import load, show

    print(show(load(options.recipe, options.sets)), end="")


def _export(options: argparse.Namespace) -> None:
    from rft.hf.models import export

    export(options.checkpoint, Path(options.output), merge=options.merge)
    print(f"written to {options.output}")


def _copy(options: argparse.Namespace) -> None:
    from rft.plugins import SHIPPED, find_file, shipped_root

    if Path(options.name).parts[:1] not in [(top,) for top in SHIPPED]:
        raise RecipeError(options.name, "is no shipped file", f"names begin with {', '.join(f'{top}/' for top in SHIPPED)}")
    source = find_file(options.name, near=shipped_root())
    target = Path(options.target)
    target = target / source.name if target.is_dir() or options.target.endswith("/") else target
    if target.exists():
        raise RecipeError(str(target), "there is a file of this name already", "give another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    use = f"; name it in a recipe as `use: {target}:FUNCTION`" if target.suffix == ".py" else ""
    print(f"{target} (from {options.name}){use}")


if __name__ == "__main__":
    sys.exit(main())
