"""What a server's `/metrics` says."""

from __future__ import annotations

import urllib.request
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.local_server import LocalServer

Sample = tuple[str, ...]
"""A sample's name and its labels' values, by label, without those that every metric of vLLM has."""


def scrape(server: LocalServer) -> Counter[Sample]:
    """Values of all samples. Taken from each other, two of these say what has been counted since."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
    common = ("model_name", "engine")
    values: Counter[Sample] = Counter()
    for family in families:
        for sample in family.samples:
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
