"""What the report says: counts, intervals, strength and agreement, by hand or by an independent formula."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.ab.studies import choice_for, contents, make_study
from trainer.ab.answers import Answer, Answers
from trainer.ab.cli import run
from trainer.ab.preference import bradley_terry, krippendorff_alpha, prefer
from trainer.ab.study import Study


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
