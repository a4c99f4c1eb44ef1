"""How fast each data loader is, how much memory it needs, and what packing a story into one sequence saves.

    python benchmarks/data.py [--rows 1000000] [--formats jsonl,cc3m] [--vist val_cleaned.json] [--out data.json]

The rows are a few of the storybook's stories again and again, with the same few pictures. folder and webdataset need
a file or member of its own for each row and have --files rows; folder-metadata is a folder with metadata.jsonl.
Prints Markdown: rows/s of `read` and of the shuffled Stream (median of --runs over --timed rows; by the clock, and
by the process's own CPU time, which a busy machine leaves as it is), the peak resident memory of a fresh process that
streams 1,000 rows and of one that streams --rows, and the tokens a story costs packed and unpacked.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.data.formats import read
from trainer.data.records import Record, Row
from trainer.data.stream import Stream

STORIES, SEED = 20, 0  # that the rows repeat
TOLD = 50  # stories whose tokens are counted
FEW = 1000  # rows of the small data set
SHARD = 10_000  # samples
LONGEST = 900  # seconds that one pass may take before fewer rows are taken
FORMATS = ("folder", "folder-metadata", "jsonl", "cc3m", "webdataset", "vist", "mmdialog")


# the data sets: one that the trainer writes itself, made longer


def build(name: str, rows: int, out: Path) -> Path:
    """A data set of `rows` rows below `out`; returns the path to read it from."""
    from trainer.storybook.world.export import (
        export_stories,  # not above: it needs torch, and a loader alone does not
    )

    path = export_stories(name.removesuffix("-metadata"), STORIES, SEED, out)
    longer: dict[str, Callable[[Path, int], Path]] = {
        "folder": link_files, "folder-metadata": write_metadata, "webdataset": write_shards, "vist": repeat_vist,
    }  # fmt: skip
    return longer.get(name, repeat_lines)(path, rows)


def repeat_lines(path: Path, rows: int) -> Path:
    """The lines of a JSONL or TSV file (whose first line stays the first) over and over."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    with path.open("w", encoding="utf-8") as file:
        if path.suffix == ".tsv":
            file.write(lines.pop(0))
        file.writelines(islice(cycle(lines), rows))
    return path


def repeat_vist(path: Path, rows: int) -> Path:
    """The same stories under new keys and image ids; the mapping leads back to the few pictures."""
    mapping_path = path.with_name("train_image_mapping.json")
    stories = json.loads(path.read_text(encoding="utf-8")).values()
    files = json.loads(mapping_path.read_text(encoding="utf-8"))
    with path.open("w", encoding="utf-8") as file, mapping_path.open("w", encoding="utf-8") as mapping:
        for number, story in enumerate(islice(cycle(stories), rows)):
            comma = "," if number else "{"
            fresh = [row | {"image_id": f"{number}_{row['sequence_index']}"} for row in story]
            pairs = [
                f'"{new["image_id"]}": "{files[old["image_id"]]}"'
                for new, old in zip(fresh, story, strict=True)
            ]
            file.write(f'{comma}\n"{number}": {json.dumps(fresh)}')
            mapping.write(f"{comma}\n{', '.join(pairs)}")
        file.write("}\n")
        mapping.write("}\n")
    return path


def link_files(path: Path, rows: int) -> Path:
    """Hard links to a few pictures and their captions."""
    many = path / "many"
    many.mkdir()
    for number, picture in enumerate(islice(cycle(sorted(path.glob("*.png"))), rows)):
        os.link(picture, many / f"{number:07}.png")
        os.link(picture.with_suffix(".txt"), many / f"{number:07}.txt")
    return many


