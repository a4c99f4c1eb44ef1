"""The server: what it serves and to whom, and which answers it refuses."""

import json
import re
import sqlite3

import pytest

from minigpt5_core.errors import BadInputError
from tests.ab.studies import SECRETS, answer_of, ask, serving
from trainer.ab.answers import read_answers
from trainer.ab.cli import run


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


def test_a_link_that_leads_out_of_the_study_is_not_served(folder):
    outside = folder.parent / "private.png"
    outside.write_bytes(b"private")
    picture = folder / "pictures" / "0001_left_1.png"
    picture.unlink()
    picture.symlink_to(outside)
    with serving(folder) as server:
        assert ask(server.server_port, "GET", "/pictures/0001_left_1.png")[0] == 404
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
        (413, {}, {"Content_Length": "7" * 5000}),
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
