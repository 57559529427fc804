"""Which requests a routed engine turns away, before they can wait or fail inside it."""

import asyncio
import gc
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from vllm_reroute.admission.checks import check_asked, check_request
from vllm_reroute.admission.engine_core import ENGINE_CORE
from vllm_reroute.admission.front_end import BEAM_SEARCH, INPUT_PROCESSOR, ONLINE_RENDERER
from vllm_reroute.admission.sent_pictures import SendingCache, SentPictures
from vllm_reroute.schedule import RoutingSchedule

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
        request(BUDGET + 1, [IMAGE]),
        request(500, [feature(5, 300)]),
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


async def rendered_chat(*_):
    """What vLLM's renderer makes of a chat with a picture."""
    places = {"image": [IMAGE.mm_position]}
    return [], [{"mm_placeholders": places, "prompt_token_ids": list(range(30))}]


WAYS_IN = {
    "front end": lambda own: INPUT_PROCESSOR.wrapper(
        lambda *_: request(30, [IMAGE], prompt_logprobs=0), own
    ),
    "chat": lambda own: asyncio.run(
        ONLINE_RENDERER.wrapper(rendered_chat, own, SimpleNamespace(prompt_logprobs=0), [])
    ),
    "offline beam search": lambda own: BEAM_SEARCH.wrapper(
        lambda *_: None, own, [{"prompt": "?", "multi_modal_data": {"image": 1}}], None
    ),
    "engine core": lambda own: ENGINE_CORE.wrapper(
        lambda *_: None, own, request(30, [IMAGE], prompt_logprobs=0)
    ),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_every_way_in_is_checked(way, vllm_config, engine_config):
    """And none of an engine that does not route."""

    def of(config):
        """The front end's or the core's own object, as far as the checks look at it."""
        renderer = SimpleNamespace(config=config, mm_processor_cache=None)
        engine = SimpleNamespace(vllm_config=config)
        return SimpleNamespace(vllm_config=config, renderer=renderer, llm_engine=engine)

    with pytest.raises(VLLMValidationError, match="is not available for prompts with images"):
        WAYS_IN[way](of(vllm_config))
    WAYS_IN[way](of(engine_config()))


@pytest.fixture(scope="module")
def keeps(engine_config):
    return engine_config(
        max_model_len=512,
        additional_config={"reroute": {"schedule": "pdrop", "history": "keep"}},
    )


def test_a_picture_s_question_must_end_where_turns_are_kept(keeps):
    marker = RoutingSchedule.of(keeps).marker
    plain, asked = request(40, [IMAGE]), request(40, [IMAGE])
    asked.prompt_token_ids[30 : 30 + len(marker)] = marker
    check_request(asked, keeps)
    asked.mm_features.append(feature(36, 2))
    for refused in (plain, asked):
        with pytest.raises(VLLMValidationError, match=r"no marker.*add_generation_prompt") as error:
            check_request(refused, keeps)
        assert error.value.parameter == "prompt"
        refused.sampling_params.extra_args = {"reroute_history": "rerank"}
        check_request(refused, keeps)


IN_ANOTHER_PROCESS = """
import pickle, sys
import vllm.plugins
vllm.plugins.load_general_plugins()  # as every process of vLLM does
configs = pickle.load(sys.stdin.buffer)
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.entrypoints.llm import LLM
from vllm.multimodal import MULTIMODAL_REGISTRY
def hooked():
    front_end = InputProcessor.process_inputs, OnlineRenderer.preprocess_chat, LLM.beam_search
    return [hasattr(one, "__wrapped__") for one in front_end]
assert not any(hooked())
MULTIMODAL_REGISTRY.create_processor(configs["stock"].model_config)
assert not any(hooked())
MULTIMODAL_REGISTRY.create_processor(configs["routed"].model_config)
assert all(hooked())
assert not hasattr(EngineCore.preprocess_add_request, "__wrapped__")
"""


def test_a_process_that_only_gets_the_config_is_ready(engine_config):
    """The front end's checks come with the model's processor; a stock one brings none."""
    routed = {"additional_config": {"reroute": {"schedule": "pdrop"}}}
    configs = {
        name: engine_config(max_model_len=512, **options)
        for name, options in (("stock", {}), ("routed", routed))
    }
    subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS], input=pickle.dumps(configs), check=True
    )


def small_item(value):
    return MultiModalKwargsItem.dummy(value)


@pytest.fixture
def cache(vllm_config):
    return LruKeyReplicatedSenderCache(vllm_config.model_config)


def rendered(cache, mm_hash="picture"):
    """What one prompt's processing gets for a picture: data, or None where the engine has it."""
    view = SendingCache(cache, SentPictures.of(cache))
    known = view.is_cached([mm_hash]) == [True]
    item, updates = view.get_and_update_item(None if known else (small_item(1), ["u"]), mm_hash)
    assert updates == ["u"]
    return item


def sent(cache, item, mm_hash="picture"):
    one = feature(5, VISUAL)
    SentPictures.of(cache).mark([replace(one, data=item, mm_hash=mm_hash)])


def test_a_picture_counts_as_known_once_it_was_sent(cache):
    first = rendered(cache)
    assert first is not None
    assert rendered(cache) is first, "refused or waiting: nobody has sent it"
    sent(cache, first)
    assert rendered(cache) is None


def test_a_picture_that_was_lost_is_processed_again(cache):
    rendered(cache)
    gc.collect()
    again = rendered(cache)
    assert again is not None
    sent(cache, again)
    assert rendered(cache) is None and rendered(cache, "other") is not None
    cache.clear_cache()
    assert rendered(cache) is not None


def test_a_picture_lost_while_a_prompt_is_being_processed(cache):
    """Refused prompts let go of their pictures whenever they are collected, also beside the thread that
    processes the next one."""
    refused = rendered(cache)
    assert refused is not None
    view = SendingCache(cache, SentPictures.of(cache))
    del refused
    gc.collect()
    assert view.is_cached(["picture"]) == [False]
    again, _ = view.get_and_update_item((small_item(1), ["u"]), "picture")
    assert again is not None and rendered(cache) is again


def test_stock_vllm_still_needs_this(cache):
    """Once its own cache waits for the sending, `sent_pictures.py` can go."""
    item, _ = cache.get_and_update_item((small_item(1), ["u"]), "picture")
    assert item is not None
    assert cache.get_and_update_item(None, "picture")[0] is None


@pytest.mark.parametrize(
    "asked,parameter",
    [
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"echo": True, "top_logprobs": 0}, "echo"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"echo": True, "top_logprobs": None}, None),
        ({"top_logprobs": 3, "logprobs": True, "n": 2}, None),
    ],
)
def test_the_error_names_what_the_client_sent(asked, parameter):
    if parameter is None:
        check_asked(SimpleNamespace(**asked))
        return
    with pytest.raises(VLLMValidationError) as error:
        check_asked(SimpleNamespace(**asked))
    assert error.value.parameter == parameter and f"Leave {parameter} out" in str(error.value)
