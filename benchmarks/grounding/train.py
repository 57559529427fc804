"""Trains the grounding model, exports it and writes its card.

    python -m benchmarks.grounding.train

First the vision tower learns to name what each patch shows, then everything learns to answer. State is kept under
.local/grounding; --resume goes on from there.
"""

import argparse
import os
import tempfile
import time
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
from benchmarks.grounding.evaluate import MODEL, accuracy_by_kind, load
from benchmarks.grounding.export import export
from benchmarks.grounding.lessons import FACT, ONE_HOP, TAUGHT, Batch, Lessons, Stage, normalise
from benchmarks.grounding.muon import Muon
from benchmarks.grounding.new_model import new_model, read_as_spoken
from benchmarks.grounding.packing import ATTENTION, answer_logits, visual_tokens
from benchmarks.grounding.questions import KINDS, questions
from benchmarks.grounding.vocabulary import IGNORED, attribute_tokens

STATE = Path(__file__).resolve().parent.parent.parent / ".local" / "grounding" / "state.pt"
# Pictures are those of one worker.
SEEING = Stage(steps=3000, pictures=8)
HARDER = ("count", "count", "largest", "beside", "beside", "beside")
HALVES = ("where-beside", "beside-cell", "beside-cell", "beside-cell", "label-at")
ANSWERING = (
    Stage(steps=250, pictures=4, asked=4, kinds=(FACT,) * 4 + ONE_HOP, lines=4),
    Stage(steps=300, pictures=8, asked=4, kinds=(FACT, *KINDS), lines=5),
    Stage(steps=350, pictures=8, asked=4, kinds=(*KINDS, *HARDER), lines=5),
    Stage(steps=1600, pictures=12, asked=4, kinds=(*KINDS, *HARDER, *HALVES), lines=5),
)
# Learning rates. Muon's of the tower while it learns to see, then AdamW's.
SEEING_MATRICES, SEEING_OTHERS = 0.02, 3e-3
TOWER, DECODER, OUTPUT = 4e-4, 5e-4, 3e-3
WARMUP = 50
SEEING_COOLDOWN, ANSWERING_COOLDOWN = 0.4, 0.22
ATTRIBUTE_WEIGHT = 1.0
SAVE_EVERY = 50
TEST_QUESTIONS = 2007


def rate(step: int, steps: int, cooldown: float) -> float:
    """Factor of the learning rates: a short rise, a plateau, a straight fall to zero."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (cooldown * steps))


def shows_thing(right: Tensor) -> Tensor:
    """[pictures, patches] bool, of attribute indices: the colour's last word is "nothing"."""
    return right[..., 1] != len(attribute_tokens()[1]) - 1


