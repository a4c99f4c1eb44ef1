"""Stories in columns, scene after scene, and their features, each computed once and only when a metric asks."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
from PIL import Image

from .encoders import Clip, Dino
from .inception import Classified, Classifier, Inception, load_inception, resized
from .recipe import ScoresRecipe
from .stories import ToldStory, concatenated
from .text import SentenceBert, sentence_folder
from .weights import path_of

Item = TypeVar("Item")


class Encoded:
    """N scenes of S stories. Features are (N, D), with NaN rows where there is no picture or text.

    groups (N,): the number of each scene's story. `clean` is applied to all texts, to the true ones too.
    """

    def __init__(
        self, stories: Sequence[ToldStory], recipe: ScoresRecipe, clean: Callable[[str], str]
    ) -> None:
        true, predicted = (concatenated(stories, side) for side in ("true", "predicted"))
        self.recipe = recipe
        self.names = [story.id for story in stories]
        self.groups = np.repeat(np.arange(len(stories)), [len(story.true) for story in stories])
        self.true_texts = [clean(scene.text) for scene in true]
        self.told_texts = [clean(scene.text) for scene in predicted]
        self.true_pictures = [scene.picture for scene in true]
        self.drawn_pictures = [scene.picture for scene in predicted]
        self.has_text = np.array([bool(text) for text in self.true_texts])
        self.told = np.array([bool(text) for text in self.told_texts])
        self.wanted = np.array([picture is not None for picture in self.true_pictures])
        self.asked = self.wanted | np.array([scene.described for scene in true])  # or described
        self.drawn = np.array([picture is not None for picture in self.drawn_pictures])

    @cached_property
    def clip(self) -> Clip:
        return Clip(path_of(self.recipe, "clip"), self.recipe.torch_device, self.recipe.batch)

    @cached_property
    def inception(self) -> Inception | Classifier:
        return load_inception(path_of(self.recipe, "inception"), self.recipe.torch_device, self.recipe.batch)

    @cached_property
    def clip_pictures(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the true and of the drawn pictures."""
        return _rows(self.clip.pictures, self.true_pictures), _rows(self.clip.pictures, self.drawn_pictures)

    @cached_property
    def clip_texts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the true and of the told texts."""
        return _rows(self.clip.texts, self.true_texts), _rows(self.clip.texts, self.told_texts)

    @cached_property
    def dino_pictures(self) -> tuple[np.ndarray, np.ndarray]:
        dino = Dino(path_of(self.recipe, "dino"), self.recipe.torch_device, self.recipe.batch)
        return _rows(dino.pictures, self.true_pictures), _rows(dino.pictures, self.drawn_pictures)

    @cached_property
    def sentences(self) -> tuple[np.ndarray, np.ndarray]:
        bert = SentenceBert(sentence_folder(self.recipe), self.recipe.torch_device, self.recipe.batch)
        return _rows(bert.texts, self.true_texts), _rows(bert.texts, self.told_texts)

    @cached_property
    def classified(self) -> tuple[Classified, Classified]:
        """Features and logits of the true and of the drawn pictures, without rows for missing ones."""
        return self._classify(self.true_pictures), self._classify(self.drawn_pictures)

    @cached_property
    def classified_small(self) -> tuple[Classified, Classified]:
        """The same of pictures resized to 256 pixels first."""
        small = [
            [None if picture is None else resized(picture, 256) for picture in pictures]
            for pictures in (self.true_pictures, self.drawn_pictures)
        ]
        return self._classify(small[0]), self._classify(small[1])

    def _classify(self, pictures: Sequence[Image.Image | None]) -> Classified:
        there = [picture for picture in pictures if picture is not None]
        empty = np.empty((0, 1))
        return self.inception.read(there) if there else Classified(empty, empty)


def _rows(encode: Callable[[list[Item]], np.ndarray], items: Sequence[Item | None]) -> np.ndarray:
    """`encode` of the items that are there, each in its row."""
    there = [number for number, item in enumerate(items) if item is not None and item != ""]
    features = encode([item for item in items if item is not None and item != ""]) if there else None
    rows = np.full((len(items), 1 if features is None else features.shape[1]), np.nan)
    if features is not None:
        rows[there] = features
    return rows
