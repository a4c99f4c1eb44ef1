"""The human study: what raters can see, that no answer is lost, what the report says, the page in a real browser."""

import http.client
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from minigpt5_core.errors import BadInputError
from trainer.ab.answers import Answer, Answers, read_answers
from trainer.ab.build import build_study
from trainer.ab.cli import run
from trainer.ab.preference import bradley_terry, krippendorff_alpha, prefer
from trainer.ab.serve import StudyServer
from trainer.ab.study import QUESTIONS, Pair, Study, load_study

ROOT = Path(__file__).resolve().parent.parent
SECRETS = ("redsystem", "bluesystem")
EVIL = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
CHROMIUM = os.environ.get("CHROMIUM_PATH", "/usr/bin/chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SHOTS = os.environ.get("AB_SHOTS")  # a folder to keep screenshots in


# ---- a study


def write_system(folder: Path, name: str, stories: int = 6, size: int = 24, texts: str = "") -> Path:
    """A system whose name is in its paths, its pictures' metadata and the keys that are not shown."""
    (folder / name).mkdir(parents=True)
    info = PngInfo()
    info.add_text("software", name)
    lines = []
    for story in range(stories):
        items = []
        for scene in range(2):
            color = (40 * story % 256, 90 * scene, 200 if name == SECRETS[0] else 60)
            file = f"{name}/{story}_{scene}.{'png' if name == SECRETS[0] else 'webp'}"
            exif = Image.Exif()
            exif[0x0131] = name
            Image.new("RGB", (size, size), color).save(folder / file, pnginfo=info, exif=exif, lossless=True)
            items.append({"text": f"{texts}Scene {scene} of story {story}.", "speaker": name})
            items.append({"picture": file, "caption": name})
        lines.append(json.dumps({"id": f"story_{story:03}", "items": items, "system": name}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def systems(tmp_path: Path) -> tuple[Path, Path]:
    return write_system(tmp_path / "in", SECRETS[0]), write_system(tmp_path / "in", SECRETS[1])


@pytest.fixture
def folder(tmp_path: Path, systems: tuple[Path, Path]) -> Path:
    build_study(*systems, tmp_path / "study")
    return tmp_path / "study"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_study_pairs_the_same_ids_and_says_what_is_left_over(tmp_path, systems, capsys):
    a, b = systems
    b.write_text("".join(b.read_text().splitlines(keepends=True)[1:]), encoding="utf-8")
    arguments = ["--a", str(a), "--b", str(b), "--out", str(tmp_path / "study"), "--pairs", "4"]
    assert run(["build", *arguments]) == 0
    said = capsys.readouterr().out
    assert "5 stories are in both files" in said
    assert f"1 are only in {a}, 0 only in {b}" in said and "4 pairs" in said
    study = load_study(tmp_path / "study")
    assert study.systems == {"a": "redsystem", "b": "bluesystem"}
    assert len({pair.story for pair in study.pairs}) == 4 and "story_000" not in str(study)


def test_each_side_shows_the_story_of_the_system_that_is_noted_for_it(folder):
    for pair in load_study(folder).pairs:
        for side, system in (("left", pair.winner("left")), ("right", pair.winner("right"))):
            picture = Image.open(folder / getattr(pair, side)[1]["picture"])
            assert (picture.getpixel((0, 0))[2] > 130) == (system == "a")
        assert pair.left[0] == {"text": f"Scene 0 of story {int(pair.story[-3:])}."}
        assert {pair.winner("left"), pair.winner("right")} == {"a", "b"} and pair.winner("tie") == "tie"


@pytest.mark.parametrize("seed", range(5))
def test_each_system_is_left_in_half_of_the_pairs(tmp_path, seed):
    from trainer.ab.build import _draw

    drawn = _draw([f"{number:03}" for number in range(51)], 50, seed)
    assert sum(left == "a" for _, left in drawn) == 25
    assert sorted(story for story, _ in drawn) != [story for story, _ in drawn]
    odd = [_draw(["x"], 5, seed)[0][1] for seed in range(20)]
    assert {"a", "b"} == set(odd)


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_study(tmp_path, systems):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        build_study(*systems, tmp_path / name, pairs=4, seed=seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert load_study(tmp_path / "one") != load_study(tmp_path / "other")


def test_a_picture_is_its_pixels_alone(tmp_path):
    """Whatever the format, mode and metadata, equal pixels become equal bytes; transparent ones become white."""
    opaque = Image.new("RGB", (8, 8), (255, 0, 0))
    opaque.paste((255, 255, 255), (0, 0, 4, 8))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 4, 8))
    for name, picture in (("a", opaque), ("b", clear)):
        exif = Image.Exif()
        exif[0x0131] = name * 50
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() if name == "a" else None
        picture.save(tmp_path / f"{name}.png", exif=exif, dpi=(72, 72), icc_profile=profile)
        line = json.dumps({"id": "s", "items": [{"picture": f"{name}.png"}]})
        (tmp_path / f"{name}.jsonl").write_text(line, encoding="utf-8")
    build_study(tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "study")
    left, right = ((tmp_path / "study/pictures" / f"0001_{side}_1.png") for side in ("left", "right"))
    assert left.read_bytes() == right.read_bytes()
    assert left.stat().st_mtime == right.stat().st_mtime == 0
    assert Image.open(left).info == {}


GOOD = '{"id": "story_000", "items": [{"text": "x"}]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"b\.jsonl cannot be read"),
        ("", r"b\.jsonl holds no story"),
        ('{"id": "story_000"', r"b\.jsonl, line 1: not valid JSON"),
        (f"{GOOD}\n[" + "[" * 100_000, r"line 2: not valid JSON"),
        ('{"items": []}', r'line 1: found no text "id"'),
        (f"{GOOD}\n\n[3]", r'line 3: found no text "id"'),
        ('{"id": "x", "items": []}', r'line 1: "items" is \[\]'),
        ('{"id": "x", "items": [{"text": "y"}, {"txt": "z"}]}', r"line 1, item 2: found {'txt': 'z'}"),
        ('{"id": "x", "items": [{"text": 3}]}', r"line 1, item 1"),
        ('{"id": "x", "items": [{"text": "\\ud800"}]}', r"not valid Unicode"),
        (f"{GOOD}\n{GOOD}", r"line 2: id 'story_000' was in line 1"),
        (GOOD.replace("story_000", "z"), r"No id is in both files: .*'story_000'.*'z'"),
        ('{"id": "story_000", "items": [{"picture": "no.png"}]}', r"line 1: picture 'no.png' is not there"),
        ('{"id": "story_000", "items": [{"picture": "b.jsonl"}]}', r"'b.jsonl' cannot be read as a picture"),
    ],
)
def test_broken_input_is_named_by_file_and_line(tmp_path, systems, content, message):
    path = tmp_path / "in" / "b.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(BadInputError, match=message):
        build_study(systems[0], path, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_study_is_never_written_over(tmp_path, systems, folder, capsys):
    before = contents(folder)
    arguments = ["build", "--a", str(systems[0]), "--b", str(systems[1]), "--out"]
    assert run([*arguments, str(folder)]) == 2
    assert "already holds a study" in capsys.readouterr().err
    assert run([*arguments, str(tmp_path / "in")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert run([*arguments, str(systems[0] / "study")]) == 2
    assert contents(folder) == before


def test_two_systems_need_two_names_and_a_study_needs_a_pair(tmp_path, systems, capsys):
    same = ["build", "--a", str(systems[0]), "--b", str(systems[0]), "--out", str(tmp_path / "study")]
    assert run(same) == 2
    assert "--names" in capsys.readouterr().err
    assert run([*same, "--names", "x", "y", "--pairs", "0"]) == 2
    assert "--pairs is 0" in capsys.readouterr().err
    assert run([*same, "--names", "x", "y"]) == 0
    assert load_study(tmp_path / "study").systems == {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"format_version": 2}', '{"format_version": 1, "pairs": []}']
)
def test_a_folder_without_a_study_says_how_to_make_one(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    assert run(["report", str(tmp_path)]) == 2
    assert "study.json" in capsys.readouterr().err
    assert run(["serve", str(tmp_path)]) == 2


# ---- the server


@contextmanager
def serving(folder: Path) -> Iterator[StudyServer]:
    with StudyServer(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes, dict]:
    """A request with the headers that the study's own page would send, but for those in `headers`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    sent = {"Host": f"127.0.0.1:{port}"}
    if method == "POST":
        sent |= {"Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, content, {name: value for name, value in sent.items() if value})
    reply = connection.getresponse()
    found = reply.status, reply.read(), dict(reply.headers)
    connection.close()
    return found


def answer_of(server: StudyServer, **changes: str) -> dict[str, str]:
    values = {
        "study": server.fingerprint,
        "rater": "Ann",
        "pair": "0001",
        "question": "image",
        "answer": "tie",
    }
    return values | changes


def test_nothing_that_a_rater_can_load_names_a_system(folder):
    with serving(folder) as server:
        shown = json.loads(ask(server.server_port, "GET", "/study?rater=Ann")[1])
        pictures = {item["picture"] for pair in shown["pairs"] for side in ("left", "right")
                    for item in pair[side] if "picture" in item}  # fmt: skip
        assert len(pictures) == 24 and all(
            re.fullmatch(r"pictures/\d{4}_(left|right)_\d\.png", name) for name in pictures
        )
        assert all(set(pair) == {"pair", "left", "right"} for pair in shown["pairs"])
        paths = [
            "/",
            "/page.js",
            "/saving.js",
            "/page.css",
            "/study?rater=Ann",
            *(f"/{name}" for name in pictures),
        ]
        for path in paths:
            status, content, headers = ask(server.server_port, "GET", path)
            assert status == 200
            assert not any(secret in f"{content!r}{headers}" for secret in SECRETS), path
            assert "Last-Modified" not in headers and headers["Cache-Control"] == "no-store"


def test_no_other_file_is_served(folder):
    with serving(folder) as server:
        for path in (
            "/study.json", "/answers.sqlite", "/pictures/../study.json", "/pictures/%2e%2e/study.json", "/pictures/",
            "/pictures", "//etc/passwd", "/../../etc/passwd", "/serve.py",
        ):  # fmt: skip
            assert ask(server.server_port, "GET", path)[0] == 404, path


def test_a_study_from_elsewhere_opens_no_other_file(folder):
    path = folder / "study.json"
    outside = folder.parent / "private.png"
    outside.write_bytes(b"private")
    text = path.read_text(encoding="utf-8")
    for name in ("../private.png", str(outside), "study.json"):
        path.write_text(text.replace("pictures/0001_left_1.png", name), encoding="utf-8")
        with serving(folder) as server:
            for asked in (f"/{name}", name, f"//{name}"):
                assert ask(server.server_port, "GET", asked)[0] in (400, 404)
            assert ask(server.server_port, "GET", "/pictures/0001_left_2.png")[0] == 200


def test_a_page_may_load_and_run_only_what_is_ours(folder):
    with serving(folder) as server:
        _, content, headers = ask(server.server_port, "GET", "/")
        policy = headers["Content-Security-Policy"]
        assert (
            "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert b"style=" not in content and b"onclick" not in content and b"http" not in content


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:PORT", "127.0.0.1", "localhost:1", "127.0.0.1:PORT.evil"]
)
def test_another_sites_name_for_this_address_is_refused(folder, host):
    with serving(folder) as server:
        host = host.replace("PORT", str(server.server_port))
        assert ask(server.server_port, "GET", "/", Host=host)[0] == 403
        assert ask(server.server_port, "GET", "/study?rater=Ann", Host=host)[0] == 403
        assert ask(server.server_port, "POST", "/answer", answer_of(server), Host=host)[0] == 403
        assert ask(server.server_port, "GET", "/", Host=f"LOCALHOST:{server.server_port}")[0] == 200
    with pytest.raises(BadInputError, match="no answers"):
        read_answers(folder)


def test_the_server_listens_on_this_machine_alone(folder):
    with serving(folder) as server:
        assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("status", "change", "headers"),
    [
        (403, {}, {"Origin": ""}),
        (403, {}, {"Origin": "null"}),
        (403, {}, {"Origin": "http://evil.example"}),
        (415, {}, {"Content_Type": "text/plain"}),
        (413, {"rater": "x" * 5000}, {}),
        (413, {}, {"Content_Length": "-1"}),
        (409, {"study": "another"}, {}),
        (400, {"pair": "9999"}, {}),
        (400, {"question": "taste"}, {}),
        (400, {"answer": "both"}, {}),
        (400, {"rater": "  "}, {}),
        (400, {"rater": "x" * 81}, {}),
        (400, {"rater": "a\u0000b"}, {}),
        (400, {"rater": "\ud800"}, {}),
        (400, {"rater": 3}, {}),
    ],
)
def test_an_answer_that_cannot_be_right_is_refused(folder, status, change, headers):
    with serving(folder) as server:
        assert ask(server.server_port, "POST", "/answer", answer_of(server, **change), **headers)[0] == status
        assert ask(server.server_port, "POST", "/answer", b"no json")[0] == 400
        assert ask(server.server_port, "POST", "/answer", [3])[0] == 400
        assert ask(server.server_port, "POST", "/", answer_of(server))[0] == 404
        assert server.answers.all() == []


def test_a_rater_finds_the_own_answers_and_order_again(folder):
    with serving(folder) as server:
        assert ask(server.server_port, "POST", "/answer", answer_of(server, rater=" Zoe\u0301  B "))[0] == 200
        again = json.loads(ask(server.server_port, "GET", "/study?rater=Zo%C3%A9+B")[1])
        assert again["rater"] == "Zo\u00e9 B" and again["answers"] == {"0001": {"image": "tie"}}
        other = json.loads(ask(server.server_port, "GET", "/study?rater=Ann")[1])
        assert other["answers"] == {}
    with serving(folder) as server:
        assert json.loads(ask(server.server_port, "GET", "/study?rater=Zo%C3%A9+B")[1]) == again
        orders = {str(json.loads(ask(server.server_port, "GET", f"/study?rater={name}")[1])["pairs"])
                  for name in "abcdef"}  # fmt: skip
        assert len(orders) == 6


def test_a_disk_that_refuses_is_told_to_the_page(folder, monkeypatch):
    def full_disk(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with serving(folder) as server:
        monkeypatch.setattr(server.answers, "save", full_disk)
        status, text, _ = ask(server.server_port, "POST", "/answer", answer_of(server))
        assert status == 503 and b"disk is full" in text


def test_a_port_in_use_is_said_with_a_cure(folder, capsys):
    with serving(folder) as server:
        assert run(["serve", str(folder), "--port", str(server.server_port)]) == 2
    assert "--port 8766" in capsys.readouterr().err
    assert run(["serve", str(folder), "--port", "99999"]) == 2


# ---- answers on the disk


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


class RealServer:
    """`ab serve` in a process of its own."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        code = f"from trainer.ab.cli import run; raise SystemExit(run({['serve', str(folder), '--port', str(port)]!r}))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, self.process.communicate()[1]
        self.port, self.url = int(found[1]), found[0]

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        self.process.communicate(timeout=20)
        return self.process.returncode


def test_every_acknowledged_answer_outlives_kill_9(folder):
    study = load_study(folder)
    acknowledged: dict[tuple[str, str, str], str] = {}
    tried: set[tuple[str, str, str]] = set()
    port = 0

    def rate(rater: str, seed: int) -> None:
        chance = random.Random(seed)
        while True:
            key = (rater, chance.choice(study.pairs).name, chance.choice(list(QUESTIONS)))
            choice = chance.choice(["left", "tie", "right"])
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


# ---- the report


def make_study(pairs: int) -> Study:
    """Without pictures; system a is left in the pairs with an odd number."""
    return Study(
        {"a": "Red <b>", "b": "Blue"},
        0,
        [Pair(f"{number:04}", f"s{number}", "ba"[number % 2], [{"text": "x"}], [{"text": "y"}])
         for number in range(1, pairs + 1)],
    )  # fmt: skip


def choice_for(pair: Pair, winner: str) -> str:
    return next(choice for choice in ("left", "tie", "right") if pair.winner(choice) == winner)


def give(study: Study, folder: Path, given: dict[str, list[list[str]]]) -> None:
    """Saves the winners that each rater names for the pairs in turn, by question."""
    answers = Answers(folder)
    for question, raters in given.items():
        for rater, winners in enumerate(raters):
            for pair, winner in zip(study.pairs[: len(winners)], winners, strict=True):
                answers.save(Answer(f"rater {rater}", pair.name, question, choice_for(pair, winner)))
    answers.close()


def test_the_report_counts_wins_ties_and_losses(tmp_path):
    """By hand: image 8 answers, a 4, tie 2, b 2: score 5/8, log-odds ln(5/3)."""
    study = make_study(4)
    (tmp_path / "study.json").write_text(study.to_json(), encoding="utf-8")
    given = {
        "image": [["a", "a", "tie", "b"], ["a", "a", "tie", "b"]],
        "language": [["a", "b", "tie"]],
        "coherence": [["b", "b", "b", "b"]],
    }
    give(study, tmp_path, given)
    assert run(["report", str(tmp_path), "--out", str(tmp_path / "deep" / "out")]) == 0
    report = json.loads((tmp_path / "deep/out/ab_report.json").read_text())
    assert report["systems"] == {"a": "Red <b>", "b": "Blue"} and (report["pairs"], report["raters"]) == (
        4,
        2,
    )
    image, language, coherence = (report["questions"][key] for key in ("image", "language", "coherence"))
    assert [image[key]["mean"] for key in ("a", "tie", "b")] == [0.5, 0.25, 0.25]
    assert all(
        0 <= image[key]["low"] <= image[key]["mean"] <= image[key]["high"] <= 1 for key in ("a", "tie", "b")
    )
    assert image["score"]["mean"] == 0.625 and image["strength"]["mean"] == pytest.approx(np.log(5 / 3))
    assert (image["answers"], image["raters"], image["pairs"]) == (8, 2, 4)
    assert image["alpha_nominal"] == image["alpha_ordinal"] == 1.0
    assert (language["answers"], language["alpha_nominal"]) == (3, None)
    assert coherence["strength"]["mean"] is None and coherence["b"]["mean"] == 1.0


def test_the_report_is_one_page_of_escaped_text(tmp_path):
    study = make_study(4)
    (tmp_path / "study.json").write_text(study.to_json(), encoding="utf-8")
    give(study, tmp_path, {"image": [["a", "a", "tie", "b"]], "language": [["b"]]})
    assert run(["report", str(tmp_path)]) == 0
    first = contents(tmp_path)
    page = first["ab_report.html"].decode()
    assert "Red &lt;b&gt;" in page and "<b>" not in page and "http" not in page and "<script" not in page
    assert page.count("<svg") == 2 and 'width="300.0"' in page and "−∞" in page
    assert run(["report", str(tmp_path)]) == 0
    assert contents(tmp_path)["ab_report.json"] == first["ab_report.json"]
    assert not [name for name in contents(tmp_path) if name.endswith(".tmp")]


def test_a_report_needs_answers_and_its_own(folder, capsys):
    assert run(["report", str(folder)]) == 2
    assert "holds no answers yet" in capsys.readouterr().err
    assert not (folder / "answers.sqlite").exists()
    answers = Answers(folder)
    answers.save(Answer("Ann", "7777", "image", "left"))
    answers.close()
    assert run(["report", str(folder)]) == 2
    assert "'7777'" in capsys.readouterr().err


KRIPPENDORFF = """
1 2 3 3 2 1 4 1 2 * * *
1 2 3 3 2 2 4 1 2 5 * 3
* 3 3 3 2 3 4 2 2 5 1 *
1 2 3 3 2 4 4 1 2 5 1 *
"""


def test_alpha_is_that_of_krippendorffs_example():
    """Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, 4 observers and 12 units: 0.743 and 0.815."""
    rows = [line.split() for line in KRIPPENDORFF.strip().splitlines()]
    values = np.array([[np.nan if value == "*" else float(value) for value in row] for row in rows])
    assert krippendorff_alpha(values, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(values, "ordinal") == pytest.approx(0.815, abs=5e-4)


def test_alpha_by_hand():
    """Two raters, units 00 01 02 22: n = 8, totals 4, 1, 3.

    Nominal: 4 of 8 coincidences disagree; expected 2 (4 + 12 + 3) = 38 of 56: 1 - 7 * 4 / 38. Ordinal: mean ranks 2,
    4.5, 6.5; observed 2 (6.25 + 20.25) = 53; expected 2 (4 * 6.25 + 12 * 20.25 + 3 * 4) = 560: 1 - 7 * 53 / 560.
    """
    values = np.array([[0.0, 0, 0, 2], [0.0, 1, 2, 2]])
    assert krippendorff_alpha(values, "nominal") == pytest.approx(1 - 28 / 38)
    assert krippendorff_alpha(values, "ordinal") == pytest.approx(1 - 371 / 560)


def test_alpha_of_one_rater_or_one_answer_is_undefined_and_that_of_chance_is_zero():
    assert krippendorff_alpha(np.array([[0.0, 1, 2]]), "nominal") is None
    assert krippendorff_alpha(np.zeros((3, 4)), "ordinal") is None
    random_values = np.random.default_rng(0).integers(0, 3, (4, 3000)).astype(float)
    for level in ("nominal", "ordinal"):
        assert krippendorff_alpha(random_values, level) == pytest.approx(0, abs=0.02)  # type: ignore[arg-type]


def test_raters_who_all_prefer_one_system_agree():
    study = make_study(10)
    answers = [
        Answer(rater, pair.name, "image", choice_for(pair, "a")) for rater in "xyz" for pair in study.pairs
    ]
    found = prefer(study, answers)
    assert found.a.mean == 1.0 and found.alpha_nominal == 1.0


def simulate(study: Study, raters: int, seed: int) -> list[Answer]:
    """Raters of whom 65 % prefer a, on some pairs more and on others fewer: beta(6.5, 3.5)."""
    chance = np.random.default_rng(seed)
    answers = []
    for pair, preferred in zip(study.pairs, chance.beta(6.5, 3.5, len(study.pairs)), strict=True):
        for rater, draw in enumerate(chance.random(raters)):
            answers.append(
                Answer(f"{rater}", pair.name, "image", choice_for(pair, "a" if draw < preferred else "b"))
            )
    return answers


def test_the_interval_holds_the_true_preference_about_as_often_as_it_says():
    study = make_study(50)
    found = [prefer(study, simulate(study, 4, seed)) for seed in range(100)]
    first = found[0]
    assert first.a.low < 0.65 < first.a.high
    assert first.strength.low < np.log(0.65 / 0.35) < first.strength.high  # type: ignore[operator]
    held = np.mean([each.a.low <= 0.65 <= each.a.high for each in found])
    assert 0.88 <= held <= 0.99
    assert np.mean([each.a.mean for each in found]) == pytest.approx(0.65, abs=0.01)


def test_the_strength_is_the_maximum_of_the_bradley_terry_likelihood():
    study = make_study(20)
    found = prefer(study, simulate(study, 3, 1))
    wins, losses = found.a.mean * found.answers, found.b.mean * found.answers
    candidates = np.linspace(-4, 4, 8001)
    likelihood = -wins * np.log1p(np.exp(-candidates)) - losses * np.log1p(np.exp(candidates))
    assert found.strength.mean == pytest.approx(candidates[likelihood.argmax()], abs=1e-3)
    assert found.strength == bradley_terry(found.score)
    assert found.strength.low < found.strength.mean < found.strength.high  # type: ignore[operator]


# ---- the page in a browser

browsing = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).is_file(), reason=f"no Chromium at {CHROMIUM}: set CHROMIUM_PATH"),
]


def in_browser(test):
    for mark in browsing:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def open_page(browser):
    """open_page(url, ...) gives a page of a rater with a browser of the own, and fails on errors in it."""
    contexts, errors = [], []

    def open_one(url, **settings):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **settings}))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: "Content Security" in message.text and errors.append(message.text))
        page.goto(url)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def real_server():
    """real_server(folder, port) starts one; all are ended."""
    running = []

    def start(folder, port=0):
        running.append(RealServer(folder, port))
        return running[-1]

    yield start
    for server in running:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


