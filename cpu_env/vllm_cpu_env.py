"""Import cures for torchvision, torchaudio and torchcodec beside a CPU build of PyTorch.

PyPI carries only CUDA builds of the three. Beside a CPU torch their compiled halves don't load, and the packages do
not cope: torchvision registers shapes for operators nobody declared, the others let the loader's OSError escape.
The pure-Python halves are all that vLLM and transformers need for images, and those work.

`install()` runs at interpreter start (vllm_cpu_env.pth), so this module imports nothing heavy: the finder answers
for three module names and acts only when one of them is imported. Where the compiled half loads, nothing changes.
"""

import sys
from collections.abc import Callable, Sequence
from types import ModuleType

# Operators that torchvision's Python code names unconditionally at import.
MISSING_OPERATORS = ("nms", "qnms")
OPERATOR_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# Operator declarations vanish with the Library object that made them.
_libraries: list[object] = []


def declare_torchvision_operators(extension: ModuleType) -> None:
    """Declares the operators torchvision expects from its compiled half, if that half did not load.

    Declared, not defined: calling one still raises torchvision's own error about missing C++ operators.
    """
    if extension._has_ops():
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in MISSING_OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + OPERATOR_SCHEMA)
    _libraries.append(library)


def tolerate_missing_torchaudio_library(utils: ModuleType) -> None:
    """Lets torchaudio treat a library that can't be loaded like one that was not shipped, which it supports."""
    load = utils._load_lib

    def load_or_false(library: str) -> bool:
        try:
            return load(library)
        except OSError:
            return False

    utils._load_lib = load_or_false


def report_missing_torchcodec_library(utils: ModuleType) -> None:
    """Turns a torchcodec library that can't be loaded into an ImportError, which vLLM takes as "not installed"."""
    load = utils.load_image_library

    def load_or_import_error() -> None:
        try:
            load()
        except OSError as error:
            raise ImportError(
                "torchcodec's compiled half does not load beside this build of PyTorch."
            ) from error

    utils.load_image_library = load_or_import_error


# Module whose import just finished -> what to do to it.
CURES: dict[str, Callable[[ModuleType], None]] = {
    "torchvision.extension": declare_torchvision_operators,
    "torchaudio._extension.utils": tolerate_missing_torchaudio_library,
    "torchcodec._internally_replaced_utils": report_missing_torchcodec_library,
}


class CuringFinder:
    """Meta path finder: finds the modules in CURES as usual and cures each right after it was executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ):
        if name not in CURES:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_cure(module: ModuleType) -> None:
            execute(module)
            CURES[name](module)

        spec.loader.exec_module = execute_and_cure
        return spec


def install() -> None:
    """Puts the finder first on the meta path. Safe to repeat."""
    if not any(isinstance(finder, CuringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, CuringFinder())
