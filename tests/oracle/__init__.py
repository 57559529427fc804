"""A plain-transformers reference for routed models: what the engine's output is compared against.

Imports neither vllm nor the package under test, so the two can only agree by being right.
"""

from .nuwa import NuwaOracle, NuwaResult
from .recall import RecallOracle
from .routed import OracleResult, RoutedOracle

__all__ = ["NuwaOracle", "NuwaResult", "OracleResult", "RecallOracle", "RoutedOracle"]
