"""Qwen2.5-VL: as Qwen2-VL; a video's positions in time also follow its `second_per_grid_ts`, [videos]."""

from .qwen2_vl import prepare

__all__ = ["prepare"]