def keep(page, name):
    if SHOTS:
        Path(SHOTS).mkdir(exist_ok=True)
        page.screenshot(path=Path(SHOTS) / f"{name}.png")


def log_in(page, name):
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Start").click()
    page.get_by_role("heading", name="Pair 1 of").wait_for()


def at(page, text):
    page.get_by_role("heading", name=text).wait_for()


def click_answers(page, *choices):
    for (title, _), choice in zip(QUESTIONS.values(), choices, strict=True):
        page.get_by_role("button", name=f"{title}: {choice}").click()


def pressed(page):
    return [button.get_attribute("aria-label") for button in page.locator("button[aria-pressed=true]").all()]


def kept(folder, rater):
    return {(each.pair, each.question): each.answer for each in read_answers(folder) if each.rater == rater}


@in_browser
def test_two_raters_by_mouse_and_by_keys_and_a_server_that_is_killed(folder, open_page, real_server):
    server = real_server(folder)
    orders = {name: [pair.name for pair in load_study(folder).order_for(name)] for name in ("Mo", "Kay")}
    mouse, keys = open_page(server.url), open_page(server.url)
    log_in(mouse, "Mo")
    log_in(keys, "Kay")
    for number in range(1, 4):
        at(mouse, f"Pair {number} of 6")
        click_answers(mouse, "Left", "Tie", "Right")
        at(keys, f"Pair {number} of 6")
        for key in "321":
            keys.keyboard.press(key)
    at(mouse, "Pair 4 of 6")
    at(keys, "Pair 4 of 6")
    keys.keyboard.press("2")
    mouse.get_by_role("button", name="Language continuity: Right").click()
    keys.get_by_text("Saved.", exact=True).wait_for()
    mouse.get_by_text("Saved.", exact=True).wait_for()
    keep(mouse, "desktop")
    assert server.end(signal.SIGKILL) == -signal.SIGKILL

    mouse.get_by_role("button", name="Image quality: Left").click()
    mouse.get_by_role("button", name="Multimodal coherence: Left").click()
    mouse.get_by_role("alert").get_by_text("Not saved yet").wait_for()
    at(mouse, "Pair 4 of 6")  # and waits there
    keep(mouse, "not_saved")
    server = real_server(folder, server.port)
    at(mouse, "Pair 5 of 6")  # by itself, with everything saved
    mouse.get_by_role("alert").wait_for(state="hidden")
    keys.reload()
    at(keys, "Pair 4 of 6")
    assert pressed(keys) == ["Language continuity: Tie"]
    keys.keyboard.press("3")
    keys.keyboard.press("3")

    again = open_page(f"{server.url}/?rater=Mo")  # another day, another browser
    at(again, "Pair 5 of 6")
    assert "4 of 6 answered" in again.locator("header").inner_text()
    for number in (5, 6):
        at(again, f"Pair {number} of 6")
        click_answers(again, "Left", "Left", "Left")
        at(keys, f"Pair {number} of 6")
        for key in "111":
            keys.keyboard.press(key)
    for page, name in ((again, "Mo"), (keys, "Kay")):
        at(page, "Thank you")
        assert "6 of 6 answered" in page.locator("header").inner_text()
        assert len(kept(folder, name)) == 18
    keep(again, "done")
    mo, kay = kept(folder, "Mo"), kept(folder, "Kay")
    assert [mo[orders["Mo"][0], key] for key in QUESTIONS] == ["left", "tie", "right"]
    assert [mo[orders["Mo"][3], key] for key in QUESTIONS] == ["right", "left", "left"]
    assert [kay[orders["Kay"][2], key] for key in QUESTIONS] == ["right", "tie", "left"]
    assert [kay[orders["Kay"][3], key] for key in QUESTIONS] == ["tie", "right", "right"]
    assert run(["report", str(folder)]) == 0
    report = json.loads((folder / "ab_report.json").read_text())
    assert list(report["questions"]) == list(QUESTIONS)
    assert {(each["answers"], each["raters"]) for each in report["questions"].values()} == {(12, 2)}
    page = open_page((folder / "ab_report.html").as_uri())
    keep(page, "report")


