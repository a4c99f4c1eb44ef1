"""No answer that was acknowledged is lost."""

import http.client
import random
import signal
import threading
import time

import pytest

from minigpt5_core.errors import BadInputError
from tests.ab.studies import RealServer, ask
from trainer.ab.answers import Answer, Answers, read_answers
from trainer.ab.study import QUESTIONS, load_study


def test_threads_and_processes_write_at_once_and_the_last_word_counts(folder):
    first, second = Answers(folder), Answers(folder)

    def write(answers: Answers, rater: str) -> None:
        for choice in ("right", "left"):
            for pair in range(50):
                answers.save(Answer(rater, f"{pair:04}", "image", choice))

    threads = [
        threading.Thread(target=write, args=(answers, f"{rater}"))
        for rater, answers in enumerate((first, first, second))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_answers(folder)
    assert len(found) == 150 and {answer.answer for answer in found} == {"left"}
    assert first._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert first._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_a_file_that_is_no_database_is_named(folder):
    (folder / "answers.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(BadInputError, match="answers.sqlite cannot be used"):
        read_answers(folder)


def test_every_acknowledged_answer_outlives_kill_9(folder):
    study = load_study(folder)
    acknowledged: dict[tuple[str, str, str], str] = {}
    tried: set[tuple[str, str, str]] = set()
    port = 0

    def rate(rater: str, seed: int) -> None:
        rng = random.Random(seed)
        while True:
            key = (rater, rng.choice(study.pairs).name, rng.choice(list(QUESTIONS)))
            choice = rng.choice(["left", "tie", "right"])
            body = dict(zip(("rater", "pair", "question", "answer"), (*key, choice), strict=True))
            acknowledged_before = acknowledged.pop(key, None)
            tried.add(key)
            try:
                status, _, _ = ask(port, "POST", "/answer", {**body, "study": study.fingerprint()})
            except (OSError, http.client.HTTPException):
                return  # killed: this one may be there or not
            assert status == 200, acknowledged_before
            acknowledged[key] = choice

    for round_ in range(3):
        server = RealServer(folder, port)
        port = server.port
        raters = [
            threading.Thread(target=rate, args=(name, 10 * round_ + index))
            for index, name in enumerate("xyz")
        ]
        for rater in raters:
            rater.start()
        while len(acknowledged) <= 10 and raters[0].is_alive():  # however busy the machine is
            time.sleep(0.05)
        raters[0].join(0.4)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        for rater in raters:
            rater.join()
        kept = {(each.rater, each.pair, each.question): each.answer for each in read_answers(folder)}
        assert len(acknowledged) > 10
        assert acknowledged.items() <= kept.items() and kept.keys() <= tried


def test_ctrl_c_ends_the_server_and_the_answers_are_there(folder):
    server = RealServer(folder)
    body = {"study": load_study(folder).fingerprint(), "rater": "Ann", "pair": "0001", "question": "image"}
    assert ask(server.port, "POST", "/answer", {**body, "answer": "left"})[0] == 200
    assert server.end(signal.SIGINT) == 130
    assert read_answers(folder) == [Answer("Ann", "0001", "image", "left")]
