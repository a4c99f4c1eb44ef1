"""The metrics as they should be: an abstention counts 0, texts are free of special tokens, sets are pooled.

Similarities are means over scenes. Of FID, KID, CMMD and the Inception Score only the drawn pictures can be part, so
they are to be read beside `abstained`; the first three compare with all true pictures, those of abstentions too.
"""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from minigpt5_core.metrics import DRAWS, Interval, frechet_distance

from .dialogue import Elements, relevance_by_story
from .distances import cmmd, inception_score, kernel_distance, resampled
from .encoders import cosines
from .features import Encoded
from .stories import Score, attempt, by_scene, by_story
from .text import Bleu, Meteor, RougeL
from .weights import path_of

ENOUGH_FOR_FID = 5000
TOO_FEW = "Fewer than two pictures were drawn, or fewer than two are true."


def correct_scores(told: Encoded) -> dict[str, Score]:
    """Every metric by name."""
    metrics: dict[str, Callable[[], Score]] = {
        **shares(told),
        "clip_i": lambda: _of_pictures(told, *told.clip_pictures),
        "clip_t": lambda: _of_pictures(told, told.clip_texts[0], told.clip_pictures[1]),
        "dino_i": lambda: _of_pictures(told, *told.dino_pictures),
        "fid": lambda: _fid(told),
        "kid": lambda: _of_classified(told, kernel_distance),
        "cmmd": lambda: _cmmd(told),
        "inception_score": lambda: _inception_score(told),
        **{f"bleu_{order}": partial(_bleu, told, order) for order in (1, 2, 4)},
        "rouge_l": lambda: _of_texts(told, RougeL()),
        "meteor": lambda: _of_texts(told, Meteor(path_of(told.recipe, "wordnet"))),
        "sentence_bert": lambda: by_scene(_told(told, cosines(*told.sentences)), told.groups),
        "mm_relevance": lambda: by_story(relevance_by_story(elements(told), told.groups)),
    }
    return {name: attempt(metric) for name, metric in metrics.items()}


def shares(told: Encoded) -> dict[str, Callable[[], Score]]:
    """Of the scenes that have a true picture, at hand or described, the share without a drawn one; of the others, the
    share with one."""
    abstained = np.where(told.asked, ~told.drawn, np.nan)
    spurious = np.where(told.asked, np.nan, told.drawn)
    return {
        "abstained": lambda: by_scene(abstained, told.groups),
        "spurious": lambda: by_scene(spurious, told.groups),
    }


def elements(told: Encoded) -> list[Elements]:
    """Texts and pictures for MM-Relevance."""
    return [
        Elements(told.has_text, told.told, cosines(*told.clip_texts)),
        Elements(told.wanted, told.drawn, cosines(*told.clip_pictures)),
    ]


def pooled(score: Interval | None, note: str = "") -> Score:
    """The score of a set of pictures."""
    return Score(score, "set", reason="" if score else TOO_FEW, note=note)


def _of_pictures(told: Encoded, true: np.ndarray, drawn: np.ndarray) -> Score:
    """Mean cosine over the scenes whose true picture (or text) is there, 0 where nothing was drawn."""
    asked = told.asked & ~np.isnan(true[:, 0])
    values = np.where(told.drawn, cosines(true, drawn), 0.0)
    return by_scene(np.where(asked, values, np.nan), told.groups)


def _of_texts(told: Encoded, score: Callable[[str, str], float]) -> Score:
    pairs: Iterable = zip(told.true_texts, told.told_texts, strict=True)
    values = [score(true, predicted) if true and predicted else np.nan for true, predicted in pairs]
    return by_scene(_told(told, np.array(values)), told.groups)


def _told(told: Encoded, values: np.ndarray) -> np.ndarray:
    """NaN where there is no true text, 0 where nothing was told."""
    return np.where(told.has_text, np.where(told.told, values, 0.0), np.nan)


def _bleu(told: Encoded, order: int) -> Score:
    """Of the whole corpus, its interval from stories drawn anew."""
    bleu = Bleu(order)
    counts = np.array([bleu.counts(*_texts(told, number)) for number in range(len(told.names))])
    if not counts.any():
        return Score(None, "set", reason="No scene has a true text.")
    chosen = np.random.default_rng(0).integers(0, len(counts), (DRAWS, len(counts)))
    low, high = np.percentile([bleu.score(counts[rows].sum(0)) for rows in chosen], (2.5, 97.5))
    return Score(Interval(bleu.score(counts.sum(0)), float(low), float(high)), "set")


def _texts(told: Encoded, story: int) -> tuple[list[str], list[str]]:
    """The true and the told texts of the story's scenes that have a true one."""
    rows = np.flatnonzero((told.groups == story) & told.has_text)
    return [told.true_texts[row] for row in rows], [told.told_texts[row] for row in rows]


def _fid(told: Encoded) -> Score:
    score = _of_classified(told, frechet_distance)
    if min(told.wanted.sum(), told.drawn.sum()) >= ENOUGH_FOR_FID:
        return score
    few = f"Biased below {ENOUGH_FOR_FID} pictures a side: compare only equal numbers, or read KID and CMMD."
    return pooled(score.interval, f"{few} {score.note}".strip())


def _of_classified(told: Encoded, distance: Callable[[np.ndarray, np.ndarray], float]) -> Score:
    true, drawn = told.classified
    sets = [
        (true.features, told.groups[told.wanted]),
        (drawn.features, told.groups[told.drawn]),
    ]
    return pooled(resampled(distance, sets), told.inception.note)


def _cmmd(told: Encoded) -> Score:
    true, drawn = told.clip_pictures
    sets = [(true[told.wanted], told.groups[told.wanted]), (drawn[told.drawn], told.groups[told.drawn])]
    return pooled(resampled(cmmd, sets))


def _inception_score(told: Encoded) -> Score:
    logits = told.classified[1].logits
    return pooled(resampled(inception_score, [(logits, told.groups[told.drawn])]), told.inception.note)
