"""The multimodal processor of a routed model: vLLM's own, which also refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from vllm.inputs import MultiModalInput
from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs

from vllm_reroute.admission.checks import check_images_only, check_text_follows
from vllm_reroute.admission.front_end import FRONT_END
from vllm_reroute.admission.sent_pictures import sending
from vllm_reroute.plan.visual_spans import VisualSpans


class DummyInputs(ProcessorInputs):
    """What vLLM profiles with; its prompt is nothing but images."""


@cache
def _admitting(stock: type[BaseMultiModalProcessor], images_only: bool) -> type:
    """The subclass of a model's processor that refuses.

    stock: its only base, so that a processor vLLM has built can take the subclass on. images_only:
    whether videos are refused, before anything is done about them.
    """

    class RoutedProcessor(stock):  # type: ignore[misc, valid-type]  # known when it runs
        def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
            return DummyInputs(**vars(super().get_dummy_inputs(*args, **kwargs)))

        def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> MultiModalInput:
            """As vLLM's. Raises VLLMValidationError for a prompt that cannot be routed."""
            if isinstance(inputs, DummyInputs):
                return super().apply(inputs, timing_ctx)
            if images_only:
                check_images_only(inputs.mm_data_items)
            inputs = replace(inputs, cache=sending(inputs.cache))
            made = super().apply(inputs, timing_ctx)
            spans = VisualSpans.of_ranges(made["mm_placeholders"])
            if spans is not None:
                check_text_follows(spans.end, len(made["prompt_token_ids"]))
            return made

    return RoutedProcessor


@dataclass(frozen=True)
class AdmittingFactories:
    """Stands in for a model class's `_processor_factory`. stock: vLLM's."""

    stock: Any
    images_only: bool

    def build_processor(self, ctx: Any) -> BaseMultiModalProcessor:
        """The stock processor that refuses; also readies this process's front end."""
        for hook in FRONT_END:
            hook.install()
        processor: BaseMultiModalProcessor = self.stock.build_processor(ctx)
        processor.__class__ = _admitting(type(processor), self.images_only)
        return processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)


def admitting(factories: Any, *, images_only: bool) -> AdmittingFactories:
    """vLLM's factories of a model class, or those of a routed base class, with the checks."""
    stock = factories.stock if isinstance(factories, AdmittingFactories) else factories
    return AdmittingFactories(stock, images_only)