@in_browser
def test_a_rater_goes_back_and_changes_an_answer(folder, open_page, real_server):
    server = real_server(folder)
    page = open_page(server.url)
    log_in(page, "Ann")
    for key in "123":
        page.keyboard.press(key)
    at(page, "Pair 2 of 6")
    page.keyboard.press("Backspace")
    at(page, "Pair 1 of 6")
    assert pressed(page) == ["Language continuity: Left", "Image quality: Tie", "Multimodal coherence: Right"]
    assert page.locator("[aria-current=step] h3").inner_text() == "Multimodal coherence"
    page.keyboard.press("Backspace")
    page.keyboard.press("3")  # image quality, and on to the next question
    page.keyboard.press("2")
    at(page, "Pair 2 of 6")
    first = load_study(folder).order_for("Ann")[0].name
    assert kept(folder, "Ann") == {
        (first, "language"): "left",
        (first, "image"): "right",
        (first, "coherence"): "tie",
    }
    page.get_by_role("button", name="Next pair").click()
    at(page, "Pair 3 of 6")
    page.get_by_role("button", name="Previous pair").click()
    at(page, "Pair 2 of 6")
    page.get_by_role("button", name="Image quality: Right").dblclick()
    page.get_by_role("button", name="Change name").click()
    log_in(page, "Bob")
    assert pressed(page) == [] and "0 of 6 answered" in page.locator("header").inner_text()


