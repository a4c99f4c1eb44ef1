"""Which conditioning spaces pass which checks: runs the tests marked `space` and prints the table, as Markdown.

python tests/spaces.py [arguments for pytest, such as -k "not comfyui"]
"""

import sys
from collections import defaultdict
from typing import Any

import pytest

CHECKS = ("train", "diffusers", "ComfyUI")


class Table:
    """A pytest plugin: collects the outcomes for each space and check."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)

    @pytest.hookimpl(trylast=True)  # after markers have been added
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            item.user_properties += [("space", mark.args) for mark in item.iter_markers("space")]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            for name, value in report.user_properties:
                if name == "space":
                    self.outcomes[tuple(value)].add(report.outcome)

    def cell(self, space: str, check: str) -> str:
        """The worst outcome counts: one test that was skipped leaves a cell unproven."""
        found = self.outcomes[space, check]
        words = {"failed": "**failed**", "skipped": "not run", "passed": "passed"}
        return next((word for outcome, word in words.items() if outcome in found), "-")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        from minigpt5_core.conditioning import SPACES

        lines = [f"| space | {' | '.join(CHECKS)} |", f"|{' --- |' * (len(CHECKS) + 1)}"]
        for space in SPACES.values():
            lines.append(f"| {space} | {' | '.join(self.cell(space.name, check) for check in CHECKS)} |")
        terminalreporter.write_line("\n" + "\n".join(lines))


if __name__ == "__main__":
    raise SystemExit(pytest.main(["-m", "space", *sys.argv[1:]], plugins=[Table()]))
