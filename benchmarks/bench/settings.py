"""How big everything is: the full run's sizes, the trial's, and what the command line changes."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from benchmarks.bench import device
from benchmarks.local_model import DEMO, MODELS, SHAPES, LlavaShape, build_local_model
from benchmarks.quality.model_shape import ModelShape

# LLaVA-1.5's depth, grid and proportions. The wide one is where arithmetic dominates, the narrow one
# where many requests are affordable.
WIDE = replace(
    DEMO,
    hidden_size=1024,
    heads=16,
    kv_heads=16,
    intermediate_size=2752,
    vision_layers=4,
    vision_hidden_size=256,
    vision_heads=4,
)
# Between both: wide enough for arithmetic to show, with room for prompts of many pictures.
MIDDLE = replace(
    DEMO, hidden_size=512, heads=8, kv_heads=8, intermediate_size=1376, max_positions=16384
)
NARROW = replace(DEMO, max_positions=8192)
# Next to no arithmetic, so that the host shows.
THIN = replace(
    DEMO,
    hidden_size=64,
    heads=2,
    kv_heads=2,
    intermediate_size=172,
    vision_layers=2,
    vision_hidden_size=64,
    vision_heads=2,
)
TRIAL = replace(SHAPES["tiny-64-visual"], max_positions=4096)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is asked of the engines.

    wide, middle, narrow, thin: models. long_images: pictures of a prompt longer than a step. tiers:
    averages the prefill part covers; nuwa_tier: the one it has Nüwa at.
    shallow_depth: of the stock engine that tells fixed from per-layer time. compiled_depth: of the
    engines that are compiled, since stock's one graph of 32 layers takes minutes. groups: KV groups.
    levels: requests under way at once; requests_per_level: requests of a run, as a multiple of them.
    conversations: at once. depths: as shares of the model's. pool_requests: dense requests the
    capacity part's pool holds.
    """

    wide: LlavaShape
    middle: LlavaShape
    narrow: LlavaShape
    thin: LlavaShape
    tiers: tuple[int, ...]
    nuwa_tier: int
    shallow_depth: int
    compiled_depth: int
    groups: tuple[int, ...]
    decode_tokens: int
    text_requests: int
    levels: tuple[int, ...]
    requests_per_level: float
    least_requests: int
    answer_tokens: int
    pool_requests: float
    capacity_requests: int
    images: tuple[int, ...]
    batches: tuple[int, ...]
    depths: tuple[float, ...]
    reference_requests: int
    long_images: int
    conversations: tuple[int, ...]


FULL = Sizes(
    wide=WIDE,
    middle=MIDDLE,
    narrow=NARROW,
    thin=THIN,
    tiers=(192, 64, 128),
    nuwa_tier=128,
    shallow_depth=2,
    compiled_depth=8,
    groups=(2, 5, 12),
    decode_tokens=20,
    text_requests=8,
    levels=(1, 2, 4, 8, 16, 32),
    requests_per_level=1.5,
    least_requests=6,
    answer_tokens=16,
    pool_requests=8.5,
    capacity_requests=40,
    images=(1, 2, 4, 8),
    batches=(1, 2, 8),
    depths=(0.25, 0.5, 1.0),
    reference_requests=2,
    long_images=14,
    conversations=(1, 8, 32),
)
QUICK = replace(
    FULL,
    wide=TRIAL,
    middle=TRIAL,
    narrow=TRIAL,
    thin=TRIAL,
    tiers=(192,),
    nuwa_tier=192,
    groups=(2, 5),
    decode_tokens=4,
    text_requests=2,
    levels=(1, 2),
    least_requests=2,
    answer_tokens=4,
    pool_requests=3.5,
    capacity_requests=12,
    images=(1, 2),
    batches=(1, 2),
    # The published schedules need seven layers.
    depths=(1.0,),
    reference_requests=2,
    long_images=40,
    conversations=(1, 2),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of the suite.

    model: a checkpoint in LLaVA-1.5's format that takes the place of the seeded ones. at_once:
    engines that live side by side. folder: results, models' logs.
    """

    sizes: Sizes
    folder: Path
    model: Path | None = None
    dtype: str = device.DTYPE
    eager: bool = device.EAGER
    rounds: int = 5
    at_once: int = device.MOST_AT_ONCE
    start_limit_s: float = 900

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def wide(self) -> "BenchModel":
        return self._model("wide", self.sizes.wide)

    def reuse(self) -> "BenchModel":
        return self._model("middle", self.sizes.middle)

    def narrow(self) -> "BenchModel":
        return self._model("narrow", self.sizes.narrow)

    def thin(self) -> "BenchModel":
        return self._model("thin", self.sizes.thin)

    def _model(self, name: str, shape: LlavaShape) -> "BenchModel":
        if self.model is not None:
            return BenchModel.of(self.model, self.dtype)
        # Folders are made for one shape; the trial's two models are one.
        name = "trial" if shape == TRIAL else name
        return BenchModel.of(build_local_model(MODELS / f"bench-{name}", shape), self.dtype)

    def identity(self) -> dict:
        """What numbers depend on and a user may choose."""
        sizes = asdict(self.sizes)
        return {
            # As JSON has it, so that what is read back is equal.
            **{k: list(v) if isinstance(v, tuple) else v for k, v in sizes.items()},
            "model": self.model.name if self.model else None,
            "dtype": self.dtype,
            "eager": self.eager,
            "rounds": self.rounds,
        }


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A checkpoint folder and what plans need to know of it.

    kv_bytes: of one token in one layer. max_positions: tokens of its longest request.
    """

    folder: Path
    shape: ModelShape
    kv_bytes: int
    max_positions: int

    @classmethod
    def of(cls, folder: Path, dtype: str) -> "BenchModel":
        shape = ModelShape.of(folder)
        per_layer = shape.kv_bytes // shape.decoder_layers
        return cls(
            folder=folder,
            shape=shape,
            kv_bytes=per_layer if dtype == "float32" else per_layer // 2,
            max_positions=AutoConfig.from_pretrained(folder)
            .get_text_config()
            .max_position_embeddings,
        )

    @property
    def depth(self) -> int:
        return self.shape.decoder_layers

    @property
    def visual(self) -> int:
        return self.shape.visual_tokens
