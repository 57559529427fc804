"""Layers of a vision tower that were published for a tower of another depth."""

from __future__ import annotations


def scaled_layer(layer: int, depth: int, published_depth: int) -> int:
    """`layer` of `published_depth` layers, in a tower of `depth`: rounded, halves up."""
    return (2 * layer * depth + published_depth) // (2 * published_depth)
