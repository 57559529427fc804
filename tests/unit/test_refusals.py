"""What a routed engine refuses at start, each with option, value, what is allowed, and a cure."""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest
import vllm
from transformers import AutoConfig, LlamaConfig
from vllm.config import (
    AttentionConfig,
    CompilationConfig,
    KVEventsConfig,
    KVTransferConfig,
    PoolerConfig,
)
from vllm.config.ec_transfer import ECTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_reroute.schedule import CONFIG_KEY
from vllm_reroute.startup import attention_backend
from vllm_reroute.startup import engine_config as startup
from vllm_reroute.startup.attention_backend import choose_attention_backend
from vllm_reroute.startup.refusals import (
    ALLOWED_CUDAGRAPH_MODES,
    REFUSALS,
    check_arguments,
    check_config,
)
from vllm_reroute.vllm_seams.seams import SEAMS, check_vllm

ROUTED = {CONFIG_KEY: {"schedule": "pdrop"}}

# Engine argument -> a value that is refused, and what of it the message shows.
BAD_VALUES = {
    "pipeline_parallel_size": (2, "2"),
    "decode_context_parallel_size": (2, "2"),
    "prefill_context_parallel_size": (4, "4"),
    "speculative_config": ({"method": "eagle", "num_speculative_tokens": 3}, "eagle"),
    "kv_transfer_config": (
        KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both"),
        "KVTransferConfig",
    ),
    "kv_events_config": (KVEventsConfig(enable_kv_cache_events=True), "KVEventsConfig"),
    "kv_offloading_size": (1.5, "1.5"),
    "ec_transfer_config": (
        ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_both"),
        "ECTransferConfig",
    ),
    "enable_dbo": (True, "True"),
    "ubatch_size": (2, "2"),
    "disable_hybrid_kv_cache_manager": (True, "True"),
    "disable_chunked_mm_input": (True, "True"),
    "kv_sharing_fast_prefill": (True, "True"),
    "enable_lora": (True, "True"),
    "enable_prompt_embeds": (True, "True"),
    "video_pruning_rate": (0.5, "0.5"),
    "quantization": ("fp8", "fp8"),
    "scheduler_cls": ("mine.Scheduler", "mine.Scheduler"),
    "spec_method": ("eagle", "eagle"),
    "spec_model": ("some/draft", "some/draft"),
    "worker_cls": ("mine.Worker", "mine.Worker"),
    "model_impl": ("transformers", "transformers"),
    "model_class_overrides": ({"LlavaForConditionalGeneration": "mine:Llava"}, "mine:Llava"),
    "convert": ("embed", "embed"),
    "pooler_config": (PoolerConfig(), "PoolerConfig"),
    "language_model_only": (True, "True"),
    "mm_encoder_only": (True, "True"),
    "cpu_offload_gb": (1, "1"),
    "offload_group_size": (2, "2"),
    "runner": ("pooling", "pooling"),
    "kv_cache_dtype": ("fp8", "fp8"),
}


@pytest.fixture
def engine_args(model_folder):
    return EngineArgs(model=str(model_folder), max_model_len=512)


def test_the_table_is_complete():
    assert set(BAD_VALUES) == {refusal.option for refusal in REFUSALS}


@pytest.mark.parametrize(
    "option,bad,shown", [(option, *value) for option, value in BAD_VALUES.items()]
)
def test_refused(engine_args, option, bad, shown):
    setattr(engine_args, option, bad)
    (refusal,) = [r for r in REFUSALS if r.option == option]
    with pytest.raises(ValueError) as refused:
        check_arguments(engine_args)
    message = str(refused.value)
    flag = f"--{option.replace('_', '-')}"
    for part in (
        f"{flag} ",
        shown,
        refusal.why,
        f"Allowed: {refusal.allowed}",
        "or serve without --reroute-schedule",
    ):
        assert part in message
    assert refusal.cure in message


def test_a_routed_engine_has_its_arguments_checked(engine_config):
    with pytest.raises(ValueError, match="--enable-prompt-embeds True cannot be combined"):
        engine_config(additional_config=ROUTED, enable_prompt_embeds=True)
    assert engine_config(enable_prompt_embeds=True).model_config.enable_prompt_embeds


def test_messages_name_flags_that_exist():
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = {option for action in parser._actions for option in action.option_strings}
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    for refusal in REFUSALS:
        assert refusal.option in fields
        assert f"--{refusal.option.replace('_', '-')}" in flags


