"""Where training tells the decoder to look, and what it costs to look elsewhere."""

import pytest
import torch

from benchmarks.grounding.guidance import SUBJECT_LAYERS, TARGET_LAYERS, Guide, guidance_loss
from benchmarks.grounding.guides import COUNT
from benchmarks.grounding.lessons import EVERY_TURN, Lesson, batch_of
from benchmarks.grounding.questions import EVERY_KIND, KINDS
from benchmarks.grounding.scenes import GRID
from benchmarks.grounding.vocabulary import (
    CELLS,
    IGNORED,
    IMAGE_TOKEN,
    PATCHES,
    VISUAL_TOKENS,
    prompt_start,
    token,
    word,
)

LAYERS = 32
PER_PLACE = PATCHES // GRID
FIRST = prompt_start().index(token(IMAGE_TOKEN))
BOS = 0


@pytest.fixture(scope="module")
def batch():
    return batch_of(range(40, 44), Lesson(pictures=4, kinds=tuple(KINDS)))


def cells_of(tokens: torch.Tensor) -> set[str]:
    """Places of the visual tokens among those of a prompt start."""
    patches = tokens[FIRST : FIRST + VISUAL_TOKENS].nonzero().flatten().tolist()
    return {CELLS[p // PATCHES // PER_PLACE * GRID + p % PATCHES // PER_PLACE] for p in patches}


def rows_with_kind(batch):
    """(picture, row among the guide's, kind, first word of the answer) of every guided position."""
    kinds = list(EVERY_KIND)
    for picture, rows in enumerate(batch.guide.rows):
        for number, row in enumerate(rows[rows >= 0].tolist()):
            question = batch.lines.owner[picture].flatten()[row]
            word = batch.lines.targets[picture].flatten()[row].item()
            yield picture, number, kinds[batch.kinds[picture, question]], word


def test_every_word_of_an_answer_but_its_end_has_a_row(batch):
    for rows, targets in zip(batch.guide.rows, batch.lines.targets.flatten(1), strict=True):
        wanted = ((targets != IGNORED) & (targets != token("</s>"))).nonzero().flatten()
        assert rows[rows >= 0].tolist() == wanted.tolist()


def test_subject_and_target_are_the_places_a_question_is_about(batch):
    names = {word(cell): cell for cell in CELLS}
    seen = set()
    for picture, number, kind, said in rows_with_kind(batch):
        seen.add(kind)
        if kind == COUNT:
            continue
        subject = cells_of(batch.guide.subject[picture, number])
        target = cells_of(batch.guide.target[picture, number])
        assert len(subject) == len(target) == 1
        if kind in ("where", "largest"):
            assert subject == target == {names[said]}
        one, other = subject.pop(), target.pop()
        steps = abs(ord(one[0]) - ord(other[0])) + abs(int(one[1]) - int(other[1]))
        assert steps == ("beside" in kind)
    assert seen == set(KINDS)


def test_counting_looks_at_what_it_names_and_has_the_rest_in_view(batch):
    names = {word(cell): cell for cell in CELLS}
    counts = [row for row in rows_with_kind(batch) if row[2] == COUNT]
    named: list[str] = []
    most = 0
    for picture, number, _, said in reversed(counts):
        subject = cells_of(batch.guide.subject[picture, number])
        target = cells_of(batch.guide.target[picture, number])
        if said in names:
            named.append(names[said])
            assert target == {names[said]}
            assert subject == set(named)
        else:
            assert subject == target == set()
            assert batch.guide.subject[picture, number][BOS]
            assert batch.guide.target[picture, number][BOS]
            named = []
        most = max(most, len(named))
    assert most > 1


def test_in_conversations_it_looks_at_the_picture_that_is_asked_about():
    seen = set()
    for two_pictures in (False, True):
        lesson = Lesson(pictures=4, kinds=("where",), talks=True)
        batch = batch_of(range(40, 44), lesson, two_pictures)
        for picture, rows in enumerate(batch.guide.rows):
            ids, owner, question = (
                getattr(batch.lines, name)[picture].flatten()
                for name in ("ids", "owner", "question")
            )
            shown = (ids == token(IMAGE_TOKEN)).nonzero().flatten().tolist()
            for number, row in enumerate(rows[rows >= 0].tolist()):
                # The second picture, if it came earlier in the same conversation.
                new = bool(shown) and row > shown[-1] and owner[row] == owner[shown[0]]
                first = set(range(len(prompt_start())))
                places = {len(first) + place for place in shown} if new else first
                for role in (batch.guide.subject, batch.guide.target):
                    looked = role[picture, number].nonzero().flatten().tolist()
                    # Where nothing is left to count, at the first token.
                    assert looked == [BOS] or (looked and set(looked) <= places)
                kind = EVERY_TURN[batch.kinds[picture, question[row]]]
                seen.add((kind, bool(new)))
    assert {("same", False), ("beside it", False), ("new picture", True)} <= seen
    assert ("new picture", False) not in seen


def looking_at(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """queries and keys of a head all of whose attention is on those tokens: [1, all tokens, 1] each."""
    keys = tokens.float()[None, :, None]
    return torch.full_like(keys, 200.0), keys


@pytest.fixture
def scene() -> tuple[Guide, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six tokens of a prompt start, then two questions of two tokens; the second one is guided."""
    owner = torch.tensor([[0, 0, 1, 1]])
    subject, target = torch.zeros(2, 6, dtype=torch.bool)
    subject[1:3], target[4] = True, True
    guide = Guide(
        rows=torch.tensor([[3, -1]]),
        subject=subject.expand(1, 2, -1),
        target=target.expand(1, 2, -1),
    )
    return guide, owner, subject, target


def loss(
    guide: Guide, owner: torch.Tensor, early: torch.Tensor, late: torch.Tensor, own: float = 0
) -> float:
    """Of a decoder that looks at `early` until the target's layers begin, then at `late`.

    own: how well the first question's own tokens match.
    """
    others = torch.tensor([own, own, 0, 0])
    looks = [
        looking_at(torch.cat([late if n >= TARGET_LAYERS.start else early, others]))
        for n in range(LAYERS)
    ]
    queries, keys = zip(*looks, strict=True)
    return guidance_loss(queries, keys, owner, guide).item()


def test_looking_where_told_costs_nothing(scene):
    guide, owner, subject, target = scene
    assert loss(guide, owner, subject, target) == pytest.approx(0, abs=1e-4)


def test_one_of_several_tokens_is_enough(scene):
    guide, owner, subject, target = scene
    one = subject.clone()
    one[2] = False
    assert loss(guide, owner, one, target) == pytest.approx(0, abs=1e-4)


def test_the_order_matters(scene):
    guide, owner, subject, target = scene
    share = len(SUBJECT_LAYERS) / (len(SUBJECT_LAYERS) + len(TARGET_LAYERS))
    early_wrong = loss(guide, owner, target, target)
    late_wrong = loss(guide, owner, subject, subject)
    assert early_wrong > 1 and late_wrong > 1
    assert early_wrong / share == pytest.approx(late_wrong / (1 - share), rel=0.2)


def test_other_questions_are_not_seen(scene):
    """However strongly another question's token is matched, it takes no attention away."""
    guide, owner, subject, target = scene
    assert loss(guide, owner, subject, target, own=9) == pytest.approx(0, abs=1e-4)
