"""Where a visual token is in the picture as the user gave it, family by family."""

from vllm_reroute.explain.geometry.families import patches_of
from vllm_reroute.explain.geometry.patches import Panel, Patches

__all__ = ["Panel", "Patches", "patches_of"]
