"""Image processors as model folders have them, without torchvision: what is kept gives what they give, to the bit."""

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from pave_lightning.errors import PaveError
from pave_lightning.tasks.image_processors import load_image_processor

SQUARE, EDGE = {"height": 16, "width": 16}, {"shortest_edge": 20}
# What stands in preprocessor_config.json, as several years of transformers wrote it.
SETTINGS = {
    "ViT": {"image_processor_type": "ViTImageProcessor", "size": SQUARE},
    "a form that needs torchvision": {"image_processor_type": "ViTImageProcessorFast", "size": SQUARE},
    "feature extractor": {"feature_extractor_type": "ViTFeatureExtractor", "size": 16, "image_std": [0.2, 0.5, 0.7]},
    "no type": {"size": SQUARE},
    "cropped": {"image_processor_type": "CLIPImageProcessor", "size": EDGE, "crop_size": SQUARE},
    "cropped by a share": {"image_processor_type": "ConvNextImageProcessorFast", "size": {"shortest_edge": 16}},
    "blue before green": {"image_processor_type": "MobileViTImageProcessor", "size": EDGE, "crop_size": SQUARE},
    "no bytes": {"image_processor_type": "EfficientNetImageProcessor", "size": SQUARE},
    "not rescaled": {"image_processor_type": "ViTImageProcessor", "size": SQUARE, "do_rescale": False},
    "grey": {"image_processor_type": "ViTImageProcessor", "size": SQUARE, "image_mean": [0.4], "image_std": [0.3]},
}


@pytest.fixture
def folder_of(tmp_path):
    """A model folder with these settings of an image processor."""

    def write(settings):
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


@pytest.mark.parametrize("kind", SETTINGS)
def test_kept_images_give_what_the_processor_gives(kind, folder_of):
    folder = folder_of(SETTINGS[kind])
    mine = load_image_processor(folder)
    drawn = np.random.default_rng(0)
    sizes = [(20, 33), (64, 8), (1, 1), (2, 300)]
    images = [Image.fromarray(drawn.integers(0, 256, (*size, 3)).astype(np.uint8)).convert(mine.mode) for size in sizes]
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = np.concatenate([theirs(image, return_tensors="np")["pixel_values"] for image in images])
    assert expected.shape == (4, 1 if kind == "grey" else 3, 16, 16)
    kept = mine.prepare(images)
    assert {len(one) for one in kept} == {expected[0].size * (4 if kind == "no bytes" else 1)}
    assert np.array_equal(mine.pixels(kept).numpy(), expected.astype(np.float32))


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is there")
def test_what_needs_torchvision_says_so(folder_of):
    folder = folder_of({"image_processor_type": "DINOv3ViTImageProcessorFast", "size": SQUARE})
    with pytest.raises(PaveError, match="could not be loaded without torchvision"):
        _ = load_image_processor(folder).form


@pytest.mark.parametrize("settings", [{"image_processor_type": "NoSuchProcessor"}, [1]])
def test_settings_that_are_no_processor_are_refused(settings, folder_of):
    with pytest.raises(PaveError, match="its image processor could not be loaded"):
        load_image_processor(folder_of(settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "ViTImageProcessor", "do_resize": False},
        {"image_processor_type": "CLIPImageProcessor", "size": EDGE, "do_center_crop": False},
    ],
)
def test_images_of_different_sizes_make_no_batch(settings, folder_of):
    with pytest.raises(PaveError, match="set 'do_resize' and 'size'"):
        _ = load_image_processor(folder_of(settings)).form


def test_a_folder_without_one_says_what_to_do(tmp_path):
    with pytest.raises(PaveError, match="there is no image processor"):
        load_image_processor(tmp_path)
