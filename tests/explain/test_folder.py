"""The pictures, and the folder they are left in."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.explain.parts import clip, explanation, photo
from vllm_reroute.explain.drawing import panel_image, sheet_image, stage_image
from vllm_reroute.explain.folder import check_folder, write_folder
from vllm_reroute.explain.pictures import image_of

ORANGE = np.array([0xF0, 0x8C, 0x00])


@pytest.fixture(scope="module")
def white(folders):
    """A white square picture in 12 x 12 patches, so that every look is a colour of its own."""
    return explanation(
        folders["llava"], [image_of("white.png", Image.new("RGB", (504, 504), "white"))]
    )


def test_look_shows_what_runs(white):
    """Patches that run are as given; those that wait are dark."""
    side = 50
    for index, stage in enumerate(white.stages):
        image = panel_image(white, white.panels[0], index, 12 * side)
        pixels = np.asarray(image.convert("L"), dtype=float)[: 12 * side, : 12 * side]
        # The lower half of each patch's left: no frame, no corner, and little of a strike.
        middles = pixels.reshape(12, side, 12, side)[:, 28:40, :, 8:20].mean(axis=(1, 3))
        assert (middles > 240).ravel().tolist() == stage.kept.tolist()
        assert (middles < 110).ravel().tolist() == stage.deferred.tolist()


def test_what_came_back_is_framed(white):
    pixels = [np.asarray(stage_image(white, index)).astype(int) for index in range(4)]
    orange = [int((np.abs(p - ORANGE).max(axis=2) < 8).sum()) for p in pixels]
    counts = [stage.num_brought_back for stage in white.stages]
    legend = orange[0]
    assert counts[:2] == [0, 0] and orange[1] == legend
    # Frames and corners of a 46-pixel patch: the more came back, the more orange.
    for count, seen in zip(counts[2:], orange[2:], strict=True):
        assert 300 * count < seen - legend < 900 * count


def test_unseen_parts_are_grey(folders):
    """LLaVA-1.5 crops a wide picture: its sides are covered by no token."""
    made = explanation(
        folders["llava"], [image_of("wide.png", Image.new("RGB", (900, 300), "white"))]
    )
    pixels = np.asarray(panel_image(made, made.panels[0], 0, 900).convert("L"))[:300]
    # The middle 300 pixels are seen, in 12 columns.
    assert pixels[:, :298].max() < 190 and pixels[:, 602:].max() < 190
    assert pixels[5:20, 305:320].min() > 240 and pixels[5:20, 580:595].min() > 240


def test_sheet_has_every_stage(white, folders):
    """More stages need more room, and so do several looks."""
    assert sheet_image(white).width == sheet_image(explanation(folders["llava"], [photo(0)])).width
    several = explanation(folders["qwen2-vl"], [photo(0), photo(1), clip(8)])
    assert sheet_image(several).height > 4 * 270


def test_folder_is_complete_and_replaced(white, tmp_path):
    folder = tmp_path / "new" / "folder"
    written = write_folder(white, folder)
    names = ["index.html", "sheet.png", "stage-0.png", "stage-1.png", "stage-2.png", "stage-3.png"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in folder.iterdir()) == names
    (folder / "stage-7.png").write_bytes(b"of a longer schedule")
    write_folder(white, folder)
    assert sorted(path.name for path in folder.iterdir()) == names


def test_other_files_are_left_alone(white, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"--out .*holiday\.jpg.*new folder"):
        write_folder(white, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(ValueError, match=r"holiday\.jpg is a file"):
        check_folder(tmp_path / "holiday.jpg")
