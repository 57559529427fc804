"""The downsampled checkpoint: same weights, fewer visual tokens."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.local_model import TINY, build_local_model
from benchmarks.quality.downsample import POSITIONS, downsample, resample_positions
from benchmarks.quality.model_shape import ModelShape

GRID = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_local_model(tmp_path_factory.mktemp("whole") / "tiny", TINY)


def test_the_own_grid_reproduces_the_checkpoint_bit_for_bit(model, tmp_path):
    made = downsample(model, GRID, tmp_path / "same")
    before, after = load_file(model / "model.safetensors"), load_file(made / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"):
        one, other = (folder.joinpath(name).read_text() for folder in (model, made))
        assert one == other or json.loads(one) == json.loads(other)


@pytest.mark.parametrize("grid", [3, 2, 1])
def test_a_smaller_grid_has_as_many_visual_tokens(model, tmp_path, grid):
    made = downsample(model, grid, tmp_path / "less")
    assert ModelShape.of(made).visual_tokens == grid * grid
    processor = AutoProcessor.from_pretrained(made)
    llava = LlavaForConditionalGeneration.from_pretrained(made).eval()
    image = Image.effect_noise((100, 80), 60).convert("RGB")
    inputs = processor(images=image, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == llava.config.image_token_id).sum() == grid * grid
    assert inputs["pixel_values"].shape[-2:] == (14 * grid, 14 * grid)
    with torch.no_grad():
        features = llava.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        assert [len(each) for each in features] == [grid * grid]
        assert llava(**inputs).logits.isfinite().all()


def test_only_positions_change(model, tmp_path):
    made = downsample(model, 2, tmp_path / "less")
    before, after = load_file(model / "model.safetensors"), load_file(made / "model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert [name.endswith(POSITIONS) for name in changed] == [True]
    assert torch.equal(before[changed[0]][0], after[changed[0]][0])  # of the class token


def test_positions_are_resampled_over_the_picture():
    """An embedding that is the row and the column of its patch stays that, on the smaller grid's scale."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    positions = torch.cat(
        [torch.tensor([[7.0, -7.0]]), torch.stack([rows, columns], -1).view(64, 2)]
    )
    smaller = resample_positions(positions, 4)
    assert smaller.shape == (17, 2)
    assert smaller[0].tolist() == [7.0, -7.0]
    inner = smaller[1:].view(4, 4, 2)[1:-1, 1:-1]
    middles = torch.tensor([2.5, 4.5])
    assert torch.allclose(inner[..., 0], middles[:, None].expand(2, 2), atol=0.1)
    assert torch.allclose(inner[..., 1], middles[None].expand(2, 2), atol=0.1)


def test_a_larger_grid_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"--grid 5 must be from 1 to 4"):
        downsample(model, 5, tmp_path / "more")


def test_it_is_made_once_and_again_for_another_model(model, tmp_path):
    made = downsample(model, 2, tmp_path / "less")
    weights = made / "model.safetensors"
    first = weights.stat().st_mtime_ns
    assert downsample(model, 2, tmp_path / "less") == made and weights.stat().st_mtime_ns == first
    changed = downsample(model, 3, tmp_path / "three")
    downsample(changed, 2, tmp_path / "less")
    assert weights.stat().st_mtime_ns > first
