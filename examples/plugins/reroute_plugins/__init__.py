"""A schedule and a scorer that vllm-reroute finds by their entry points."""
