"""lmms-eval against a server some of whose requests fail: they must never be scored."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from benchmarks.quality.checked_client import AnswerFile, CheckedClient, RequestsFailed
from tests.unit.quality_stub import Reply, stub

REPOSITORY = Path(__file__).resolve().parents[2]
TASK = """\
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
task: stub_task
test_split: test
output_type: generate_until
doc_to_visual: !function stub_task.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
VISUAL = """\
from PIL import Image


def visual(doc):
    return [Image.new("RGB", (28, 28), "red")]
"""


def payload(text: str) -> dict:
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    return {"model": "stub", "messages": [message], "max_tokens": 8, "temperature": 0}


def client_of(url: str, path: Path) -> CheckedClient:
    plain = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20)
    return CheckedClient(plain, AnswerFile(path), url)


@pytest.mark.parametrize(
    "bad",
    [Reply(status=500), Reply(status=400), Reply(finish_reason="abort"), Reply(content=None)],
    ids=["500", "400", "aborted", "no-text"],
)
def test_a_failed_request_stops_the_scoring(tmp_path, bad):
    with stub(lambda text: bad if text == "b" else Reply()) as server:
        client = client_of(server.url, tmp_path / "answers.jsonl")
        client.chat.completions.create(**payload("a"))
        client.check(["yes"])
        with pytest.raises((openai.OpenAIError, ValueError)):
            client.chat.completions.create(**payload("b"))
        with pytest.raises(RequestsFailed, match="1 requests have no answer"):
            client.check(["yes", "what the program made up"])


def test_an_attempt_that_succeeds_makes_up_for_one_that_failed(tmp_path):
    with stub(lambda _: Reply(status=500)) as server:
        client = client_of(server.url, tmp_path / "answers.jsonl")
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(**payload("a"))
        server.reply_to = lambda _: Reply()
        client.chat.completions.create(**payload("a"))
        client.check(["yes"])


def test_answers_made_up_without_a_request_are_noticed(tmp_path):
    client = client_of("http://127.0.0.1:9/v1", tmp_path / "answers.jsonl")
    with pytest.raises(RequestsFailed):
        client.check(["yes", "[LMMS_EVAL_BUDGET_EXCEEDED]"])


def test_only_what_failed_is_asked_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    with stub(lambda text: Reply(content=text) if text == "a" else Reply(status=503)) as server:
        for text in "ab":
            try:
                client_of(server.url, path).chat.completions.create(**payload(text))
            except openai.InternalServerError:
                assert text == "b"
        server.reply_to = lambda text: Reply(content="now " + text)
        path.write_text(path.read_text() + '{"key": "cut')
        later = client_of(server.url, path)
        answers = [
            later.chat.completions.create(**payload(text)).choices[0].message.content
            for text in "ab"
        ]
        assert answers == ["a", "now b"]
        assert server.asked == ["a", "b", "b"]
        assert len(path.read_text().splitlines()) == 2


def test_other_questions_and_servers_are_not_mixed_up(tmp_path):
    path = tmp_path / "answers.jsonl"
    with stub(lambda _: Reply(content="one")) as one, stub(lambda _: Reply(content="two")) as two:
        for server in (one, two, one):
            client = client_of(server.url, path)
            reply = client.chat.completions.create(**payload("a"))
            assert reply.choices[0].message.content == ("one" if server is one else "two")
        client.chat.completions.create(**payload("a") | {"max_tokens": 9})
    assert len(one.asked) == 2 and len(two.asked) == 1


def command(url: str, out: Path, *words: str) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", "benchmarks.quality.lmms_eval"]
    given = ["--base-url", url, "--model", "stub", "--out", str(out), "--attempts", "2"]
    return subprocess.run(
        [*program, *given, *words],
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hub")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_options_that_would_let_failures_in_are_refused(tmp_path):
    for words in (["--use_cache", "x"], ["--max_tokens=9"], ["--model_args", "model=y"]):
        done = command("http://127.0.0.1:9/v1", tmp_path, *words)
        assert done.returncode == 2 and words[0] in done.stderr


has_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval has an environment of its own (benchmarks/quality/README.md)",
)


@has_lmms_eval
def test_lmms_eval_scores_nothing_until_all_is_answered(tmp_path):
    """A real lmms-eval run of a task with local data: first with failing requests, then again without."""
    questions = [{"question": f"number {i}", "answer": "yes"} for i in range(6)]
    tasks, out = tmp_path / "tasks", tmp_path / "out"
    tasks.mkdir()
    data = tasks / "data.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in questions))
    (tasks / "stub_task.yaml").write_text(TASK.format(data=data))
    (tasks / "stub_task.py").write_text(VISUAL)
    words = ["--tasks", "stub_task", "--include_path", str(tasks)]
    bad = {"number 1": Reply(status=500), "number 4": Reply(finish_reason="abort")}
    with stub(lambda text: bad.get(text, Reply())) as server:
        done = command(server.url, out, *words)
        assert done.returncode == 1
        assert "2 requests have no answer, so nothing was scored" in done.stderr
        assert not list(out.rglob("*results.json"))
        asked = len(server.asked)
        server.reply_to = lambda text: Reply(content="no" if text == "number 4" else "yes")
        done = command(server.url, out, *words)
        assert done.returncode == 0, done.stderr
        assert sorted(server.asked[asked:]) == ["number 1", "number 4"]
    (path,) = out.rglob("*results.json")
    scores = json.loads(path.read_text())["results"]["stub_task"]
    assert scores["exact_match,none"] == pytest.approx(5 / 6)


@has_lmms_eval
def test_the_documented_tasks_get_as_far_as_their_data(tmp_path):
    with stub(lambda _: Reply()) as server:
        done = command(server.url, tmp_path)
    assert done.returncode == 1
    assert "nothing was scored" in done.stderr and not server.asked
    assert "lmms-lab" in done.stderr + done.stdout
