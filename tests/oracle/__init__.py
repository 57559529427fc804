"""A plain-transformers reference for routed LLaVA: what the engine's output is compared against.

Imports neither vllm nor the package under test, so the two can only agree by being right.
"""

from .routed_llava import OracleResult, RoutedOracle

__all__ = ["OracleResult", "RoutedOracle"]
