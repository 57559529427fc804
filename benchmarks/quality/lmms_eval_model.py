"""lmms-eval's model for OpenAI-compatible servers, with failed requests stopping the evaluation.

lmms-eval's own gives a request that failed for good the text "[LMMS_EVAL_REQUEST_FAILED …", which tasks then score as
a wrong answer and its response cache keeps. Needs lmms-eval; `benchmarks.quality.lmms_eval` registers it.
"""

from pathlib import Path
from typing import Any

from lmms_eval.models.chat.openai import OpenAICompatible

from benchmarks.quality.checked_client import AnswerFile, CheckedClient


class CheckedOpenAI(OpenAICompatible):
    """answers: file of the replies so far. Everything else as lmms-eval has it."""

    is_simple = False
    client: Any

    def __init__(self, answers: str, base_url: str, **options) -> None:
        super().__init__(base_url=base_url, **options)
        # lmms-eval leaves its timeout unused, and the client would repeat requests on top of lmms-eval's attempts.
        once = self.client.with_options(timeout=self.timeout, max_retries=0)
        self.client = CheckedClient(once, AnswerFile(Path(answers)), base_url)

    def generate_until(self, requests) -> list:
        """Raises RequestsFailed, before anything is scored, if a request has no answer."""
        generated = super().generate_until(requests)
        self.client.check(each.text for each in generated)
        return generated
