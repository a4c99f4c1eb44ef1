"""python -m trainer ab COMMAND

    build   pair two systems' stories and hide which is which
    serve   show the pairs to raters, on a page of this machine alone
    report  shares with intervals, agreement, Bradley-Terry strength

A system is a JSON Lines file with a story a line, its pictures' paths beginning at the file's folder:
{"id": "story_000", "items": [{"text": "Mia is in the snow."}, {"picture": "pictures/1.png"}]}

Exit codes: 0 done, 2 bad input, 130 interrupted (with the answers saved).
"""

import argparse
import sys
from pathlib import Path

from minigpt5_core.errors import BadInputError


def run(argv: list[str]) -> int:
    """Runs `build`, `serve` or `report` with the arguments after `ab`; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the answers are saved.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer ab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="pair two systems' stories and hide which is which")
    build.add_argument(
        "--a", type=Path, required=True, metavar="FILE.jsonl", help="the first system's stories"
    )
    build.add_argument("--b", type=Path, required=True, metavar="FILE.jsonl", help="the second system's")
    build.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the study goes")
    build.add_argument("--pairs", type=int, default=50, help="how many are drawn (default 50)")
    build.add_argument("--seed", type=int, default=0, help="another seed draws other pairs and sides")
    build.add_argument(
        "--names", nargs=2, metavar=("A", "B"), help="in the report (default: the files' names)"
    )
    build.set_defaults(command=_build)
    serve = commands.add_parser("serve", help="show the pairs to raters, on a page of this machine alone")
    serve.add_argument("folder", type=Path, metavar="FOLDER", help="what ab build wrote")
    serve.add_argument("--port", type=int, default=8765, help="of the page's address (default 8765; 0: any)")
    serve.set_defaults(command=_serve)
    report = commands.add_parser("report", help="what the raters preferred, with intervals and agreement")
    report.add_argument("folder", type=Path, metavar="FOLDER", help="what ab build wrote")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where the report goes (default: there)")
    report.set_defaults(command=_report)
    return parser


def _build(arguments: argparse.Namespace) -> None:
    from .build import build_study

    built = build_study(
        arguments.a, arguments.b, arguments.out, arguments.pairs, arguments.seed, arguments.names
    )
    print(f"{built.common} stories are in both files.")
    print(f"{built.only_a} are only in {arguments.a}, {built.only_b} only in {arguments.b}.")
    print(f"{len(built.study.pairs)} pairs are in {arguments.out}.")
    print(f"Next: python -m trainer ab serve {arguments.out}")


def _serve(arguments: argparse.Namespace) -> None:
    from .serve import serve

    serve(arguments.folder, arguments.port)


def _report(arguments: argparse.Namespace) -> None:
    from .report import write_report

    for path in write_report(arguments.folder, arguments.out or arguments.folder):
        print(path)
