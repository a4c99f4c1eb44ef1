"""python -m trainer convert COMMAND

    minigpt4  Vicuna, its vision parts and the MiniGPT-4 projection: the folder of an LLM that sees
    minigpt5  the checkpoints of MiniGPT-5: a mapper and an adapter for that LLM

Nothing in the files is run: a pickle that holds more than tensors is refused. With --dry-run nothing is written, and
every tensor is listed with its new name.

Exit codes: 0 done, 2 bad input, 130 interrupted (nothing is left behind).
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt5_core.errors import BadInputError

from .report import REPORT

if TYPE_CHECKING:
    from .report import Report


def run(argv: list[str]) -> int:
    """Runs `minigpt4` or `minigpt5` with the arguments after `convert`; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        _check_out(arguments.out)
        arguments.command(arguments)
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. Nothing was written to {arguments.out}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


def _check_out(out: Path) -> None:
    """BadInputError for a folder that holds what no conversion wrote: it would be replaced."""
    if out.is_dir() and any(out.iterdir()) and not (out / REPORT).is_file():
        raise BadInputError(f"--out {out} is a folder with other things in it. Name a new or an empty one.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_minigpt4(commands)
    _add_minigpt5(commands)
    for command in commands.choices.values():
        command.add_argument(
            "--out",
            type=Path,
            required=True,
            metavar="DIR",
            help="a new folder; an earlier conversion is replaced",
        )
        command.add_argument("--dry-run", action="store_true", help="list what would happen, write nothing")
    return parser


def _add_minigpt4(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("minigpt4", help="Vicuna and what it sees with: the folder of an LLM")
    parser.add_argument(
        "--vicuna",
        type=Path,
        required=True,
        metavar="DIR",
        help="its Hugging Face folder with tokenizer.model",
    )
    parser.add_argument(
        "--vit",
        type=Path,
        required=True,
        metavar="FILE",
        help="eva_vit_g.pth, or a file or folder that holds it",
    )
    parser.add_argument(
        "--qformer", type=Path, required=True, metavar="FILE", help="LAVIS's file, or a folder of BLIP-2"
    )
    parser.add_argument(
        "--projection", type=Path, required=True, metavar="FILE", help="such as prerained_minigpt4_7b.pth"
    )
    parser.add_argument("--vit-heads", type=int, default=16, help="published: 16")
    parser.add_argument("--qformer-heads", type=int, default=12, help="published: 12")
    parser.add_argument("--vokens", type=int, default=8, help="published: 8")
    parser.set_defaults(command=_minigpt4)


def _minigpt4(arguments: argparse.Namespace) -> None:
    from .minigpt4 import Sizes, Sources, convert_minigpt4

    sources = Sources(arguments.vicuna, arguments.vit, arguments.qformer, arguments.projection)
    sizes = Sizes(arguments.vit_heads, arguments.qformer_heads, arguments.vokens)
    found = convert_minigpt4(sources, arguments.out, sizes, arguments.dry_run)
    if arguments.dry_run:
        from .memory import memory_plans

        for plan in memory_plans(found.config, found.vision_config):
            found.report.notes[f"memory, {plan.precision}"] = str(plan)
    _show(found.report, arguments)


def _add_minigpt5(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("minigpt5", help="the checkpoints of MiniGPT-5: a mapper and an adapter")
    parser.add_argument("--stage1", type=Path, metavar="FILE", help="such as stage1_cc3m.ckpt")
    parser.add_argument(
        "--stage2", type=Path, metavar="FILE", help="such as stage2_vist.ckpt; laid over stage 1"
    )
    parser.add_argument(
        "--bos",
        choices=("auto", "1", "2"),
        default="auto",
        help="the id its prompts begin with (default: auto, which knows the published files)",
    )
    parser.add_argument(
        "--llm", type=Path, metavar="DIR", help="what convert minigpt4 wrote, to check against and to name"
    )
    parser.add_argument("--mapper-heads", type=int, default=8, help="published: 8")
    parser.add_argument("--lora-alpha", type=int, default=16, help="published: 16")
    parser.add_argument("--vokens", type=int, default=8, help="published: 8")
    parser.set_defaults(command=_minigpt5)


def _minigpt5(arguments: argparse.Namespace) -> None:
    from .minigpt5 import Heads, convert_minigpt5

    heads = Heads(arguments.mapper_heads, arguments.lora_alpha, arguments.vokens)
    report = convert_minigpt5(
        arguments.stage1,
        arguments.stage2,
        arguments.out,
        arguments.bos,
        arguments.llm,
        heads,
        arguments.dry_run,
    )
    _show(report, arguments)


def _show(report: "Report", arguments: argparse.Namespace) -> None:
    for line in report.lines(every=arguments.dry_run):
        print(line)
    print(f"Nothing was written to {arguments.out}." if arguments.dry_run else f"Written to {arguments.out}.")
