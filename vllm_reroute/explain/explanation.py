"""One request explained: what was asked, decided and answered, and where every token is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from vllm_reroute.explain.geometry import Panel, Patches, patches_of
from vllm_reroute.explain.pictures import Picture
from vllm_reroute.explain.question import Question
from vllm_reroute.explain.record import dense_answer, trace_request
from vllm_reroute.explain.trace import RoutingTrace, TracedStage, stages_of
from vllm_reroute.schedule import RerouteOptions
from vllm_reroute.schedule.options import DEFAULT_ACTION
from vllm_reroute.startup.calibrated import with_calibration


@dataclass(frozen=True, kw_only=True)
class DrawnPanel:
    """One look at a picture, ready to be drawn.

    title: what it shows. picture: which of the request's, counted from 0. image: the picture, or a
    video's first frame of those it covers, for which `frame` counts from 0. image_title: what
    `image` is, apart from the look. tokens: [n] the visual
    tokens that cover part of it. boxes: [n, 4] where, in pixels of `image`. placeless: tokens that
    belong here and cover nothing.
    """

    title: str
    picture: int
    frame: int
    image: Image.Image
    image_title: str
    tokens: np.ndarray
    boxes: np.ndarray
    placeless: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Everything the pictures and the page show.

    options: the reroute options, what a file says in its place. patches: of each of the question's pictures.
    """

    question: Question
    options: RerouteOptions
    trace: RoutingTrace
    patches: tuple[Patches, ...]
    routed_answer: str
    dense_answer: str

    def __post_init__(self) -> None:
        placed = sum(map(len, self.patches))
        if placed != self.trace.num_visual:
            raise ValueError(
                f"the engine gave these pictures {self.trace.num_visual} visual tokens, the model's "
                f"own processor {placed}, so they cannot be placed. Leave out engine "
                "flags that change how pictures are prepared, such as --mm-processor-kwargs."
            )

    @cached_property
    def stages(self) -> tuple[TracedStage, ...]:
        return stages_of(self.trace)

    @property
    def removes(self) -> bool:
        """Whether deferred tokens are gone for good."""
        return (self.options.action or DEFAULT_ACTION) == "remove"

    @property
    def flags(self) -> tuple[str, ...]:
        """The options, each as the command line spells it."""
        return tuple(
            f"--reroute-{name} {','.join(map(str, v)) if isinstance(v, tuple) else v}"
            for name, v in self.options.to_mapping().items()
        )

    @property
    def model_name(self) -> str:
        """The model's id, or its folder's name alone."""
        folder = Path(self.question.model)
        return folder.resolve().name if folder.is_dir() else self.question.model

    @cached_property
    def panels(self) -> tuple[DrawnPanel, ...]:
        """Every look the model takes, in prompt order."""
        drawn, first_token = [], 0
        for number, (picture, patches) in enumerate(
            zip(self.question.pictures, self.patches, strict=True)
        ):
            for index, panel in enumerate(patches.panels):
                here = patches.panel == index
                on_it = np.flatnonzero(here & patches.covers)
                drawn.append(
                    DrawnPanel(
                        title=_title(picture.name, panel.name, _frames(picture, panel)),
                        picture=number,
                        frame=panel.first_frame,
                        image=picture.frames[panel.first_frame],
                        image_title=_title(picture.name, _frames(picture, panel)),
                        tokens=first_token + on_it,
                        boxes=patches.boxes[on_it],
                        placeless=first_token + np.flatnonzero(here & ~patches.covers),
                    )
                )
            first_token += len(patches)
        return tuple(drawn)


def explain(
    question: Question,
    options: RerouteOptions,
    say: Callable[[str], None],
    dense: str | None = None,
) -> Explanation:
    """Ask a routed and a stock engine, one after the other.

    say: is told what happens next. dense: the stock engine's answer, where it is known already.
    Raises ValueError for what cannot be asked or placed.
    """
    from transformers import AutoConfig, AutoProcessor

    # Before any engine: what cannot be drawn need not be asked.
    config = AutoConfig.from_pretrained(question.model)
    processor = AutoProcessor.from_pretrained(question.model)
    patches = patches_of(config, processor, question.pictures)
    # What a file says is shown, and says whether what is deferred may come back.
    options = with_calibration(options, question.model, config)
    say("asking the routed engine")
    trace, routed = trace_request(question, options.to_mapping())
    if dense is None:
        say("asking a stock engine")
        dense = dense_answer(question)
    return Explanation(
        question=question,
        options=options,
        trace=trace,
        patches=tuple(patches),
        routed_answer=routed.strip(),
        dense_answer=dense.strip(),
    )


def _title(*parts: str) -> str:
    return " · ".join(filter(None, parts))


def _frames(picture: Picture, panel: Panel) -> str:
    if not picture.is_video:
        return ""
    first, last = panel.first_frame + 1, panel.end_frame
    frames = f"frame {first}" if first == last else f"frames {first}-{last}"
    return f"{frames} of {len(picture.frames)}"
