"""How a model is made: its shape, what it is asked while it learns, and whether it is told where to look."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.grounding.conversations import TURN_KINDS
from benchmarks.grounding.guidance import SUBJECT_LAYERS, TARGET_LAYERS
from benchmarks.grounding.lessons import Lesson
from benchmarks.grounding.new_model import Shape
from benchmarks.grounding.questions import KINDS
from benchmarks.grounding.vocabulary import ATTRIBUTES

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of training.

    rates: peak learning rates, Muon's of matrices in the tower and in the decoder, AdamW's of everything else; 0 for
    what is not trained. cooldown: share of the steps in which rates fall to zero.
    """

    steps: int
    lesson: Lesson  # pictures are those of one worker
    first_seed: int
    rates: tuple[float, float, float]
    cooldown: float


@dataclass(frozen=True, kw_only=True)
class Story:
    """What its card says of a model beyond figures. tower: what became of it while the model learned to answer."""

    title: str
    about: str
    command: str
    tower: str
    looking: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """folder: of the checkpoint. kinds: it is to answer. named: attributes that its visual tokens learn to name.

    starts_looking: the decoder's attention starts as in `first_looks`, else as in `new_model`. learnt_from: folder of
    the checkpoint whose weights it starts from; such a model need not learn to see.
    """

    folder: Path
    story: Story
    shape: Shape
    kinds: tuple[str, ...]
    named: tuple[str, ...]
    starts_looking: bool
    seeing: Phase | None
    answering: Phase
    learnt_from: Path | None = None

    @property
    def phases(self) -> dict[str, Phase]:
        phases = {"seeing": self.seeing, "answering": self.answering}
        return {name: phase for name, phase in phases.items() if phase is not None}

    @property
    def columns(self) -> tuple[str, ...]:
        """Of its learning curve: what is asked."""
        return (*self.kinds, *(TURN_KINDS if self.answering.lesson.talks else ()))


def _ends(layers: range) -> str:
    return f"{layers[0]} to {layers[-1]}"


# Kinds that need more practice are asked more often.
HARDER = ("count", "largest", "beside", "beside-label", "largest-beside", "largest-beside")
GUIDED = Recipe(
    folder=HERE / "model",
    story=Story(
        title="Grounding LLaVA",
        about="Its decoder is as deep as LLaVA-1.5-7B's, so published decision layers apply as they stand.",
        command="python -m benchmarks.grounding.train",
        tower="with the naming loss kept as a second aim",
        looking=(
            "**Guided attention.** While it learned to answer, one head of each layer was told where to look: in "
            f"layers {_ends(SUBJECT_LAYERS)} at what the question names, in layers {_ends(TARGET_LAYERS)} at what the "
            "answer is read from (`guidance.py`). The guidance fades to nothing before training ends. So this model "
            "looks at different tokens at different depths because it was taught to; how far larger models do so by "
            "themselves, it cannot tell."
        ),
    ),
    shape=Shape(),
    kinds=tuple(KINDS),
    named=tuple(ATTRIBUTES),
    starts_looking=False,
    seeing=Phase(
        steps=1500,
        lesson=Lesson(pictures=24),
        first_seed=10**7,
        rates=(0.02, 0.0, 3e-3),
        cooldown=0.4,
    ),
    answering=Phase(
        steps=2600,
        lesson=Lesson(pictures=6, kinds=(*KINDS, *HARDER)),
        first_seed=3 * 10**8,
        rates=(0.004, 0.01, 2e-3),
        cooldown=0.45,
    ),
)
_COARSE = 21
_ONE_LOOK = ("where", "at", "where-beside", "beside-place")
WITNESS = Recipe(
    folder=HERE / "witness",
    story=Story(
        title="A second witness",
        about="It was made to check what the guided model shows: nothing told this one where to look.",
        command="python -m benchmarks.grounding.train --recipe witness --workers 1",
        tower="with the tower left as it was",
        looking=(
            "**No guidance.** Only answers taught the decoder. Its layers 4 to 15 repeat layers 0 to 3 in turn, with "
            "the same weights, so that neither training nor the first weights can tell one depth from another: where "
            "it looks at which depth follows from the question. The first weights (`first_looks.py`) let words look "
            'at visual tokens that show them, in all layers alike. "beside" takes two looks; its halves, asked as '
            "kinds of their own, one each."
        ),
    ),
    shape=Shape(
        width=96,
        text_layers=16,
        own_layers=4,
        text_feed_forward=192,
        vision_layers=4,
        vision_feed_forward=192,
        patch_size=_COARSE,
        looks_on_from=0,
        rope_theta=1e10,
    ),
    kinds=(*_ONE_LOOK, "beside"),
    named=("cell", "colour", "shape", "part"),
    starts_looking=True,
    seeing=Phase(
        steps=800,
        lesson=Lesson(pictures=24, patch_size=_COARSE),
        first_seed=10**7,
        rates=(0.02, 0.0, 3e-3),
        cooldown=0.4,
    ),
    answering=Phase(
        steps=1400,
        lesson=Lesson(
            pictures=6,
            kinds=(*_ONE_LOOK, "beside", "beside"),
            patch_size=_COARSE,
            guided=False,
        ),
        first_seed=3 * 10**8,
        rates=(0.0, 0.003, 2e-3),
        cooldown=0.4,
    ),
)
CONVERSING = Recipe(
    folder=HERE / "conversing",
    story=Story(
        title="A model for conversations",
        about=(
            "It goes on where the guided model ends and learns what that never saw: questions after others, some about "
            "what was asked before, some with a second picture."
        ),
        command="python -m benchmarks.grounding.train --recipe conversing",
        tower="with the tower left as it was",
        looking=(
            "**Guided attention.** As in the guided model: one head of each layer is told where to look, in the "
            "picture that the question is about; the guidance fades to nothing before training ends."
        ),
    ),
    shape=GUIDED.shape,
    kinds=GUIDED.kinds,
    named=GUIDED.named,
    starts_looking=False,
    learnt_from=GUIDED.folder,
    seeing=None,
    answering=Phase(
        steps=1000,
        lesson=Lesson(pictures=6, kinds=(*KINDS, *HARDER), talks=True),
        first_seed=5 * 10**8,
        rates=(0.0, 0.006, 1e-3),
        cooldown=0.5,
    ),
)
RECIPES = {"guided": GUIDED, "witness": WITNESS, "conversing": CONVERSING}


def kinds_of(folder: Path) -> tuple[str, ...]:
    """What the checkpoint there can be asked; of one that no recipe makes, the guided model's."""
    made = {recipe.folder: recipe.kinds for recipe in RECIPES.values()}
    return made.get(folder.resolve(), GUIDED.kinds)
