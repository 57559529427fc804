"""The `vllm-reroute` command: look at schedules, fit one to a model, and see what one does to a request."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_reroute import __version__
from vllm_reroute.command_line.calibrate import add_calibrate
from vllm_reroute.command_line.doctor import add_doctor
from vllm_reroute.command_line.explain import add_explain
from vllm_reroute.command_line.predictions import Hardware, prediction_lines
from vllm_reroute.command_line.schedules import add_schedules
from vllm_reroute.families.short_names import resolve_model
from vllm_reroute.families.table import FAMILIES
from vllm_reroute.schedule.footprint import TYPICAL_TEXT_TOKENS, RequestFootprint
from vllm_reroute.schedule.options import RerouteOptions
from vllm_reroute.startup.flags import add_reroute_flags, options_from_flags

if TYPE_CHECKING:
    from vllm_reroute.schedule.cost_model import RequestCost

EXAMPLE = "vllm-reroute plan --model llava-1.5 --reroute-schedule pdrop --reroute-tier 64"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; a user's mistake is one line on standard error and code 2."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    takes_engine_flags = "run_with_engine_flags" in args
    if unknown and not takes_engine_flags:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        lines = args.run_with_engine_flags(args, unknown) if takes_engine_flags else args.run(args)
        for line in lines:
            print(line)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"vllm-reroute: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-reroute",
        description="Look at visual-token routing schedules for vLLM, fit them, and see what one does.",
    )
    parser.add_argument("--version", action="version", version=f"vllm-reroute {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser(
        "plan",
        help="what a schedule keeps of a model's image tokens, and what that saves by arithmetic",
        description="Print what a schedule does to a model, without starting an engine. Times are "
        "printed only for hardware you name, as lower bounds.",
        epilog=f"example: {EXAMPLE}",
    )
    plan.add_argument("--model", required=True, help="model id, local folder or short name")
    plan.add_argument(
        "--block-size", type=_positive, default=16, help="tokens per KV cache block (default: 16)"
    )
    plan.add_argument(
        "--text-tokens",
        type=_positive,
        default=TYPICAL_TEXT_TOKENS,
        help=f"text tokens of the request (default: {TYPICAL_TEXT_TOKENS})",
    )
    plan.add_argument(
        "--images", type=_positive, default=1, help="images of the request (default: 1)"
    )
    plan.add_argument(
        "--turns",
        type=_positive,
        metavar="N",
        help="also: a conversation of N questions and answers",
    )
    plan.add_argument(
        "--questions-per-image",
        type=_positive,
        metavar="M",
        help="of the conversation, before a new picture comes (default: all of them)",
    )
    plan.add_argument(
        "--devices", type=_positive, default=1, help="tensor-parallel devices (default: 1)"
    )
    plan.add_argument(
        "--pool-gib", type=_amount, help="KV pool of one device: how many requests fit"
    )
    plan.add_argument("--peak-tflops", type=_amount, help="of one device: bound of the prefill")
    plan.add_argument(
        "--bandwidth", type=_amount, metavar="GB/S", help="of one device: bound of a decode step"
    )
    add_reroute_flags(plan)
    plan.set_defaults(run=_plan)
    add_calibrate(commands)
    add_explain(commands)
    add_schedules(commands)
    models = commands.add_parser("models", help="models that can be routed, with short names")
    models.set_defaults(run=_models)
    add_doctor(commands)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _amount(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _plan(args: argparse.Namespace) -> list[str]:
    from transformers import AutoConfig

    from vllm_reroute.families.deepstack import first_decision_layer
    from vllm_reroute.families.visual_tokens import visual_tokens_per_image
    from vllm_reroute.models.architecture import RoutedArchitecture
    from vllm_reroute.report import budget_lines, footprint_lines, model_lines, schedule_lines
    from vllm_reroute.schedule.cost_model import DecoderShape, RequestCost, vision_shape
    from vllm_reroute.startup.calibrated import with_calibration

    options = RerouteOptions.from_mapping(options_from_flags(args))
    if not options.active:
        raise ValueError(f"nothing to plan: give --reroute-schedule. Example: {EXAMPLE}")
    model = resolve_model(args.model)
    config = RoutedArchitecture(None, nuwa=options.starts_in_encoder)(
        AutoConfig.from_pretrained(model)
    )
    options = with_calibration(options, model, config)
    text = config.get_text_config()
    schedule = options.resolve(text.num_hidden_layers, first_decision_layer(config))
    num_visual = visual_tokens_per_image(config)
    decoder = DecoderShape.of(text)
    image_sizes = (num_visual,) * args.images
    # Heads are dealt out to devices, and repeated where there are too few.
    heads_per_device = max(1, decoder.num_kv_heads // args.devices)
    # Like vLLM, which serves float32 checkpoints in a 16-bit type unless told otherwise.
    bytes_per_value = 2
    footprint = RequestFootprint(
        schedule=schedule,
        num_visual=sum(image_sizes),
        num_text=args.text_tokens,
        bytes_per_token=2 * heads_per_device * decoder.head_dim * bytes_per_value,
        block_size=args.block_size,
        image_sizes=image_sizes,
    )
    cost = RequestCost(
        decoder=decoder,
        vision=vision_shape(config, num_visual),
        schedule=schedule,
        image_sizes=image_sizes,
        num_text=args.text_tokens,
    )
    hardware = Hardware(
        peak_tflops=args.peak_tflops,
        bandwidth_gbs=args.bandwidth,
        pool_gib=args.pool_gib,
        tensor_parallel=args.devices,
    )
    return [
        f"model             {model}",
        *schedule_lines(schedule, num_visual),
        *model_lines(config, num_visual),
        "",
        *footprint_lines(footprint),
        f"  (16-bit K/V, {'one device' if args.devices == 1 else f'each of {args.devices} devices'})",
        *budget_lines(footprint),
        "",
        *prediction_lines(cost, footprint, hardware),
        *_conversation(args, cost, num_visual),
    ]


def _conversation(args: argparse.Namespace, cost: RequestCost, num_visual: int) -> list[str]:
    from vllm_reroute.command_line.conversations import conversation_lines
    from vllm_reroute.schedule.conversation_cost import ConversationCost

    if args.turns is None:
        if args.questions_per_image is not None:
            raise ValueError(
                f"--questions-per-image {args.questions_per_image} is about a conversation. Add "
                "--turns N, or leave it out."
            )
        return []
    conversation = ConversationCost(
        decoder=cost.decoder,
        vision=cost.vision,
        schedule=cost.schedule,
        num_visual=num_visual,
        turns=args.turns,
        questions_per_image=args.questions_per_image or args.turns,
        question=max(1, args.text_tokens // 2),
        answer=args.text_tokens // 2,
    )
    return ["", *conversation_lines(conversation)]


def _models(_: argparse.Namespace) -> list[str]:
    lines = [
        "Models that can be routed. Any checkpoint of these architectures works, by id or folder;",
        "a short name stands for the id wherever a reroute flag is given. Real weights of these",
        "checkpoints were not run: tested means small seeded models against an independent oracle.",
    ]
    for family in FAMILIES:
        lines += ["", f"{family.title}: {family.architecture}", f"  tested: {family.tested}"]
        lines += [f"  {short:<22} {full}" for short, full in family.short_names.items()]
    return lines
