"""Which replies of an OpenAI-compatible server are answers."""

from openai.types.chat import ChatCompletion

# How a finished answer ends: the model stopped, or had said all it may.
FINISHED = ("stop", "length")


def answer_in(reply: object) -> tuple[str, str]:
    """The reply's text and why it ended.

    Raises ValueError for a reply that is no finished answer, though HTTP called it a success.
    """
    if not isinstance(reply, ChatCompletion) or not reply.choices:
        raise ValueError(f"the reply is no chat completion: {reply!r}")
    choice = reply.choices[0]
    if choice.finish_reason not in FINISHED:
        raise ValueError(f"the answer ended with finish_reason {choice.finish_reason!r}")
    if not isinstance(choice.message.content, str):
        raise ValueError("the reply holds no text")
    return choice.message.content, choice.finish_reason
