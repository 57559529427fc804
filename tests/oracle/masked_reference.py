"""Routing without moving a token: transformers' own layers, all tokens, masks and undone rows.

A second way to the same numbers. Every layer runs on every token; whoever is not kept is hidden
from the others by the attention mask and gets its layer's input back as output. Scores are read
off transformers' eager attention map.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


@torch.inference_mode()
def masked_forward(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    generated: list[int],
    *,
    action: str,
    layers: Sequence[int],
    keep: Sequence[float],
    visual_embeddings: Tensor | None = None,
    anchors: list[int] | None = None,
    rejects_return: bool = False,
    previous_layer: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """One forward over prompt and generated tokens but the last; the model counts positions itself.

    visual_embeddings: in place of the model's own, [visual tokens, hidden]. anchors: the only visual
    tokens that run from the first layer on, and, unless rejects_return, the only candidates ever.
    previous_layer: decisions go by the attention map of the layer before, as this makes scores of it;
    given [heads, prompt, visual tokens], it returns [visual tokens].

    Returns the log-probabilities that predict `generated`, [generated, vocab], and per decision
    layer the kept visual tokens, ascending.
    """
    inputs = followed_by(inputs, generated[:-1])
    tokens = inputs["input_ids"]
    num_prompt = tokens.shape[1] - len(generated) + 1
    placeholders = [model.config.image_token_id, getattr(model.config, "video_token_id", -1)]
    visual = torch.isin(tokens[0, :num_prompt], torch.tensor(placeholders)).nonzero().flatten()
    ratios = dict(zip(layers, keep, strict=True))
    at_first = torch.full((len(visual),), anchors is None)
    at_first[anchors or []] = True
    alive = at_first.clone()
    may_return = torch.ones_like(alive) if rejects_return else at_first
    last_map: list[Tensor] = []
    selected: list[list[int]] = []

    def mask_showing(shown: Tensor) -> Tensor:
        hidden_tokens = torch.zeros(tokens.shape[1], dtype=torch.bool)
        hidden_tokens[visual[~shown]] = True
        blocked = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        blocked |= hidden_tokens[None, :]
        blocked.fill_diagonal_(False)  # a hidden token's own row must not be empty
        return torch.zeros(blocked.shape).masked_fill(blocked, torch.finfo().min)[None, None]

    def decide(block: torch.nn.Module, index: int, hidden: Tensor, rope: tuple) -> None:
        candidates = may_return if action == "reroute" else alive.clone()
        if previous_layer is None:
            attention_map = block.self_attn(
                hidden_states=block.input_layernorm(hidden),
                position_embeddings=rope,
                attention_mask=mask_showing(candidates),
            )[1]
            scores = attention_map[0, :, num_prompt - 1, visual].mean(dim=0)
        else:
            scores = previous_layer(last_map[-1][0, :, :num_prompt, visual])
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

    def see(block: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        embeddings = kwargs["inputs_embeds"].clone()
        embeddings[0, visual] = visual_embeddings
        return args, {**kwargs, "inputs_embeds": embeddings}

    handles = []
    if visual_embeddings is not None:
        language_model = model.model.language_model
        handles.append(language_model.register_forward_pre_hook(see, with_kwargs=True))
    for block in model.model.language_model.layers:
        handles.append(
            block.self_attn.register_forward_hook(lambda _, __, output: last_map.append(output[1]))
        )
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after, with_kwargs=True))
    try:
        logits = model(**inputs, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits[num_prompt - 1 :].float().log_softmax(dim=-1), selected


def followed_by(inputs: Mapping[str, Tensor], generated: list[int]) -> dict[str, Tensor]:
    """A request's inputs with generated text behind the prompt."""
    added = torch.tensor([generated], dtype=torch.long)
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], added], dim=1)}
    longer.pop("attention_mask", None)
    if "mm_token_type_ids" in inputs:
        text = torch.zeros_like(added)
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], text], dim=1)
    return longer
