"""The plain alternative to routing: the same model on a smaller image, with fewer visual tokens everywhere.

The vision tower's position embeddings are resampled to the smaller grid; image size and crop of the processor follow.
Nothing is trained, so the model meets pictures at a scale it has not seen. Stock vLLM and transformers load the result.

    python -m benchmarks.quality.downsample MODEL --grid 6 --out FOLDER
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.checkpoint_folder import MARKER, build_folder
from benchmarks.quality.model_shape import PARTS, fingerprint

POSITIONS = "embeddings.position_embedding.weight"
# Older checkpoints store what is only counted: 0, 1, 2, …
POSITION_IDS = "embeddings.position_ids"
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
# Raised whenever the same model and grid would give other files.
RECIPE = 1


def downsample(model: Path, grid: int, out: Path) -> Path:
    """Makes `out` from `model`: the same weights for images of grid × grid visual tokens.

    Raises ValueError if the grid is not smaller than, or equal to, the model's own.
    """
    own = _own_grid(model)
    if not 1 <= grid <= own:
        raise ValueError(
            f"--grid {grid} must be from 1 to {own}, the side of the model's own grid of visual tokens."
        )
    wanted = {"recipe": RECIPE, "model": fingerprint(model), "grid": grid}
    return build_folder(out, wanted, lambda folder: _save(model, grid, folder))


def _own_grid(model: Path) -> int:
    vision = _json(model / "config.json")["vision_config"]
    return vision["image_size"] // vision["patch_size"]


def _save(model: Path, grid: int, folder: Path) -> None:
    config = _json(model / "config.json")
    size = grid * config["vision_config"]["patch_size"]
    config["vision_config"]["image_size"] = size
    config["image_seq_length"] = grid * grid
    for path in sorted({path for pattern in PARTS for path in model.glob(pattern)}):
        if path.suffix == ".safetensors":
            _save_weights(path, grid, folder / path.name)
        elif path.name == "config.json":
            _write_json(folder / path.name, config)
        elif path.name in PROCESSORS:
            _write_json(folder / path.name, _resized_processor(_json(path), size))
        elif path.name != MARKER:
            shutil.copyfile(path, folder / path.name)


def _save_weights(path: Path, grid: int, out: Path) -> None:
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name, weight in weights.items():
        if name.endswith(POSITIONS):
            weights[name] = resample_positions(weight, grid)
        elif name.endswith(POSITION_IDS):
            weights[name] = torch.arange(1 + grid * grid, dtype=weight.dtype).view(1, -1)
    save_file(weights, out, metadata)


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """[1 + old * old, width] -> [1 + grid * grid, width]: bicubic, the class token's as it was."""
    own = math.isqrt(len(positions) - 1)
    patches = positions[1:].T.reshape(1, -1, own, own)
    resampled = F.interpolate(
        patches.float(), size=(grid, grid), mode="bicubic", antialias=True, align_corners=False
    )
    patches = resampled.to(positions.dtype).reshape(-1, grid * grid).T
    return torch.cat([positions[:1], patches]).contiguous()


def _resized_processor(config: dict, size: int) -> dict:
    """With that image size, in transformers' present or its former layout."""
    if "image_processor" in config:
        return config | {"image_processor": _resized_processor(config["image_processor"], size)}
    if "size" not in config:  # The former layout keeps the sizes in the other of the two files.
        return config
    return config | {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
    }


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a checkpoint folder in LLaVA-1.5's format")
    parser.add_argument("--grid", type=int, required=True, help="side of the new grid of tokens")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    args = parser.parse_args()
    try:
        print(downsample(args.model, args.grid, args.out))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