@in_browser
def test_pairs_that_were_passed_over_come_back_at_the_end(folder, open_page, real_server):
    page = open_page(f"{real_server(folder).url}/?rater=Ann")
    at(page, "Pair 1 of 6")
    page.get_by_role("button", name="Next pair").click()
    for number in range(2, 7):
        at(page, f"Pair {number} of 6")
        for key in "222":
            page.keyboard.press(key)
    at(page, "Pair 1 of 6")
    for key in "222":
        page.keyboard.press(key)
    at(page, "Thank you")


@in_browser
def test_another_study_at_the_same_address_gets_none_of_this_ones_answers(
    tmp_path, systems, folder, open_page, real_server
):
    server = real_server(folder)
    page = open_page(f"{server.url}/?rater=Ann")
    at(page, "Pair 1 of 6")
    server.end(signal.SIGKILL)
    build_study(*systems, tmp_path / "other", seed=1)
    real_server(tmp_path / "other", server.port)
    page.keyboard.press("1")
    page.get_by_role("alert").get_by_text("Another study").wait_for()
    with pytest.raises(BadInputError, match="no answers"):
        read_answers(tmp_path / "other")


@in_browser
def test_texts_are_shown_as_they_are_and_run_nothing(tmp_path, open_page, real_server):
    a = write_system(tmp_path / "in", SECRETS[0], texts=EVIL)
    b = write_system(tmp_path / "in", SECRETS[1])
    build_study(a, b, tmp_path / "study")
    page = open_page(f"{real_server(tmp_path / 'study').url}/?rater={urllib.request.quote(EVIL[:70])}")
    at(page, "Pair 1 of 6")
    assert EVIL in page.locator(".stories").inner_text()
    assert EVIL[:70] in page.locator("header").inner_text()
    assert page.evaluate("window.broken") is None
    assert page.locator(".stories img").count() == 4 and page.locator("main script").count() == 0


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_can_be_used_by_tab_and_enter(folder, open_page, real_server, scheme):
    server = real_server(folder)
    page = open_page(server.url, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    keep(page, f"welcome_{scheme}")
    log_in(page, "Ann")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.get_by_role("group").count() == 3 and page.get_by_role("progressbar").count() == 1
    assert page.get_by_role("img", name="Picture 2 of the left story").count() == 1
    keep(page, f"phone_{scheme}")
    page.get_by_role("button", name="Language continuity: Left").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert pressed(page) == ["Language continuity: Tie"]
    style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert style == "solid"
    page.evaluate("scrollTo(0, 1e6)")
    keep(page, f"phone_questions_{scheme}")
