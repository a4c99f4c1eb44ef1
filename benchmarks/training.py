"""What a feature cache and a second process save in training: python benchmarks/training.py [RUNS]

Trains stage 1 for real (default LLM, the storybook's diffusion model, both losses) on stories of the storybook written
out as JSONL: from pixels, from a cache, and from pixels in two processes of one thread each. Every way is run RUNS (3)
times in turn, in fresh processes, with 4 steps and with 20; the difference is 16 steps without what comes before them.
Prints the median samples/s of each way and the ratios.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORT, LONG, BATCH = 4, 20, 8
TRAINER = [sys.executable, "-m", "trainer"]
SHARED = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
    "-m",
    "trainer",
]


def seconds(command: list[str]) -> float:
    """Of one run of a command, with one thread a process."""
    started = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return time.monotonic() - started


def align(launch: list[str], data: Path, out: Path, steps: int, cache: str = "") -> list[str]:
    """The command that trains."""
    values = {
        "steps": steps,
        "batch": BATCH,
        "image_from": 0.0,
        "preview_every": 1000,
        "save_every": 1000,
        "tracker": "",
    }
    values |= {"data": str(data), "cache": cache}
    return [
        *launch,
        "align",
        "--out",
        str(out),
        *(f"--set={key}={json.dumps(value)}" for key, value in values.items()),
    ]


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data, cache = folder / "data" / "stories.jsonl", str(folder / "cache")
        seconds([*TRAINER, "data", "export", str(data.parent), "--format", "jsonl", "--stories", "60"])
        seconds([*TRAINER, "data", "cache", str(data), "--format", "jsonl", "--out", cache])
        ways = {
            "pixels": lambda steps: align(TRAINER, data, folder / "run", steps),
            "cache": lambda steps: align(TRAINER, data, folder / "run", steps, cache),
            "two processes": lambda steps: align(SHARED, data, folder / "run", steps),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(runs):
            for name, command in ways.items():
                spent = seconds(command(LONG)) - seconds(command(SHORT))
                speeds[name].append((LONG - SHORT) * BATCH / spent)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    for name, found in speeds.items():
        print(f"{name}: {medians[name]:.1f} samples/s ({min(found):.1f} to {max(found):.1f})")
    for name in ("cache", "two processes"):
        print(f"{name} / pixels: {medians[name] / medians['pixels']:.2f}")


if __name__ == "__main__":
    main()
