"""The file of a calibrated schedule: what an engine needs to serve it, and to know that it may."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_reroute.families.short_names import resolve_model
from vllm_reroute.families.table import family_of
from vllm_reroute.schedule.options import RerouteOptions
from vllm_reroute.schedule.published import Action

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORMAT = "vllm-reroute calibrated schedule 1"


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What tells a model from another one. name: last part of its id, or its folder's.

    architecture: the stock one. The rest is the decoder's.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int

    @classmethod
    def of(cls, model: str, hf_config: PretrainedConfig) -> ModelIdentity:
        """model: id, short name or folder. hf_config: stock or routed, of a supported family."""
        model = resolve_model(model)
        folder = Path(model)
        text = hf_config.get_text_config()
        assert hf_config.architectures, "vLLM refuses a model without"
        family = family_of(hf_config.architectures[0])
        assert family is not None, "checked before"
        return cls(
            name=folder.resolve().name if folder.is_dir() else model.rsplit("/", 1)[-1],
            architecture=family.architecture,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            num_heads=text.num_attention_heads,
        )


@dataclass(frozen=True, kw_only=True)
class CalibratedSchedule:
    """model: it was made for. action, layers, keep: as `RerouteOptions` has them.

    about: how it was made and what it is expected to lose; for readers, the engine ignores it.
    """

    model: ModelIdentity
    action: Action
    layers: tuple[int, ...]
    keep: tuple[float, ...]
    about: Mapping[str, Any]

    @property
    def options(self) -> RerouteOptions:
        return RerouteOptions(action=self.action, layers=self.layers, keep=self.keep)

    @property
    def flags(self) -> str:
        """The same schedule as flags of `vllm serve`."""
        layers, keep = ",".join(map(str, self.layers)), ",".join(f"{r:g}" for r in self.keep)
        action = f" --reroute-action {self.action}" if self.action != "reroute" else ""
        return f"--reroute-layers {layers} --reroute-keep {keep}{action}"

    def write(self, path: Path) -> None:
        entries = {"format": FORMAT, **asdict(self), "about": dict(self.about)}
        path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> CalibratedSchedule:
        """Raises ValueError for anything `write` has not written."""
        cure = "Make one with: vllm-reroute calibrate --help"
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"--reroute-file {path} cannot be read ({error.strerror}). {cure}"
            ) from error
        except ValueError as error:
            raise ValueError(f"--reroute-file {path} is not JSON ({error}). {cure}") from error
        if not isinstance(entries, dict) or entries.get("format") != FORMAT:
            raise ValueError(
                f"--reroute-file {path} is not a calibrated schedule: its 'format' must be "
                f"{FORMAT!r}. {cure}"
            )
        try:
            found = cls(
                model=ModelIdentity(**entries["model"]),
                action=entries["action"],
                layers=tuple(entries["layers"]),
                keep=tuple(entries["keep"]),
                about=entries["about"],
            )
            # Checks what the file says as it checks flags.
            RerouteOptions.from_mapping(found.options.to_mapping())
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"--reroute-file {path} is damaged: {error}. {cure}") from error
        return found

    def check_model(self, path: Path, served: ModelIdentity) -> None:
        """Raises ValueError if the schedule was made for another model than the one served."""
        made, now = asdict(self.model), asdict(served)
        different = [
            f"{key} {made[key]!r} is not {now[key]!r}" for key in made if made[key] != now[key]
        ]
        if different:
            raise ValueError(
                f"--reroute-file {path} was calibrated on another model than the one served: "
                f"{'; '.join(different)}. Allowed: the model it was made for. Calibrate this one "
                f"(vllm-reroute calibrate), or take the schedule all the same: {self.flags}"
            )
