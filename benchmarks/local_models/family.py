"""What a family is made of, and the sizes all of them share."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

# What vLLM's attention on CPU supports.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def special_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Of one token, where transformers would take several."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


@dataclass(frozen=True, kw_only=True)
class FamilyShape:
    """Everything but the family that a checkpoint depends on. Equal shapes give equal files."""

    text_layers: int = 8
    hidden_size: int = 128
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 256
    vision_layers: int = 4
    vision_hidden_size: int = 64
    vision_heads: int = 2
    max_positions: int = 4096
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads or self.head_size not in HEAD_SIZES:
            raise ValueError(
                f"hidden_size={self.hidden_size} with heads={self.heads} gives no head size that vLLM supports on CPU. "
                f"hidden_size / heads must be one of: {', '.join(map(str, HEAD_SIZES))}."
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}.")
        if self.vision_layers < 4:
            raise ValueError(
                f"vision_layers={self.vision_layers} is too few: window attention and DeepStack name layers up to 3."
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.heads

    def text_options(self) -> dict:
        """The sizes as every text configuration names them."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
        }


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family's checkpoints are made."""

    model_class: type[PreTrainedModel]
    make_config: Callable[[FamilyShape, PreTrainedTokenizerBase], PreTrainedConfig]
    make_processor: Callable[[FamilyShape], ProcessorMixin]
    # Linear layers whose output the decoder receives as visual tokens.
    projections: tuple[str, ...]
    # Prefixes of transformers' parameter names -> those of published checkpoints.
    published_prefixes: dict[str, str]

    def published_name(self, name: str) -> str:
        for ours, theirs in self.published_prefixes.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        raise ValueError(f"{self.model_class.__name__} has no parameter {name!r}.")
