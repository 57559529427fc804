"""The arithmetic of conversations as `vllm-reroute plan --turns` prints it."""

from __future__ import annotations

from itertools import accumulate

from vllm_reroute.schedule.conversation_cost import ConversationCost
from vllm_reroute.schedule.published import HISTORIES
from vllm_reroute.schedule.recall import RECALL_CAP, RECALL_SHARE


def conversation_lines(cost: ConversationCost) -> list[str]:
    """Prefill per turn and K/V at the end, stock and with each history, and which history that speaks for."""
    columns = {"stock": cost.stock(), "rerank": cost.rerank()}
    if cost.can_keep:
        columns["keep"] = cost.keep()
    if cost.can_recall:
        columns["recall"] = cost.recall()
    pictures = -(-cost.turns // cost.questions_per_image)
    lines = [
        f"CONVERSATION of {cost.turns} turn{'s' * (cost.turns > 1)} about {pictures} "
        f"picture{'s' * (pictures > 1)}, all with the prefix cache; prefill by arithmetic, GFLOP:",
        "  turn   new picture" + "".join(f"{name:>12}" for name in columns),
    ]
    for turn in range(cost.turns):
        flops = "".join(f"{column[turn] / 1e9:>12.1f}" for column in columns.values())
        lines.append(f"  {turn + 1:>4}   {'yes' if cost.brings_picture(turn) else '':<11}{flops}")
    sums = {name: sum(column) for name, column in columns.items()}
    lines.append(
        "  sum of stock      " + "".join(f"{s / sums['stock']:>12.2f}" for s in sums.values())
    )
    stock = cost.held(None)
    histories = [name for name in HISTORIES if name in columns]
    held = [1.0, *(cost.held(name) / stock for name in histories)]
    lines.append("  K/V at the end    " + "".join(f"{share:>12.2f}" for share in held))
    return [*lines, *_advice(cost, columns), *_assumptions(cost)]


def _advice(cost: ConversationCost, columns: dict[str, list[int]]) -> list[str]:
    running = zip(accumulate(columns["rerank"]), accumulate(columns["stock"]), strict=True)
    loses = next((turn for turn, (own, stock) in enumerate(running, 1) if own > stock), None)
    lines = [
        "  rerank costs less than stock in all of it"
        if loses is None
        else f"  rerank has cost more than stock from turn {loses} on"
    ]
    if not cost.can_keep:
        return [*lines, f"  --reroute-history keep is not available with {cost.schedule.name}"]
    share = _of_rerank(columns, "keep")
    if share > 0.95:
        return [*lines, "  advice: --reroute-history rerank, keep would save little here"]
    lines += [
        f"  advice: --reroute-history keep, at {share:.2f} of rerank's prefill, where later questions "
        "may do with what",
        "  the picture's own question has kept; rerank where they ask about something else in it",
    ]
    if not cost.can_recall:
        return [
            *lines,
            "  --reroute-history recall is not available with --reroute-action remove",
        ]
    return [
        *lines,
        f"  between them: --reroute-history recall, at {_of_rerank(columns, 'recall'):.2f} of rerank's "
        "prefill; each later question without",
        f"  a picture brings back up to {RECALL_SHARE:g} of what a stage keeps, until the stage holds "
        f"{RECALL_CAP} times what keep holds",
    ]


def _of_rerank(columns: dict[str, list[int]], history: str) -> float:
    return sum(columns[history]) / sum(columns["rerank"])


def _assumptions(cost: ConversationCost) -> list[str]:
    tower = "counted" if cost.vision else "of this family not counted"
    return [
        f"  Assumed: {cost.question} tokens a question, {cost.answer} an answer, answers back unchanged,"
        f" nothing evicted; vision tower {tower}"
    ]
