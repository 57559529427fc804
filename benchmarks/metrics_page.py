"""What a server's `/metrics` says."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def fetch(url: str) -> str:
    """The page of the server with this base URL."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        return response.read().decode()


def samples(page: str) -> list[Sample]:
    """All there are."""
    return [sample for family in text_string_to_metric_families(page) for sample in family.samples]


def of_metric(page: str, name: str) -> list[Sample]:
    """A sample for each combination of labels. Raises RuntimeError if there is none."""
    # The rest of the page is not parsed: it would take longer than a small model's decode step.
    lines = "".join(f"{line}\n" for line in page.splitlines() if line.startswith(name))
    found = [sample for sample in samples(lines) if sample.name == name]
    if not found:
        raise RuntimeError(f"The server's /metrics has no {name}. Is this vLLM 0.32?")
    return found
