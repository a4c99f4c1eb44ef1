"""Features of pictures: of CLIP, DINO and Inception, with real classes at toy size."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    CLIPModel,
    CLIPTokenizer,
)

from minigpt5_core.errors import BadInputError
from tests.metrics.toys import CPU, SIDE, needs, picture
from trainer.metrics.encoders import Clip, Dino, PictureReader
from trainer.metrics.inception import Inception, resized
from trainer.metrics.weights import NotAvailableError


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


@pytest.mark.slow
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
