"""Metrics are found by their whole name, with all that a label's value may hold."""

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from benchmarks import metrics_page


def test_a_metric_is_found_by_its_whole_name():
    registry = CollectorRegistry()
    waiting = Gauge("vllm:waiting", "…", ("model_name", "engine"), registry=registry)
    waiting.labels('x{} " y', "0").set(2)
    waiting.labels("x", "1").set(3)
    Gauge("vllm:waiting_by_reason", "…", registry=registry).set(9)
    page = generate_latest(registry).decode()
    found = metrics_page.of_metric(page, "vllm:waiting")
    assert [(sample.labels["model_name"], sample.value) for sample in found] == [
        ('x{} " y', 2),
        ("x", 3),
    ]
    with pytest.raises(RuntimeError, match="no vllm:wait"):
        metrics_page.of_metric(page, "vllm:wait")
