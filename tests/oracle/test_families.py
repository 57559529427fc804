"""The oracle on every family: against transformers' `generate`, against transformers with masks,
and by what each family's visual tokens are."""

from functools import cache, partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.local_models import FAMILIES, FamilyShape, build_family

from . import RoutedOracle
from .families import family_of
from .family_requests import REQUESTS, WITHOUT_VIDEO, prepared
from .masked_reference import masked_forward

NEW = 5
DEPTH = 6
SHAPE = FamilyShape(text_layers=DEPTH)
QWEN = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
# The ratio rises: removed tokens stay away, deferred ones return.
RISING = {"layers": (2, 3, 4), "keep": (0.3, 0.6, 0.2)}
close = partial(torch.testing.assert_close, rtol=0, atol=5e-5)

ASKED = [
    (family, request)
    for family in FAMILIES
    for request in (WITHOUT_VIDEO if family == "llava-next" else REQUESTS)
]


class Checkpoints:
    """Checkpoints, models and requests by family, made once."""

    def __init__(self, root):
        self.folder = cache(lambda family: build_family(root / family, family, SHAPE))
        self.processor = cache(lambda family: AutoProcessor.from_pretrained(self.folder(family)))
        self.plain = cache(self._plain)
        self.inputs = cache(
            lambda family, request: prepared(self.processor(family), family, REQUESTS[request])
        )

    def _plain(self, family):
        return AutoModelForImageTextToText.from_pretrained(
            self.folder(family), attn_implementation="eager", dtype=torch.float32
        ).eval()

    def oracle(self, family, action="reroute", layers=(), keep=()):
        return RoutedOracle(self.folder(family), action=action, layers=layers, keep=keep)

    def num_visual(self, family, request):
        config = self.plain(family).config
        ids = self.inputs(family, request)["input_ids"]
        videos = 0 if family == "llava-next" else int((ids == config.video_token_id).sum())
        return int((ids == config.image_token_id).sum()) + videos


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family,request_name", ASKED)
def test_dense_equals_generate(made, family, request_name):
    inputs = made.inputs(family, request_name)
    result = made.oracle(family).run(inputs, NEW)
    expect = made.plain(family).generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    num_prompt = inputs["input_ids"].shape[1]
    assert result.token_ids == expect.sequences[0, num_prompt:].tolist()
    close(result.logprobs, torch.cat(expect.logits).log_softmax(dim=-1))
    assert result.kv_lens == [num_prompt + NEW - 1] * DEPTH


