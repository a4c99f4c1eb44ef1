"""Cells of a report's table."""

from dataclasses import asdict

from minigpt5_core.metrics import Interval


def cell(interval: Interval | None) -> dict[str, float] | None:
    """An interval as the report holds it: five places."""
    return None if interval is None else {name: round(value, 5) for name, value in asdict(interval).items()}
