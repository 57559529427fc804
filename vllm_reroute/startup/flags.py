"""The reroute flags of `vllm serve`, `vllm bench` and `vllm-reroute`."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from vllm_reroute.families.short_names import resolve_model
from vllm_reroute.schedule import CONFIG_KEY
from vllm_reroute.schedule.options import (
    DEFAULT_ACTION,
    DEFAULT_HISTORY,
    DEFAULT_SCORER,
    DEFAULT_TIER,
    DEFAULT_VARIANT,
    NO_SCHEDULE,
)
from vllm_reroute.schedule.published import ACTIONS, HISTORIES, SCHEDULES, SCORERS, TIERS, VARIANTS
from vllm_reroute.schedule.recall import RECALL_CAP, RECALL_SHARE

GROUP_TITLE = "Reroute"
_PREFIX = "reroute_"

AddArgument = Callable[..., argparse.Action]


def add_reroute_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags in a group of their own. Without any of them vLLM is untouched.

    A flag that was not given leaves no attribute behind.
    """
    group = parser.add_argument_group(
        title=GROUP_TITLE,
        description="Route visual tokens: at each decision layer the most attended ones run the "
        "next decoder layers, the others wait outside the KV cache (arXiv 2606.12412).",
    )
    add = functools.partial(group.add_argument, default=argparse.SUPPRESS)
    _add_schedule(add)
    _add_own_choice(add)
    _add_conversation(add)
    return parser


def _add_schedule(add: AddArgument) -> None:
    """A published schedule, and how much it keeps."""
    add(
        "--reroute-schedule",
        choices=[*SCHEDULES, NO_SCHEDULE],
        help=f"Where to decide and how much to keep. {NO_SCHEDULE!r} serves without routing.",
    )
    add(
        "--reroute-action",
        choices=ACTIONS,
        help="What becomes of tokens that were not kept: 'reroute' lets them come back at the next "
        f"decision, 'remove' drops them for good. Default: {DEFAULT_ACTION}.",
    )
    add(
        "--reroute-variant",
        choices=VARIANTS,
        help="With schedule nuwa and action reroute, tokens the vision encoder rejects are gone (A) "
        f"or may come back like any other (B). Default: {DEFAULT_VARIANT}.",
    )
    add(
        "--reroute-tier",
        type=int,
        choices=TIERS,
        help="Published keep ratios, named by the average number of visual tokens per layer they "
        f"aim at for a 576-token image. Default: {DEFAULT_TIER}.",
    )
    add(
        "--reroute-budget",
        type=float,
        metavar="AVG",
        help="Instead of a tier: solve for ratios that average AVG visual tokens per layer for a "
        "576-token image, at this model's depth.",
    )


def _add_own_choice(add: AddArgument) -> None:
    """What may take the place of the published decisions, ratios and scores."""
    add(
        "--reroute-layers",
        metavar="L1,L2,...",
        help="Instead of a schedule: decision layers (0-based, increasing), e.g. 2,7,15,23.",
    )
    add(
        "--reroute-keep",
        metavar="R1,R2,...",
        help="With --reroute-layers: share of the image's visual tokens each stage keeps, e.g. "
        ".45,.45,.225,.1126.",
    )
    add(
        "--reroute-scorer",
        choices=list(SCORERS),
        help="What ranks visual tokens: the last prompt token's attention, the same accumulated over "
        "this and all earlier decisions (with reroute: later words of an answer may need what the "
        "first one no longer looks at), random choice, a baseline for quality comparisons, or one that "
        f"another distribution has brought. Default: {DEFAULT_SCORER}.",
    )
    add(
        "--reroute-file",
        metavar="FILE",
        help="Instead of a schedule: one that 'vllm-reroute calibrate' has chosen for this model.",
    )


def _add_conversation(add: AddArgument) -> None:
    """What later turns of a conversation do."""
    add(
        "--reroute-history",
        choices=HISTORIES,
        help="What a later turn of a conversation does with earlier pictures: 'rerank' ranks all of "
        "them by the newest question; 'keep' finds what the question that came with a picture has "
        "kept, so that finished turns are read from the prefix cache in all layers; 'recall' does as "
        f"keep, and each later question without a picture brings back up to {RECALL_SHARE:g} of what a stage "
        f"keeps, until the stage holds {RECALL_CAP} times what keep holds. Default: "
        f"{DEFAULT_HISTORY}.",
    )
    add(
        "--reroute-turn-marker",
        metavar="TEXT",
        help="With --reroute-history keep or recall, or to let requests ask for it: the text with which a "
        "prompt asks the assistant to speak, where the model's chat template does not say it, e.g. "
        "'ASSISTANT:'.",
    )


def options_from_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The reroute options given on the command line, by their `RerouteOptions` names."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in vars(args).items()
        if name.startswith(_PREFIX) and value is not None
    }


def fold_flags_when_parsed(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make the parser turn reroute flags into an entry of `additional_config`, vLLM's own argument.

    So they reach every process that is handed the parsed arguments, whether or not this plugin is
    loaded there before it reads them.
    """
    parse = parser.parse_known_args

    def parse_and_fold(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        parsed, rest = parse(*args, **kwargs)
        given = options_from_flags(parsed)
        if given:
            additional = getattr(parsed, "additional_config", None) or {}
            if CONFIG_KEY in additional:
                parser.error(
                    f"--reroute-{next(iter(given))} and --additional-config with a {CONFIG_KEY!r} "
                    "entry exclude each other. Give the options one way."
                )
            parsed.additional_config = {**additional, CONFIG_KEY: given}
            for name in given:
                delattr(parsed, _PREFIX + name)
            _use_short_name(parsed)
        return parsed, rest

    # Its overloads say no more than this: a namespace and the rest.
    parser.parse_known_args = parse_and_fold  # type: ignore[method-assign, assignment]
    return parser


def _use_short_name(parsed: argparse.Namespace) -> None:
    """Replace a short model name by its id, and keep answering to both."""
    for name in ("model_tag", "model"):
        short = getattr(parsed, name, None)
        full = resolve_model(short) if short else short
        if full != short:
            setattr(parsed, name, full)
            parsed.served_model_name = getattr(parsed, "served_model_name", None) or [short, full]
