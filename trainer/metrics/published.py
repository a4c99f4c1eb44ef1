"""The metrics as MiniGPT-5's script defines them (arXiv 2310.02239, metric.py), to compare with the paper's numbers.

Where it differs from `correct`: BLEU counts characters; special tokens stay in the texts, so that a picture without
words counts as text; scenes without a drawn picture are left out; FID is also taken of each story's pictures by
themselves; CLIP-T of VIST compares each picture with the string of vokens; texts are averaged by dialogue first; the
Inception Score is the mean of ten shuffled parts; pictures are resized to 256 pixels before FID.

CLIP-I, CLIP-T, FID and the Inception Score are those of CC3M and VIST, the texts' and MM-Relevance those of MMDialog.
CC3M's FID has all true pictures on its side, which differs only where some were not drawn.
"""

import string
from collections.abc import Callable

import numpy as np

from minigpt5_core.metrics import frechet_distance

from .corrected import TOO_FEW, elements, pooled, shares
from .dialogue import relevance_by_story
from .distances import inception_score, resampled
from .encoders import cosines
from .features import Encoded
from .stories import Score, attempt, by_scene, by_story, story_means
from .weights import library

VIST_TARGET = "".join(f"[IMG{number}]" for number in range(8)) + " ###"
SPLITS = 10
SEED = 42
ABSENT = ("dino_i", "kid", "cmmd", "bleu_4", "meteor")


def published_scores(told: Encoded) -> dict[str, Score]:
    """Every metric of the script by name, and those it lacks with that reason."""
    metrics: dict[str, Callable[[], Score]] = {
        **shares(told),
        "clip_i": lambda: by_scene(_drawn(told, cosines(*told.clip_pictures)), told.groups),
        "clip_t": lambda: by_scene(
            _drawn(told, cosines(told.clip_texts[0], told.clip_pictures[1])), told.groups
        ),
        "clip_t_vist": lambda: by_scene(
            _drawn(told, cosines(told.clip.texts([VIST_TARGET]), told.clip_pictures[1])), told.groups
        ),
        "fid": lambda: _fid(told),
        "story_fid": lambda: _story_fid(told),
        "inception_score": lambda: _inception_score(told),
        "bleu_1": lambda: _of_texts(told, CharacterBleu(1)),
        "bleu_2": lambda: _of_texts(told, CharacterBleu(2)),
        "rouge_l": lambda: _of_texts(told, PublishedRougeL()),
        "sentence_bert": lambda: _by_dialogue(told, cosines(*told.sentences)),
        "mm_relevance": lambda: by_story(relevance_by_story(elements(told), told.groups, empty=0.0)),
    }
    absent = {name: Score(None, "", reason="The published script does not compute it.") for name in ABSENT}
    return {name: attempt(metric) for name, metric in metrics.items()} | absent


def published_text(text: str) -> str:
    """What the script takes for a reply's text: up to the first voken, without ###, empty if all punctuation."""
    words = text.replace("###", "").split("[IMG0]")[0].strip()
    return "" if all(letter in string.punctuation for letter in words) else words


class CharacterBleu:
    """nltk's sentence BLEU of two plain strings, which it takes for lists of characters."""

    def __init__(self, order: int) -> None:
        self.bleu = library("nltk.translate", "nltk").bleu
        self.weights = (1 / order,) * order

    def __call__(self, true: str, predicted: str) -> float:
        return float(self.bleu([true], predicted, self.weights))


class PublishedRougeL:
    """ROUGE-L's F1 by the package rouge, sentence by sentence, which counts each different word once."""

    def __init__(self) -> None:
        self.rouge = library("rouge", "rouge").Rouge(metrics=["rouge-l"])

    def __call__(self, true: str, predicted: str) -> float:
        return self.rouge.get_scores(predicted, true)[0]["rouge-l"]["f"]


def inception_score_of_parts(logits: np.ndarray) -> float:
    """The mean Inception Score of ten parts (fewer for few pictures) of shuffled logits (N, K), as in torchmetrics."""
    shuffled = logits[np.random.default_rng(SEED).permutation(len(logits))]
    size = -(-len(logits) // SPLITS)
    return float(
        np.mean([inception_score(shuffled[start : start + size]) for start in range(0, len(logits), size)])
    )


def _drawn(told: Encoded, values: np.ndarray) -> np.ndarray:
    return np.where(told.wanted & told.drawn, values, np.nan)


def _of_texts(told: Encoded, score: Callable[[str, str], float]) -> Score:
    pairs = zip(told.true_texts, told.told_texts, strict=True)
    return _by_dialogue(told, np.array([score(*pair) if all(pair) else np.nan for pair in pairs]))


def _by_dialogue(told: Encoded, values: np.ndarray) -> Score:
    """0 for a turn without an answer; a dialogue's mean is one value."""
    answered = np.where(told.has_text, np.where(told.told, values, 0.0), np.nan)
    return by_story(story_means(answered, told.groups))


def _fid(told: Encoded) -> Score:
    """Only the true pictures of scenes that were drawn."""
    true, drawn = told.classified_small
    both = told.wanted & told.drawn
    sets = [
        (true.features[both[told.wanted]], told.groups[both]),
        (drawn.features[both[told.drawn]], told.groups[both]),
    ]
    return pooled(resampled(frechet_distance, sets), told.inception.note)


def _story_fid(told: Encoded) -> Score:
    """The mean over stories of the FID of one story's pictures; stories of one scene are left out."""
    lengths = np.bincount(told.groups)
    if gone := np.flatnonzero((lengths[told.groups] > 1) & ~(told.wanted & told.drawn)).tolist():
        name = told.names[told.groups[gone[0]]]
        return Score(
            None, "story", reason=f"The published script stops at story {name}: a picture is missing."
        )
    true, drawn = told.classified_small
    values = np.full(len(lengths), np.nan)
    for story in np.flatnonzero(lengths > 1):
        part = told.groups == story
        values[story] = frechet_distance(true.features[part[told.wanted]], drawn.features[part[told.drawn]])
    score = by_story(values)
    return Score(score.interval, "story", values, score.reason, told.inception.note)


def _inception_score(told: Encoded) -> Score:
    logits = told.classified[1].logits
    if len(logits) < 2:
        return Score(None, "set", reason=TOO_FEW)
    score = resampled(inception_score_of_parts, [(logits, told.groups[told.drawn])])
    return pooled(score, told.inception.note)
