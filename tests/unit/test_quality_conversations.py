"""Conversations over HTTP and their table: what is asked behind what, what is counted where, what follows from it."""

import json
from dataclasses import replace

import pytest

from benchmarks.grounding.conversations import OTHER, TURN_KINDS, conversations
from benchmarks.quality.asking import Endpoint
from benchmarks.quality.conversations import report
from benchmarks.quality.conversations.__main__ import parse_arguments
from benchmarks.quality.conversations.gap import Gap
from benchmarks.quality.conversations.rows import (
    COMPARISONS,
    KEEP,
    METHODS,
    RECALL,
    REMOVE,
    RERANK,
    rows,
)
from benchmarks.quality.conversations.table import ALL, LATER, default, table
from benchmarks.quality.conversations.talking import hold_all, talks_of, turns_of
from benchmarks.quality.methods import DENSE
from benchmarks.quality.model_shape import ModelShape
from benchmarks.quality.outcomes import Outcome, OutcomeFile
from tests.unit.quality_stub import Reply, stub

SHAPE = ModelShape(visual_tokens=144, decoder_layers=32, image_token=4, kv_bytes=1)
IDENTITY = {
    "split": "test",
    "max_tokens": 12,
    "temperature": 0,
    "model": "0123456789abcdef",
    "model_name": "small",
    "visual_tokens": 144,
    "decoder_layers": 32,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def talks():
    return talks_of(conversations("test", 24))


def held(talks, reply_to) -> tuple[dict[int, Outcome], list[dict]]:
    outcomes: list[Outcome] = []
    with stub(reply_to) as server:
        hold_all(Endpoint(url=server.url, model="stub"), talks, 8, outcomes.append)
    assert len({each.index for each in outcomes}) == len(outcomes)
    return {each.index: each for each in outcomes}, server.requests


def test_every_turn_is_asked_behind_the_servers_own_answers(talks):
    outcomes, requests = held(talks, lambda text: Reply(content=f" heard {text}"))
    assert set(outcomes) == {turn.prompt.index for turn in turns_of(talks)}
    asked = {json.dumps(request["messages"]) for request in requests}
    for talk in talks:
        messages = []
        for turn in talk:
            content = [{"type": "text", "text": turn.prompt.text}]
            if turn.new_picture:
                picture = {"type": "image_url", "image_url": {"url": turn.prompt.picture}}
                content = [picture, *content]
            messages.append({"role": "user", "content": content})
            assert json.dumps(messages) in asked
            answer = {"role": "assistant", "content": f"heard {turn.prompt.text}"}
            messages.append(answer)
    assert {sum(turn.new_picture for turn in talk) for talk in talks} == {1, 2}


def test_after_a_turn_without_an_answer_the_conversation_waits(talks):
    lost = talks[0][0].prompt.text
    outcomes, requests = held(
        talks[:2], lambda text: Reply(status=500) if text == lost else Reply()
    )
    assert len(requests) == 1 + len(talks[1])
    assert outcomes[0].failed and not any(t.prompt.index in outcomes for t in talks[0][1:])


def test_what_a_question_depends_on_is_in_its_digest(talks):
    """Also everything before it."""
    talk = next(conversations("test", 1))
    again = talks_of([talk])[0]
    assert [turn.prompt for turn in again] == [turn.prompt for turn in talks[0]]
    first = replace(talk.turns[0], asked=talk.turns[0].asked._replace(text="What?"))
    changed = talks_of([replace(talk, turns=(first, *talk.turns[1:]))])[0]
    pairs = zip(again, changed, strict=True)
    assert all(one.prompt.digest != other.prompt.digest for one, other in pairs)


def test_servers_differ_in_what_they_are_named_for_alone():
    found = rows(list(METHODS), [0.33, 0.22], SHAPE)
    assert [each.method for each in found] == [DENSE, *[RERANK, KEEP, RECALL, REMOVE] * 2]
    assert len({each.name for each in found}) == len(found)
    by_name = {(each.method, each.budget): each for each in found}
    for budget in (0.33, 0.22):
        methods = (RERANK, KEEP, RECALL, REMOVE)
        rerank, keep, recall, remove = (by_name[name, budget] for name in methods)
        assert rerank.arguments[-2:] == ("--reroute-history", "rerank")
        assert keep.arguments == (*rerank.arguments[:-1], "keep")
        assert recall.arguments == (*rerank.arguments[:-1], "recall")
        assert remove.arguments[-2:] == keep.arguments[-2:]
        assert "remove" in remove.arguments[remove.arguments.index("--reroute-action") :][1]
        assert abs(remove.average - keep.average) < 1.5
    with pytest.raises(ValueError, match="reroute keep"):
        rows(["keep"], [0.33], SHAPE)


def right_for(turn, wrong) -> Outcome:
    """Right, unless the turn is among `wrong`."""
    prompt = turn.prompt
    return Outcome(
        index=prompt.index,
        digest=prompt.digest,
        kind=prompt.kind,
        expected=prompt.expected,
        answer="no" if prompt.index in wrong else prompt.expected,
    )


def record(folder, name, method, budget, turns, wrong) -> None:
    about = {
        **IDENTITY,
        "method": method,
        "budget": budget,
        "average": 144 * (budget or 1),
        "decision_layers": [],
        "kept": [],
        "arguments": [],
    }
    file = OutcomeFile(folder / f"{name}.jsonl", about, [turn.prompt.digest for turn in turns])
    file.start_run({"date": "2026-01-01 10:00 UTC", "note": ""})
    for turn in turns:
        file.add(right_for(turn, wrong))


@pytest.fixture
def folder(tmp_path, talks):
    turns = turns_of(talks)
    of_kind = {k: [t.prompt.index for t in turns if t.prompt.kind == k] for k in TURN_KINDS}
    record(tmp_path, "dense", DENSE, None, turns, [])
    record(tmp_path, "keep", KEEP, 0.33, turns, of_kind[OTHER])
    record(tmp_path, "rerank", RERANK, 0.33, turns, of_kind["same"][:1])
    return tmp_path


def test_accuracies_are_by_turn_and_by_kind(folder, talks):
    found = table(folder, turns_of(talks), len(talks), {})
    assert found["complete"] and found["questions"]["conversations"] == len(talks)
    dense, rerank, keep = found["rows"]
    assert (dense["method"], rerank["method"], keep["method"]) == (DENSE, RERANK, KEEP)
    assert keep["by_kind"][OTHER]["accuracy"] == 0 and keep["by_kind"]["same"]["accuracy"] == 1
    assert keep["by_turn"]["1"]["accuracy"] == 1 and keep["by_turn"]["2"]["accuracy"] < 1
    for row in found["rows"]:
        for by in ("by_kind", "by_turn"):
            assert sum(score["answered"] for score in row[by].values()) == len(turns_of(talks))
    low, high = keep["by_kind"]["same"]["interval"]
    assert low < 1 == high


def test_differences_are_paired_and_of_one_kind_each(folder, talks):
    found = table(folder, turns_of(talks), len(talks), {})
    assert [each["kind"] for each in found["comparisons"]] == [ALL, LATER, *TURN_KINDS]
    at = {each["kind"]: each for each in found["comparisons"]}
    others = sum(turn.prompt.kind == OTHER for turn in turns_of(talks))
    assert (at[OTHER]["first"], at[OTHER]["second"]) == COMPARISONS[0]
    assert (at[OTHER]["difference"], at[OTHER]["pairs"]) == (1.0, others)
    assert at[OTHER]["p_value"] == pytest.approx(2 * 0.5**others)
    assert (at["same"]["only_first"], at["same"]["only_second"]) == (0, 1)
    assert at["first"]["difference"] == 0 and at["first"]["p_value"] == 1
    assert at[LATER]["pairs"] == at[ALL]["pairs"] - len(talks)


def answers(rights: str) -> dict[int, Outcome]:
    """`+` right, `-` wrong, `!` no answer."""
    about = {"digest": "0", "kind": OTHER, "expected": "yes"}
    given = {"+": "yes", "-": "no", "!": None}
    return {n: Outcome(index=n, answer=given[one], **about) for n, one in enumerate(rights)}


def test_a_share_of_a_gap_is_of_questions_that_all_three_answered():
    few = Gap.between(answers("+----!--"), answers("++++--!-"), answers("+++++++!"))
    assert (few.questions, few.share) == (5, 0.75)
    many = Gap.between(*(answers(one * 200) for one in ("+----", "++-+-", "+++++")))
    low, high = many.interval
    assert many.share == 0.5 and 0.4 < low < 0.5 < high < 0.6
    more = Gap.between(*(answers(one * 200) for one in ("+---", "++++", "+++-")))
    worse = Gap.between(*(answers(one * 200) for one in ("+---", "----", "+++-")))
    assert more.share == 1.5 and worse.share == -0.5


@pytest.mark.parametrize("high", ["++--", "+---", "-++-" + "-+-+"])
def test_there_is_no_share_of_what_may_be_nothing(high):
    gap = Gap.between(answers("++--" * 2), answers("+-+-" * 2), answers(high * (8 // len(high))))
    assert gap.questions == 8 and gap.share is gap.interval is None
    assert Gap.between({}, {}, {}).share is None


def test_the_table_has_gaps_where_three_servers_answered(folder, talks):
    turns = turns_of(talks)
    assert table(folder, turns, len(talks), {})["gaps"] == []
    others = [turn.prompt.index for turn in turns if turn.prompt.kind == OTHER]
    record(folder, "recall", RECALL, 0.33, turns, others[: len(others) // 4])
    found = table(folder, turns, len(talks), {})
    at = {each["kind"]: each for each in found["gaps"]}
    assert list(at) == [LATER, *TURN_KINDS[1:]] and found["rows"][3]["method"] == RECALL
    assert at[OTHER]["share"] == pytest.approx(1 - len(others) // 4 / len(others))
    assert at["same"]["share"] is None
    named = {(each["first"], each["second"]) for each in found["comparisons"]}
    assert named == {(RERANK, KEEP), (RERANK, RECALL), (RECALL, KEEP)}
    text = "\n".join(report.markdown(found))
    assert f"| 33 % | {report._closed(at[LATER])} | - |" in text
    assert f"{100 * at[OTHER]['share']:.0f} (" in text


def test_the_default_follows_from_other_things_at_both_budgets():
    def lost(at_33: float, at_22: float | None, kind: str = OTHER) -> list[dict]:
        points = {0.33: at_33, 0.22: at_22}
        return [
            {"first": RERANK, "second": KEEP, "kind": kind, "budget": b, "difference": d / 100}
            for b, d in points.items()
            if d is not None
        ]

    assert default(lost(0.9, 0.9)) == "keep"
    assert default(lost(-2, 0.4)) == "keep"
    assert default(lost(0.2, 1.0)) == default(lost(5, 0)) == "rerank"
    assert default(lost(0.2, None)) is None and default(lost(0, 0, "same")) is None


def test_a_report_shows_all_of_it_and_says_what_is_missing(folder, talks):
    turns = turns_of(talks)
    found = table(folder, turns, len(talks), {})
    out = folder / "out"
    report.write(found, out)
    text = (out / report.MARKDOWN_NAME).read_text(encoding="utf-8")
    assert "ncomplete" not in text and f"| {RERANK} - {KEEP} | 33 % | {OTHER} | +100.0 (" in text
    assert (out / report.PLOT).read_text(encoding="utf-8").count("<svg") == 1
    (folder / "keep.jsonl").unlink()
    record(folder, "keep", KEEP, 0.33, turns[:-1], [])
    found = table(folder, turns, len(talks), {"remove-keep-33": "no room"})
    text = "\n".join(report.markdown(found))
    assert "**Incomplete.**" in text and "1 not asked" in text and "no room" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--publish", "--quick"], "--publish"), (["--talks", "0"], "--talks 0 must be 1 or more")],
)
def test_what_makes_no_sense_is_refused(words, says, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(words)
    assert says in capsys.readouterr().err
