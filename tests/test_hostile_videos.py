"""Videos that would take hours or gigabytes to read: refused in one line."""

import pytest
from conftest import GREYS, save_video

from model.data import timeline, video
from model.data.video import read_frames


def test_a_video_of_too_many_packets_is_refused(tmp_path, monkeypatch):
    """Each is looked at; a day of them takes minutes."""
    path = save_video(tmp_path / "a.mp4", GREYS)
    assert len(read_frames(path)) == 5
    monkeypatch.setattr(timeline, "MAX_PACKETS", 3)
    with pytest.raises(ValueError, match="a.mp4: it holds more than 3 packets: cut it into parts"):
        read_frames(path)


def test_a_video_whose_frames_take_too_much_decoding_is_refused(tmp_path, monkeypatch):
    """One without key frames is decoded from its beginning; a few kB may hold hours of large frames."""
    path = save_video(tmp_path / "a.mp4", GREYS)
    monkeypatch.setattr(video, "MAX_DECODED", 3 * 64 * 64)
    with pytest.raises(ValueError, match="a.mp4: more than 12,288 pixels would have to be decoded: cut it"):
        read_frames(path)
    monkeypatch.setattr(video, "MAX_DECODED", 6 * 64 * 64)
    assert len(read_frames(path)) == 5


def test_frames_are_as_large_as_8k_at_most():
    video.check_size(8192, 4320)
    with pytest.raises(ValueError, match="its frames have 16384 x 8640 pixels; at most 36,000,000 are read"):
        video.check_size(16384, 8640)
