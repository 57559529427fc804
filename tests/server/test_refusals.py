"""Refusals, the same in every process that takes requests, and whole answers beside them.

A server's start is what costs, so two families are served here: LLaVA-1.5, and Qwen2.5-VL with another chat template,
three position components, and images of several sizes.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from benchmarks.local_model import TINY, build_local_model
from benchmarks.local_models import build_family
from benchmarks.local_server import ENVIRONMENT, LocalServer, vllm_command
from tests.server.chat import check_concurrent_answers
from tests.server.refusals import (
    CHAT,
    REFUSED,
    SERVER_WORDS,
    SOME,
    cases,
    chat,
    check_refusals,
    check_refusals_at_once,
    new_picture,
)

LLAVA, QWEN = "llava-1.5", "qwen2.5-vl"
# Of both.
DEPTH = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("refusing")
    return {
        LLAVA: build_local_model(root / "tiny-llava", replace(TINY, image_size=112)),
        QWEN: build_family(root / QWEN, QWEN),
    }


# Every refusal where one process takes requests, some of each kind where there are several: for two
# data-parallel ranks vLLM starts two API servers.
PROCESSES = {
    "data-parallel-two": (LLAVA, ["--data-parallel-size", "2"], SOME),
    "tensor-parallel-two": (QWEN, ["--tensor-parallel-size", "2"], tuple(REFUSED)),
}


@pytest.mark.parametrize(("family", "words", "names"), PROCESSES.values(), ids=PROCESSES)
def test_refused_alike_and_answered_right(
    folders: dict[str, Path],
    family: str,
    words: list[str],
    names: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever processes there are, spawned ones too."""
    # From 0.33 on vLLM wants a memory node for each data-parallel rank on CPU, unless this is set at all; with
    # another value than 0 it would bind threads, too.
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "0")
    model = folders[family]
    words = [*SERVER_WORDS, "--trust-request-chat-template", *words]
    with LocalServer("test-refusals", model, words, start_limit_s=400) as server:
        # Each rank is asked, by whichever API server accepts a connection.
        if "--data-parallel-size" in words:
            for rank in ("0", "1"):
                check_refusals(server.url, names, **{"X-data-parallel-rank": rank})
        else:
            check_refusals(server.url, names)
        check_refusals_at_once(server.url)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
        check_concurrent_answers(client, model, DEPTH)
        assert server.metric("vllm:num_requests_waiting") == 0


def test_a_batch_file_is_answered_line_by_line(folders: dict[str, Path], tmp_path: Path) -> None:
    """`vllm run-batch`: a refused line costs no other line anything."""
    lines, expected = [], {}
    for name, refused, stream in cases():
        if stream or "chat_template" in refused.options:
            continue
        picture = new_picture()
        for key, body, status in (
            (f"{name}-bad", refused.body(picture, False), 400),
            (f"{name}-good", chat(picture), 200),
        ):
            expected[key] = (status, refused.cure if status == 400 else "")
            line = {"custom_id": key, "method": "POST", "url": CHAT, "body": body}
            lines.append(json.dumps(line))
    assert len(lines) == 6
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = [str(vllm_command()), "run-batch", "-i", str(tmp_path / "in.jsonl")]
    command += ["-o", str(tmp_path / "out.jsonl"), "--model", str(folders[LLAVA]), *SERVER_WORDS]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = {one["custom_id"]: (one["response"]["status_code"], json.dumps(one)) for one in out}
    for key, (status, cure) in expected.items():
        assert found[key][0] == status and cure in found[key][1], (key, found[key])
