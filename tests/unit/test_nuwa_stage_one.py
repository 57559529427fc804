"""Nüwa's first stage against loops over patches, and what must hold for any image."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_reroute.nuwa.aggregation import LLAVA, QWEN2_5_VL, Aggregation, collect, is_pillar
from vllm_reroute.nuwa.anchors import select_anchors
from vllm_reroute.nuwa.depth import scaled_layer
from vllm_reroute.nuwa.grid import Grid, proximity
from vllm_reroute.nuwa.salience import attention_received, class_token_row
from vllm_reroute.schedule.budget import num_kept

GRIDS = [(24, 24), (8, 8), (1, 1), (1, 7), (5, 2), (7, 9), (6, 11)]
RATIOS = [336.5 / 576, 224.5 / 576, 112.5 / 576, 1.0, 0.01]


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def anchors_by_hand(salience, grid, num_anchors):
    """Region by region, then the best of all that regions offer; ties to the lower cell."""
    num_offered = math.ceil(4 * num_anchors / grid.num_cells)
    offered = []
    for top in range(0, grid.height, 2):
        for left in range(0, grid.width, 2):
            region = [
                y * grid.width + x
                for y in range(top, min(top + 2, grid.height))
                for x in range(left, min(left + 2, grid.width))
            ]
            region.sort(key=lambda cell: (-float(salience[cell]), cell))
            offered += region[:num_offered]
    offered.sort(key=lambda cell: (-float(salience[cell]), cell))
    return sorted(offered[:num_anchors])


def collected_by_hand(states, features, salience, anchors, grid, recipe):
    """The formula, one pair of patches at a time; the quantile interpolated as text books do."""
    ranked = sorted(float(salience[anchor]) for anchor in anchors)
    place = recipe.pillar_quantile * (len(ranked) - 1)
    below, share = int(place), place - int(place)
    above = min(below + 1, len(ranked) - 1)
    threshold = ranked[below] + share * (ranked[above] - ranked[below])
    height, width = (side + side % 2 for side in (grid.height, grid.width))
    reach = recipe.reach * math.hypot(height - 1, width - 1) or 1.0
    expect = states.clone()
    for i in anchors:
        if float(salience[i]) >= threshold - 1e-9:
            continue
        weights = torch.zeros(grid.num_cells)
        for j in range(grid.num_cells):
            down, across = i // grid.width - j // grid.width, i % grid.width - j % grid.width
            near = 1 - min(1.0, math.hypot(down, across) / reach)
            alike = torch.cosine_similarity(features[i], features[j], dim=0)
            weights[j] = max(0.0, float(alike)) * near
        weights = weights / (weights.sum() + 1e-8)
        if not recipe.convex:
            weights[i] = 1.0
        expect[i] = (weights.unsqueeze(1) * states).sum(dim=0)
    return expect


@pytest.mark.parametrize("shape", GRIDS, ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("ties", [False, True])
def test_anchors(shape, ratio, ties):
    grid = Grid(*shape)
    num_anchors = num_kept(grid.num_cells, ratio)
    salience = random(grid.num_cells, seed=sum(shape))
    salience = (salience * 3).floor() if ties else salience
    anchors = select_anchors(salience, grid, num_anchors).tolist()
    assert anchors == anchors_by_hand(salience, grid, num_anchors)
    assert len(set(anchors)) == num_anchors
    assert all(0 <= anchor < grid.num_cells for anchor in anchors), "never a cell of the padding"


def test_a_dark_image_still_has_its_anchors():
    """Salience of zero everywhere: the padding must not win the ties."""
    for height in range(1, 8):
        for width in range(1, 8):
            grid = Grid(height, width)
            for num_anchors in range(1, grid.num_cells + 1):
                anchors = select_anchors(torch.zeros(grid.num_cells), grid, num_anchors)
                assert len(anchors) == num_anchors and int(anchors.max()) < grid.num_cells


@pytest.mark.parametrize("num_anchors,offered", [(112, 1), (224, 2), (336, 3)])
def test_published_tiers_offer_as_many_per_region_as_published(num_anchors, offered):
    grid = Grid(24, 24)
    salience = random(grid.num_cells)
    chosen = torch.zeros(24, 24, dtype=torch.bool)
    chosen.view(-1)[select_anchors(salience, grid, num_anchors)] = True
    assert int(chosen.unfold(0, 2, 2).unfold(1, 2, 2).sum(dim=(2, 3)).max()) == offered


@pytest.mark.parametrize("shape", [(6, 6), (5, 7), (1, 1), (2, 9)], ids=str)
@pytest.mark.parametrize("recipe", [LLAVA, QWEN2_5_VL], ids=["llava", "qwen"])
def test_collecting(shape, recipe):
    grid = Grid(*shape)
    cells = grid.num_cells
    states, features = normal(cells, 12, seed=1), normal(cells, 5, seed=2)
    salience = random(cells, seed=3)
    anchors = select_anchors(salience, grid, num_kept(cells, 0.5))
    found = collect(states, features, salience, anchors, grid, recipe)
    expect = collected_by_hand(states, features, salience, anchors.tolist(), grid, recipe)
    torch.testing.assert_close(found, expect, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", [LLAVA, QWEN2_5_VL], ids=["llava", "qwen"])
def test_pillars_and_rejected_patches_stay_exactly(recipe):
    grid = Grid(8, 8)
    states, features, salience = normal(64, 12), normal(64, 5), random(64)
    anchors = select_anchors(salience, grid, 40)
    found = collect(states, features, salience, anchors, grid, recipe)
    pillars = anchors[is_pillar(salience[anchors], recipe.pillar_quantile)]
    unchanged = (found == states).all(dim=1).nonzero().flatten().tolist()
    rejected = set(range(64)) - set(anchors.tolist())
    assert unchanged == sorted(rejected | set(pillars.tolist()))
    assert 0 < len(pillars) < len(anchors)


def test_a_convex_collector_is_a_mean():
    """Surroundings that are all the same leave it the same; added instead, they would not."""
    grid, same = Grid(6, 6), torch.full((36, 4), 2.0)
    features, salience = random(36, 5), random(36)
    anchors = select_anchors(salience, grid, 18)
    mean = collect(same, features, salience, anchors, grid, QWEN2_5_VL)
    torch.testing.assert_close(mean, same)
    added = collect(same, features, salience, anchors, grid, LLAVA)
    assert float(added.max()) > 2.1


def test_many_patches_are_collected_in_chunks(monkeypatch):
    grid = Grid(8, 8)
    inputs = normal(64, 12), normal(64, 5), random(64)
    anchors = select_anchors(inputs[2], grid, 40)
    at_once = collect(*inputs, anchors, grid, LLAVA)
    monkeypatch.setattr("vllm_reroute.nuwa.aggregation._MAX_WEIGHTS", 3 * 64)
    torch.testing.assert_close(collect(*inputs, anchors, grid, LLAVA), at_once)


@pytest.mark.parametrize("recipe", [LLAVA, QWEN2_5_VL], ids=["llava", "qwen"])
def test_states_keep_their_type(recipe):
    grid, salience = Grid(4, 4), random(16)
    states, features = normal(16, 6).bfloat16(), normal(16, 5).bfloat16()
    anchors = select_anchors(salience, grid, 8)
    found = collect(states, features, salience, anchors, grid, recipe)
    exact = collect(states.float(), features.float(), salience, anchors, grid, recipe)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("recipe", [LLAVA, QWEN2_5_VL], ids=["llava", "qwen"])
def test_nothing_is_read_back_from_the_device(recipe):
    """On tensors without values, reading one back is an error."""
    grid = Grid(5, 7)
    with FakeTensorMode():
        salience = attention_received(torch.rand(35, 2, 4), torch.rand(35, 2, 4), 0.5)
        anchors = select_anchors(salience, grid, 12)
        states = collect(torch.rand(35, 6), torch.rand(35, 3), salience, anchors, grid, recipe)
    assert (anchors.shape, states.shape) == ((12,), (35, 6))


def test_reach_of_llava_is_the_published_one():
    assert LLAVA.reach * Grid(24, 24).diagonal == pytest.approx(math.sqrt(280), rel=1e-12)
    assert isinstance(QWEN2_5_VL, Aggregation) and QWEN2_5_VL.reach == 0.8


def test_proximity():
    grid = Grid(3, 4)
    near = proximity(torch.tensor([0, 6]), grid, reach=2.5)
    assert near.shape == (2, 12)
    for row, cell in zip(near, (0, 6), strict=True):
        for other in range(12):
            distance = math.hypot(cell // 4 - other // 4, cell % 4 - other % 4)
            assert float(row[other]) == pytest.approx(1 - min(1, distance / 2.5), abs=1e-6)


def test_padding_to_even_sides():
    assert [Grid(*shape).padded for shape in ((1, 1), (2, 3), (4, 6))] == [
        Grid(2, 2),
        Grid(2, 4),
        Grid(4, 6),
    ]


def test_class_token_row_is_a_row_of_attention():
    query, keys = normal(2, 3, 8, seed=1), normal(2, 11, 3, 8, seed=2)
    found = class_token_row(query, keys, 8**-0.5)
    for image in range(2):
        expect = torch.zeros(10)
        for head in range(3):
            row = torch.softmax(keys[image, :, head] @ query[image, head] * 8**-0.5, dim=0)
            expect += row[1:]
        torch.testing.assert_close(found[image], expect)


@pytest.mark.parametrize("block", [2**24, 1])
def test_attention_received_is_the_column_sum_of_the_map(monkeypatch, block):
    monkeypatch.setattr("vllm_reroute.nuwa.salience._MAX_LOGITS", block)
    queries, keys = normal(13, 3, 8, seed=1), normal(13, 3, 8, seed=2)
    attention = torch.einsum("qhd,khd->hqk", queries, keys).mul(8**-0.5).softmax(dim=-1)
    found = attention_received(queries, keys, 8**-0.5)
    torch.testing.assert_close(found, attention.sum(dim=(0, 1)))


@pytest.mark.parametrize(
    "layer,depth,published,expect",
    [(16, 24, 24, 16), (16, 12, 24, 8), (16, 3, 24, 2), (7, 32, 32, 7), (23, 4, 32, 3)],
)
def test_layers_scale_with_the_tower(layer, depth, published, expect):
    assert scaled_layer(layer, depth, published) == expect
