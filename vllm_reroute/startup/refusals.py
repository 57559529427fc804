"""What routing cannot be combined with: refused at start, each with a cure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import vllm.envs as envs

from vllm_reroute.kv_cache.spec import PLAIN_CACHE_DTYPES
from vllm_reroute.plan.chunks import fewest_step_tokens
from vllm_reroute.schedule import RoutingSchedule

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

TESTED_QUANTIZATION = ("compressed-tensors",)
"""Quantisation methods of weights that tests compare with an oracle."""

_WEIGHTS = f"unquantised weights, {', '.join(TESTED_QUANTIZATION)}"

ALLOWED_CUDAGRAPH_MODES = ("NONE", "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
"""All but FULL: a graph over a mixed batch would replay an image prefill as if nothing were routed."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One engine argument routing cannot honour.

    option: the field of `EngineArgs`. allowed: shown to the user. accepts: whether a value is
    fine. cure: what to do instead. why: one clause.
    """

    option: str
    allowed: str
    accepts: Callable[[Any], bool]
    why: str
    cure: str = "Leave it out"

    def check(self, engine_args: EngineArgs) -> None:
        """Raises ValueError naming option, value, what is allowed and the cure."""
        value = getattr(engine_args, self.option)
        if not self.accepts(value):
            raise ValueError(
                f"--{self.option.replace('_', '-')} {_shown(value)} cannot be combined with "
                f"visual-token routing: {self.why}. Allowed: {self.allowed}. {self.cure}, or serve "
                "without --reroute-schedule."
            )


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _only(option: str, value: Any, why: str, cure: str = "Leave it out") -> Refusal:
    return Refusal(
        option=option, allowed=str(value), accepts=lambda v: v == value, why=why, cure=cure
    )


def _unset(option: str, why: str) -> Refusal:
    return Refusal(option=option, allowed="unset", accepts=lambda v: not v, why=why)


REFUSALS = (
    _only("pipeline_parallel_size", 1, "a stage's deferred tokens live on one pipeline rank"),
    _only("decode_context_parallel_size", 1, "routed K/V is not sharded over positions"),
    _only("prefill_context_parallel_size", 1, "a decision needs the whole prompt on one rank"),
    Refusal(
        option="speculative_config",
        allowed="unset, or method ngram",
        accepts=lambda v: not v or (isinstance(v, dict) and v.get("method") == "ngram"),
        why="a draft model would need stages of its own",
        cure="Take the method ngram, which drafts from the prompt",
    ),
    _unset("spec_model", "a draft model would need stages of its own"),
    Refusal(
        option="spec_method",
        allowed="unset, or ngram",
        accepts=lambda v: v in (None, "ngram"),
        why="a draft model would need stages of its own",
        cure="Take ngram, which drafts from the prompt",
    ),
    _unset("kv_transfer_config", "K/V of a stage is not addressed by prompt position"),
    _unset("kv_events_config", "K/V of a stage is not addressed by prompt position"),
    _unset("kv_offloading_size", "K/V of a stage is not addressed by prompt position"),
    _unset("ec_transfer_config", "it has not been tested with routing"),
    _unset("enable_dbo", "a decision cannot be split over two micro-batches"),
    _only("ubatch_size", 0, "a decision cannot be split over micro-batches"),
    _unset("disable_hybrid_kv_cache_manager", "every stage is a KV cache group of its own"),
    _unset(
        "disable_chunked_mm_input",
        "no step runs a single token of an image prompt, so an image as large as a step could wait "
        "for ever",
    ),
    _unset("kv_sharing_fast_prefill", "deferred tokens already skip layers"),
    Refusal(
        option="enable_lora",
        allowed="unset",
        accepts=lambda v: not v,
        why="vLLM assigns adapters by a token's place in the step, and a stage runs some tokens only",
        cure="Merge the adapter into the weights (peft's merge_and_unload) and serve those",
    ),
    _unset("enable_prompt_embeds", "embeddings of a whole prompt do not say which are visual"),
    Refusal(
        option="video_pruning_rate",
        allowed="unset",
        accepts=lambda v: not v,
        why="it removes video tokens for good before the decoder, and keep ratios are shares of all",
        cure="Leave it out and let the schedule choose, with a lower tier if need be",
    ),
    Refusal(
        option="quantization",
        allowed=_WEIGHTS,
        accepts=lambda v: v is None or v in TESTED_QUANTIZATION,
        why="routing has not been tested with it",
    ),
    _unset("scheduler_cls", "routing brings its own scheduler"),
    Refusal(
        option="worker_cls",
        allowed="auto",
        accepts=lambda v: v == "auto",
        why="routing plans its steps inside vLLM's own workers",
        cure="Leave it out (--worker-extension-cls works)",
    ),
    Refusal(
        option="model_impl",
        allowed="auto, vllm",
        accepts=lambda v: v in ("auto", "vllm"),
        why="what is routed is vLLM's own implementation of the model",
    ),
    _unset("model_class_overrides", "routing brings a model class of its own"),
    Refusal(
        option="convert",
        allowed="auto, none",
        accepts=lambda v: v in ("auto", "none"),
        why="only text generation is routed",
    ),
    _unset("pooler_config", "only text generation is routed"),
    _unset("language_model_only", "without images there is nothing to route"),
    _unset("mm_encoder_only", "routing happens in the language model, which it leaves out"),
    _unset("cpu_offload_gb", "a decision reads its layer's weights before that layer runs"),
    _unset("offload_group_size", "a decision reads its layer's weights before that layer runs"),
    Refusal(
        option="runner",
        allowed="auto, generate",
        accepts=lambda v: v in ("auto", "generate"),
        why="only text generation is routed",
    ),
    Refusal(
        option="kv_cache_dtype",
        allowed=", ".join(PLAIN_CACHE_DTYPES),
        accepts=lambda v: v in PLAIN_CACHE_DTYPES,
        why="a quantised KV cache is untested",
    ),
)
"""Checked in this order before vLLM builds its config."""


def check_arguments(engine_args: EngineArgs) -> None:
    """Refuse engine arguments routing cannot honour. Raises ValueError."""
    for refusal in REFUSALS:
        refusal.check(engine_args)
    _check_cudagraph_mode(getattr(engine_args.compilation_config, "cudagraph_mode", None))


def _check_cudagraph_mode(mode: Any) -> None:
    if mode is not None and mode.name not in ALLOWED_CUDAGRAPH_MODES:
        raise ValueError(
            f"--compilation-config with cudagraph_mode {mode.name} cannot be combined with "
            "visual-token routing: the tokens of an image prefill differ from stage to stage. "
            f"Allowed: {', '.join(ALLOWED_CUDAGRAPH_MODES)}. Leave it out to get vLLM's default, and "
            "leave out splitting_ops too, which can change it."
        )


def check_config(vllm_config: VllmConfig) -> None:
    """Refuse what only the finished config shows. Raises ValueError."""
    _check_cudagraph_mode(vllm_config.compilation_config.cudagraph_mode)
    if envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        raise ValueError(
            "VLLM_USE_BREAKABLE_CUDAGRAPH=1 cannot be combined with visual-token routing: such graphs "
            "hold the whole model, and the tokens of an image prefill differ from stage to stage. "
            "Allowed: unset, or 0. Unset it, or serve without --reroute-schedule."
        )
    quantization = vllm_config.model_config.quantization
    if quantization is not None and quantization not in TESTED_QUANTIZATION:
        raise ValueError(
            f"The checkpoint is quantised with {quantization!r}, which visual-token routing has "
            f"not been tested with. Allowed: {_WEIGHTS}. Use such a checkpoint, or serve without "
            "--reroute-schedule."
        )
    fewest = fewest_step_tokens(RoutingSchedule.of(vllm_config).marker)
    for option in (
        "long_prefill_token_threshold",
        "max_num_scheduled_tokens",
        "max_num_batched_tokens",
    ):
        most = getattr(vllm_config.scheduler_config, option)
        if most is not None and 0 < most < fewest:
            raise ValueError(
                f"--{option.replace('_', '-')} {most} cannot be combined with visual-token routing: an "
                f"image prompt runs at least {fewest - 1} tokens at a time. Allowed: unset, or "
                f"{fewest} and more. Raise it, or serve without --reroute-schedule."
            )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "vLLM has switched its hybrid KV cache manager off for this configuration, but every "
            "stage is a KV cache group of its own. Remove the option that vLLM's log names "
            "for it, or serve without --reroute-schedule."
        )
