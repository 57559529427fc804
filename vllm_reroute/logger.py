"""Loggers that vLLM's own logging configuration shows."""

from __future__ import annotations

from logging import Logger

from vllm.logger import init_logger


def reroute_logger(name: str) -> Logger:
    """A logger below `vllm`, whose level, format and handlers vLLM sets up and users know."""
    return init_logger(f"vllm.{name}")
