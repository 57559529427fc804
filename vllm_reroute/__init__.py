"""Recoverable visual-token routing (Reroute, arXiv 2606.12412) inside vLLM's paged engine."""

__version__ = "0.1.0"
