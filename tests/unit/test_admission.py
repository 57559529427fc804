"""Which requests a routed engine turns away, before they can wait or fail inside it."""

import time

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from vllm_reroute.admission.checks import check_request

from .parts import VISUAL, feature

BUDGET = 64
IMAGE = feature(5, VISUAL)


@pytest.fixture(scope="module")
def vllm_config(engine_config):
    return engine_config(
        max_num_batched_tokens=BUDGET,
        max_model_len=512,
        additional_config={"reroute": {"schedule": "pdrop"}},
    )


def request(num_prompt, images=(), resumable=False, **sampling):
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=list(range(num_prompt)),
        mm_features=list(images) or None,
        sampling_params=SamplingParams(**sampling),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        resumable=resumable,
    )


@pytest.mark.parametrize(
    "accepted",
    [
        request(30, [IMAGE]),
        request(BUDGET, [IMAGE]),
        request(5 + VISUAL + 1, [IMAGE]),
        request(40, [IMAGE, feature(22, VISUAL)]),
        request(30, [IMAGE], n=4, logprobs=5),
        request(500),
        request(500, prompt_logprobs=2),
        request(500, prompt_logprob_token_ids=[[1]]),
        request(5, resumable=True),
    ],
)
def test_accepted(accepted, vllm_config):
    check_request(accepted, vllm_config)


@pytest.mark.parametrize(
    "refused,words",
    [
        (
            request(BUDGET + 1, [IMAGE]),
            ["65 tokens", "at most 64", "--max-num-batched-tokens 65 or more", "fewer"],
        ),
        (
            request(5 + VISUAL, [IMAGE]),
            ["ends with an image", "must be text", "Put the question after"],
        ),
        (request(30, [IMAGE], prompt_logprobs=0), ["prompt_logprobs", "Leave prompt_logprobs out"]),
        (
            request(30, [IMAGE], prompt_logprob_token_ids=[[1]]),
            ["prompt_logprob_token_ids", "Leave prompt_logprob_token_ids out"],
        ),
        (request(30, [IMAGE], resumable=True), ["Streamed input", "whole prompt", "in one piece"]),
    ],
)
def test_refused_for_the_client_to_see(refused, words, vllm_config):
    with pytest.raises(VLLMValidationError) as error:
        check_request(refused, vllm_config)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)
    assert error.value.parameter is not None
