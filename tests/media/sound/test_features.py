"""Sound at other rates, and as mel spectrograms, against the feature extractor of Whisper."""

import sys

import numpy as np
import pytest
import torch

from tokenprune.errors import MediaError, MissingExtraError
from tokenprune.media import log_mel, resample


def tone(hertz, seconds, rate=16000):
    return 0.5 * torch.sin(2 * np.pi * hertz * torch.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("mels", [80, 128])
def test_features_are_those_of_whisper(mels):
    from transformers import WhisperFeatureExtractor

    torch.manual_seed(0)
    sound = torch.randn(16000 * 3 + 77) * 0.1 + tone(440, 3.1)[: 16000 * 3 + 77]
    expected = WhisperFeatureExtractor(feature_size=mels)(
        sound.numpy(),
        sampling_rate=16000,
        return_tensors="pt",
        padding="longest",
        truncation=False,
    )["input_features"][0]

    features = log_mel(sound, mels=mels)

    assert features.shape == (mels, 300) and features.dtype == torch.float32
    assert torch.allclose(features, expected[:, :300], atol=1e-3)


def test_features_of_long_sounds_are_not_cut():
    quiet = torch.zeros(16000 * 301)
    quiet[-16000:] = tone(1000, 1.0)
    features = log_mel(quiet, mels=80)
    assert features.shape == (80, 30_100)
    assert features[:, -50].max() > 1 > 0 > features[:, :29_990].max()


@pytest.mark.parametrize("rate", [8000, 24000, 44100])
def test_other_rates_keep_the_pitch(rate):
    sound = resample(torch.stack([tone(440, 2.0), tone(1000, 2.0)]), 16000, rate)
    assert sound.shape == (2, 2 * rate)
    for row, hertz in zip(sound, (440, 1000), strict=True):
        middle = row[rate // 2 : rate + rate // 2]
        assert np.argmax(np.abs(np.fft.rfft(middle.numpy()))) == hertz  # over one second
        assert middle.abs().max() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resample(torch.zeros(9), 0, 8), "^rate must be at least 1 per second, got 0"),
        (lambda: resample(torch.zeros(9), 8, 0), "new_rate must be at least 1 per second, got 0"),
        (lambda: log_mel(torch.zeros(1, 900)), r"samples must be \[T\].*got \[1, 900\]"),
        (lambda: log_mel(torch.zeros(399)), r"at least 400 samples, got \[399\]"),
        (lambda: log_mel(torch.zeros(900), mels=0), "mels must be at least 1, got 0"),
        (lambda: log_mel(torch.zeros(900), sampling_rate=11025), "multiple of 200 .*got 11025"),
    ],
)
def test_wrong_sound_fails(make, message):
    with pytest.raises(MediaError, match=message):
        make()


def test_without_torchaudio_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(MissingExtraError, match=r'pip install "tokenprune-mm\[audio\]"'):
        resample(torch.zeros(9), 8, 9)