def attribute_loss(
    model: LlavaForConditionalGeneration, visual: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """How badly visual tokens point at the words for what their patch shows, and how often they point right.

    visual: [pictures, patches, width]; right: [pictures, patches, attributes], indices of words. The loss is a mean
    over attributes in which patches that show a thing weigh as much as those that do not; the shares of right words
    are per attribute, over patches that show a thing.
    """
    embeddings = model.get_output_embeddings().weight
    states = F.rms_norm(visual, visual.shape[-1:])
    shows = shows_thing(right)
    weight = torch.where(shows, 0.5 / shows.sum(), 0.5 / (~shows).sum()).flatten()
    losses, shares = [], []
    for number, tokens in enumerate(attribute_tokens()):
        words = F.rms_norm(embeddings[list(tokens)], embeddings.shape[-1:])
        logits = states @ words.T / visual.shape[-1] ** 0.5
        wanted = right[..., number]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        losses.append((loss * weight).sum())
        shares.append((logits.argmax(-1) == wanted)[shows].float().mean())
    return torch.stack(losses).mean(), torch.stack(shares)


def right_by_kind(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per kind in TAUGHT: how many were asked, and how many had all tokens likeliest in turn."""
    wanted = batch.lines.targets != IGNORED
    wrong_tokens = logits.argmax(-1) != batch.lines.targets[wanted]
    pictures, most = batch.kinds.shape
    question = torch.arange(pictures)[:, None, None] * most + batch.lines.owner
    wrong = torch.zeros(pictures * most).index_add_(0, question[wanted], wrong_tokens.float())
    kinds = batch.kinds.flatten()
    return (
        kinds[kinds >= 0].bincount(minlength=len(TAUGHT)),
        kinds[(kinds >= 0) & (wrong == 0)].bincount(minlength=len(TAUGHT)),
    )


def _is_seeing(name: str) -> bool:
    return "vision_tower" in name or "multi_modal_projector" in name


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() == 2 and "embed" not in name and "lm_head" not in name


def seeing_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    parts = [(n, p) for n, p in _read(model) if _is_seeing(n) or "lm_head" in n]
    return [
        Muon([p for n, p in parts if _is_matrix(n, p)], lr=SEEING_MATRICES),
        torch.optim.AdamW(
            [p for n, p in parts if not _is_matrix(n, p)],
            lr=SEEING_OTHERS, betas=(0.9, 0.95), weight_decay=0.0,
        ),
    ]  # fmt: skip


def answering_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    rates = {"tower": TOWER, "decoder": DECODER, "output": OUTPUT}
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in rates}
    for name, parameter in _read(model):
        if _is_seeing(name):
            parts["tower"].append(parameter)
        elif "lm_head" in name or parameter.dim() == 1:
            parts["output"].append(parameter)
        else:
            parts["decoder"].append(parameter)
    groups = [{"params": parameters, "lr": rates[part]} for part, parameters in parts.items()]
    return [torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)]


def _read(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that LLaVA reads: not the tower's last layer."""
    last = f"encoder.layers.{len(model.model.vision_tower.encoder.layers) - 1}."
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if last not in name and "post_layernorm" not in name
    ]


class Trainer:
    """One worker of a training run; workers see different pictures and average their gradients."""

    def __init__(self, worker: int, workers: int, resume: bool) -> None:
        self.worker, self.workers = worker, workers
        self.model = new_model(seed=0)
        self.model.set_attn_implementation({"text_config": ATTENTION, "vision_config": "sdpa"})
        self.curve = Curve()
        self.done = {"seeing": 0, "answering": 0}
        self.optimizer_state: list[dict] | None = None
        if resume:
            state = torch.load(STATE, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.curve.rows = state["curve"]
            self.done = state["done"]
            self.optimizer_state = state["optimizers"]

    def save(self, optimizers: list[torch.optim.Optimizer]) -> None:
        if self.worker == 0:
            STATE.parent.mkdir(parents=True, exist_ok=True)
            state = {
                "model": self.model.state_dict(),
                "curve": self.curve.rows,
                "done": self.done,
                "optimizers": [each.state_dict() for each in optimizers],
            }
            torch.save(state, STATE.with_suffix(".new"))
            os.replace(STATE.with_suffix(".new"), STATE)

    def see(self) -> None:
        if self.done["seeing"] < SEEING.steps:
            self._run("seeing", (SEEING,), seeing_optimizers(self.model), SEEING_COOLDOWN)
            self._settle()
            self.optimizer_state = None

    def answer(self) -> None:
        self._run("answering", ANSWERING, answering_optimizers(self.model), ANSWERING_COOLDOWN)

    @torch.no_grad()
    def _settle(self) -> None:
        """Gives visual tokens the size of word embeddings, and input words the output words as they are now."""
        pixels = normalise(Lessons(SEEING, first_seed=0)[0].pixels)
        size = visual_tokens(self.model, pixels).pow(2).mean().sqrt()
        last = self.model.model.multi_modal_projector.linear_2
        last.weight.div_(size)
        last.bias.div_(size)
        read_as_spoken(self.model)

    def _run(
        self,
        phase: str,
        stages: tuple[Stage, ...],
        optimizers: list[torch.optim.Optimizer],
        cooldown: float,
    ) -> None:
        peaks = [group["lr"] for each in optimizers for group in each.param_groups]
        if self.optimizer_state is not None:
            for each, state in zip(optimizers, self.optimizer_state, strict=True):
                each.load_state_dict(state)
        groups = [group for each in optimizers for group in each.param_groups]
        steps = sum(stage.steps for stage in stages)
        bar = tqdm(
            total=steps, initial=self.done[phase], desc=phase, disable=self.worker > 0, unit="step"
        )
        first = 0
        for number, stage in enumerate(stages):
            seed = (10**7) * (1 + number + (10 if phase == "seeing" else 20))
            lessons = Lessons(stage, seed, self.worker, self.workers)
            todo = range(max(0, self.done[phase] - first), stage.steps)
            loader = DataLoader(
                lessons,
                batch_size=None,
                sampler=todo,
                num_workers=1,
                prefetch_factor=4,
                multiprocessing_context="fork",
            )
            for batch in loader if len(todo) else ():
                factor = rate(self.done[phase], steps, cooldown)
                for group, peak in zip(groups, peaks, strict=True):
                    group["lr"] = peak * factor
                self._step(batch, stage, optimizers)
                self.done[phase] += 1
                bar.update()
                if self.done[phase] % SAVE_EVERY == 0:
                    row = self.curve.close(phase, self.done[phase])
                    bar.write(row) if self.worker == 0 else None
                    self.save(optimizers)
            first += stage.steps
        bar.close()

    def _step(self, batch: Batch, stage: Stage, optimizers: list) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            visual = visual_tokens(self.model, normalise(batch.pixels))
        visual = visual.float()
        seeing, shares = attribute_loss(self.model, visual, batch.attributes)
        loss = seeing
        if batch.lines is not None:
            with torch.autocast("cpu", torch.bfloat16):
                logits = answer_logits(self.model, visual[: stage.asked], batch.lines)
            wanted = batch.lines.targets[batch.lines.targets != IGNORED]
            answering = F.cross_entropy(logits.float(), wanted)
            loss = answering + ATTRIBUTE_WEIGHT * seeing
            self.curve.add_answers(answering, *right_by_kind(logits, batch))
        self.curve.add_sight(seeing, shares)
        loss.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.workers > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(flat)
            for p, part in zip(
                parameters, flat.split([p.numel() for p in parameters]), strict=True
            ):
                p.grad.copy_(part.view_as(p)).div_(self.workers)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        self.model.zero_grad()


def train_worker(worker: int, workers: int, resume: bool, meeting_point: str) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=meeting_point, rank=worker, world_size=workers)
    trainer = Trainer(worker, workers, resume)
    trainer.see()
    trainer.answer()


def finish() -> None:
    """Exports what was trained and measures it as anyone would: from the files, by transformers."""
    state = torch.load(STATE, weights_only=True)
    model = new_model(seed=0)
    model.load_state_dict(state["model"])
    export(model, MODEL)
    asked = tqdm(questions("test", TEST_QUESTIONS), total=TEST_QUESTIONS, desc="test")
    shares = accuracy_by_kind(*load(MODEL, torch.float32), asked)
    write_card(MODEL, shares, TEST_QUESTIONS, state["done"], state["curve"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
            arguments = (args.workers, args.resume, f"file://{folder}/meeting-point")
            mp.spawn(train_worker, arguments, nprocs=args.workers)
    finish()
    print(f"{MODEL} made in {(time.perf_counter() - started) / 60:.0f} min")


if __name__ == "__main__":
    main()
