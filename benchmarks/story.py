"""How long a story of four scenes takes and how much memory it needs: python benchmarks/story.py [RUNS]

Runs the real command in fresh processes and prints the median wall time and peak resident memory of RUNS (3) runs.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Leo the bear finds a red balloon on the beach."


def run_once(folder: Path) -> float:
    """Seconds of one run of the command."""
    started = time.monotonic()
    command = [sys.executable, "-m", "minigpt5_core", PROMPT, "--scenes", "4", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.monotonic() - started


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as folder:
        seconds = [run_once(Path(folder) / str(number)) for number in range(runs)]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # kilobytes on Linux
    print(
        f"4 scenes: median {statistics.median(seconds):.1f} s of {runs} runs ({min(seconds):.1f} to {max(seconds):.1f})"
    )
    print(f"largest resident memory of a run: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
