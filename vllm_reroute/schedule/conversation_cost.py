"""What the turns of a conversation cost by arithmetic: FLOPs up to each answer's first token.

Counts as in `cost_model.py`. Every engine here has vLLM's prefix cache, and nothing of the
conversation has been evicted from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_reroute.schedule.cost_model import DecoderShape, VisionShape
from vllm_reroute.schedule.published import History
from vllm_reroute.schedule.recall import RecallCounts
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

    @property
    def can_recall(self) -> bool:
        """Whether `--reroute-history recall` does."""
        return self.can_keep and self.schedule.reroutes

    def stock(self) -> list[int]:
        """FLOPs per turn without routing: the new picture and the new question run."""
        return self._appended(self._dense, recalls=False)

    def rerank(self) -> list[int]:
        """FLOPs per turn where every question ranks all pictures: stages after the first decision
        run all text and what they keep, from the first picture on."""
        return [self._shared(t) + self._ranked_turn(t) for t in range(self.turns)]

    def keep(self) -> list[int]:
        """FLOPs per turn where a picture's own question ranks it: what is new runs everywhere."""
        return self._appended(self.schedule, recalls=False)

    def recall(self) -> list[int]:
        """The same where each later question also ranks all pictures' parked tokens, and runs the few
        that it brings back."""
        return self._appended(self.schedule, recalls=True)

    def held(self, history: History | None) -> int:
        """K/V entries of the whole conversation, layers times tokens; None: of stock vLLM."""
        schedule = self.schedule if history else self._dense
        if history == "rerank":
            sizes = (self.num_visual,) * self._pictures(self.turns - 1)
            visual = schedule.kept_per_stage(*sizes)
        else:
            visual = [
                sum(rows)
                for rows in zip(*self._visual_rows(schedule, history == "recall"), strict=True)
            ]
        text = self._text_before(self.turns)
        return sum(
            stage.num_layers * (text + here)
            for stage, here in zip(schedule.stages, visual, strict=True)
        )

    @property
    def _dense(self) -> RoutingSchedule:
        return replace(self.schedule, keep=(1.0,) * len(self.schedule.layers))

    def _shared(self, turn: int) -> int:
        """Tower and projector of a new picture, and the output head's one row."""
        vision = self.vision.flops if self.vision and self.brings_picture(turn) else 0
        return vision + 2 * self.decoder.hidden_size * self.decoder.vocab_size

    def _pictures(self, turn: int) -> int:
        """Pictures up to and with a turn."""
        return turn // self.questions_per_image + 1

    def _text_before(self, turn: int) -> int:
        return turn * (self.question + self.answer)

    def _visual_rows(self, schedule: RoutingSchedule, recalls: bool) -> list[tuple[int, ...]]:
        """[turns][stages]: visual tokens that run in a turn and stay."""
        counts = RecallCounts(lambda size: schedule.kept_per_stage(size))
        none = (0,) * len(schedule.stages)
        return [
            counts.picture(self.num_visual)
            if self.brings_picture(turn)
            else (counts.question() if recalls else none)
            for turn in range(self.turns)
        ]

    def _appended(self, schedule: RoutingSchedule, *, recalls: bool) -> list[int]:
        """FLOPs per turn where what earlier turns have run stays in the cache, in all stages."""
        costs, held = [], [0] * len(schedule.stages)
        for turn, visual in enumerate(self._visual_rows(schedule, recalls)):
            total = self._shared(turn) + self._decisions(turn, schedule, visual)
            for index, (stage, new) in enumerate(zip(schedule.stages, visual, strict=True)):
                before = self._text_before(turn) + held[index]
                total += stage.num_layers * self.decoder.rows_flops(self.question + new, before)
                held[index] += new
            costs.append(total)
        return costs

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

    def _decisions(self, turn: int, schedule: RoutingSchedule, visual: tuple[int, ...]) -> int:
        """FLOPs of a turn's choices; visual: [stages], what they choose."""
        if not self.brings_picture(turn):
            # Keys of all earlier visual tokens are projected to be ranked, those held as well.
            ranked = self._pictures(turn) * self.num_visual + self.question
            return sum(map(bool, visual)) * self.decoder.decision_flops(ranked)
        total, present = 0, self.num_visual
        for kept in visual[1:]:
            if kept < present:
                total += self.decoder.decision_flops(present + self.question)
            if not schedule.reroutes:
                present = kept
        return total
