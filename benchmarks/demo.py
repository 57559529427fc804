"""`make demo`: one picture and one question, answered by a routed and by a dense server of the same model.

The picture is a rendered scene that the model was not trained on; its question takes two looks. Prints the answers,
then what routing saved: visual tokens per stage, KV memory, time to first token. Leaves a page that shows what every
stage kept of the picture. Prefix caching and the image processor's cache are off in both servers: repeats of one
request would otherwise measure the caches.
"""

import argparse
import base64
import io
import json
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
from openai.types.chat import ChatCompletionContentPartParam
from PIL import Image

from benchmarks.grounding.evaluate import MODEL
from benchmarks.grounding.questions import KINDS, questions
from benchmarks.local_server import LOGS, LocalServer, say

# Small, so that a block is a visible share of the pool.
POOL_BYTES = 256 * 2**20
ANSWER_TOKENS = 16
# Long enough for the server's gauge of its KV cache to be read while the request runs.
GAUGED_TOKENS = 64
PICTURE = LOGS.parent / "demo.png"
EXPLAINED = LOGS.parent / "demo-explained"
# On CPU vLLM would take 128 and round both servers up; the smallest that each kind of backend supports is fairer.
ON_GPU = shutil.which("nvidia-smi") is not None
BLOCK_SIZE = 16 if ON_GPU else 32
DTYPE = "bfloat16" if ON_GPU else "float32"
SMALL = """
This model is so small that its decisions take about the time that they save; docs/results.md has larger ones."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked. right: the known answer, if there is one. png: the picture as a client would upload it."""

    question: str
    right: str | None
    png: bytes


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one server did with the request.

    blocks: KV blocks held while answering. block_bytes: bytes of one of this server's blocks, which differ in
    width: a dense block holds its tokens in every layer, a routed one in the layers of one group.
    first_token_s: one entry per repeat.
    """

    answer: str
    blocks: int
    block_bytes: float
    first_token_s: list[float]

    @property
    def kv_kib(self) -> float:
        return self.blocks * self.block_bytes / 1024


def main() -> None:
    args = parse_arguments()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # Unwinds, so that the server is stopped.
    try:
        request = request_of(args)
        print(f"Picture:  {shown(PICTURE)}\nQuestion: {request.question}", flush=True)
        if request.right:
            print(f"Right is: {request.right}", flush=True)
        routed = measure("routed", args.model, routing_flags(args), request, args)
        print(f"Routed:   {routed.answer}", flush=True)
        dense = measure("dense", args.model, [], request, args)
        print(f"Dense:    {dense.answer}", flush=True)
        print(f"Page:     {shown(explained(args, request, dense.answer))}\n", flush=True)
    except KeyboardInterrupt:
        sys.exit("\nStopped; no server is left running.")
    except (RuntimeError, ValueError, openai.APIError) as error:
        sys.exit(f"The demo could not finish: {error}")
    print("\n".join(stage_table(args.model, args.schedule, args.tier)))
    print("\n".join(comparison_table(routed, dense)))
    if args.model == MODEL:
        print(SMALL)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=MODEL,
        help="a LLaVA-1.5 checkpoint folder (default: the small one trained on such scenes)",
    )
    parser.add_argument("--schedule", default="pdrop", help="routing schedule (default: pdrop)")
    parser.add_argument("--tier", type=int, default=192, help="published tier (default: 192)")
    parser.add_argument(
        "--kind", default="beside-label", choices=list(KINDS),
        help="of question about the scene (default: beside-label)",
    )  # fmt: skip
    parser.add_argument(
        "--number", type=int, default=1, help="which of them, other numbers have other scenes"
    )
    parser.add_argument("--picture", type=Path, help="a picture of yours; needs --question")
    parser.add_argument("--question", help="about that picture")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed requests per server (default: 5)"
    )
    parser.add_argument(
        "--start-limit", type=float, default=600, help="seconds a server may take to start"
    )
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be 1 or more.")
    if args.number < 1:
        parser.error(f"--number {args.number} must be 1 or more.")
    if (args.picture is None) != (args.question is None):
        parser.error("--picture and --question go together: a rendered scene has its own question.")
    return args


def request_of(args: argparse.Namespace) -> Request:
    """The wanted question, or the user's. Its picture is left where it can be looked at."""
    if args.picture:
        image, question, right = Image.open(args.picture).convert("RGB"), args.question, None
    else:
        of_kind = list(KINDS).index(args.kind)
        found = list(questions("test", (args.number - 1) * len(KINDS) + of_kind + 1))[-1]
        image, question, right = found.image, found.text, found.answer
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_bytes(buffer.getvalue())
    return Request(question=question, right=right, png=buffer.getvalue())


