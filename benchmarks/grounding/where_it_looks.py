"""Where the last prompt token looks, layer by layer: at what a question names, and at what its answer is read from.

    python -m benchmarks.grounding.where_it_looks --out benchmarks/results

Attention as decisions score it, the mean over heads, of a dense pass by transformers. Writes a plot and a table of the
best rank that a token of the subject or of the target has among all visual tokens: rank r is kept where r tokens are.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration, LlavaProcessor

from benchmarks.grounding.evaluate import MODEL, load, prompt
from benchmarks.grounding.guides import tokens_of
from benchmarks.grounding.lessons import patch_attributes
from benchmarks.grounding.questions import SPLITS, TWO_LOOKS, ask
from benchmarks.grounding.recipe import kinds_of
from benchmarks.grounding.scenes import render, sample_scene
from benchmarks.grounding.vocabulary import IMAGE_TOKEN, prompt_start, token
from vllm_reroute.schedule.published import scale_decision_layers

JSON_NAME, PLOT = "where-it-looks.json", "where-it-looks.svg"
FIRST = prompt_start().index(token(IMAGE_TOKEN))
# Decision layers of the published schedules with reroute, for 32 layers.
DECISIONS = (3, 7, 15, 23)


def looks(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    count: int,
    kinds: Sequence[str],
) -> Iterator[dict[str, np.ndarray]]:
    """Per question: "attention" [layers, visual tokens] and bool "subject", "target" [visual tokens]."""
    scenes = (sample_scene(seed) for seed in SPLITS["validation"])
    vision = model.config.vision_config
    assert isinstance(vision, CLIPVisionConfig) and isinstance(vision.patch_size, int)
    in_turn = itertools.cycle(kinds)
    kind = next(in_turn)
    for scene in scenes:
        asked = ask(scene, kind, np.random.default_rng([scene.seed, 4]))
        if asked is None:
            continue
        kind = next(in_turn)
        inputs = processor(text=[prompt(asked.text)], images=[render(scene)], return_tensors="pt")
        with torch.inference_mode():
            attentions = model(**inputs, output_attentions=True).attentions
        rows = torch.stack([layer[0, :, -1].mean(dim=0) for layer in attentions])
        shown = patch_attributes(scene, vision.patch_size)
        visual = slice(FIRST, FIRST + len(shown))
        yield {
            "attention": rows[:, visual].numpy(),
            "subject": tokens_of(asked.subject, shown)[visual],
            "target": tokens_of(asked.target, shown)[visual],
        }
        count -= 1
        if not count:
            return


def summarise(found: list[dict[str, np.ndarray]], kinds: Sequence[str]) -> dict:
    """Per role and layer: mean attention, and quartiles of the best rank, 1 for the most attended token."""
    summary: dict = {"questions": len(found), "kinds": list(kinds)}
    for role in ("subject", "target"):
        shares = [each["attention"][:, each[role]].sum(axis=1) for each in found]
        ranks = [_best_rank(each["attention"], each[role]) for each in found]
        summary[role] = {
            "attention": np.mean(shares, axis=0).round(4).tolist(),
            "best_rank": np.percentile(ranks, [25, 50, 75, 90], axis=0).T.tolist(),
        }
    return summary


def _best_rank(attention: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[layers]"""
    ranks = 1 + (-attention).argsort(axis=1, kind="stable").argsort(axis=1)
    return ranks[:, wanted].min(axis=1)


def draw(summary: dict, path: Path) -> None:
    with rc_context({"svg.hashsalt": "looks", "font.size": 9}):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for role, colour in (("subject", "#1f77b4"), ("target", "#d62728")):
            layers = range(len(summary[role]["attention"]))
            left.plot(layers, summary[role]["attention"], color=colour, label=role)
            median = [quartiles[1] for quartiles in summary[role]["best_rank"]]
            right.plot(layers, median, color=colour, label=role)
        left.set(xlabel="decoder layer", ylabel="attention of the last prompt token")
        right.set(xlabel="decoder layer", ylabel="best rank among visual tokens, median")
        right.set_yscale("log")
        for axes in (left, right):
            for layer in scale_decision_layers(DECISIONS, len(median)):
                axes.axvline(layer, color="#bbbbbb", linestyle=":", linewidth=1)
        left.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint (default: ours)")
    parser.add_argument("--count", type=int, default=300, help="questions (default: 300)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder (default: here)")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count {args.count} must be 1 or more.")
    model, processor = load(args.model, torch.float32)
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    kinds = [kind for kind in kinds_of(args.model) if kind in TWO_LOOKS]
    asked = looks(model, processor, args.count, kinds)
    summary = summarise(list(tqdm(asked, total=args.count, unit="question")), kinds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / JSON_NAME).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draw(summary, args.out / PLOT)
    print("layer  subject: attention, best rank   target: attention, best rank (medians)")
    for layer in range(len(summary["subject"]["attention"])):
        cells = [
            f"{summary[role]['attention'][layer]:8.3f} {summary[role]['best_rank'][layer][1]:8.0f}"
            for role in ("subject", "target")
        ]
        print(f"{layer:5d}       {cells[0]}             {cells[1]}")


if __name__ == "__main__":
    main()
