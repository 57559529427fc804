"""Grounding: rendered scenes with questions that have one right answer, and a small LLaVA trained on them."""
