"""Exact answers in conversations, run by transformers: each turn sees what the model itself has said before.

python -m benchmarks.grounding.evaluate_talks --model benchmarks/grounding/conversing --count 300
"""

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from benchmarks.grounding.conversations import TURN_KINDS, Conversation, conversations
from benchmarks.grounding.evaluate import generated, load, shares_of
from benchmarks.grounding.questions import SPLITS
from benchmarks.grounding.scenes import render

MODEL = Path(__file__).resolve().parent / "conversing"


def messages(talk: Conversation, said: list[str]) -> list[dict]:
    """The conversation up to the next question, as the OpenAI API and chat templates take it; pictures are marks.

    said: answers so far, without the space before them.
    """
    found: list[dict] = []
    shown = -1
    for number, turn in enumerate(talk.turns[: len(said) + 1]):
        content = [{"type": "text", "text": turn.asked.text}]
        if turn.picture != shown:
            shown = turn.picture
            content = [{"type": "image"}, *content]
        found.append({"role": "user", "content": content})
        if number < len(said):
            answer = [{"type": "text", "text": said[number]}]
            found.append({"role": "assistant", "content": answer})
    return found


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, talks: list[Conversation]
) -> list[list[str]]:
    """Greedy answers to every turn of each conversation."""
    said: list[list[str]] = [[] for _ in talks]
    pictures = [[render(scene) for scene in talk.scenes] for talk in talks]
    for number in range(max(len(talk.turns) for talk in talks)):
        going = [i for i, talk in enumerate(talks) if number < len(talk.turns)]
        inputs = processor(
            text=[
                processor.apply_chat_template(
                    messages(talks[i], said[i]), add_generation_prompt=True
                )
                for i in going
            ],
            images=[pictures[i][: talks[i].turns[number].picture + 1] for i in going],
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
        for i, text in zip(going, generated(model, processor, inputs), strict=True):
            said[i].append(text)
    return said


def accuracy_by_turn(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    talks: Iterable[Conversation],
    batch: int = 24,
) -> dict[str, float]:
    """Share of exact answers per kind of turn, and over all turns under "all"."""
    right: dict[str, list[bool]] = {kind: [] for kind in TURN_KINDS}
    talks = iter(talks)
    while chunk := list(itertools.islice(talks, batch)):
        for talk, said in zip(chunk, answers(model, processor, chunk), strict=True):
            for turn, answer in zip(talk.turns, said, strict=True):
                right[turn.kind].append(answer == turn.asked.answer)
    return shares_of(right)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint (default: ours)")
    parser.add_argument("--split", choices=list(SPLITS), default="test", help="default: test")
    parser.add_argument("--count", type=int, default=300, help="conversations (default: 300)")
    args = parser.parse_args()
    held = tqdm(conversations(args.split, args.count), total=args.count, unit="conversation")
    for kind, share in accuracy_by_turn(*load(args.model, torch.float32), held).items():
        print(f"{kind:16s}{100 * share:6.1f} %")


if __name__ == "__main__":
    main()
