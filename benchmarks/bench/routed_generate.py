"""Routing the way research code does it: transformers, one request at a time. The other side of part 5.

Not a straw man and not the oracle of the tests: the model's own decoder layers with PyTorch's fused attention
(SDPA), transformers' own `DynamicCache`, which lets every layer hold as many entries as it has seen, only the
attention row that scores, and no copies of what stays where it is. Without a schedule it is transformers' own
`generate`. What it lacks is what an engine adds: batching, paged memory, fused projections.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    StoppingCriteria,
)

from vllm_reroute.schedule import RoutingSchedule


class PlainModel:
    """A LLaVA-1.5 checkpoint in transformers; with a schedule of `fastv` or `pdrop` it routes."""

    def __init__(self, folder: Path, dtype: str, schedule: RoutingSchedule | None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = (
            AutoModelForImageTextToText.from_pretrained(
                folder, attn_implementation="sdpa", dtype=getattr(torch, dtype)
            )
            .eval()
            .to(self.device)
        )
        # As with `ignore_eos`: everybody writes as many tokens.
        self.model.generation_config.eos_token_id = None
        self.processor = AutoProcessor.from_pretrained(folder)
        self.decoder = self.model.model.language_model
        self.schedule = schedule

    @torch.inference_mode()
    def answer(self, prompt: str, images: list[Any], num_tokens: int) -> dict:
        """Greedy tokens of one request, and seconds from the raw images to the first and to all of them."""
        started = time.perf_counter()
        inputs = self.processor(text=prompt, images=images, return_tensors="pt").to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        generate = self._dense if self.schedule is None else self._routed
        tokens, stamps = generate(inputs, num_tokens)
        return {
            "answer": tokens,
            "first_token_s": stamps[0] - started,
            "total_s": stamps[-1] - started,
        }

    def _dense(self, inputs: Any, num_tokens: int) -> tuple[list[int], list[float]]:
        stamps = _Stamps()
        output = self.model.generate(
            **inputs, max_new_tokens=num_tokens, do_sample=False, stopping_criteria=[stamps]
        )
        return output[0, inputs["input_ids"].shape[1] :].tolist(), stamps.times

    def _routed(self, inputs: Any, num_tokens: int) -> tuple[list[int], list[float]]:
        cache = DynamicCache()
        state = self._prefill(inputs, cache)
        length = inputs["input_ids"].shape[1]
        tokens, stamps = [], []
        while True:
            tokens.append(int(self.model.lm_head(self.decoder.norm(state)).argmax()))
            stamps.append(time.perf_counter())
            if len(tokens) == num_tokens:
                return tokens, stamps
            position = torch.tensor([[length + len(tokens) - 1]], device=self.device)
            hidden = self.decoder.embed_tokens(torch.tensor([tokens[-1:]], device=self.device))
            rope = self.decoder.rotary_emb(hidden, position)
            for layer in self.decoder.layers:
                hidden = layer(hidden, position_embeddings=rope, past_key_values=cache)
            state = hidden[0, -1]

    def _prefill(self, inputs: Any, cache: DynamicCache) -> Tensor:
        """The last prompt token's state behind the last layer, [hidden]; fills the cache."""
        ids = inputs["input_ids"][0]
        visual = ids == self.model.config.image_token_id
        states = self.decoder.embed_tokens(ids)
        features = self.model.get_image_features(inputs["pixel_values"]).pooler_output
        states[visual] = torch.cat(list(features)).to(states.dtype)
        positions = torch.arange(len(ids), device=self.device)
        num_visual, running, schedule = int(visual.sum()), positions, self.schedule
        assert schedule is not None, "without one, transformers generates"
        kept_per_stage = schedule.kept_per_stage(num_visual)
        for stage, kept in zip(schedule.stages, kept_per_stage, strict=True):
            if stage.first_layer:
                candidates = positions if schedule.reroutes else running
                scores = self._scores(stage.first_layer, states[candidates], candidates)
                scores = scores.masked_fill(~visual[candidates], -torch.inf)
                runs = ~visual[candidates]
                runs[scores.topk(min(kept, int((~runs).sum()))).indices] = True
                running = candidates[runs]
            hidden = states[running][None]
            rope = self.decoder.rotary_emb(hidden, running[None])
            for layer in self.decoder.layers[stage.first_layer : stage.end_layer]:
                hidden = layer(hidden, position_embeddings=rope, past_key_values=cache)
            states[running] = hidden[0]
        return states[-1]

    def _scores(self, layer: int, states: Tensor, positions: Tensor) -> Tensor:
        """The last token's attention to all that are present, mean over heads. [tokens], fp32."""
        block = self.decoder.layers[layer]
        attention = block.self_attn
        rotate = sys.modules[type(self.decoder).__module__].apply_rotary_pos_emb
        normed = block.input_layernorm(states)
        cos, sin = self.decoder.rotary_emb(states[None], positions[None])
        by_head = (1, -1, attention.head_dim)
        keys = attention.k_proj(normed).unflatten(-1, by_head[1:]).transpose(0, 1)[None]
        query = attention.q_proj(normed[-1:]).unflatten(-1, by_head[1:]).transpose(0, 1)[None]
        _, keys = rotate(keys, keys, cos, sin)
        query, _ = rotate(query, query, cos[:, -1:], sin[:, -1:])
        grouped = query[0, :, 0].unflatten(0, (keys.shape[1], -1)).float()
        logits = grouped @ keys[0].float().transpose(1, 2) * attention.head_dim**-0.5
        return logits.softmax(-1).mean((0, 1))


class _Stamps(StoppingCriteria):
    """Never stops; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
