"""Sound."""

import av
import numpy as np
import pytest
import torch

from tests.media import clips
from tokenprune.errors import MediaError
from tokenprune.media import read_audio


def test_tone_comes_back(clip):
    sound = read_audio(clip("h264_sound").path)

    assert sound.dtype == torch.float32 and sound.dim() == 1
    assert len(sound) == pytest.approx(2.4 * 16000, abs=1100)  # the coder adds a frame at the end
    middle = sound[4000:36000].numpy()
    spectrum = np.abs(np.fft.rfft(middle))
    assert np.argmax(spectrum) * 16000 / len(middle) == pytest.approx(440, abs=1)
    assert np.abs(middle).max() == pytest.approx(0.25, abs=0.02)  # the mean of 0.5 and silence


def test_sampling_rate(clip):
    sound = read_audio(clip("h264_sound").path, sampling_rate=8000)
    assert len(sound) == pytest.approx(2.4 * 8000, abs=600)


def test_several_tracks(tmp_path):
    path = tmp_path / "two.mka"
    with av.open(str(path), "w") as container:
        tracks = [container.add_stream("aac", rate=48000, layout="stereo") for _ in range(2)]
        for track, hertz in zip(tracks, (440.0, 880.0), strict=True):
            clips.write_tone(container, track, 1.0, hertz)
    for number, hertz in enumerate((440, 880)):
        sound = read_audio(path, track=number).numpy()[2000:14000]
        peak = np.argmax(np.abs(np.fft.rfft(sound))) * 16000 / len(sound)
        assert peak == pytest.approx(hertz, abs=2)
    with pytest.raises(MediaError, match=r"track must be from 0 to 1 in .*two\.mka', got 2"):
        read_audio(path, track=2)


def test_bad_requests_fail(clip, tmp_path):
    with pytest.raises(MediaError, match=r"v\.webm' has no sound track"):
        read_audio(clip("vp9").path)
    with pytest.raises(MediaError, match="sampling_rate must be at least 1 per second, got 0"):
        read_audio(clip("h264_sound").path, sampling_rate=0)
    with pytest.raises(MediaError, match="no such file"):
        read_audio(tmp_path / "none.wav")
