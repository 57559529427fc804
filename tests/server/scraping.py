"""What a server's `/metrics` says."""

from __future__ import annotations

from collections import Counter

from benchmarks import metrics_page
from benchmarks.local_server import LocalServer

Sample = tuple[str, ...]
"""A sample's name and its labels' values, by label, without those that every metric of vLLM has."""


def scrape(server: LocalServer) -> Counter[Sample]:
    """Values of all samples. Taken from each other, two of these say what has been counted since."""
    common = ("model_name", "engine")
    values: Counter[Sample] = Counter()
    for sample in metrics_page.samples(metrics_page.fetch(server.url)):
        own = [value for label, value in sorted(sample.labels.items()) if label not in common]
        values[sample.name, *own] += sample.value
    return values


def of_routing(values: Counter[Sample]) -> dict[Sample, float]:
    """Those that routing adds, without zeros and the times at which they were made."""
    return {
        sample: value
        for sample, value in values.items()
        if sample[0].startswith("vllm:reroute_") and not sample[0].endswith("_created") and value
    }
