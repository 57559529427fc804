"""What the turns of a conversation cost by arithmetic: FLOPs up to each answer's first token.

Counts as in `cost_model.py`. Every engine here has vLLM's prefix cache, and nothing of the
conversation has been evicted from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_reroute.schedule.cost_model import DecoderShape, VisionShape
from vllm_reroute.schedule.routing_schedule import RoutingSchedule


@dataclass(frozen=True, kw_only=True)
class ConversationCost:
    """A conversation about one picture after another.

    vision: of one picture, None where it is not known; it is then left out. num_visual: visual tokens
    of a picture. turns: questions in all. questions_per_image: asked before the next picture comes.
    question, answer: text tokens of one turn.
    """

    decoder: DecoderShape
    vision: VisionShape | None
    schedule: RoutingSchedule
    num_visual: int
    turns: int
    questions_per_image: int
    question: int
    answer: int

    def brings_picture(self, turn: int) -> bool:
        """Whether a new picture comes with turn `turn`, from 0 on."""
        return turn % self.questions_per_image == 0

    @property
    def can_keep(self) -> bool:
        """Whether `--reroute-history keep` works with this schedule."""
        return self.schedule.encoder_ratio is None

    def stock(self) -> list[int]:
        """FLOPs per turn without routing: the new picture and the new question run."""
        dense = replace(self.schedule, keep=(1.0,) * len(self.schedule.layers))
        return [self._shared(t) + self._kept_turn(t, dense) for t in range(self.turns)]

    def rerank(self) -> list[int]:
        """FLOPs per turn where every question ranks all pictures: stages after the first decision
        run all text and what they keep, from the first picture on."""
        return [self._shared(t) + self._ranked_turn(t) for t in range(self.turns)]

    def keep(self) -> list[int]:
        """FLOPs per turn where a picture's own question ranks it: what is new runs everywhere."""
        return [
            self._shared(t) + self._kept_turn(t, self.schedule) + self._own_decisions(t)
            for t in range(self.turns)
        ]

    def _shared(self, turn: int) -> int:
        """Tower and projector of a new picture, and the output head's one row."""
        vision = self.vision.flops if self.vision and self.brings_picture(turn) else 0
        return vision + 2 * self.decoder.hidden_size * self.decoder.vocab_size

    def _pictures(self, turn: int) -> int:
        """Pictures up to and with a turn."""
        return turn // self.questions_per_image + 1

    def _text_before(self, turn: int) -> int:
        return turn * (self.question + self.answer)

    def _kept_turn(self, turn: int, schedule: RoutingSchedule) -> int:
        new = int(self.brings_picture(turn))
        total = 0
        for stage, kept in zip(
            schedule.stages, schedule.kept_per_stage(self.num_visual), strict=True
        ):
            before = self._text_before(turn) + kept * (self._pictures(turn) - new)
            rows = self.question + kept * new
            total += stage.num_layers * self.decoder.rows_flops(rows, before)
        return total

    def _ranked_turn(self, turn: int) -> int:
        schedule, sizes = self.schedule, (self.num_visual,) * self._pictures(turn)
        text = self._text_before(turn) + self.question
        total, present = 0, sum(sizes)
        for index, (stage, kept) in enumerate(
            zip(schedule.stages, schedule.kept_per_stage(*sizes), strict=True)
        ):
            if index == 0 and self.can_keep:
                new = self.question + self.num_visual * self.brings_picture(turn)
                before = text + present - new
                total += stage.num_layers * self.decoder.rows_flops(new, before)
                continue
            if kept < present:
                total += self.decoder.decision_flops(present + text)
            total += stage.num_layers * self.decoder.rows_flops(kept + text, 0)
            if not schedule.reroutes:
                present = kept
        return total

    def _own_decisions(self, turn: int) -> int:
        if not self.brings_picture(turn):
            return 0
        total, present = 0, self.num_visual
        for kept in self.schedule.kept_per_stage(self.num_visual)[1:]:
            if kept < present:
                total += self.decoder.decision_flops(present + self.question)
            if not self.schedule.reroutes:
                present = kept
        return total
