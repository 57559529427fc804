"""The words of the task, a tokenizer in which each is one token, and the processor around it.

The tokenizer is a byte-level BPE, so any text can be asked and comes back unchanged.
"""

from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlavaProcessor

from benchmarks import local_tokenizer
from benchmarks.grounding.questions import DIRECTIONS, NOTHING, NOWHERE, plural
from benchmarks.grounding.scenes import (
    COLOURS,
    GRID,
    IMAGE_SIZE,
    LABELS,
    RADII,
    SHAPES,
    Thing,
    cell_name,
)
from benchmarks.local_tokenizer import IMAGE_TOKEN, SPECIAL_TOKENS

PATCH_SIZE = 14
PATCHES = IMAGE_SIZE // PATCH_SIZE
VISUAL_TOKENS = PATCHES * PATCHES
IGNORED = -100

CELLS = tuple(cell_name(row, column) for row in range(GRID) for column in range(GRID))
SIZES = ("smallest", NOTHING, "largest")
# Of a thing: the patch its middle lies in, and the others.
PARTS = ("centre", "edge", NOTHING)
# What the words of a visual token are about. A patch that shows no thing is NOTHING in all but its cell.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "cell": CELLS,
    "colour": (*COLOURS, NOTHING),
    "shape": (*SHAPES, NOTHING),
    "label": (*LABELS, NOTHING),
    "size": SIZES,
    "part": PARTS,
}
# Words with the space before them.
WORDS = (
    *("is", "at", "of", "the", "has", "are", "and", "how", "many", "label", "thing", "things"),
    *(word for direction in DIRECTIONS for word in direction.split()),
    *map(plural, SHAPES),
    *dict.fromkeys(word for group in ATTRIBUTES.values() for word in group),
    *(digit for digit in "0123456789" if digit not in LABELS),
    NOWHERE,
    "ASSISTANT",
)
OPENING_WORDS = ("USER", "Where", "What")
# Letters and digits stay together, so that a cell's name is one word.
WORD_PATTERN = r" ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]+|\s+"


@cache
def trained_tokenizer() -> Tokenizer:
    """The byte-level BPE with LLaVA's special tokens, adding `<s>` in front of a prompt as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,  # never reached: merging ends when every word is one token
        min_frequency=1,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*OPENING_WORDS, *(" " + word for word in WORDS)], trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    return tokenizer


def token(name: str) -> int:
    """Id of a special token."""
    return local_tokenizer.special_token_id(trained_tokenizer(), name)


@cache
def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text that follows others: no `<s>`."""
    return tuple(trained_tokenizer().encode(text, add_special_tokens=False).ids)


def word(text: str) -> int:
    """The one token of a word of the task, with the space before it."""
    (only,) = encode(" " + text)
    return only


@cache
def attribute_tokens() -> dict[str, tuple[int, ...]]:
    """Per attribute, the tokens of its words."""
    return {name: tuple(map(word, words)) for name, words in ATTRIBUTES.items()}


def attribute_indices(cell: str, thing: Thing | None, part: str = NOTHING) -> list[int]:
    """Which word of each attribute is right for a patch in that cell which shows that part of that thing."""
    if thing is None:
        values = (cell, *[NOTHING] * (len(ATTRIBUTES) - 1))
    else:
        band = next(i for i, (_, most) in enumerate(RADII) if thing.radius <= most)
        values = (cell, thing.colour, thing.shape, thing.label, SIZES[band], part)
    return [words.index(value) for words, value in zip(ATTRIBUTES.values(), values, strict=True)]


def prompt_start(visual: int = VISUAL_TOKENS) -> list[int]:
    """What precedes every question: `<s>USER: <image>\\n` with that many visual tokens."""
    return [
        token("<s>"),
        *encode("USER: "),
        *[token(IMAGE_TOKEN)] * visual,
        *encode("\n"),
    ]


def question_tokens(text: str) -> tuple[int, ...]:
    """What follows it, up to where the answer starts."""
    return encode(text + " ASSISTANT:")


def next_question_tokens(text: str, visual: int = 0) -> tuple[int, ...]:
    """What follows an answer in a conversation, up to where the next one starts; with a picture of so many tokens."""
    if not visual:
        return encode(f" USER: {text} ASSISTANT:")
    picture = [token(IMAGE_TOKEN)] * visual
    return (*encode(" USER: "), *picture, *encode("\n"), *question_tokens(text))


def answer_tokens(answer: str) -> tuple[int, ...]:
    return (*encode(" " + answer), token("</s>"))


def make_processor(patch_size: int = PATCH_SIZE) -> LlavaProcessor:
    """LLaVA-1.5's processor for this tokenizer and picture size."""
    processor = local_tokenizer.make_processor(IMAGE_SIZE, patch_size, trained_tokenizer())
    # A chat server adds no special tokens of its own, and this model leans on its first token.
    processor.chat_template = "{{ bos_token }}" + local_tokenizer.CHAT_TEMPLATE
    return processor
