"""What calibration records of every family, against the full attention maps of transformers."""

from functools import cache

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.local_model import SHAPES, build_local_model
from benchmarks.local_models import FAMILIES, FamilyShape, build_family
from vllm_reroute.calibration import recording
from vllm_reroute.calibration.recording import Recorder

from .family_requests import REQUESTS, WITHOUT_VIDEO, prepared

DEPTH = 6
LLAVA = "llava-1.5"
ASKED = [
    (family, request)
    for family in (LLAVA, *FAMILIES)
    for request in (WITHOUT_VIDEO if family in (LLAVA, "llava-next") else REQUESTS)
    if request != "text"
]


class Checkpoints:
    """Folders, processors, recorders and plain models by family, made once."""

    def __init__(self, root):
        self.root = root
        self.folder = cache(self._folder)
        self.processor = cache(lambda family: AutoProcessor.from_pretrained(self.folder(family)))
        self.recorder = cache(lambda family: Recorder(str(self.folder(family)), "float32", "cpu"))
        self.plain = cache(self._plain)

    def _folder(self, family):
        if family == LLAVA:
            return build_local_model(self.root / family, SHAPES["tiny-grouped"])
        return build_family(self.root / family, family, FamilyShape(text_layers=DEPTH))

    def _plain(self, family):
        return AutoModelForImageTextToText.from_pretrained(
            self.folder(family), attn_implementation="eager", dtype=torch.float32
        ).eval()

    def inputs(self, family, request):
        return prepared(self.processor(family), family, REQUESTS[request])

    def visual(self, family, inputs):
        config = self.plain(family).config
        tokens = [config.image_token_id, getattr(config, "video_token_id", None)]
        return torch.isin(
            inputs["input_ids"][0], torch.tensor([t for t in tokens if t is not None])
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("recorded"))


@pytest.mark.parametrize("family,request_name", ASKED)
def test_rows_are_those_of_the_attention_maps(made, family, request_name):
    inputs = made.inputs(family, request_name)
    rows = made.recorder(family).record(inputs)
    with torch.inference_mode():
        maps = made.plain(family)(**inputs, output_attentions=True).attentions
    visual = made.visual(family, inputs)
    expect = torch.stack([layer[0, :, -1, visual].mean(dim=0) for layer in maps])
    assert rows.attention.shape == expect.shape
    torch.testing.assert_close(torch.from_numpy(rows.attention), expect, rtol=0, atol=5e-6)
    assert expect.std() > 1e-4


@pytest.mark.parametrize("family", [LLAVA, "qwen2.5-vl", "qwen3-vl"])
def test_contributions_are_what_the_stream_is_given(made, family):
    """One visual token's value through its weights and the output projection, over the stream's length."""
    inputs = made.inputs(family, "image")
    rows = made.recorder(family).record(inputs)
    plain = made.plain(family)
    layers = plain.model.language_model.layers
    streams, values = {}, {}

    def note_stream(index):
        return lambda _, args, kwargs: streams.update(
            {index: args[0] if args else kwargs["hidden_states"]}
        )

    def note_values(index):
        return lambda _, args, output: values.update({index: output})

    hooks = []
    for index, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(note_stream(index), with_kwargs=True))
        hooks.append(layer.self_attn.v_proj.register_forward_hook(note_values(index)))
    with torch.inference_mode():
        maps = plain(**inputs, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    visual = made.visual(family, inputs).nonzero().flatten()
    for index in (0, DEPTH - 1):
        attention = layers[index].self_attn
        by_head = values[index][0].view(len(maps[0][0, 0]), -1, attention.head_dim)
        by_head = by_head.repeat_interleave(attention.num_key_value_groups, dim=1)
        for place in (0, len(visual) - 1):
            token = visual[place]
            weights = maps[index][0, :, -1, token]
            added = attention.o_proj.weight @ (weights[:, None] * by_head[token]).flatten()
            expect = added.norm() / streams[index][0, -1].norm()
            assert rows.contribution[index, place] == pytest.approx(expect.item(), rel=1e-4)


def test_no_map_is_ever_made(made, monkeypatch):
    """Beside transformers' own kernels: one row, and one layer's values."""
    inputs = made.inputs("qwen2.5-vl", "two images")
    tokens = inputs["input_ids"].shape[1]
    seen = []
    last_row = recording.last_row

    def measured(*args):
        weights, values = last_row(*args)
        seen.append((weights.numel(), values.untyped_storage().nbytes()))
        return weights, values

    monkeypatch.setattr(recording, "last_row", measured)
    made.recorder("qwen2.5-vl").record(inputs)
    heads, dim = 4, 32
    assert seen == [(heads * tokens, 4 * heads * tokens * dim)] * DEPTH


def test_a_layer_that_does_not_see_the_whole_prompt_is_refused(made, tmp_path):
    folder = build_family(tmp_path / "windowed", "llava-next", FamilyShape(text_layers=DEPTH))
    config = made.plain("llava-next").config.__class__.from_pretrained(folder)
    config.text_config.sliding_window = 16
    config.save_pretrained(folder)
    with pytest.raises(ValueError, match="sliding window"):
        Recorder(str(folder), "float32", "cpu").record(made.inputs("llava-next", "image"))


def test_a_recorder_leaves_nothing_behind(made):
    recorder = made.recorder(LLAVA)
    first = recorder.record(made.inputs(LLAVA, "image"))
    recorder.record(made.inputs(LLAVA, "two images"))
    again = recorder.record(made.inputs(LLAVA, "image"))
    assert (first.attention == again.attention).all()
    assert all(not layer._forward_pre_hooks for layer in recorder.model.model.language_model.layers)
