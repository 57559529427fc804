"""Trains a grounding model, exports it and writes its card.

    python -m benchmarks.grounding.train
    python -m benchmarks.grounding.train --recipe witness
    python -m benchmarks.grounding.train --recipe conversing

First the vision tower learns to name what each patch shows, then everything learns to answer; the conversing model
goes on from the guided one. State is kept under .local/grounding; --resume goes on from there.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from benchmarks.grounding.card import Curve, write_card
from benchmarks.grounding.conversations import conversations
from benchmarks.grounding.evaluate import accuracy_by_kind, load
from benchmarks.grounding.evaluate_talks import accuracy_by_turn
from benchmarks.grounding.export import export
from benchmarks.grounding.first_looks import start_looking
from benchmarks.grounding.guidance import guidance_loss
from benchmarks.grounding.layer_passes import compiled_decoder_layer, compiled_vision_layer
from benchmarks.grounding.lessons import EVERY_TURN, Batch, Lessons, normalise
from benchmarks.grounding.muon import Muon
from benchmarks.grounding.new_model import new_model, read_as_spoken
from benchmarks.grounding.packing import Lines, answer_pass, visual_tokens
from benchmarks.grounding.questions import questions
from benchmarks.grounding.recipe import RECIPES, Phase, Recipe
from benchmarks.grounding.vocabulary import ATTRIBUTES, IGNORED, attribute_tokens

STATES = Path(__file__).resolve().parent.parent.parent / ".local" / "grounding"
WARMUP = 50
NAMING_WEIGHT = 1.0
# Guidance stays whole for this share of answering, then fades to nothing.
GUIDED, FADING = 0.7, 0.25
SAVE_EVERY = 50
TEST_QUESTIONS, TEST_TALKS = 2007, 300
DTYPE = torch.bfloat16


def rate(step: int, phase: Phase) -> float:
    """Factor of the learning rates: a short rise, a plateau, a straight fall to zero."""
    return min(1.0, (step + 1) / WARMUP, (phase.steps - step) / (phase.cooldown * phase.steps))


def guidance_weight(step: int, steps: int) -> float:
    return min(1.0, max(0.0, (GUIDED + FADING - step / steps) / FADING))


def shows_thing(right: Tensor) -> Tensor:
    """[pictures, patches] bool, of attribute indices: the colour's last word is "nothing"."""
    return right[..., list(ATTRIBUTES).index("colour")] != len(ATTRIBUTES["colour"]) - 1