@pytest.mark.parametrize(
    "option,value",
    [
        ("tensor_parallel_size", 2),
        ("enable_mm_embeds", True),
        ("video_pruning_rate", 0.0),
        ("quantization", "compressed-tensors"),
        ("kv_cache_dtype", "bfloat16"),
        ("runner", "generate"),
        ("enable_prefix_caching", False),
        ("enable_chunked_prefill", True),
        ("dtype", "bfloat16"),
        ("enforce_eager", True),
    ],
)
def test_accepted(engine_args, option, value):
    check_arguments(engine_args)
    setattr(engine_args, option, value)
    check_arguments(engine_args)


def test_cuda_graphs_of_image_prefills_are_refused(engine_args, monkeypatch):
    engine_args.compilation_config = CompilationConfig(cudagraph_mode="FULL")
    with pytest.raises(ValueError) as refused:
        check_arguments(engine_args)
    for part in (
        "--compilation-config",
        "cudagraph_mode FULL ",
        "Allowed: NONE, PIECEWISE, FULL_DECODE_ONLY, FULL_AND_PIECEWISE",
        "Leave it out",
    ):
        assert part in str(refused.value)
    # vLLM makes it FULL of FULL_AND_PIECEWISE where nothing is split.
    with pytest.raises(ValueError, match=r"cudagraph_mode FULL .*leave out splitting_ops"):
        check_config(SimpleNamespace(compilation_config=engine_args.compilation_config))
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    engine_args.compilation_config.cudagraph_mode = None
    with pytest.raises(ValueError, match="VLLM_USE_BREAKABLE_CUDAGRAPH=1 cannot be combined"):
        check_config(SimpleNamespace(compilation_config=engine_args.compilation_config))


BACKENDS = AttentionBackendEnum


@pytest.mark.parametrize(
    "given,error",
    [
        ({"attention_backend": BACKENDS.FLASHINFER}, "--attention-backend FLASHINFER cannot"),
        (
            {
                "attention_config": AttentionConfig(
                    backend_per_kind={"full_attention": "FLASHINFER"}
                )
            },
            "backend_per_kind full_attention FLASHINFER cannot",
        ),
    ],
)
def test_attention_backends_that_cannot_route_are_refused(model_folder, given, error):
    args = EngineArgs(model=str(model_folder), max_model_len=512, additional_config=ROUTED, **given)
    with pytest.raises(ValueError, match=f"{error}.*Allowed: CPU_ATTN, FLASH_ATTN.*Leave it out"):
        args.create_engine_config()


@pytest.mark.parametrize(
    "fitting,chosen",
    [
        (("FLASHINFER", "FLASH_ATTN", "TRITON_ATTN"), "FLASH_ATTN"),
        (("FLASHINFER", "TRITON_ATTN"), "TRITON_ATTN"),
        (("FLASH_ATTN", "FLASHINFER"), None),
        ((), None),
        (("FLASHINFER", "FLEX_ATTENTION"), ValueError),
    ],
)
def test_the_best_backend_that_routes_is_chosen(engine_config, monkeypatch, fitting, chosen):
    """vLLM prefers FlashInfer on some GPUs."""
    config = engine_config()
    candidates = [
        SimpleNamespace(backend=BACKENDS[name], priority=priority)
        for priority, name in enumerate(fitting)
    ]
    gpu = SimpleNamespace(
        is_cuda=lambda: True,
        get_device_capability=lambda: DeviceCapability(10, 0),
        get_valid_backends=lambda *_: (candidates[::-1], {}),
    )
    monkeypatch.setattr(attention_backend, "current_platform", gpu)
    if chosen is ValueError:
        with pytest.raises(ValueError, match="only FLASHINFER, FLEX_ATTENTION fit this GPU"):
            choose_attention_backend(config)
        return
    choose_attention_backend(config)
    assert config.attention_config.backend is (BACKENDS[chosen] if chosen else None)


def test_vllm_prefers_flashinfer_there_and_takes_what_it_is_asked(engine_config, monkeypatch):
    """Fails once vLLM no longer does: then nothing has to be chosen in its place."""
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("compiled half"))
    from vllm.platforms.cuda import CudaPlatformBase, _get_backend_priorities

    capability = DeviceCapability(10, 0)
    assert _get_backend_priorities(False, capability)[0] is BACKENDS.FLASHINFER
    asked = attention_backend._selector_config(engine_config(dtype="bfloat16"))
    valid, why_not = CudaPlatformBase.get_valid_backends(capability, asked, 4)
    assert "TRITON_ATTN" in [candidate.backend.name for candidate in valid], why_not


@pytest.mark.parametrize("mode", ALLOWED_CUDAGRAPH_MODES)
def test_cuda_graphs_of_decodes_are_accepted(engine_args, mode):
    engine_args.compilation_config = CompilationConfig(cudagraph_mode=mode)
    check_arguments(engine_args)


