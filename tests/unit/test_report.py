"""The block a routed engine logs at start says what its live requests will really hold."""

import re
from dataclasses import replace

import pytest

from vllm_reroute.kv_cache.engine_report import engine_report
from vllm_reroute.report import budget_lines, schedule_lines
from vllm_reroute.schedule import CONFIG_KEY, SCHEDULE_KEY, RerouteOptions, RoutingSchedule
from vllm_reroute.schedule.footprint import TYPICAL_TEXT_TOKENS, RequestFootprint

from .parts import VISUAL, kv_cache_config

DEPTH = 8
HIDDEN = 64  # of the model in `model_folder`, in 32-bit


@pytest.fixture(scope="module")
def config(engine_config):
    def make(**options):
        return engine_config(
            max_num_batched_tokens=512, dtype="float32", additional_config={CONFIG_KEY: options}
        )

    return make


def footprint(schedule, block_size):
    return RequestFootprint(
        schedule=schedule,
        num_visual=VISUAL,
        num_text=TYPICAL_TEXT_TOKENS,
        bytes_per_token=2 * 32 * 2,
        block_size=block_size,
    )


@pytest.mark.parametrize("action", ["reroute", "remove"])
@pytest.mark.parametrize("block_size", [16, 32])
def test_the_report_agrees_with_the_pool(config, action, block_size):
    vllm_config = config(layers=[2, 5], keep=[0.5, 0.25], action=action)
    schedule = RoutingSchedule.of(vllm_config)
    assert schedule == RerouteOptions(action=action, layers=(2, 5), keep=(0.5, 0.25)).resolve(DEPTH)
    expect = footprint(schedule, block_size)
    dense_blocks = DEPTH * -(-(VISUAL + TYPICAL_TEXT_TOKENS) // block_size)
    # One block of the pool is vLLM's null block, so seven requests do not fit into seven requests' blocks.
    for num_blocks, fit in ((7 * expect.routed_blocks, 6), (7 * expect.routed_blocks + 1, 7)):
        shown = engine_report(
            vllm_config, kv_cache_config(schedule, num_blocks, block_size=block_size)
        )
        assert f"{fit} routed, {(num_blocks - 1) // dense_blocks} dense" in shown
    numbers = [float(number) for number in re.findall(r"([\d.]+) MiB", shown)]
    # A step's own tokens, and those of earlier steps that it decides about: a whole prompt's.
    side_buffer = (512 + 1024) * HIDDEN * 4 if action == "reroute" else 0
    tables = 4 * DEPTH * 16 * (1024 // block_size)
    runners = 2 * 4 * (DEPTH + 2) * 16 * (1024 // block_size)
    # Last what a request may choose here: to keep everything.
    own = expect.dense_bytes
    held = (expect.dense_bytes, expect.routed_bytes, side_buffer, tables, runners, own)
    assert numbers == pytest.approx([size / 2**20 for size in held], abs=5e-4)
    assert f"custom, action {action}" in shown and "2, 5 of 8" in shown and "0.5, 0.25" in shown
    assert f"{schedule.average(VISUAL):.1f} per layer on average, of {VISUAL}" in shown


MARKER = (8, 9)


def shown_with(options, **changes):
    schedule = RerouteOptions.from_mapping(options).resolve(DEPTH)
    return "\n".join(schedule_lines(replace(schedule, **changes), VISUAL))


def test_what_later_turns_do_is_said():
    own = {"layers": [2, 5], "keep": [0.75, 0.25]}
    assert "earlier turns" not in shown_with(own)
    keep = shown_with({**own, "history": "keep"}, marker=MARKER)
    assert "turns end with tokens 8, 9" in keep and "later questions" not in keep
    recall = shown_with({**own, "history": "recall"})
    assert "that the engine looks up at start" in recall and "up to 0.25 of what a stage" in recall
    # Never more than there are.
    most = [VISUAL, VISUAL, 2 * (VISUAL // 4)]
    assert f"2 times that: of {VISUAL} visual tokens at most {', '.join(map(str, most))}," in recall


@pytest.mark.parametrize(
    "action,allowed", [("reroute", "rerank, keep or recall"), ("remove", "rerank or keep")]
)
@pytest.mark.parametrize("history", ["rerank", "keep", "recall"])
def test_a_request_s_choice_of_history_is_said(config, action, allowed, history):
    vllm_config = config(layers=[2, 5], keep=[0.5, 0.25], action=action)
    schedule = RoutingSchedule.of(vllm_config)
    pool = kv_cache_config(schedule, 100, block_size=16)
    assert "reroute_history" not in engine_report(vllm_config, pool)
    if history == "recall" and action == "remove":
        return
    schedule = replace(schedule, history=history, marker=MARKER)
    vllm_config.additional_config[SCHEDULE_KEY] = schedule.to_dict()
    shown = engine_report(vllm_config, pool)
    assert f"reroute_history {allowed}; here {history} unless it says so" in shown
    assert ("stay while a later question of the same prompt" in shown) is (history == "recall")
    # An int32 for each of the pool's 100 blocks of 16.
    noted = f"noted beside the K/V pool: {100 * 16 * 4 / 2**20:.3f} MiB"
    assert (noted in shown) is (action == "reroute")


def test_a_tier_that_cannot_be_met_is_left_out(monkeypatch):
    """Such as 128 with decisions as late as a schedule of another distribution may have them."""
    monkeypatch.setattr("vllm_reroute.report.TIERS", (192, 1))
    own = footprint(RerouteOptions(schedule="pdrop").resolve(DEPTH), 16)
    (line,) = budget_lines(own)
    assert "with reroute_tier 192" in line and "with reroute_schedule none" in line
    assert "reroute_tier 1," not in line