@pytest.mark.parametrize(
    "family,request_name", [(f, r) for f, r in ASKED if r in ("two images", "image and video")]
)
@pytest.mark.parametrize("action", ["remove", "reroute"])
def test_routed_equals_masked_transformers(made, family, request_name, action):
    inputs = made.inputs(family, request_name)
    schedule = {"action": action, **RISING}
    result = made.oracle(family, **schedule).run(inputs, NEW)
    logprobs, selected = masked_forward(made.plain(family), inputs, result.token_ids, **schedule)
    assert result.selected == selected
    assert result.token_ids == logprobs.argmax(dim=-1).tolist()
    close(result.logprobs, logprobs)

    num_visual = made.num_visual(family, request_name)
    text = inputs["input_ids"].shape[1] - num_visual + NEW - 1
    kept = [int(num_visual * ratio) for ratio in RISING["keep"]]
    if action == "remove":
        kept[1] = kept[0]
        assert [len(scores) for scores in result.scores] == [num_visual, kept[0], kept[0]]
    else:
        assert [len(scores) for scores in result.scores] == [num_visual] * 3
    assert result.kv_lens == [text + k for k in (num_visual, num_visual, *kept, kept[-1])]


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_the_row_of_the_attention_map(made, family):
    inputs = made.inputs(family, "image")
    layer = 3
    result = made.oracle(family, "remove", (layer,), (0.3,)).run(inputs, 1)
    with torch.inference_mode():
        attentions = made.plain(family)(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"][0] == made.plain(family).config.image_token_id
    expect = attentions[layer][0, :, -1, visual].mean(dim=0)
    torch.testing.assert_close(result.scores[0], expect, rtol=0, atol=1e-6)
    assert expect.std() > 1e-3  # far from uniform, or agreement would say little
    order = torch.sort(expect, descending=True, stable=True).indices
    assert result.selected == [sorted(order[: int(0.3 * len(expect))].tolist())]


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl", "llava-onevision"])
def test_images_and_videos_are_ranked_jointly(made, family):
    inputs = made.inputs(family, "image and video")
    result = made.oracle(family, "reroute", (2,), (0.3,)).run(inputs, 1)
    num_visual = made.num_visual(family, "image and video")
    num_image = int((inputs["input_ids"] == made.plain(family).config.image_token_id).sum())
    (kept,) = result.selected
    from_image = sum(token < num_image for token in kept)
    assert len(kept) == int(0.3 * num_visual)
    assert from_image != int(0.3 * num_image)  # an equal share of each would be
    assert 0 < from_image < len(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blind_query_keeps_the_first_tokens(made, family):
    tied = made.oracle(family, "reroute", (2,), (0.2,))
    query = tied.model.model.language_model.layers[2].self_attn.q_proj
    for parameter in query.parameters():
        torch.nn.init.zeros_(parameter)
    result = tied.run(made.inputs(family, "two images"), 1)
    count = int(0.2 * made.num_visual(family, "two images"))
    assert result.selected == [list(range(count))]


@pytest.mark.parametrize("family", FAMILIES)
def test_newlines_are_visual_tokens(made, family):
    """As many visual tokens as rows the model embeds; LLaVA-NeXT and OneVision count their newlines."""
    model, inputs = made.plain(family), made.inputs(family, "image")
    prompt = family_of(model.config).prepare(model, inputs)
    assert int(prompt.visual.sum()) == made.num_visual(family, "image")
    newlines = 0
    if family not in QWEN:
        newline = model.model.image_newline
        newlines = int((prompt.embeddings[prompt.visual] == newline).all(dim=-1).sum())
    assert (newlines > 1) == (family not in QWEN)


def test_timestamps_are_text(made):
    """Qwen3-VL writes times between frames; every frame's tokens but not its time are visual."""
    inputs = made.inputs("qwen3-vl", "video")
    model = made.plain("qwen3-vl")
    prompt = family_of(model.config).prepare(model, inputs)
    runs = (prompt.visual[1:] & ~prompt.visual[:-1]).sum()
    frames, height, width = inputs["video_grid_thw"][0].tolist()
    assert runs == frames
    assert prompt.visual.sum() == frames * height * width // 4


@pytest.mark.parametrize("family", QWEN)
def test_kept_tokens_keep_three_position_components(made, family):
    """Positions reach the layers as they were counted for the whole prompt."""
    routed = made.oracle(family, "reroute", (2, 4), (0.3, 0.3))
    inputs = made.inputs(family, "image and video")
    prompt = family_of(routed.model.config).prepare(routed.model, inputs)
    rows = {}
    run_layer = routed._decoder.run_layer

    def spy(layer, hidden, positions, kv):
        rows.setdefault(layer, positions)
        return run_layer(layer, hidden, positions, kv)

    routed._decoder.run_layer = spy
    result = routed.run(inputs, 2)
    visual = prompt.visual.nonzero().flatten()
    dropped = torch.ones(len(visual), dtype=torch.bool)
    dropped[result.selected[0]] = False
    present = torch.ones(len(prompt.visual), dtype=torch.bool)
    present[visual[dropped]] = False
    assert torch.equal(rows[0], prompt.positions)
    assert torch.equal(rows[2], prompt.positions[:, present])
    time, height, width = prompt.positions[:, prompt.visual]
    assert not torch.equal(time, height) and not torch.equal(height, width)
    assert prompt.next_position < len(prompt.visual)


def test_a_decision_before_deepstack_ends_is_refused(made):
    with pytest.raises(ValueError, match="must not be below 2"):
        made.oracle("qwen3-vl", "reroute", (1, 3), (0.5, 0.5))
    assert made.oracle("qwen2.5-vl", "reroute", (1, 3), (0.5, 0.5)).depth == DEPTH


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl"])
def test_frames_later_than_the_grid_reaches_are_refused(made, family):
    still = np.zeros((20, 56, 56, 3), dtype=np.uint8)
    inputs = prepared(made.processor(family), family, REQUESTS["video"], videos=[still])
    with pytest.raises(ValueError, match="last frame is later"):
        made.oracle(family).run(inputs, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_follows_fp32(made, family):
    schedule = {"action": "reroute", **RISING}
    inputs = made.inputs(family, "image")
    exact = made.oracle(family, **schedule).run(inputs, NEW)
    rounded = RoutedOracle(made.folder(family), **schedule, dtype=torch.bfloat16).run(
        inputs, NEW, forced_token_ids=exact.token_ids
    )
    assert rounded.scores[0].dtype == torch.float32
    assert not torch.equal(rounded.scores[0], exact.scores[0])
    torch.testing.assert_close(rounded.scores[0], exact.scores[0], rtol=0, atol=4e-2)