def shown(path: Path) -> Path:
    """Relative to where the user is, if it lies there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def routing_flags(args: argparse.Namespace) -> list[str]:
    return ["--reroute-schedule", args.schedule, "--reroute-tier", str(args.tier)]


def serve_flags() -> list[str]:
    """What both servers are started with."""
    flags = {
        "--served-model-name": "demo",
        "--dtype": DTYPE,
        "--max-model-len": "2048",
        "--max-num-seqs": "8",
        "--block-size": str(BLOCK_SIZE),
        "--kv-cache-memory-bytes": str(POOL_BYTES),
        "--mm-processor-cache-gb": "0",
    }
    return [word for pair in flags.items() for word in pair] + [
        "--enforce-eager",
        "--no-enable-prefix-caching",
    ]


def measure(
    name: str, model: Path, flags: list[str], request: Request, args: argparse.Namespace
) -> Measured:
    """Starts a server, asks once for the answer and KV use, then `repeats` times for time to first token."""
    with LocalServer(name, model, [*serve_flags(), *flags], args.start_limit) as server:
        client = openai.OpenAI(
            base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=300
        )
        # The first request compiles and fills allocators; its time is discarded.
        answer, used = "".join(ask(client, request, ANSWER_TOKENS)), 0.0
        for _ in ask(client, request, GAUGED_TOKENS, ignore_eos=True):
            used = max(used, server.metric("vllm:kv_cache_usage_perc"))
        seconds = []
        for repeat in range(args.repeats):
            say(f"timing the {name} server, request {repeat + 1} of {args.repeats}")
            seconds.append(seconds_to_first_token(client, request))
        num_blocks = int(server.label("vllm:cache_config_info", "num_gpu_blocks"))
    return Measured(
        answer=answer.strip(),
        # One block is vLLM's null block, which the share leaves out.
        blocks=round(used * (num_blocks - 1)),
        block_bytes=POOL_BYTES / num_blocks,
        first_token_s=seconds,
    )


def ask(
    client: openai.OpenAI, request: Request, max_tokens: int, ignore_eos: bool = False
) -> Iterator[str]:
    """Streams the answer's text as the server sends it, with empty pieces where there is none to show."""
    data = base64.b64encode(request.png).decode()
    content: list[ChatCompletionContentPartParam] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": request.question},
    ]
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": content}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": ignore_eos},
    )
    with stream:
        for chunk in stream:
            if chunk.choices:
                yield chunk.choices[0].delta.content or ""


def seconds_to_first_token(client: openai.OpenAI, request: Request) -> float:
    """From sending the request to the first word of the answer, image upload and processing included."""
    started = time.perf_counter()
    if any(ask(client, request, max_tokens=1)):
        return time.perf_counter() - started
    raise RuntimeError("The server sent no text. Its log is in .local/logs.")


def explained(args: argparse.Namespace, request: Request, dense: str) -> Path:
    """Leaves pictures of what every stage kept, and returns the page that shows them.

    A third engine decides the same once more, in a process whose decoder can be watched.
    """
    from vllm_reroute.explain.explanation import explain
    from vllm_reroute.explain.folder import write_folder
    from vllm_reroute.explain.pictures import load_image
    from vllm_reroute.explain.question import Question
    from vllm_reroute.schedule import RerouteOptions

    flags = {"--dtype": DTYPE, "--max-model-len": "2048", "--kv-cache-memory-bytes": POOL_BYTES}
    question = Question(
        model=str(args.model),
        text=request.question,
        pictures=(load_image(PICTURE),),
        max_tokens=ANSWER_TOKENS,
        engine_flags=tuple(str(word) for pair in flags.items() for word in pair),
    )
    options = RerouteOptions(schedule=args.schedule, tier=args.tier)
    return write_folder(explain(question, options, say, dense), EXPLAINED)[0]


def stage_table(model: Path, schedule: str, tier: int) -> list[str]:
    """Lines that say how many visual tokens of one image run in which decoder layers."""
    from vllm_reroute.schedule import RerouteOptions

    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    visual = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    resolved = RerouteOptions(schedule=schedule, tier=tier).resolve(
        config["text_config"]["num_hidden_layers"]
    )
    lines = [f"{'stage':<8}{'decoder layers':>16}{'visual tokens':>16}"]
    for number, (stage, kept) in enumerate(
        zip(resolved.stages, resolved.kept_per_stage(visual), strict=True)
    ):
        layers = f"{stage.first_layer}-{stage.end_layer - 1}"
        lines.append(f"{number:<8}{layers:>16}{kept:>16}")
    return [*lines, f"{'average':<8}{'':>16}{resolved.average(visual):>16.1f}", ""]


def comparison_table(routed: Measured, dense: Measured) -> list[str]:
    """Lines that set the two servers side by side."""
    servers = (dense, routed)
    rows: dict[str, list[float]] = {
        "KV memory of the request, KiB": [server.kv_kib for server in servers],
        "  in KV blocks": [server.blocks for server in servers],
        "  of KiB each": [server.block_bytes / 1024 for server in servers],
        f"time to first token, ms (median of {len(dense.first_token_s)})": [
            1000 * statistics.median(server.first_token_s) for server in servers
        ],
        "  fastest": [1000 * min(server.first_token_s) for server in servers],
        "  slowest": [1000 * max(server.first_token_s) for server in servers],
    }
    lines = [f"{'':<42}{'dense':>10}{'routed':>10}{'routed/dense':>14}"]
    for label, (of_dense, of_routed) in rows.items():
        ratio = "" if label.startswith(" ") else f"{of_routed / of_dense:.2f}"
        lines.append(f"{label:<42}{of_dense:>10,.0f}{of_routed:>10,.0f}{ratio:>14}")
    return lines


if __name__ == "__main__":
    main()
