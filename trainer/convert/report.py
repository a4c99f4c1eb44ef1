"""What a conversion did with every tensor: used under which name, or left over and why."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

REPORT = "conversion.json"


@dataclass
class Report:
    """`used`: our name of each tensor, as "file: name", by theirs; `left_over`: why, by their name."""

    used: dict[str, str] = field(default_factory=dict)
    left_over: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def lines(self, every: bool) -> list[str]:
        """For the terminal: `every` tensor, or how many of each part went where."""
        used = [f"used       {theirs} -> {ours}" for theirs, ours in self.used.items()]
        left = [f"left over  {theirs}: {why}" for theirs, why in self.left_over.items()]
        if not every:
            used = _counted(
                f"used       {_part(t)} -> {ours.split(': ')[0]}" for t, ours in self.used.items()
            )
            left = _counted(f"left over  {_part(t)}: {why}" for t, why in self.left_over.items())
        total = f"{len(self.used)} tensors used, {len(self.left_over)} left over, none missing."
        return [*used, *left, total, *(f"{name}: {note}" for name, note in self.notes.items())]

    def write(self, folder: Path) -> None:
        """Every tensor, as conversion.json."""
        content = {"used": self.used, "left_over": self.left_over, "notes": self.notes}
        (folder / REPORT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _counted(lines: Iterable[str]) -> list[str]:
    return [f"{line} ({count})" for line, count in Counter(lines).items()]


def _part(name: str) -> str:
    """ "file: " and the name up to its first number, or what stands for the whole of a short one."""
    return re.split(r"\.\d+\.", name)[0]
