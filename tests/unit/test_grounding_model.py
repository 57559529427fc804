"""The checkpoints in the repository: LLaVA-1.5's layout, small, and as right as their cards say."""

import re

import pytest
import torch
from safetensors import safe_open

from benchmarks.grounding.conversations import conversations
from benchmarks.grounding.evaluate import MODEL, accuracy_by_kind, load
from benchmarks.grounding.evaluate_talks import MODEL as CONVERSING
from benchmarks.grounding.evaluate_talks import accuracy_by_turn
from benchmarks.grounding.questions import questions
from benchmarks.local_model import HEAD_SIZES

# Three of every kind.
QUESTIONS = 27
# Of two to four turns: 24 of them.
TALKS = 8
# More than four standard errors of that many questions, at the share its card claims.
TOLERANCE = 0.15


@pytest.mark.parametrize("folder", [MODEL, CONVERSING], ids=lambda folder: folder.name)
def test_files_are_small_and_carry_the_published_names(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16e6
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    starts = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.")
    assert all(name.startswith(starts) for name in names)


def test_the_decoder_is_one_that_vllm_serves_on_cpu():
    model, _ = load(MODEL, torch.float32)
    text = model.config.text_config
    assert text.hidden_size // text.num_attention_heads in HEAD_SIZES
    assert text.num_hidden_layers >= 12
    assert model.config.image_seq_length >= 144
    assert text.max_position_embeddings >= 1024
    assert model.config.vision_feature_layer == -2


def test_it_answers_as_its_card_says():
    (claimed,) = claims(MODEL)
    shares = accuracy_by_kind(*load(MODEL, torch.float32), questions("test", QUESTIONS))
    assert shares["all"] >= claimed - TOLERANCE


def test_it_converses_as_its_card_says_with_the_words_of_the_other():
    alone, claimed = claims(CONVERSING)
    assert alone >= 0.97
    shares = accuracy_by_turn(*load(CONVERSING, torch.float32), conversations("test", TALKS))
    assert shares["all"] >= claimed - TOLERANCE
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        assert (CONVERSING / name).read_bytes() == (MODEL / name).read_bytes()


def claims(folder) -> list[float]:
    """Shares of exact answers over all questions that the card states."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    return [float(share) / 100 for share in re.findall(r"\| all \| ([\d.]+) % \|", card)]
