"""A model of LLaVA-1.5-7B's shape without weights, and requests to it, timed from inside."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.local_model import TINY, LlavaShape, make_config
from benchmarks.local_tokenizer import make_processor

SHAPE = LlavaShape(
    text_layers=32, hidden_size=4096, heads=32, kv_heads=32, intermediate_size=11008,
    vision_layers=24, vision_hidden_size=1024, vision_heads=16, image_size=336,
    max_positions=4096,
)  # fmt: skip
TRIAL_SHAPE = replace(TINY, text_layers=32, image_size=112, max_positions=4096)
VOCABULARY = 32064
QUESTION = (
    "USER: <image>\nWhat is shown in this image? Describe the photo in one sentence. ASSISTANT:"
)


def model_folder(folder: Path, *, trial: bool) -> Path:
    """Config, tokenizer and processor; weights are dummies that vLLM makes itself."""
    shape = TRIAL_SHAPE if trial else SHAPE
    config = make_config(shape)
    if not trial:
        config.get_text_config().vocab_size = VOCABULARY
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    make_processor(shape.image_size, shape.patch_size).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Times:
    """Of some requests, in the order they were sent: seconds to the first token and from it to the
    last; and of all together."""

    first: Sequence[float]
    rest: Sequence[float]
    wall: float


class Driver:
    """Sends requests to an engine in this process. Pictures are decoded before the clock starts."""

    def __init__(self, llm: Any, *, trial: bool) -> None:
        self.llm, self.side = llm, (TRIAL_SHAPE if trial else SHAPE).image_size
        self._random = np.random.default_rng(1)
        self._sent = 0

    def requests(self, count: int, *, image: bool = True) -> list[Any]:
        """Each with a picture of its own, so that no cache answers."""
        from PIL import Image

        prompts: list[dict[str, Any]] = []
        for _ in range(count):
            if image:
                pixels = self._random.integers(0, 255, (self.side, self.side, 3), dtype=np.uint8)
                picture = {"image": Image.fromarray(pixels)}
                prompts.append({"prompt": QUESTION, "multi_modal_data": picture})
            else:
                prompts.append({"prompt": QUESTION.replace("<image>\n", "") * 8})
        return [self.llm._preprocess_cmpl([prompt])[0] for prompt in prompts]

    def run(self, inputs: Sequence[Any], max_tokens: int, concurrency: int) -> Times:
        """Keep `concurrency` requests in flight until all are answered."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        waiting = list(inputs)
        born: dict[str, float] = {}
        first: dict[str, float] = {}
        done: dict[str, float] = {}
        begin = time.perf_counter()
        while waiting or engine.has_unfinished_requests():
            while waiting and len(born) - len(done) < concurrency:
                self._sent += 1
                name = str(self._sent)
                born[name] = time.perf_counter()
                engine.add_request(name, waiting.pop(), params)
            for output in engine.step():
                now, name = time.perf_counter(), output.request_id.split("-")[0]
                if output.outputs and output.outputs[0].token_ids:
                    first.setdefault(name, now)
                if output.finished:
                    done[name] = now
        return Times(
            [first[name] - born[name] for name in born],
            [done[name] - first[name] for name in born],
            time.perf_counter() - begin,
        )
