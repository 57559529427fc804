"""A turn that the prefix cache had is not offered again: its request may hold none of the turn's pages."""

from dataclasses import replace

from .kv_engine import SCHEDULE, Engine, Picture, Text, ask

MARKER = Text("marker", 2)
RECALLS = replace(SCHEDULE, history="recall", marker=tuple(MARKER.tokens()))
FIRST = (Text("system", 40), Picture("cat"), Text("which", 20), MARKER)
SECOND = (*FIRST, Text("short", 3), Text("where", 20), MARKER)
ANSWER = Text("answer", 3)


def test_who_finds_a_turn_offers_none_of_its_pages():
    """No question is left that may recall, so the table has no pages; whose then, is found as before."""
    engine = Engine(RECALLS)
    for name, parts in (("asks", SECOND), ("goes on", (*SECOND, ANSWER))):
        request = ask(name, *parts)
        engine.turns(request)
        engine.finish(request)
    assert engine.pages(request) == 0
    again = ask("asks again", *SECOND, ANSWER, Text("why", 9), MARKER)
    assert engine.hit(again) == len(ask("known", *SECOND, ANSWER).prompt_token_ids)
