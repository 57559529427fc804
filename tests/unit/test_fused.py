"""Norms and rotary embeddings outside compiled code: one kernel each, and what the model's own would say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_reroute.routing.fused import FusedNorm, FusedRotary

from .operations import Operations

SIZE = 64
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture(params=["all", "none"], ids=["kernels", "plain operations"])
def custom_ops(request):
    """What vLLM builds modules for: itself, or its compiler."""
    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=[request.param]))
    with set_current_vllm_config(config), torch.inference_mode():
        yield request.param


def norm_of(dtype: torch.dtype, seed: int = 0) -> RMSNorm:
    torch.manual_seed(seed)
    norm = RMSNorm(SIZE, dtype=dtype)
    norm.weight.data.normal_()
    return norm


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(7, SIZE), (5, 3, SIZE)])
def test_a_norm_is_one_kernel(custom_ops, dtype, shape):
    norm = norm_of(dtype)
    states = torch.randn(shape).to(dtype)
    before, expect = states.clone(), norm(states)
    with Operations() as kernels:
        found = FusedNorm(norm)(states)
    assert dict(kernels.seen) == {"_C.rms_norm.default": 1}
    torch.testing.assert_close(found, expect, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert states.equal(before)


@pytest.mark.parametrize("dtype", CLOSE)
def test_a_norm_of_a_sum_is_one_kernel(custom_ops, dtype):
    norm = norm_of(dtype)
    states, residual = torch.randn(2, 7, SIZE).to(dtype)
    expect = norm(states.clone(), residual.clone())[0]
    with Operations() as kernels:
        found = FusedNorm(norm).of_sum(states.clone(), residual.clone())
    kernels.seen.pop("aten.clone.default")
    assert dict(kernels.seen) == {"_C.fused_add_rms_norm.default": 1}
    torch.testing.assert_close(found, expect, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_rows_need_not_be_next_to_each_other(custom_ops):
    """Queries are a part of each row of the fused projection."""
    norm, wide = norm_of(torch.float32), torch.randn(2, 7, 3 * SIZE)
    for states in (wide[0, :, :SIZE], wide[0].view(7, 3, SIZE)[:, 1:]):
        torch.testing.assert_close(FusedNorm(norm)(states), norm(states))
    states, residual = wide[..., :SIZE]
    expect = norm(states.clone(), residual.clone())[0]
    torch.testing.assert_close(FusedNorm(norm).of_sum(states, residual), expect)


def test_weights_are_those_in_use(custom_ops):
    """They may be loaded anew, in another type, too."""
    norm, states = norm_of(torch.float32), torch.randn(7, SIZE)
    fused = FusedNorm(norm)
    fused(states)
    for dtype in (torch.float32, torch.bfloat16):
        norm.weight = nn.Parameter(torch.randn(SIZE).to(dtype))
        expect, of_sum = norm(states), norm(states.clone(), states.clone())[0]
        torch.testing.assert_close(fused(states), expect)
        torch.testing.assert_close(fused.of_sum(states.clone(), states.clone()), of_sum)


def test_other_norms_stay_what_they_are(custom_ops):
    class Doubled(RMSNorm):
        def forward(self, states, residual=None):  # type: ignore[override]
            return 2 * states if residual is None else (2 * (states + residual), residual)

    states = torch.ones(3, SIZE)
    fused = FusedNorm(Doubled(SIZE))
    assert fused(states).eq(2).all() and fused.of_sum(states, states).eq(4).all()
    of_half = RMSNorm(SIZE, var_hidden_size=SIZE // 2)
    states = torch.randn(3, SIZE)
    torch.testing.assert_close(FusedNorm(of_half)(states), of_half(states))


MROPE = {"mrope_section": [6, 5, 5]}
ROTARY = {
    "plain": {},
    "three sections": MROPE,
    "three, interleaved": {**MROPE, "mrope_interleaved": True},
}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kind", ROTARY)
def test_a_rotary_embedding_is_one_kernel(custom_ops, kind, dtype):
    # vLLM gives out the same one for the same arguments, whatever it was made for.
    most = {"all": 512, "none": 256}[custom_ops]
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **ROTARY[kind]}
    rotary = get_rope(32, max_position=most, rope_parameters=parameters, dtype=dtype)
    torch.manual_seed(0)
    positions = torch.arange(3, 10) if kind == "plain" else torch.randint(200, (3, 7))
    # As many heads as there are, next to each other or not.
    queries, keys = torch.randn(7, 192).to(dtype)[:, :128], torch.randn(7, 64).to(dtype)
    expect = rotary(positions, queries.clone(), keys.clone())
    fused = FusedRotary(rotary)
    angles = fused.angles(positions, keys)
    with Operations() as kernels:
        found = fused(angles, queries, keys.clone())
    kernels.seen.pop("aten.clone.default")
    assert dict(kernels.seen) == {"_C.rotary_embedding.default": 1}
    for one, other in zip(found, expect, strict=True):
        torch.testing.assert_close(one, other, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    some = torch.tensor([5, 0, 6])
    _, part = fused(angles.at(some), queries[some], keys[some])
    torch.testing.assert_close(part, expect[1][some], rtol=CLOSE[dtype], atol=CLOSE[dtype])
    _, part = fused(angles.at(slice(2, 5)), queries[2:5].clone(), keys[2:5].clone())
    torch.testing.assert_close(part, expect[1][2:5], rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_text_of_a_model_with_sections_has_plain_positions(custom_ops):
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **MROPE}
    rotary = get_rope(32, max_position=128, rope_parameters=parameters, dtype=torch.float32)
    positions, (queries, keys) = torch.arange(7), torch.randn(2, 7, SIZE)
    expect = rotary(positions, queries.clone(), keys.clone())
    fused = FusedRotary(rotary)
    found = fused(fused.angles(positions, keys), queries, keys)
    for one, other in zip(found, expect, strict=True):
        torch.testing.assert_close(one, other)


def test_other_rotary_embeddings_stay_what_they_are():
    def rotary(positions, queries, keys):
        return queries + positions[0], keys + positions[-1]

    fused, positions = FusedRotary(rotary), torch.arange(6).view(3, 2)
    queries, keys = fused(fused.angles(positions, torch.zeros(2)).at(slice(1, 2)), 0, 0)
    assert queries.tolist() == [1] and keys.tolist() == [5]
