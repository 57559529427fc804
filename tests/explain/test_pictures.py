"""Images and videos from files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vllm_reroute.explain.pictures import load_image, load_video


def test_image_is_upright_and_opaque(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned by a quarter.
    Image.new("RGB", (40, 20), "red").save(path, exif=exif)
    assert load_image(path).size == (20, 40)
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(clear)
    picture = load_image(clear)
    assert picture.name == "clear.png" and not picture.is_video
    assert picture.frames[0].getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("wanted,frames", [(3, 3), (50, 12)])
def test_video_is_sampled_evenly(tmp_path, wanted, frames):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "grey.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for shade in range(0, 240, 20):
        writer.write(np.full((48, 64, 3), shade, dtype=np.uint8))
    writer.release()
    video = load_video(path, wanted)
    assert video.is_video and video.size == (64, 48) and len(video.frames) == frames
    shades = video.as_array().mean(axis=(1, 2, 3))
    assert abs(shades[0]) < 8 and abs(shades[-1] - 220) < 8
    assert len(video.metadata["frames_indices"]) == frames
    # All sampled frames go to the model: nothing may sample them again.
    assert "do_sample_frames" not in video.metadata


def test_files_of_the_wrong_kind(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("no picture")
    with pytest.raises(ValueError, match=r"--image .*words\.txt.*PNG"):
        load_image(path)
    with pytest.raises(ValueError, match=r"--video .*words\.txt.*MP4"):
        load_video(path, 4)
    with pytest.raises(OSError, match="absent"):
        load_image(tmp_path / "absent.png")
