"""Sound of many channels keeps its speech, which is in the centre."""

import math
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from tokenprune.media import read_audio
from tokenprune.media.sound.downmix import mix_to_mono, mono_weights

RATE = 16000


def write(path: Path, codec: str, layout: str, loud: dict[str, float]) -> Path:
    """Half a second of a tone, in each channel named at the amplitude given."""
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE) / 2 / RATE)
    names = [channel.name for channel in av.AudioLayout(layout).channels]
    samples = np.stack([tone * loud.get(name, 0.0) for name in names])
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=RATE, layout=layout)
        packed = np.ascontiguousarray((samples * 32767).astype(np.int16).T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout)
        frame.sample_rate = RATE
        container.mux(track.encode(frame))
        container.mux(track.encode())
    return path


def amplitude(path: Path) -> float:
    """Of the tone that is read."""
    samples = read_audio(path).numpy()[1000:-1000]
    return math.sqrt(2 * (samples**2).mean())


@pytest.mark.parametrize(
    ("layout", "channel", "share"),
    [
        ("5.1", "FC", 0.7071 / 2.4142),
        ("5.1", "FL", 0.5 / 2.4142),
        ("5.1", "BR", 0.3536 / 2.4142),
        ("5.1", "LFE", 0.0),
        ("5.1(side)", "FC", 0.7071 / 2.4142),
        ("5.1(side)", "SL", 0.3536 / 2.4142),
        ("7.1", "FC", 0.7071 / 3.1213),
        ("7.1", "SR", 0.3536 / 3.1213),
        ("7.1.4", "FC", 0.7071 / 4.5355),
        ("quad", "FR", 0.5 / 1.7071),
        ("quad", "BL", 0.3536 / 1.7071),
        ("stereo", "FL", 0.5),
        ("mono", "FC", 1.0),
    ],
)
def test_each_channel_has_its_standard_share(layout, channel, share, tmp_path):
    path = write(tmp_path / "a.wav", "pcm_s16le", layout, {channel: 0.9})
    assert amplitude(path) == pytest.approx(0.9 * share, abs=1e-3)


@pytest.mark.parametrize("layout", ["5.1", "5.1(side)", "quad"])
def test_the_standard_is_that_of_others(layout, tmp_path):
    """FFmpeg's own mono downmix of samples of 16 bits has the same shares."""
    loud = {"FL": 0.1, "FR": 0.2, "FC": 0.4, "BL": 0.3, "SL": 0.3, "LFE": 0.5}
    path = write(tmp_path / "a.wav", "pcm_s16le", layout, loud)
    resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
    with av.open(str(path)) as container:
        frames = [part for one in container.decode(audio=0) for part in resampler.resample(one)]
    theirs = np.concatenate([frame.to_ndarray()[0] for frame in frames]) / 32768
    assert read_audio(path).numpy()[: len(theirs)] == pytest.approx(theirs, abs=2e-4)


def test_all_channels_at_once_stay_within_full_scale(tmp_path):
    names = [channel.name for channel in av.AudioLayout("5.1").channels]
    path = write(tmp_path / "a.flac", "flac", "5.1", dict.fromkeys(names, 0.99))
    assert np.abs(read_audio(path).numpy()).max() <= 1


def test_channels_without_names_are_the_usual_ones(tmp_path):
    path = tmp_path / "a.wav"
    samples = np.zeros((RATE, 6), "<i2")
    samples[:, 2] = 20000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(6)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    sound = read_audio(path).numpy()
    assert sound[1000:-1000] == pytest.approx(20000 / 32768 * 0.7071 / 2.4142, abs=1e-3)


def test_channels_of_other_kinds():
    assert mono_weights(("AMBI0", "AMBI1", "AMBI2", "AMBI3")).tolist() == [1, 0, 0, 0]
    assert mono_weights(("NONE",) * 12) == pytest.approx([1 / 12] * 12)
    assert mono_weights(("LFE",) * 3) == pytest.approx([1 / 3] * 3)
    assert mono_weights(("FL", "FR", "TFL")) == pytest.approx([0.3694, 0.3694, 0.2612], abs=1e-4)
    pair = np.array([[1.0, 0.5], [0.0, 0.5]], np.float32)
    assert mix_to_mono(pair, ["FL", "FR"]).tolist() == [0.5, 0.5]
