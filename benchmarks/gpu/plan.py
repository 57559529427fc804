"""The steps of `make gpu`, most telling first."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process. module: below `benchmarks.gpu.steps`. limit_s: after which it is ended."""

    name: str
    module: str
    words: str = ""
    limit_s: int
    about: str


def _speed(name: str, words: str, about: str, limit_s: int = 300) -> Step:
    return Step(name=name, module="speed", words=words, limit_s=limit_s, about=about)


STEPS = (
    Step(name="environment", module="environment", limit_s=180, about="card, versions, plugin"),
    Step(
        name="kernels",
        module="kernels",
        limit_s=300,
        about="attention over blocks past 2^31 elements; the tables' kernel against torch; no waiting",
    ),
    *(
        Step(
            name=f"oracle-{name}",
            module="oracle",
            words=f"--dtype {dtype} --backend {backend} {more}",
            limit_s=400,
            about=f"a trained model against plain transformers, {dtype}, {backend}",
        )
        for name, dtype, backend, more in (
            ("fp32", "float32", "TRITON_ATTN", ""),
            ("bf16", "bfloat16", "FLASH_ATTN", ""),
            ("bf16-triton", "bfloat16", "TRITON_ATTN", ""),
            (
                "fp32-remove",
                "float32",
                "TRITON_ATTN",
                "--schedule fastv --action remove --tier 128",
            ),
        )
    ),
    *(
        Step(
            name=f"graphs-{name}",
            module="graphs",
            words=words,
            limit_s=400,
            about=about,
        )
        for name, words, about in (
            ("decode", "--graphs decode", "CUDA graphs of decode steps against eager"),
            ("compiled", "--graphs piecewise", "compiled, all graphs, against eager"),
        )
    ),
    _speed("speed-dense", "--schedule none", "7B-shaped, stock vLLM"),
    _speed("speed-pdrop-64", "--schedule pdrop --tier 64", "7B-shaped, routed"),
    _speed("speed-pdrop-192", "--schedule pdrop --tier 192", "7B-shaped, routed"),
    _speed("speed-fastv-64", "--schedule fastv --tier 64", "7B-shaped, routed"),
    _speed("speed-fastv-192", "--schedule fastv --tier 192", "7B-shaped, routed"),
    _speed("speed-stages-12", "--stages 12", "7B-shaped, twelve decisions that save nothing"),
    _speed("compiled-dense", "--schedule none --compiled", "the same, compiled", 600),
    _speed("compiled-pdrop-64", "--schedule pdrop --tier 64 --compiled", "the same, compiled", 600),
    *(
        Step(
            name=f"profile-{name}",
            module="profile",
            words=words,
            limit_s=400,
            about="where a prefill and a decode step spend host and device time",
        )
        for name, words in (
            ("dense", "--schedule none"),
            ("pdrop-64", "--schedule pdrop --tier 64"),
        )
    ),
)


def chosen(names: list[str]) -> tuple[Step, ...]:
    """Steps by name or by the beginning of one; all of them without names. Raises ValueError."""
    unknown = [name for name in names if not any(s.name.startswith(name) for s in STEPS)]
    if unknown:
        raise ValueError(
            f"--only {' '.join(unknown)}: no step begins so. Choose of: "
            f"{', '.join(step.name for step in STEPS)}."
        )
    return tuple(s for s in STEPS if not names or any(s.name.startswith(name) for name in names))
