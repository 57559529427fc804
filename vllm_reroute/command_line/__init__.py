"""Flags added to vLLM's commands, and the `vllm-reroute` command."""
