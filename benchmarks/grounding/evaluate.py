"""Exact answers of a checkpoint by kind of question, run by transformers.

python -m benchmarks.grounding.evaluate --count 2000
"""

import argparse
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor

from benchmarks.grounding.questions import ANSWER_TOKENS, EVERY_KIND, SPLITS, Question, questions

MODEL = Path(__file__).resolve().parent / "model"


def load(folder: Path, dtype: torch.dtype) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    return model, LlavaProcessor.from_pretrained(folder)


def prompt(text: str) -> str:
    """LLaVA-1.5's prompt as the chat template writes it, but for the `<s>` that tokenizing adds."""
    return f"USER: <image>\n{text} ASSISTANT:"


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: list[Question]
) -> list[str]:
    """Greedy answers to a batch of questions."""
    inputs = processor(
        text=[prompt(question.text) for question in asked],
        images=[question.image for question in asked],
        padding=True,
        return_tensors="pt",
    )
    return generated(model, processor, inputs)


def generated(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, inputs: BatchFeature
) -> list[str]:
    """Greedy answers to a batch of prompts, as the processor gives them."""
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    # Its `self` is annotated with a class this one is not derived from.
    tokens = model.generate(  # type: ignore[misc]
        **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False
    )
    said = processor.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in said]


def accuracy_by_kind(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: Iterable[Question],
    batch: int = 32,
) -> dict[str, float]:
    """Share of exact answers per kind, and over all questions under "all"."""
    right: dict[str, list[bool]] = {kind: [] for kind in EVERY_KIND}
    asked = iter(asked)
    while chunk := list(itertools.islice(asked, batch)):
        for question, said in zip(chunk, answers(model, processor, chunk), strict=True):
            right[question.kind].append(said == question.answer)
    return shares_of(right)


def shares_of(right: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    """Share of right answers per kind that has any, and over all of them under "all"."""
    shares = {kind: sum(r) / len(r) for kind, r in right.items() if r}
    everything = [each for r in right.values() for each in r]
    return {**shares, "all": sum(everything) / len(everything)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint (default: ours)")
    parser.add_argument("--split", choices=list(SPLITS), default="test", help="default: test")
    parser.add_argument("--count", type=int, default=2000, help="questions (default: 2000)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32"
    )
    args = parser.parse_args()
    model, processor = load(args.model, getattr(torch, args.dtype))
    asked = tqdm(questions(args.split, args.count), total=args.count, unit="question")
    shares = accuracy_by_kind(model, processor, asked)
    error = math.sqrt(shares["all"] * (1 - shares["all"]) / args.count)
    for kind, share in shares.items():
        print(
            f"{kind:16s}{100 * share:6.1f} %" + (f" ± {100 * error:.1f}" if kind == "all" else "")
        )


if __name__ == "__main__":
    main()
