"""What the plan of a run needs to know of a checkpoint, and which files it consists of."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from benchmarks import grounding
from vllm_reroute.calibration.file import ModelIdentity

DEFAULT_MODEL = Path(grounding.__file__).resolve().parent / "model"
# What a LLaVA-1.5-format folder answers with; notes and logs beside these change nothing.
PARTS = ("*.safetensors", "*.json", "*.jinja", "*.model")
FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """visual_tokens: of one image. image_token: id that stands for each of them in a prompt.

    kv_bytes: of one token in all decoder layers, fp32. identity: what calibrated schedules are made
    for, None where none is served.
    """

    visual_tokens: int
    decoder_layers: int
    image_token: int
    kv_bytes: int
    identity: ModelIdentity | None = None

    @classmethod
    def of(cls, folder: Path) -> "ModelShape":
        """Reads a folder in LLaVA-1.5's format.

        Raises ValueError if there is none, or if its images do not all have the same number of tokens.
        """
        if not (folder / "config.json").exists():
            raise ValueError(
                f"--model {folder} has no config.json. Name a checkpoint folder in LLaVA-1.5's "
                "format, or make the default one: python -m benchmarks.grounding.train"
            )
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "llava":
            raise ValueError(
                f"--model {folder} is a {config.model_type!r} checkpoint. Allowed: 'llava', whose "
                "images all have the same number of visual tokens. Serve others yourself and use "
                "--base-url."
            )
        text, vision = config.get_text_config(), config.vision_config
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            visual_tokens=(vision.image_size // vision.patch_size) ** 2,
            decoder_layers=text.num_hidden_layers,
            image_token=config.image_token_id,
            kv_bytes=2 * text.num_hidden_layers * text.num_key_value_heads * head_size * FP32_BYTES,
            identity=ModelIdentity.of(str(folder), config),
        )


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of the checkpoint's files."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in PARTS for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
