"""Scenes and questions as `vllm-reroute calibrate` reads them: one of every kind in turn, of the validation split.

python -m benchmarks.grounding.calibration_samples --count 198 --out .local/calibration
"""

import argparse
import json
from pathlib import Path

from benchmarks.grounding.questions import SPLITS, questions

NAME = "samples.jsonl"


def write(folder: Path, split: str, count: int) -> Path:
    """Pictures and samples.jsonl in `folder`; returns the latter. The same arguments give the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, question in enumerate(questions(split, count)):
        picture = f"{split}-{number:04d}.png"
        question.image.save(folder / picture)
        lines.append(json.dumps({"prompt": question.text, "image_files": [picture]}))
    path = folder / NAME
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--split", choices=list(SPLITS), default="validation", help="default: validation"
    )
    parser.add_argument("--count", type=int, default=198, help="questions (default: 198)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(".local/calibration"),
        help="folder (default: .local/calibration)",
    )
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count {args.count} must be 1 or more.")
    print(write(args.out, args.split, args.count))


if __name__ == "__main__":
    main()
