"""A LLaVA-1.5-shaped processor made without any download: tokenizer, image processor, chat template.

The tokenizer is a byte-level BPE, so any text comes back unchanged; its merges are trained on the paragraph below.
"""

import re
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

VOCABULARY_SIZE = 1024
# In the order of LLaVA's Llama tokenizer: <unk> 0, <s> 1, </s> 2.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
IMAGE_TOKEN = "<image>"

# As LLaVA-1.5's: all images of a message first, then its text. Content may be a string or a list of parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

TEXT = """
USER: What is shown in this image? Describe the photo in one sentence. How many people, animals or things can you see?
ASSISTANT: The picture shows a young woman in an orange space suit who is smiling at the camera. Behind her stands a
flag and a model of the shuttle. A brown cat with green eyes lies on a soft blanket and looks to the left. There is a
white cup of hot coffee with a silver spoon on a wooden table, seen from above. A tall rocket rises from the launch
pad with bright fire and a long trail of smoke against the dark night sky. Two dogs run along the beach while small
children play with a red ball near the water. An old man sits on a bench under a large tree and reads his newspaper.
Several boats float on the quiet lake, and mountains covered with snow stand in the far background. The street is
full of cars, buses and bicycles, and a traffic light turns yellow. Someone has left a black umbrella beside the
door of a narrow brick house. Four birds fly over a field of wheat under heavy grey clouds. The kitchen has clean
glass windows, metal pots, fresh bread, three apples, some cheese and a bowl of fruit. A train crosses the stone
bridge early in the morning. Our guests wear blue jackets, hats, shoes and scarves because it is cold outside. The
text on the sign says open, but nobody waits there today. On the right side, half hidden by leaves, grows a round pink
flower; its shape, colour and shadow are clear. Yes, I think that the horse near the fence is eating grass. No, it
does not seem to be summer. Between both buildings you may notice a clock, five lamps and some painted walls. This
scene probably took place after rain, since the road still looks wet and every roof reflects the sun. They ride,
walk, jump, sleep, cook, drink, write, sing, dance and laugh together. First count what lies above, below, inside and
around each object, then name the closest one, its size, and where it points. Other parts remain dark, flat, empty,
blurred, broken or new. Maybe these fine details would help us find which city, country or season we have here.
"""


@cache
def trained_tokenizer() -> Tokenizer:
    """The byte-level BPE with special tokens, adding `<s>` in front of a prompt as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=1,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT.replace("\n", " ")], trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    return tokenizer


def word_token_ids(vocabulary: dict[str, int] | None = None) -> list[int]:
    """Tokens that are a whole word with the space before it, or a mark; answers made of them can be read.

    vocabulary: of a byte-level BPE; the LLaVA tokenizer's unless given.
    """
    vocabulary = vocabulary or trained_tokenizer().get_vocab()
    words = {"Ġ" + word for word in re.findall("[A-Za-z]+", TEXT)}
    marks = {".", ","}
    return sorted(i for token, i in vocabulary.items() if token in words | marks)


def image_token_id() -> int:
    return special_token_id(trained_tokenizer(), IMAGE_TOKEN)


def special_token_id(tokenizer: Tokenizer, name: str) -> int:
    """Of a token it was trained with."""
    found = tokenizer.token_to_id(name)
    assert found is not None, f"{name} is a special token"
    return found


def llava_tokenizer(tokenizer: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens as transformers has it; by default the trained one."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer or trained_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_processor(
    image_size: int, patch_size: int, tokenizer: Tokenizer | None = None
) -> LlavaProcessor:
    """The processor of a LLaVA-1.5 with a CLIP tower of that grid; the class token is counted and dropped."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=llava_tokenizer(tokenizer),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