def test_an_unsupported_architecture_is_refused(tmp_path, model_folder):
    text = AutoConfig.from_pretrained(model_folder).text_config.to_dict()
    LlamaConfig(**{**text, "architectures": ["LlamaForCausalLM"]}).save_pretrained(tmp_path)
    args = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, additional_config=ROUTED)
    with pytest.raises(ValueError) as refused:
        args.create_engine_config()
    for part in (
        "--reroute-schedule",
        "'LlamaForCausalLM'",
        "LlavaForConditionalGeneration",
        "without",
    ):
        assert part in str(refused.value)


def test_a_model_too_shallow_is_refused(engine_config):
    with pytest.raises(
        ValueError, match="--reroute-layers 2,8 must stay below the model's 8 decoder layers"
    ):
        engine_config(additional_config={CONFIG_KEY: {"layers": [2, 8], "keep": [0.5, 0.5]}})


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_batched_tokens": 16},
        {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 20},
        {"max_num_batched_tokens": 64, "max_num_scheduled_tokens": 20},
    ],
    ids=str,
)
def test_small_steps_are_accepted(engine_config, limits):
    """An image prompt runs in chunks, however small: nothing need fit a step."""
    config = engine_config(additional_config=ROUTED, max_model_len=512, **limits)
    assert {name: getattr(config.scheduler_config, name) for name in limits} == limits


@pytest.mark.parametrize("option", ["long_prefill_token_threshold", "max_num_scheduled_tokens"])
def test_steps_too_small_for_any_image_are_refused(engine_config, option):
    flag = option.replace("_", "-")
    with pytest.raises(ValueError, match=rf"--{flag} 2 .*Allowed: unset, .*Raise it"):
        engine_config(additional_config=ROUTED, max_model_len=512, **{option: 2})


@pytest.mark.parametrize(
    "seqs,max_len,on_cpu,on_gpu",
    [
        (256, 4096, 32, None),
        (1024, 32768, 32, None),
        (1024, 262144, 64, 64),
        (1024, 10**7, 128, 128),
    ],
)
def test_blocks_grow_before_their_tables_do(
    engine_config, monkeypatch, seqs, max_len, on_cpu, on_gpu
):
    """36 layers, an int32 for each block of the longest request, in two copies: at most 2 GiB."""
    config = engine_config()
    cache = config.cache_config
    monkeypatch.setattr(config.scheduler_config, "max_num_seqs", seqs)
    monkeypatch.setattr(config.model_config, "max_model_len", max_len)
    monkeypatch.setattr(config.model_config.hf_text_config, "num_hidden_layers", 36)
    startup._choose_block_size(config)
    assert cache.block_size == on_cpu
    monkeypatch.setattr(startup, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    cache.block_size, cache.user_specified_block_size = 16, False
    startup._choose_block_size(config)
    assert (cache.block_size, cache.user_specified_block_size) == (on_gpu or 16, bool(on_gpu))
    cache.block_size, cache.user_specified_block_size = 48, True
    startup._choose_block_size(config)
    assert cache.block_size == 48, "the user's own"


def test_what_only_the_finished_config_shows(engine_config):
    config = engine_config(additional_config=ROUTED)
    check_config(config)
    config.scheduler_config.disable_hybrid_kv_cache_manager = True
    with pytest.raises(ValueError, match="hybrid KV cache manager off"):
        check_config(config)
    config.model_config.quantization = "awq"
    with pytest.raises(ValueError, match="quantised with 'awq'"):
        check_config(config)


def test_this_vllm_is_the_tested_one():
    check_vllm()


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "1.0.0", "0.320.0"])
def test_another_version_is_refused(monkeypatch, engine_config, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(RuntimeError) as refused:
        check_vllm()
    for part in (
        "tested with vLLM 0.32.* and 0.33.*",
        f"the version is {version}",
        "pip install 'vllm==0.32.*'",
    ):
        assert part in str(refused.value)
    with pytest.raises(RuntimeError, match=r"tested with vLLM 0\.32"):
        engine_config(additional_config=ROUTED)
    engine_config()


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.qualname)
def test_a_changed_seam_is_refused(monkeypatch, seam):
    target = f"{seam.module}.{seam.qualname}"
    monkeypatch.setattr(target, lambda something, other, *more: None)
    with pytest.raises(RuntimeError) as refused:
        check_vllm()
    assert f"{target} takes ('something'" in str(refused.value)
    assert f"instead of {seam.parameters}" in str(refused.value)


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.qualname)
def test_a_lost_seam_is_refused(monkeypatch, seam):
    monkeypatch.delattr(f"{seam.module}.{seam.qualname.split('.')[0]}")
    with pytest.raises(RuntimeError, match=f"{seam.qualname} is gone"):
        check_vllm()
