"""Text metrics: BLEU, ROUGE-L, METEOR and Sentence-BERT, all from 0 to 1 (a cosine may be below)."""

import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from minigpt5_core.errors import BadInputError
from minigpt5_core.texts import read_json

from .encoders import batched, unit_length
from .recipe import ScoresRecipe
from .weights import SENTENCE_PACKAGE, NotAvailableError, companion, library, path_of, pretrained

MARKS = re.compile(r"<unk>|<s>|</s>|<pad>|###|\[IMG\d+\]")


def without_marks(text: str) -> str:
    """Text without what decoding leaves in it: special tokens, vokens and the turn separator."""
    return " ".join(MARKS.sub(" ", text).split())


class Bleu:
    """Corpus BLEU of words (ACL P02-1040) up to `order`-grams by sacrebleu, tokenised as in WMT (13a).

    `counts` of stories add up, so that stories can be drawn anew without counting again.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.kind = library("sacrebleu.metrics", "sacrebleu").BLEU
        self.metric = self.kind(max_ngram_order=order)

    def counts(self, true: Sequence[str], predicted: Sequence[str]) -> np.ndarray:
        """(2 order + 2,): matches and totals of each order, then both lengths."""
        if not true:
            return np.zeros(2 * self.order + 2, int)
        score = self.metric.corpus_score(list(predicted), [list(true)])
        return np.array([*score.counts, *score.totals, score.sys_len, score.ref_len])

    def score(self, counts: np.ndarray) -> float:
        matches, totals = counts[: self.order].tolist(), counts[self.order : -2].tolist()
        lengths = int(counts[-2]), int(counts[-1])
        found = self.kind.compute_bleu(matches, totals, *lengths, "exp", max_ngram_order=self.order)
        return found.score / 100


class RougeL:
    """F1 of the longest common subsequence of words (ACL W04-1013) by rouge-score, without stemming."""

    def __init__(self) -> None:
        self.scorer = library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"])

    def __call__(self, true: str, predicted: str) -> float:
        return self.scorer.score(true, predicted)["rougeL"].fmeasure


class Meteor:
    """METEOR (ACL W07-0734) by nltk, with synonyms from a local WordNet, on words and marks (\\w+ or [^\\w\\s]+)."""

    def __init__(self, folder: Path) -> None:
        self.score = library("nltk.translate.meteor_score", "nltk").meteor_score
        self.tokenize = library("nltk.tokenize", "nltk").wordpunct_tokenize
        self.wordnet = _wordnet(folder)

    def __call__(self, true: str, predicted: str) -> float:
        return self.score([self.tokenize(true)], self.tokenize(predicted), wordnet=self.wordnet)


def _wordnet(folder: Path) -> Any:
    """nltk's reader on `folder`, given what it wants beyond the files that Debian's package has and METEOR reads."""
    if not (folder / "data.noun").is_file():
        raise BadInputError(
            f"wordnet: {folder} has no data.noun. Expected WordNet's own files in this folder."
        )
    reader: Any = library("nltk.corpus.reader.wordnet", "nltk").WordNetCorpusReader

    class Synonyms(reader):
        def open(self, file: str) -> Any:
            absent = file == "lexnames" and not (folder / file).exists()
            return io.StringIO("".join(f"{i} {i} 0\n" for i in range(45))) if absent else super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """No mapping to other versions of WordNet."""

    allowed = library("nltk.data", "nltk").path  # nltk reads nothing outside these folders
    if str(folder) not in allowed:
        allowed.append(str(folder))
    with warnings.catch_warnings(action="ignore"):  # that there are no other languages
        return Synonyms(str(folder), None)


class SentenceBert:
    """Sentence-BERT (arXiv 1908.10084): the mean of a BERT's last hidden states, features (N, D) of length 1."""

    def __init__(self, folder: Path, device: torch.device, batch: int) -> None:
        self.model = pretrained(AutoModel, folder, device)
        self.tokenizer = companion(AutoTokenizer, folder)
        self.length = _setting(folder / "sentence_bert_config.json", "max_seq_length", 512)
        self.batch = batch
        if not _setting(folder / "1_Pooling/config.json", "pooling_mode_mean_tokens", True):
            raise BadInputError(
                f"sentence: {folder} does not pool by the mean (1_Pooling/config.json). Name a model that does, "
                "such as all-MiniLM-L6-v2."
            )

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return unit_length(batched(self._texts, texts, self.batch))

    @torch.no_grad()
    def _texts(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        hidden = self.model(**tokens).last_hidden_state
        there = tokens["attention_mask"][..., None]
        return (hidden * there).sum(1) / there.sum(1)


def _setting(path: Path, name: str, default: Any) -> Any:
    return read_json(path).get(name, default) if path.is_file() else default


def sentence_folder(recipe: ScoresRecipe) -> Path:
    """The recipe's folder, or the one in the package for it."""
    if not recipe.sentence:
        try:
            return Path(library(SENTENCE_PACKAGE.replace("-", "_"), SENTENCE_PACKAGE).get_model_path())
        except NotAvailableError:
            pass  # the recipe's own error names this package and the other way
    return path_of(recipe, "sentence")
