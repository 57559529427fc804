"""Tests that run real vLLM engines, each runner in a process of its own."""
