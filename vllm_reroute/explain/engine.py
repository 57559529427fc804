"""One vLLM engine in this process, and one greedy answer of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_reroute.explain.question import Question
from vllm_reroute.schedule import CONFIG_KEY

if TYPE_CHECKING:
    from vllm import LLM, EngineArgs, RequestOutput

DEFAULTS = {"enforce_eager": True, "max_num_seqs": 1, "enable_prefix_caching": False}
"""One request: nothing to compile for, nothing to share. Engine flags of the user's override these."""


def start_engine(question: Question, reroute: Mapping[str, Any] | None) -> LLM:
    """A routed engine with these options, or a stock one."""
    from vllm import LLM

    engine_args = parsed_engine_flags(question)
    if reroute is not None:
        additional = engine_args.additional_config or {}
        engine_args.additional_config = {**additional, CONFIG_KEY: dict(reroute)}
    return LLM.from_engine_args(engine_args)


def parsed_engine_flags(question: Question) -> EngineArgs:
    """vLLM's engine arguments for a question. Raises ValueError for words that are none."""
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(
                f"{message}. Flags that explain does not know itself must be engine flags of vLLM, "
                "such as --max-model-len 4096; `vllm serve --help=all` lists them."
            )

    parser = EngineArgs.add_cli_args(Parser(prog="vllm-reroute explain"))
    limits = {"image": len(question.images), "video": len(question.videos)}
    parser.set_defaults(limit_mm_per_prompt=limits, **DEFAULTS)
    args = parser.parse_args(["--model", question.model, *question.engine_flags])
    engine_args = EngineArgs.from_cli_args(args)
    if CONFIG_KEY in (engine_args.additional_config or {}):
        raise ValueError(
            f"--additional-config with a {CONFIG_KEY!r} entry: explain takes reroute options as flags. "
            "Give them as --reroute-schedule and so on."
        )
    return engine_args


def answered(
    llm: LLM, question: Question, extra_args: dict[str, Any] | None = None
) -> RequestOutput:
    """The request, asked as one user message in the model's chat template, answered greedily."""
    from transformers import AutoProcessor
    from vllm import SamplingParams

    trust = llm.model_config.trust_remote_code
    processor = AutoProcessor.from_pretrained(question.model, trust_remote_code=trust)
    kinds = ["video" if picture.is_video else "image" for picture in question.pictures]
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question.text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    data: dict[str, Any] = {}
    if question.images:
        data["image"] = [picture.frames[0] for picture in question.images]
    if question.videos:
        data["video"] = [
            (picture.as_array(), {**(picture.metadata or {}), "do_sample_frames": False})
            for picture in question.videos
        ]
    (output,) = llm.generate(
        {"prompt": prompt, "multi_modal_data": data},
        SamplingParams(temperature=0, max_tokens=question.max_tokens, extra_args=extra_args),
        use_tqdm=False,
        # The template has written the first token already, as vLLM's server takes it.
        tokenization_kwargs={"add_special_tokens": False},
    )
    return output
