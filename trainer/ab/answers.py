"""The raters' answers in SQLite: once `save` returns, an answer is on the disk, whatever happens to the process."""

import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

from minigpt5_core.errors import BadInputError

from .study import ANSWERS

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    rater TEXT NOT NULL, pair TEXT NOT NULL, question TEXT NOT NULL,
    answer TEXT NOT NULL CHECK (answer IN ('left', 'tie', 'right')), time TEXT NOT NULL,
    PRIMARY KEY (rater, pair, question)
)
"""
_UPSERT = """
INSERT INTO answers VALUES (?, ?, ?, ?, ?)
ON CONFLICT (rater, pair, question) DO UPDATE SET answer = excluded.answer, time = excluded.time
"""


@dataclass(frozen=True)
class Answer:
    """What a rater answered to one question about one pair: "left", "tie" or "right"."""

    rater: str
    pair: str
    question: str
    answer: str


class Answers:
    """The answers in a study's folder, for any number of threads; other processes may have them open too.

    Raises BadInputError where the file cannot be opened or is no such database.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / ANSWERS
        self._lock = Lock()
        try:
            # autocommit: a statement that returns is committed; FULL: and synced to the disk
            self._connection = sqlite3.connect(
                path, timeout=30, isolation_level=None, check_same_thread=False
            )
            for command in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", _TABLE):
                self._connection.execute(command)
            self.all()  # a file may be damaged anywhere
        except sqlite3.Error as error:
            raise BadInputError(
                f"{path} cannot be used: {error}. Expected a database of answers in a folder that can be written."
            ) from error

    def save(self, answer: Answer) -> None:
        """Keeps an answer, in place of an earlier one to the same question. sqlite3.Error if the disk refuses."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = (answer.rater, answer.pair, answer.question, answer.answer, time)
        with self._lock:
            self._connection.execute(_UPSERT, row)

    def of(self, rater: str) -> dict[str, dict[str, str]]:
        """A rater's answers by pair and question."""
        found: dict[str, dict[str, str]] = {}
        for answer in self.all():
            if answer.rater == rater:
                found.setdefault(answer.pair, {})[answer.question] = answer.answer
        return found

    def all(self) -> list[Answer]:
        """Every answer, in a fixed order."""
        command = "SELECT rater, pair, question, answer FROM answers ORDER BY rater, pair, question"
        with self._lock:
            return [Answer(*row) for row in self._connection.execute(command)]

    def close(self) -> None:
        """Lets go of the file."""
        with self._lock:
            self._connection.close()


def read_answers(folder: Path) -> list[Answer]:
    """The answers given so far, also while a server runs; BadInputError when there are none."""
    found: list[Answer] = []
    if (folder / ANSWERS).is_file():
        answers = Answers(folder)
        found = answers.all()
        answers.close()
    if not found:
        raise BadInputError(
            f"{folder} holds no answers yet. Let raters give some: python -m trainer ab serve {folder}"
        )
    return found
