"""An OpenAI client for evaluation programs that take whatever a request yields for an answer.

It passes on finished answers only, remembers them on disk, and knows which requests never got one.
"""

import hashlib
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from benchmarks.quality.replies import answer_in


class RequestsFailed(RuntimeError):
    """Some requests have no answer, so that nothing may be scored."""


class AnswerFile:
    """Replies by what was asked, kept at `path`, so that a later run asks only what is missing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._replies: dict[str, dict] = {}
        if path.exists():
            # A last line without its end is from a run that was killed.
            complete, _, half = path.read_text(encoding="utf-8").rpartition("\n")
            if half:
                path.write_text(complete + "\n" * bool(complete), encoding="utf-8")
            entries = map(json.loads, complete.splitlines())
            self._replies = {entry["key"]: entry["reply"] for entry in entries}

    def get(self, key: str) -> ChatCompletion | None:
        reply = self._replies.get(key)
        return None if reply is None else ChatCompletion.model_validate(reply)

    def put(self, key: str, reply: ChatCompletion) -> None:
        kept = reply.model_dump(mode="json")
        entry = {"key": key, "reply": kept}
        with self._lock:
            self._replies[key] = kept
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


class CheckedClient:
    """Takes the place of an `openai.OpenAI`; only `chat.completions.create` is there.

    model_key: tells models of equal name apart, such as the server's address.
    """

    def __init__(self, client: openai.OpenAI, answers: AnswerFile, model_key: str) -> None:
        self._client, self._answers, self._model_key = client, answers, model_key
        self._unanswered: dict[str, str] = {}
        self.chat = self.completions = self

    def create(self, **payload: Any) -> ChatCompletion:
        """The reply, from disk if this was asked before. Raises whatever went wrong, or ValueError for no answer."""
        text = json.dumps([self._model_key, payload], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        reply = self._answers.get(key)
        if reply is None:
            self._unanswered[key] = "still under way"
            try:
                reply = self._client.chat.completions.create(**payload)
                answer_in(reply)
            except Exception as error:
                self._unanswered[key] = f"{type(error).__name__}: {error}"
                raise
            self._answers.put(key, reply)
        self._unanswered.pop(key, None)
        return reply

    def check(self, texts: Iterable[str]) -> None:
        """Raises RequestsFailed unless every request so far was answered.

        texts: what the evaluation program takes for answers; lmms-eval marks some it made up.
        """
        made_up = [text for text in texts if text.startswith("[LMMS_EVAL_")]
        errors = list(self._unanswered.values()) or made_up
        if errors:
            raise RequestsFailed(
                f"{len(errors)} requests have no answer, so nothing was scored. The first: {errors[0][:300]} "
                "The others' answers are kept: run the same command again to ask these once more."
            )
