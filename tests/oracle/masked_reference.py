"""Routing without moving a token: transformers' own layers, all tokens, masks and undone rows.

A second way to the same numbers. Every layer runs on every token; whoever is not kept is hidden
from the others by the attention mask and gets its layer's input back as output. Scores are read
off transformers' eager attention map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration


@torch.inference_mode()
def masked_forward(
    model: LlavaForConditionalGeneration,
    prompt: list[int],
    generated: list[int],
    pixel_values: Tensor,
    *,
    action: str,
    layers: Sequence[int],
    keep: Sequence[float],
) -> tuple[Tensor, list[list[int]]]:
    """One forward over prompt and generated tokens but the last.

    Returns the log-probabilities that predict `generated`, [generated, vocab], and per decision
    layer the kept visual tokens, ascending.
    """
    tokens = torch.tensor([prompt + generated[:-1]])
    visual = (tokens[0, : len(prompt)] == model.config.image_token_id).nonzero().flatten()
    ratios = dict(zip(layers, keep, strict=True))
    alive = torch.ones(len(visual), dtype=torch.bool)
    selected: list[list[int]] = []

    def mask_showing(shown: Tensor) -> Tensor:
        hidden_tokens = torch.zeros(tokens.shape[1], dtype=torch.bool)
        hidden_tokens[visual[~shown]] = True
        blocked = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        blocked |= hidden_tokens[None, :]
        blocked.fill_diagonal_(False)  # a hidden token's own row must not be empty
        return torch.zeros(blocked.shape).masked_fill(blocked, torch.finfo().min)[None, None]

    def decide(block: torch.nn.Module, index: int, hidden: Tensor, rope: tuple) -> None:
        candidates = torch.ones_like(alive) if action == "reroute" else alive.clone()
        attention_map = block.self_attn(
            hidden_states=block.input_layernorm(hidden),
            position_embeddings=rope,
            attention_mask=mask_showing(candidates),
        )[1]
        scores = attention_map[0, :, len(prompt) - 1, visual].mean(dim=0)
        scores[~candidates] = -1.0
        wanted = max(1, int(len(visual) * ratios[index]))
        alive.zero_()
        alive[scores.topk(min(wanted, int(candidates.sum()))).indices] = True
        selected.append(alive.nonzero().flatten().tolist())

    def before(block: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        index = block.self_attn.layer_idx
        if index in ratios:
            decide(block, index, args[0], kwargs["position_embeddings"])
        return args, {**kwargs, "attention_mask": mask_showing(alive)}

    def after(block: torch.nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        output[:, visual[~alive]] = args[0][:, visual[~alive]]
        return output

    handles = []
    for block in model.model.language_model.layers:
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after, with_kwargs=True))
    try:
        logits = model(input_ids=tokens, pixel_values=pixel_values, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits[len(prompt) - 1 :].float().log_softmax(dim=-1), selected
