"""Tests against the real HTTP server on loopback."""
