"""How a prompt asks the assistant to speak: from the chat template, or from the flag's text."""

from types import SimpleNamespace

import pytest
import vllm.tokenizers

from benchmarks.local_tokenizer import CHAT_TEMPLATE, llava_tokenizer
from vllm_reroute.startup.turn_marker import turn_marker

QWEN = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
THINKS = QWEN.replace("'<s>assistant\n'", "'<s>assistant\n<pad>\n'")
SILENT = QWEN.replace("add_generation_prompt", "false")
REFUSES = "{{ raise_exception('no messages, please') }}"


@pytest.fixture
def marker_of(monkeypatch, tmp_path):
    """The text of the marker for a template and a flag."""

    def found(template, text=None):
        tokenizer = llava_tokenizer()
        tokenizer.chat_template = template
        # Nothing to find a processor or a fallback by.
        tokenizer.name_or_path = str(tmp_path)
        config = SimpleNamespace(
            model="some-model",
            tokenizer="some-model",
            tokenizer_revision=None,
            code_revision=None,
            trust_remote_code=False,
            hf_config=SimpleNamespace(model_type="llava"),
        )
        monkeypatch.setattr(vllm.tokenizers, "cached_tokenizer_from_config", lambda _: tokenizer)
        return tokenizer.decode(turn_marker(config, text))

    return found


@pytest.mark.parametrize(
    "template,text,marker",
    [
        (CHAT_TEMPLATE, None, " ASSISTANT:"),
        (QWEN, None, "<s>assistant\n"),
        (THINKS, None, "<s>assistant\n"),
        (SILENT, "ASSISTANT:", " ASSISTANT:"),
        (SILENT, "\nBot:", "Bot:"),
        (CHAT_TEMPLATE, "<s>assistant\n", "<s>assistant\n"),
    ],
    ids=["llava", "qwen", "more than later turns keep", "text", "on a line of its own", "special"],
)
def test_the_marker(marker_of, template, text, marker):
    assert marker_of(template, text) == marker


@pytest.mark.parametrize("template", [SILENT, REFUSES])
def test_a_template_that_does_not_say(marker_of, template):
    with pytest.raises(ValueError, match=r"some-model does not show how.*--reroute-turn-marker"):
        marker_of(template)