def naming_loss(
    model: LlavaForConditionalGeneration, visual: Tensor, right: Tensor, named: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """How badly visual tokens point at the words for what their patch shows, and how often they point right.

    visual: [pictures, patches, width]; right: [pictures, patches, attributes], indices of words. The loss is a mean
    over the named attributes in which patches that show a thing weigh as much as those that do not; the shares of right
    words are per attribute, over patches that show a thing, NaN for those not named.
    """
    embeddings = model.lm_head.weight
    states = F.rms_norm(visual, visual.shape[-1:])
    shows = shows_thing(right)
    weight = torch.where(shows, 0.5 / shows.sum(), 0.5 / (~shows).sum()).flatten()
    losses, shares = [], []
    for number, (name, tokens) in enumerate(attribute_tokens().items()):
        if name not in named:
            shares.append(visual.new_tensor(math.nan))
            continue
        words = F.rms_norm(embeddings[list(tokens)], embeddings.shape[-1:])
        logits = states @ words.T / visual.shape[-1] ** 0.5
        wanted = right[..., number]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        losses.append((loss * weight).sum())
        shares.append((logits.argmax(-1) == wanted)[shows].float().mean())
    return torch.stack(losses).mean(), torch.stack(shares)


def right_by_kind(logits: Tensor, lines: Lines, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Per kind in EVERY_TURN: how many were asked, and how many had all tokens likeliest in turn.

    kinds: as a `Batch` has them.
    """
    wanted = lines.targets != IGNORED
    wrong_tokens = logits.argmax(-1) != lines.targets[wanted]
    pictures, most = kinds.shape
    question = torch.arange(pictures)[:, None, None] * most + lines.question
    wrong = torch.zeros(pictures * most).index_add_(0, question[wanted], wrong_tokens.float())
    kinds = kinds.flatten()
    return (
        kinds[kinds >= 0].bincount(minlength=len(EVERY_TURN)),
        kinds[(kinds >= 0) & (wrong == 0)].bincount(minlength=len(EVERY_TURN)),
    )


def optimizers(model: LlavaForConditionalGeneration, phase: Phase) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for words, biases, norms and the patch embedding.

    Left out: the tower's last layer, which LLaVA never reads, and tower or decoder where their rate is 0.
    """
    tower_rate, decoder_rate, _ = phase.rates
    unread = f"encoder.layers.{len(model.model.vision_tower.encoder.layers) - 1}."
    tower: list[nn.Parameter] = []
    decoder: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if unread in name or "post_layernorm" in name:
            continue
        sees = "vision_tower" in name or "multi_modal_projector" in name
        if not (tower_rate if sees else decoder_rate or "lm_head" in name):
            continue
        if parameter.dim() != 2 or "embed" in name or "lm_head" in name:
            others.append(parameter)
        else:
            (tower if sees else decoder).append(parameter)
    groups = [
        {"params": parameters, "lr": peak, "peak": peak}
        for parameters, peak in zip((tower, decoder, others), phase.rates, strict=True)
    ]
    return [
        Muon([group for group in groups[:2] if group["params"]]),
        torch.optim.AdamW(groups[2:], betas=(0.9, 0.98), weight_decay=0.0),
    ]


def set_rates(stepping: Iterable[torch.optim.Optimizer], phase: Phase, step: int) -> None:
    for each in stepping:
        for group in each.param_groups:
            group["lr"] = group["peak"] * rate(step, phase)


class Trainer:
    """One worker of a training run; workers see different pictures and average their gradients."""

    def __init__(
        self, recipe: Recipe, state: Path, worker: int, workers: int, resume: bool
    ) -> None:
        """state: file that progress is kept in."""
        self.recipe, self.state, self.worker, self.workers = recipe, state, worker, workers
        self.model = new_model(recipe.shape, seed=0)
        if recipe.learnt_from is not None:
            learnt, _ = load(recipe.learnt_from, torch.float32)
            self.model.load_state_dict(learnt.state_dict())
        self.curve = Curve(recipe.columns)
        self.done = dict.fromkeys(recipe.phases, 0)
        self.optimizer_state: list[dict] | None = None
        if resume:
            saved = torch.load(self.state, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.curve.rows = saved["curve"]
            self.done = saved["done"]
            self.optimizer_state = saved["optimizers"]

    def save(self, stepping: Iterable[torch.optim.Optimizer]) -> None:
        if self.worker > 0:
            return
        self.state.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "curve": self.curve.rows,
            "done": self.done,
            "optimizers": [each.state_dict() for each in stepping],
        }
        torch.save(state, self.state.with_suffix(".new"))
        os.replace(self.state.with_suffix(".new"), self.state)

    def run(self) -> None:
        if self.recipe.seeing is not None and self.done["answering"] == 0:
            self._run("seeing")
            self._settle()
            self.optimizer_state = None
        self._run("answering")

    @torch.no_grad()
    def _settle(self) -> None:
        """Gives visual tokens the size of word embeddings, and input words the output words as they are now."""
        assert self.recipe.seeing is not None
        pixels = normalise(Lessons(self.recipe.seeing.lesson, first_seed=0)[0].pixels)
        size = visual_tokens(self.model, pixels).pow(2).mean().sqrt()
        last = self.model.model.multi_modal_projector.linear_2
        last.weight.div_(size)
        last.bias.div_(size)
        (start_looking if self.recipe.starts_looking else read_as_spoken)(self.model)

    def _run(self, name: str) -> None:
        phase = self.recipe.phases[name]
        stepping = optimizers(self.model, phase)
        if self.optimizer_state is not None:
            for each, state in zip(stepping, self.optimizer_state, strict=True):
                each.load_state_dict(state)
        steps, done = phase.steps, self.done[name]
        lessons = Lessons(phase.lesson, phase.first_seed, self.worker, self.workers)
        loader = DataLoader(
            lessons,
            batch_size=None,
            sampler=range(done, steps),
            num_workers=1,
            prefetch_factor=4,
            multiprocessing_context="fork",
        )
        bar = tqdm(total=steps, initial=done, desc=name, disable=self.worker > 0, unit="step")
        for step, batch in zip(range(done, steps), loader, strict=True):
            set_rates(stepping, phase, step)
            self._step(batch, phase, guidance_weight(step, steps), stepping)
            self.done[name] += 1
            bar.update()
            if self.done[name] % SAVE_EVERY == 0:
                row = self.curve.close(name, self.done[name])
                if self.worker == 0:
                    bar.write(row)
                self.save(stepping)
        bar.close()

    def _step(
        self, batch: Batch, phase: Phase, guiding: float, stepping: list[torch.optim.Optimizer]
    ) -> None:
        with torch.set_grad_enabled(phase.rates[0] > 0):
            visual = visual_tokens(
                self.model, normalise(batch.pixels), DTYPE, compiled_vision_layer
            )
        loss, shares = naming_loss(self.model, visual, batch.attributes, self.recipe.named)
        self.curve.add_naming(loss, shares)
        if (lines := batch.lines) is not None:
            found = answer_pass(self.model, visual, lines, DTYPE, compiled_decoder_layer)
            wanted = lines.targets[lines.targets != IGNORED]
            answering = F.cross_entropy(found.logits, wanted)
            loss = answering + NAMING_WEIGHT * loss
            looking = answering.new_tensor(math.nan)
            if batch.guide is not None and guiding > 0:
                owner = lines.owner.flatten(1)
                looking = guidance_loss(found.queries, found.keys, owner, batch.guide)
                loss = loss + guiding * looking
            self.curve.add_answers(
                answering, looking, *right_by_kind(found.logits, lines, batch.kinds)
            )
        loss.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.workers > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient)).div_(self.workers)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in stepping:
            optimizer.step()
        self.model.zero_grad()


