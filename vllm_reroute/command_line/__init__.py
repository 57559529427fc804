"""Flags added to vLLM's commands, and the `vllm-reroute` command."""

from vllm_reroute.command_line.main import main

__all__ = ["main"]
