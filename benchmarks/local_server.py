"""One `vllm serve` on loopback, started for a `with` block and stopped with everything it started."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from prometheus_client.samples import Sample

from benchmarks import metrics_page

LOGS = Path(__file__).resolve().parent.parent / ".local" / "logs"
LOG_LINE_LIMIT = 70
ENVIRONMENT = {
    # Models are local folders, and nothing reports usage.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
}


class LocalServer:
    """`vllm serve model *arguments` on a free port of 127.0.0.1.

    with LocalServer("dense", model, ["--max-model-len", "2048"]) as server:
        openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    """

    def __init__(
        self, name: str, model: Path | str, arguments: list[str], start_limit_s: float = 600
    ):
        self.name = name
        self.model = str(model)
        self.arguments = arguments
        self.start_limit_s = start_limit_s
        self.log = LOGS / f"{name}.log"
        self.url = ""
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "LocalServer":
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            str(vllm_command()),
            "serve",
            self.model,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        LOGS.mkdir(parents=True, exist_ok=True)
        with self.log.open("w", encoding="utf-8") as log:
            # A session of its own: Ctrl-C reaches this program alone, which then stops the whole group.
            self._process = subprocess.Popen(
                [*command, *self.arguments],
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Asks the server to end, waits, then ends whatever is left of its process group. Safe to repeat."""
        if self._process is None:
            return
        process, self._process = self._process, None
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                say(f"the {self.name} server did not end by itself; ending it")
        with contextlib.suppress(ProcessLookupError):  # The usual case: nothing was left.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    @property
    def pid(self) -> int:
        """The first of its processes."""
        return self._started.pid

    @property
    def _started(self) -> subprocess.Popen:
        assert self._process is not None, "it runs inside the `with` block"
        return self._process

    def metric(self, name: str) -> float:
        """The value of a metric of /metrics, such as `vllm:kv_cache_usage_perc`."""
        return self._sample(name).value

    def label(self, name: str, label: str) -> str:
        """A label's value of a metric, such as `num_gpu_blocks` of `vllm:cache_config_info`."""
        labels = self._sample(name).labels
        if label not in labels:
            raise RuntimeError(f"The metric {name} has no label {label}. Is this vLLM 0.32?")
        return labels[label]

    def _sample(self, name: str) -> Sample:
        return metrics_page.of_metric(metrics_page.fetch(self.url), name)[0]

    def _wait_until_healthy(self) -> None:
        started = time.monotonic()
        shown = -10.0
        while not self._healthy():
            waited = time.monotonic() - started
            if (code := self._started.poll()) is not None:
                raise RuntimeError(
                    f"The {self.name} server ended with code {code} while starting. "
                    f"Its last words ({self.log}):\n{self._last_errors()}"
                )
            if waited > self.start_limit_s:
                raise RuntimeError(
                    f"The {self.name} server was not ready after {self.start_limit_s:.0f} s. "
                    f"See {self.log}; on a busy machine allow more with --start-limit."
                )
            if waited - shown >= 10:
                shown = waited
                say(f"starting the {self.name} server, {waited:3.0f} s  {self._last_line()}")
            time.sleep(0.5)
        say(f"the {self.name} server is ready after {time.monotonic() - started:.0f} s")

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _lines(self) -> list[str]:
        return [
            line
            for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        ]

    def _last_line(self) -> str:
        """What the server said last, without vLLM's prefix of process, time and source line."""
        told = [line for line in self._lines() if " INFO " in line]
        line = (
            re.sub(r"^.*? INFO \S+ \S+ (\[[^]]*\] )?", "", told[-1]).strip()
            if told
            else "importing vLLM"
        )
        return line if len(line) <= LOG_LINE_LIMIT else line[: LOG_LINE_LIMIT - 1] + "…"

    def _last_errors(self) -> str:
        lines = self._lines()
        errors = [line for line in lines if re.search(r"\w+(Error|Exception): ", line)]
        return "\n".join((errors or lines)[-5:])


def say(line: str) -> None:
    """A line of progress, apart from results on standard output."""
    print(f"[demo] {line}", file=sys.stderr, flush=True)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def vllm_command() -> Path:
    """The `vllm` command of the environment this program runs in."""
    command = Path(sys.executable).with_name("vllm")
    if not command.exists():
        raise RuntimeError(
            f"{sys.executable} has no `vllm` command beside it. Run `make demo`, or `make setup` first."
        )
    return command