def state_of(recipe: str) -> Path:
    return STATES / f"{recipe}.pt"


def train_worker(worker: int, recipe: str, workers: int, resume: bool, meeting_point: str) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=meeting_point, rank=worker, world_size=workers)
    Trainer(RECIPES[recipe], state_of(recipe), worker, workers, resume).run()


def finish(name: str) -> None:
    """Exports what was trained and measures it as anyone would: from the files, by transformers."""
    recipe, state = RECIPES[name], torch.load(state_of(name), weights_only=True)
    model = new_model(recipe.shape, seed=0)
    model.load_state_dict(state["model"])
    export(model, recipe.folder)
    asked = tqdm(questions("test", TEST_QUESTIONS, recipe.kinds), total=TEST_QUESTIONS, desc="test")
    trained = load(recipe.folder, torch.float32)
    shares = accuracy_by_kind(*trained, asked)
    talks = None
    if recipe.answering.lesson.talks:
        held = tqdm(conversations("test", TEST_TALKS), total=TEST_TALKS, desc="conversations")
        talks = accuracy_by_turn(*trained, held)
    write_card(recipe, shares, TEST_QUESTIONS, state["done"], state["curve"], talks, TEST_TALKS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", choices=list(RECIPES), default="guided", help="of which model (default: guided)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of one thread each (default: 2)"
    )
    parser.add_argument(
        "--export-only", action="store_true", help="export and measure the saved state as it is"
    )
    args = parser.parse_args()
    started = time.perf_counter()
    if not args.export_only:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (args.recipe, args.workers, args.resume, f"file://{folder}/meeting-point")
            mp.spawn(train_worker, arguments, nprocs=args.workers)
    finish(args.recipe)
    print(f"{RECIPES[args.recipe].folder} made in {(time.perf_counter() - started) / 60:.0f} min")


if __name__ == "__main__":
    main()
