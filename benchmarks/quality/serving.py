"""One configuration as a running server, and whether that server does what the configuration says."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.local_server import LocalServer
from benchmarks.quality.asking import Endpoint, Prompt, visual_tokens_in
from benchmarks.quality.downsample import downsample
from benchmarks.quality.methods import DOWNSAMPLE, Configuration
from benchmarks.quality.model_shape import ModelShape

SERVED_NAME = "quality"
# Tokens of the longest question with its answer, and more.
TEXT_ROOM = 256
STEP_PROMPTS = 8
# The engine and the server's own work take turns on few cores.
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}
PRINTED_AVERAGE = re.compile(r"visual tokens +([\d.]+) per layer on average, of (\d+)")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How servers are started.

    model: checkpoint folder of all but downsampled configurations. folder: for their checkpoints, and for logs.
    pictures: of a prompt at most. prefix_cache: what prompts have in common is run once.
    """

    model: Path
    shape: ModelShape
    folder: Path
    dtype: str
    concurrency: int
    start_limit_s: float
    pictures: int = 1
    prefix_cache: bool = False

    def flags(self) -> list[str]:
        """What all servers are started with."""
        room = self.pictures * self.shape.visual_tokens + TEXT_ROOM
        flags = {
            "--served-model-name": SERVED_NAME,
            "--dtype": self.dtype,
            "--max-model-len": room,
            "--max-num-seqs": self.concurrency,
            "--max-num-batched-tokens": STEP_PROMPTS * room,
            # Twice what dense requests need, for blocks that are not full.
            "--kv-cache-memory-bytes": 2 * self.concurrency * room * self.shape.kv_bytes,
            # Preparing a picture again costs less than keeping it.
            "--mm-processor-cache-gb": 0,
        }
        words = [str(word) for pair in flags.items() for word in pair]
        cache = "--enable-prefix-caching" if self.prefix_cache else "--no-enable-prefix-caching"
        return [*words, "--enforce-eager", cache]

    @contextlib.contextmanager
    def serve(self, configuration: Configuration, probe: Prompt) -> Iterator[Endpoint]:
        """A server of that configuration, checked with the probe.

        Raises RuntimeError if it does not start, or routes other than the configuration says.
        """
        folder = self.model
        if configuration.method == DOWNSAMPLE:
            name = f"{self.model.name}-{configuration.grid}x{configuration.grid}"
            folder = downsample(self.model, configuration.grid, self.folder / "downsampled" / name)
        arguments = [*self.flags(), *configuration.arguments]
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        server = LocalServer(configuration.name, folder, arguments, self.start_limit_s)
        server.log = self.folder / "logs" / f"{configuration.name}.log"
        server.log.parent.mkdir(parents=True, exist_ok=True)
        with server:
            endpoint = Endpoint(url=f"{server.url}/v1", model=SERVED_NAME)
            counted = visual_tokens_in(endpoint, probe, self.shape.image_token)
            check_average(configuration, counted, server.log.read_text(errors="replace"))
            yield endpoint


def check_average(configuration: Configuration, counted: int, log: str) -> None:
    """Compares the configuration with what its server does.

    counted: visual tokens of one image, as the server counts them. log: of the server.
    Raises RuntimeError where they disagree.
    """
    if counted != configuration.grid**2:
        raise RuntimeError(
            f"The server makes {counted} visual tokens of an image, not {configuration.grid**2}."
        )
    printed = PRINTED_AVERAGE.search(log)
    if not configuration.decision_layers:
        if printed:
            raise RuntimeError("The server routes visual tokens, but should not.")
        return
    if printed is None:
        raise RuntimeError("The server does not say how many visual tokens it averages.")
    average, visual = float(printed[1]), int(printed[2])
    # It prints one decimal.
    if visual != counted or abs(average - configuration.average) > 0.0501:
        raise RuntimeError(
            f"The server averages {average} of {visual} visual tokens per layer, not "
            f"{configuration.average:.2f} of {counted}."
        )