def write_metadata(path: Path, rows: int) -> Path:
    texts = [(text.stem, text.read_text(encoding="utf-8")) for text in sorted(path.glob("*.txt"))]
    lines = [json.dumps({"file_name": f"{name}.png", "text": text}) + "\n" for name, text in texts]
    (path / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return repeat_lines(path / "metadata.jsonl", rows).parent


def write_shards(path: Path, rows: int) -> Path:
    with tarfile.open(path / "00000.tar") as file:
        members = [(Path(member.name).suffix, file.extractfile(member).read()) for member in file]
    few = cycle(zip(members[::2], members[1::2], strict=True))  # a picture, its caption
    many = path / "many"
    many.mkdir()
    for start in range(0, rows, SHARD):
        with tarfile.open(many / f"{start // SHARD:05}.tar", "w") as file:
            for number, sample in zip(range(start, min(start + SHARD, rows)), few, strict=False):
                for suffix, content in sample:
                    member = tarfile.TarInfo(f"{number:07}{suffix}")
                    member.size = len(content)
                    file.addfile(member, BytesIO(content))
    return many


# speed and memory, in a process of their own


def built_and_run(name: str, rows: int, reads: int, streams: int) -> dict[str, Any]:
    """What a fresh process says of so many passes over a data set of `rows` rows."""
    with tempfile.TemporaryDirectory(prefix="minigpt5-data-") as folder:
        numbers = [str(number) for number in (rows, reads, streams)]
        path = str(build(name, rows, Path(folder)))
        command = [sys.executable, __file__, "--child", path, name.removesuffix("-metadata"), *numbers]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def child(path: Path, layout: str, rows: int, reads: int, streams: int) -> None:
    """Prints (seconds, CPU seconds) of each pass, and peaks in MB."""
    said: dict[str, Any] = {"imports": peak()}
    said["read"] = [seconds(read(path, layout), rows) for _ in range(reads)]
    said["stream"] = [seconds(Stream(path, layout, seed), rows) for seed in range(streams)]
    print(json.dumps(said | {"peak": peak()}))


def seconds(rows: Iterable[Row], wanted: int) -> tuple[float, float]:
    wall, own = time.monotonic(), time.process_time()
    count = sum(isinstance(row, Record) for row in islice(rows, wanted))
    assert count == wanted and getattr(rows, "epoch", 0) == 0, f"{count} usable rows, expected {wanted}"
    return time.monotonic() - wall, time.process_time() - own


def peak() -> float:
    """MB (2^20 bytes). Not ru_maxrss, which a process takes over from the one that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measure(name: str, rows: int, timed: int, runs: int) -> dict[str, Any]:
    few = built_and_run(name, FEW, 0, 1)
    rates = built_and_run(name, timed, runs, runs)
    if rows / timed * median(wall for wall, _ in rates["stream"]) > LONGEST:
        rows //= 5
    whole = built_and_run(name, rows, 0, 1)  # one pass and no more: its peak is that pass's
    figures = {"rows": rows, "imports": few["imports"], "few": few["peak"], "whole": whole["peak"]}
    for kind in ("read", "stream"):
        figures[kind], figures[f"{kind}_cpu"] = (
            timed / median(part) for part in zip(*rates[kind], strict=True)
        )
    return figures | {"stream_whole": rows / whole["stream"][0][0], "passes": rates}


# tokens


def stories_as_turns(vist: Path | None) -> Iterator[tuple[str, list[list[Any]]]]:
    """(name, stories as turns) as the task `story` has them, no picture shown."""
    from minigpt5_core.story.prompts import Turn
    from trainer.data.tasks import Tools, story
    from trainer.storybook.world.stories import stories

    told = islice(stories(SEED), TOLD)
    yield "storybook", [[Turn(scene.request, scene.text) for scene in scenes] for scenes in told]
    if vist is not None and vist.is_file():
        tools = Tools(random.Random(SEED), (), lambda picture: None)
        made = (story(row, tools) for row in read(vist, "vist") if isinstance(row, Record))
        yield "VIST", [one[0] for one in made if one]


def count_tokens(vist: Path | None) -> Iterator[dict[str, Any]]:
    """Mean tokens of a story as one sequence, and as one a picture: earlier scenes with their blocks, or without."""
    from minigpt5_core.llm import load_llm
    from minigpt5_core.llm.files import default_llm
    from trainer.llm.sequences import story_sequence

    llm = load_llm(default_llm())
    for name, told in stories_as_turns(vist):
        packed, with_blocks, without = [], [], []
        for turns in told:
            texts = [replace(turn, picture=False) for turn in turns]
            whole = [len(story_sequence(llm, turns[: i + 1]).ids) for i in range(len(turns))]
            packed.append(whole[-1])
            with_blocks.append(sum(whole))
            without.append(
                sum(len(story_sequence(llm, [*texts[:i], turns[i]]).ids) for i in range(len(turns)))
            )
        yield {
            "stories": name, "count": len(told), "pictures": mean(map(len, told)),
            "packed": mean(packed), "unpacked": mean(with_blocks), "unpacked_one_block": mean(without),
        }  # fmt: skip


LOADERS = """
| format | rows | `read` rows/s (CPU) | Stream rows/s (CPU) | peak MB, 1,000 rows | all rows | ratio | growth MB |
|---|---:|---:|---:|---:|---:|---:|---:|"""
TOKENS = """
| stories | pictures a story | tokens packed | a sequence a picture | ratio | the same, one block each | ratio |
|---|---:|---:|---:|---:|---:|---:|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=20_000, help="rows of folder and webdataset")
    parser.add_argument("--timed", type=int, default=20_000, help="rows of a pass for the rates")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--formats", type=lambda text: text.split(","), default=FORMATS, help=", ".join(FORMATS)
    )
    parser.add_argument("--vist", type=Path, help="a SPLIT_cleaned.json whose stories' tokens are counted")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    asked = parser.parse_args()
    if unknown := set(asked.formats) - set(FORMATS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(FORMATS)}")
    figures: dict[str, Any] = {"loaders": {}, "tokens": []}
    print(LOADERS.strip(), flush=True)
    for name in asked.formats:
        rows = asked.files if name in ("folder", "webdataset") else asked.rows
        figures["loaders"][name] = it = measure(name, rows, asked.timed, asked.runs)
        print(
            f"| {name} | {it['rows']:,} | {it['read']:,.0f} ({it['read_cpu']:,.0f}) "
            f"| {it['stream']:,.0f} ({it['stream_cpu']:,.0f}) | {it['few']:,.0f} | {it['whole']:,.0f} "
            f"| {it['whole'] / it['few']:.2f} | {round(it['whole'] - it['few']):,} |",
            flush=True,
        )
    print(f"\nAll peaks hold the imports, {it['imports']:.0f} MB; rates are over {asked.timed:,} rows.")
    print("folder and webdataset have fewer rows, as each needs a file or member of its own; others have a")
    print(f"fifth of --rows where all would take more than {LONGEST} s.\n{TOKENS}", flush=True)
    for it in count_tokens(asked.vist):
        figures["tokens"].append(it)
        print(
            f"| {it['count']} of {it['stories']} | {it['pictures']:.1f} | {it['packed']:.0f} | {it['unpacked']:.0f} "
            f"| {it['unpacked'] / it['packed']:.2f} | {it['unpacked_one_block']:.0f} "
            f"| {it['unpacked_one_block'] / it['packed']:.2f} |"
        )
    if asked.out:
        asked.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
    else:
        main()
