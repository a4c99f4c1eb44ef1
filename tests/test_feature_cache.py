"""The feature cache: it has what training would compute, never anything else, and whatever is missing is made again."""

import multiprocessing
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from minigpt5_core.diffusion import load_diffusion
from minigpt5_core.errors import BadInputError
from minigpt5_core.vision import (
    ImageAdapterHeader,
    ImageEncoder,
    ImageEncoderConfig,
    picture_tensor,
    save_image_adapter,
)
from trainer.cli import LAYOUTS, main
from trainer.common.images import to_tensor
from trainer.common.progress import Terminated, TrainingError
from trainer.data.formats import read
from trainer.data.records import BrokenPicture, Picture
from trainer.data.source import PictureTarget
from trainer.diffusion.unet import Sd
from trainer.feature_cache.build import Filling, fill, load_seeing, summary
from trainer.feature_cache.cache import CachedFeatures, FeatureCache, picture_hash
from trainer.storybook.models.autoencoder import AutoencoderRecipe, build_autoencoder
from trainer.storybook.models.diffusion_model import (
    DiffusionRecipe,
    build_text_encoder,
    build_unet,
    encode_texts,
)
from trainer.storybook.world.export import export_stories
from trainer.training.picture_losses import picture_latents

STORYBOOK = Path(__file__).parents[1] / "storybook" / "diffusers"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """A text-to-image model of the storybook's classes, untrained, with its tokenizer: made in a second."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(STORYBOOK / "tokenizer")
    recipe = DiffusionRecipe(block_out_channels=(32, 32), text_layers=1)
    vae = build_autoencoder(AutoencoderRecipe(width=8))
    vae.register_to_config(scaling_factor=1.5)
    pipeline = StableDiffusionPipeline.from_pretrained(
        STORYBOOK, vae=vae, tokenizer=tokenizer, text_encoder=build_text_encoder(recipe, tokenizer),
        unet=build_unet(recipe, vae.config.latent_channels), local_files_only=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("diffusion")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(diffusion):
    return load_diffusion(diffusion)


@pytest.fixture(scope="module")
def sight(tmp_path_factory):
    torch.manual_seed(0)
    config = ImageEncoderConfig(llm_width=32, tokens=3, channels=[4, 4, 4, 4], hidden=12, heads=2, layers=1)
    path = tmp_path_factory.mktemp("sight") / "adapter.safetensors"
    save_image_adapter(path, ImageEncoder(config), ImageAdapterHeader("tiny", 32, "any"))
    return path


@pytest.fixture
def llm(tiny_llm_folder, sight):
    return load_seeing(tiny_llm_folder, sight)


@pytest.fixture
def data(tmp_path):
    return export_stories("jsonl", 1, 3, tmp_path / "data")


def filled(data, out, pipeline, llm, layout="jsonl", **most):
    out.mkdir(exist_ok=True)
    return fill(data, layout, out, Sd(pipeline), llm, **most)


def pictured(data, layout="jsonl"):
    """Its pictures with their captions."""
    rows = list(read(data, layout))
    return [(s.picture, s.caption or s.text) for row in rows for s in row.scenes if s.picture]


def assert_right(features, data, pipeline, llm, layout="jsonl"):
    """Whatever the cache answers is what training computes, bit by bit; and it has an answer to everything."""
    for picture, caption in pictured(data, layout):
        image = picture.open()
        shows = [PictureTarget(caption, lambda _, image=image: image)]
        assert torch.equal(features.latents(picture), picture_latents(Sd(pipeline), shows)[0])
        assert torch.equal(features.target(caption).tokens, encode_texts(pipeline, [caption])[0])
        llm.seen.clear()
        assert torch.equal(features.image_tokens(picture), llm.see(picture_tensor(image)))
    assert torch.equal(features.target("").tokens, encode_texts(pipeline, [""])[0])
    assert features.missed == 0


def test_the_cache_has_what_training_computes(data, tmp_path, pipeline, llm):
    built = filled(data, tmp_path / "cache", pipeline, llm)
    pictures = pictured(data)
    captions = {caption for _, caption in pictures}
    assert (built.pictures, built.captions, built.there) == (len(pictures), len(pictures), 0)
    assert built.computed == 2 * len(pictures) + len(captions) + 1  # and the empty caption
    features = CachedFeatures(tmp_path / "cache", Sd(pipeline), llm)
    assert_right(features, data, pipeline, llm)
    # as training computes them, a batch at a time: other sizes, other order of summation
    shows = [
        PictureTarget(caption, lambda _, picture=picture: picture.open()) for picture, caption in pictures
    ]
    latents = torch.stack([features.latents(picture) for picture, _ in pictures])
    assert torch.allclose(latents, picture_latents(Sd(pipeline), shows), atol=1e-5)
    targets = torch.stack([features.target(caption).tokens for _, caption in pictures])
    batch = Sd(pipeline).encode([caption for _, caption in pictures]).tokens
    assert torch.allclose(targets, batch, atol=1e-5) and targets.dtype == torch.float32


def test_of_an_autoencoder_kl_the_cache_has_the_mode(data, tmp_path, pipeline, llm):
    torch.manual_seed(0)
    pipeline.vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, scaling_factor=0.5, shift_factor=0.1,
    ).eval()  # fmt: skip
    filled(data, tmp_path / "cache", pipeline, llm)
    features = CachedFeatures(tmp_path / "cache", Sd(pipeline), llm)
    assert_right(features, data, pipeline, llm)
    picture, _ = pictured(data)[0]
    posterior = pipeline.vae.encode(to_tensor([picture.open()])).latent_dist
    assert torch.allclose(features.latents(picture), (posterior.mean[0] - 0.1) * 0.5, atol=1e-6)


def test_a_second_run_computes_and_decodes_nothing(data, tmp_path, pipeline, llm, monkeypatch):
    first = filled(data, tmp_path / "cache", pipeline, llm)
    files = sorted((tmp_path / "cache").iterdir())
    monkeypatch.setattr(Image, "open", lambda *given: pytest.fail("a picture was opened"))
    diffusion = Sd(pipeline)
    for place, name in (
        (pipeline.vae, "encode"),
        (llm.image_encoder, "forward"),
        (diffusion, "encode_prompt"),
    ):
        setattr(place, name, lambda *given, name=name: pytest.fail(f"{name} was called"))
    second = fill(data, "jsonl", tmp_path / "cache", diffusion, llm)
    assert (second.computed, second.there, second.written) == (0, first.computed, 0)
    assert sorted((tmp_path / "cache").iterdir()) == files


def test_equal_pictures_are_computed_once(tmp_path, pipeline):
    (tmp_path / "data").mkdir()
    for name in "abc":
        Image.new("RGB", (8, 8), "red" if name < "c" else "blue").save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text("a fox")
    built = filled(tmp_path / "data", tmp_path / "cache", pipeline, None, "folder")
    assert (built.pictures, built.captions, built.computed) == (3, 3, 2 + 2)


def test_a_changed_picture_is_computed_anew(data, tmp_path, pipeline, llm):
    filled(data, tmp_path / "cache", pipeline, llm)
    features = CachedFeatures(tmp_path / "cache", Sd(pipeline), llm)
    picture, _ = pictured(data)[0]
    before = features.latents(picture)
    Image.effect_noise((200, 150), 90).save(picture.path)  # of which only the middle square is learnt
    assert features.latents(picture) is None and features.image_tokens(picture) is None
    assert filled(data, tmp_path / "cache", pipeline, llm).computed == 2
    after = CachedFeatures(tmp_path / "cache", Sd(pipeline), llm)
    assert_right(after, data, pipeline, llm)
    assert not torch.equal(before, after.latents(picture))


def test_a_files_bytes_are_read_again_only_when_it_changed(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    first = picture_hash(Picture("a", path))
    assert first == picture_hash(Picture("b", content=b"one"))
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.file_digest", lambda *given: pytest.fail("the file was read"))
        assert picture_hash(Picture("a", path)) == first
    path.write_bytes(b"two")  # of the same size
    os.utime(path, ns=(1, 1))
    assert picture_hash(Picture("a", path)) == picture_hash(Picture("b", content=b"two"))
    path.unlink()
    with pytest.raises(BrokenPicture, match="a is missing"):
        picture_hash(Picture("a", path))


def change_weight(model):
    """In the middle, where a hash of first and last rows would not look."""
    weight = max(model.parameters(), key=torch.numel)
    with torch.no_grad():
        weight.view(-1)[weight.numel() // 2] += 1.0


CHANGES = {
    "latents": [
        lambda pipeline, llm: change_weight(pipeline.vae),
        lambda pipeline, llm: pipeline.vae.register_to_config(scaling_factor=2.0),
        lambda pipeline, llm: pipeline.unet.register_to_config(sample_size=8),
    ],
    "target": [
        lambda pipeline, llm: change_weight(pipeline.text_encoder),
        lambda pipeline, llm: pipeline.tokenizer.add_tokens(["the"]),
    ],
    "tokens": [lambda pipeline, llm: change_weight(llm.image_encoder)],
}


@pytest.mark.parametrize(
    ("what", "change"), [(what, change) for what, changes in CHANGES.items() for change in changes]
)
def test_another_model_finds_nothing_of_the_first_ones(tmp_path, pipeline, llm, what, change):
    (tmp_path / "data").mkdir()
    Image.effect_noise((8, 8), 90).save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "a.txt").write_text("over the hills")
    filled(tmp_path / "data", tmp_path / "cache", pipeline, llm, "folder")
    change(pipeline, llm)
    ((picture, caption),) = pictured(tmp_path / "data", "folder")
    features = CachedFeatures(tmp_path / "cache", Sd(pipeline), llm)
    found = {
        "latents": features.latents(picture),
        "target": features.target(caption),
        "tokens": features.image_tokens(picture),
    }
    assert [name for name, value in found.items() if value is None] == [what]
    assert (features.found, features.missed) == (2, 1)


def test_a_cache_says_when_it_has_nothing_of_what_was_asked(data, tmp_path, pipeline, llm):
    filled(data, tmp_path / "cache", pipeline, llm)
    features = CachedFeatures(tmp_path / "cache", Sd(pipeline), llm)
    features.target("never heard of")
    assert "nothing of what was asked for" in features.summary() and "--diffusion" in features.summary()
    features.target("")
    assert features.summary() == "cache: 1 values found, 1 computed"


def test_an_llm_that_does_not_see_has_no_tokens(data, tmp_path, pipeline, llm):
    filled(data, tmp_path / "cache", pipeline, llm)
    picture, _ = pictured(data)[0]
    blind = CachedFeatures(tmp_path / "cache", Sd(pipeline))
    assert blind.image_tokens(picture) is None and blind.latents(picture) is not None


def fill_in_a_process(barrier, *given):
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    barrier.wait()
    filled(*given, most_values=3)


def test_two_processes_fill_a_cache_at_once(data, tmp_path, pipeline, llm):
    (tmp_path / "cache").mkdir()
    forked = multiprocessing.get_context("fork")
    given = forked.Barrier(2), data, tmp_path / "cache", pipeline, llm
    with warnings.catch_warnings(action="ignore"):
        processes = [forked.Process(target=fill_in_a_process, args=given) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert filled(data, tmp_path / "cache", pipeline, llm).computed == 0
    assert_right(CachedFeatures(tmp_path / "cache", Sd(pipeline), llm), data, pipeline, llm)
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError("No space left"), TrainingError), (MemoryError(), MemoryError)]
)
def test_an_ended_run_loses_one_shard_and_the_next_goes_on(data, tmp_path, pipeline, llm, error, raised):
    (tmp_path / "cache").mkdir()
    filling, written = Filling(tmp_path / "cache", Sd(pipeline), llm, most_values=4), []
    plain = filling.cache.add

    def add_once(values):
        if written:
            raise error
        written.append(plain(values))
        return written[0]

    filling.cache.add = add_once
    with pytest.raises(raised):
        filling.add_all(read(data, "jsonl"))
    assert list((tmp_path / "cache").iterdir()) == written
    built = filled(data, tmp_path / "cache", pipeline, llm, most_values=4)
    assert built.there == 4 and built.written > 1
    assert_right(CachedFeatures(tmp_path / "cache", Sd(pipeline), llm), data, pipeline, llm)


def test_sigterm_writes_what_is_computed(tmp_path, pipeline):
    data = export_stories("cc3m", 1, 3, tmp_path / "data")
    (tmp_path / "cache").mkdir()
    diffusion = Sd(pipeline)
    plain = diffusion.latents

    def latents(pictures):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(pictures)

    diffusion.latents = latents
    with pytest.raises(Terminated):
        fill(data, "cc3m", tmp_path / "cache", diffusion, None)
    assert (
        filled(data, tmp_path / "cache", pipeline, None, "cc3m").there == 3
    )  # latents, caption and the empty one


def test_a_broken_and_a_foreign_shard_are_named_and_computed_anew(data, tmp_path, pipeline, llm):
    filled(data, tmp_path / "cache", pipeline, llm, most_values=4)
    shards = sorted((tmp_path / "cache").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-10])
    save_file({"a": torch.zeros(1)}, tmp_path / "cache" / "foreign.safetensors")
    (tmp_path / "cache" / "text.safetensors").write_text("no shard")
    (tmp_path / "cache" / ".left.safetensors.1.tmp").write_text("of a killed run")
    features = CachedFeatures(tmp_path / "cache", Sd(pipeline), llm)
    ignored = {path.name for path in features.cache.ignored}
    assert ignored == {shards[0].name, "foreign.safetensors", "text.safetensors"}
    assert features.latents(pictured(data)[0][0]) is None
    built = filled(data, tmp_path / "cache", pipeline, llm)
    assert built.computed == 4
    told = summary(built, data, tmp_path / "cache")
    assert f"ignored  {shards[0].name}: no whole safetensors file" in told
    assert "ignored  foreign.safetensors: no shard of a feature cache" in told
    assert_right(CachedFeatures(tmp_path / "cache", Sd(pipeline), llm), data, pipeline, llm)


def test_shards_are_opened_when_asked_and_one_that_is_gone_is_missed(data, tmp_path, pipeline, llm):
    filled(data, tmp_path / "cache", pipeline, llm, most_values=4)
    cache = FeatureCache(tmp_path / "cache")
    assert len(cache.shards) > 1 and not cache._opened
    key = next(iter(cache._places))
    assert cache.get(key) is not None and len(cache._opened) == 1
    shard = next(path for path in cache.shards if path not in cache._opened)
    lost = next(key for key, place in cache._places.items() if place == shard)
    shard.unlink()
    assert cache.get(lost) is None and lost not in cache and shard in cache.ignored
    assert cache.get(key) is not None and cache.get("unknown") is None


def test_a_shard_holds_no_more_than_it_should(data, tmp_path, pipeline):
    filled(data, tmp_path / "cache", pipeline, None, most_bytes=60_000)
    sizes = [path.stat().st_size for path in (tmp_path / "cache").iterdir()]
    assert len(sizes) > 1 and max(sizes) < 60_000 + 77 * 128 * 4 + 4096


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "captions"])
def test_the_command_caches_every_layout(
    layout, tmp_path, pipeline, llm, diffusion, sight, tiny_llm_folder, capsys
):
    data = export_stories(layout, 1, 3, tmp_path / "data")
    parts = ["--diffusion", diffusion, "--llm", tiny_llm_folder, "--image-adapter", sight]
    command = ["data", "cache", data, "--format", layout, "--out", tmp_path / "cache", *parts]
    assert main([str(part) for part in command]) == 0
    told = capsys.readouterr().out
    count = len(pictured(data, layout))
    assert f"{count} pictures and {count} captions usable, 0 broken" in told
    assert "0 already there; 1 shards written" in told
    assert_right(CachedFeatures(tmp_path / "cache", Sd(pipeline), llm), data, pipeline, llm, layout)


def test_what_is_broken_is_named_and_the_rest_cached(tmp_path, diffusion, pipeline, capsys):
    data = export_stories("jsonl", 1, 3, tmp_path / "data")
    first, second = (picture for picture, _ in pictured(data)[:2])
    first.path.write_bytes(first.path.read_bytes()[:-200])
    data.write_text(data.read_text() + "{\n")
    command = ["data", "cache", str(data), "--format", "jsonl", "--out", str(tmp_path / "cache")]
    assert main([*command, "--diffusion", str(diffusion)]) == 0
    told = capsys.readouterr().out
    assert "2 broken" in told and "broken  stories.jsonl:2: not valid JSON" in told
    assert f"broken  stories.jsonl:1: {first.name} cannot be decoded" in told
    features = CachedFeatures(tmp_path / "cache", Sd(pipeline))
    assert features.latents(first) is None and features.latents(second) is not None
    first.path.unlink()
    assert features.latents(first) is None


def test_the_command_says_by_its_exit_code_what_went_wrong(data, tmp_path, diffusion, capsys):
    def run(path, out="cache", layout="jsonl", **options):
        named = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return main(["data", "cache", str(path), "--format", layout, "--out", str(tmp_path / out), *named])

    (tmp_path / "empty.jsonl").write_text("{}\n")
    assert run(tmp_path / "empty.jsonl", diffusion=diffusion) == 1
    told = capsys.readouterr().out
    assert "Nothing here can be trained on" in told and "0 shards, 0.0 MB" in told
    (tmp_path / "file").touch()
    for options, message in (
        ({"path": tmp_path / "gone"}, "There is nothing at"),
        ({"layout": "coco"}, "Known: folder, jsonl"),
        ({"diffusion": tmp_path}, "is no diffusers model folder"),
        ({"out": "file"}, "Name another for --out"),
    ):
        assert run(**{"path": data, "diffusion": diffusion} | options) == 2
        assert message in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_no_cache(tmp_path):
    with pytest.raises(BadInputError, match="Make one: python -m trainer data cache"):
        FeatureCache(tmp_path / "none")
