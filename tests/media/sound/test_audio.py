"""Sound."""

import wave
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from tests.media import clips
from tokenprune.errors import MediaError
from tokenprune.media import read_audio
from tokenprune.media.sound import audio


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


def test_the_sound_begins_where_it_is_asked_to(files):
    whole = read_audio(files.sound)
    assert torch.equal(read_audio(files.sound, start_seconds=0), whole)
    assert torch.equal(read_audio(files.sound, start_seconds=0.5), whole[8000:])
    early = read_audio(files.sound, start_seconds=-0.25)
    assert torch.equal(early[4000:], whole) and not early[:4000].any()
    assert len(read_audio(files.sound, start_seconds=9)) == 0


def test_a_late_track_stays_in_step(tmp_path):
    """A track that begins a third of a second after the file's clock."""
    path = tmp_path / "late.mka"
    with av.open(str(path), "w") as container:
        track = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.full((1, 8000), 10000, dtype=np.int16), format="s16", layout="mono"
        )
        frame.sample_rate, frame.pts = 16000, 5328  # 0.333 seconds
        container.mux([*track.encode(frame), *track.encode(None)])
    sound = read_audio(path, start_seconds=0.0)
    assert not sound[:5328].any()
    assert (sound[5328:] > 0.3).all() and len(sound) == 13328


def test_bad_requests_fail(clip, tmp_path):
    with pytest.raises(MediaError, match=r"v\.webm' has no sound track"):
        read_audio(clip("vp9").path)
    with pytest.raises(MediaError, match="sampling_rate must be at least 1 per second, got 0"):
        read_audio(clip("h264_sound").path, sampling_rate=0)
    with pytest.raises(MediaError, match="no such file"):
        read_audio(tmp_path / "none.wav")


KINDS = {  # file: codec, rate, layout
    "a.wav": ("pcm_s16le", 44100, "mono"),
    "24bit.wav": ("pcm_s24le", 48000, "stereo"),
    "8bit.wav": ("pcm_u8", 8000, "mono"),
    "float.wav": ("pcm_f32le", 16000, "stereo"),
    "law.wav": ("pcm_mulaw", 8000, "mono"),
    "a.flac": ("flac", 96000, "stereo"),
    "a.mp3": ("libmp3lame", 44100, "stereo"),
    "a.m4a": ("aac", 44100, "stereo"),
    "5.1.flac": ("flac", 48000, "5.1"),
    "alac.m4a": ("alac", 44100, "stereo"),
    "a.aac": ("aac", 22050, "mono"),
    "a.opus": ("libopus", 48000, "mono"),
    "a.ts": ("ac3", 48000, "stereo"),
    "a.mka": ("libopus", 24000, "stereo"),
    "a.wma": ("wmav2", 44100, "stereo"),
    "a.amr": ("libopencore_amrnb", 8000, "mono"),
    "a.aiff": ("pcm_s16be", 32000, "mono"),
}


def write_sound(path, codec="pcm_s16le", rate=16000, layout="mono", hertz=440.0, seconds=2.0):
    """A sine of amplitude 0.5 on all channels."""
    count = round(seconds * rate)
    wave_ = 0.5 * np.sin(2 * np.pi * hertz * np.arange(count) / rate)
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=rate, layout=layout)
        if codec == "wmav2":
            track.bit_rate = 128000
        if codec == "libopencore_amrnb":
            track.bit_rate = 12200
        resampler = av.AudioResampler(format=track.format, layout=layout, rate=rate)
        for start in range(0, count, 1024):
            part = wave_[start : start + 1024].astype(np.float32)
            channels = np.repeat(part[None], track.layout.nb_channels, axis=0)
            frame = av.AudioFrame.from_ndarray(channels, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            for piece in resampler.resample(frame):
                container.mux(track.encode(piece))
        container.mux(track.encode())
    return path


def hertz_of(sound):
    return np.argmax(np.abs(np.fft.rfft(sound.numpy()))) * 16000 / len(sound)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_sound(name, tmp_path):
    sound = read_audio(write_sound(tmp_path / name, *KINDS[name]))

    assert sound.dtype == torch.float32
    assert len(sound) == pytest.approx(2 * 16000, abs=1600)  # coders pad by a frame or two
    middle = sound[8000:24000]
    assert hertz_of(middle) == pytest.approx(440, abs=2)
    assert middle.abs().max() == pytest.approx(0.5, abs=0.12 if name == "a.amr" else 0.05)


def test_part(tmp_path):
    path = write_sound(tmp_path / "a.wav")
    whole = read_audio(path)

    for begin, stop in ((0.5, 1.25), (None, 1.0), (1.5, None), (1.9, 99.0), (0.0, 2.0)):
        part = read_audio(path, start=begin, end=stop)
        first, last = round((begin or 0) * 16000), min(32000, round((stop or 2.0) * 16000))
        assert torch.equal(part, whole[first:last])
    assert len(read_audio(path, sampling_rate=8000, start=0.5, end=1.0)) == 4000


def test_part_of_a_sound_in_step_with_a_video(tmp_path):
    """`start` and `end` count from `start_seconds`, where the video begins."""
    path = write_sound(tmp_path / "a.wav")
    for clock in (-0.75, 0.0, 0.5):
        whole = read_audio(path, start_seconds=clock)
        assert len(whole) == round((2.0 - clock) * 16000)
        for begin, stop in ((0.25, 1.0), (0.0, 0.5), (1.0, 3.0)):
            part = read_audio(path, start_seconds=clock, start=begin, end=stop)
            assert torch.equal(part, whole[round(begin * 16000) : round(stop * 16000)])


def test_nothing_after_the_part_is_decoded(tmp_path, monkeypatch):
    path, frames = write_sound(tmp_path / "a.flac", "flac", seconds=30.0), []
    decode = audio._frames
    monkeypatch.setattr(
        audio, "_frames", lambda *a: map(lambda f: frames.append(f) or f, decode(*a))
    )
    read_audio(path, end=1.0)
    few = len(frames)
    frames.clear()
    read_audio(path)
    assert few < len(frames) / 10


def test_long_sound_is_not_cut(tmp_path):
    """Five minutes and twenty seconds, the last ten of them at another pitch."""
    time = np.arange(320 * 16000) / 16000
    tone = np.sin(2 * np.pi * np.where(time < 310, 440, 880) * time) * 16000
    path = tmp_path / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(tone.astype("<i2").tobytes())

    sound = read_audio(path)

    assert len(sound) == 320 * 16000
    assert hertz_of(sound[305 * 16000 : 309 * 16000]) == pytest.approx(440, abs=1)
    assert hertz_of(sound[-9 * 16000 :]) == pytest.approx(880, abs=1)
    assert torch.equal(read_audio(path, start=311), sound[311 * 16000 :])


def test_lost_sound_becomes_silence(tmp_path):
    """Half a second of packets is missing; what comes after stays where it was."""
    whole = write_sound(tmp_path / "whole.mka", "pcm_s16le", seconds=3.0)
    holed = tmp_path / "holed.mka"
    with av.open(str(whole)) as old, av.open(str(holed), "w") as new:
        stream = new.add_stream_from_template(old.streams.audio[0])
        for packet in old.demux(audio=0):
            if packet.size and not 1.0 <= packet.pts * packet.time_base < 1.5:
                packet.stream = stream
                new.mux(packet)

    expected, sound = read_audio(whole), read_audio(holed)

    assert len(sound) == pytest.approx(len(expected), abs=32)
    assert sound[int(1.1 * 16000) : int(1.45 * 16000)].abs().max() == 0
    assert hertz_of(sound[2 * 16000 :]) == pytest.approx(440, abs=1)
    assert sound[int(1.6 * 16000) :].abs().max() > 0.49


def holed(tmp_path, keep, move=lambda seconds: 0.0, seconds=4.0):
    """Noise, which shows where it lies, without some packets or with later times; and the noise."""
    whole = tmp_path / "noise.wav"
    samples = (np.random.default_rng(0).normal(0, 3000, int(seconds * 16000))).astype("<i2")
    with wave.open(str(whole), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())
    path = tmp_path / "holed.mka"
    with av.open(str(whole)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.audio[0])
        content = samples.tobytes()
        for number in filter(keep, range(len(content) // 640)):  # of 20 ms
            piece = av.Packet(content[640 * number :][:640])
            begin = number / 50
            piece.time_base = Fraction(1, 1000)
            piece.pts = piece.dts = round(1000 * (begin + move(begin)))
            piece.stream = stream
            new.mux(piece)
    return path, samples / 32768


def test_small_losses_do_not_add_up(tmp_path):
    """Every third piece of 20 ms is lost, each too short a gap to be certain."""
    path, noise = holed(tmp_path, lambda number: number % 3 != 1)
    sound = read_audio(path).numpy()
    assert abs(len(sound) - len(noise)) < 0.11 * 16000
    for number in (51, 99, 174, 198):  # of packets that are there: each fits best near its place
        score = np.correlate(sound, noise[320 * number :][:320])
        assert abs(score.argmax() - 320 * number) < 0.11 * 16000


def test_a_pause_is_silence(tmp_path):
    path, noise = holed(tmp_path, lambda number: True, lambda begin: 25.0 * (begin >= 2))
    sound = read_audio(path).numpy()
    assert len(sound) == pytest.approx(len(noise) + 25 * 16000, abs=400)
    assert np.abs(sound[2 * 16000 + 400 : 27 * 16000 - 400]).max() == 0
    assert sound[27 * 16000 :][:8000] == pytest.approx(noise[2 * 16000 :][:8000], abs=1e-4)


def audio_frames(*times):
    """Frames of 20 ms."""
    return [SimpleNamespace(time=time, samples=320, sample_rate=16000) for time in times]


@pytest.mark.parametrize("leap", [0.5, 5.0, 30.0, -1.5, 90_000.0])
def test_few_damaged_times_are_not_believed(leap):
    """Several frames may have their PTS from one that is damaged."""
    clock = [2.0 + k / 50 for k in range(100)]
    odd = [time + leap for time in clock]
    for count in (1, 20, 45):
        frame, *others = audio_frames(*odd[:count], *clock[count:])
        assert audio._gap_seconds(frame, audio._Lookahead(iter(others)), 2.0) == 0
    frame, *others = audio_frames(*odd)
    due = leap if leap < 3600 else -leap
    assert audio._gap_seconds(frame, audio._Lookahead(iter(others)), 2.0) == pytest.approx(due)
    frame, *others = audio_frames(*odd[:10])  # the end of the track agrees as far as it goes
    assert audio._gap_seconds(frame, audio._Lookahead(iter(others)), 2.0) == pytest.approx(due)
    assert audio._gap_seconds(frame, audio._Lookahead(iter([])), 2.0) == 0


def test_short_bursts_lie_where_they_belong(tmp_path):
    """Each pause is followed by another one soon."""
    path, noise = holed(
        tmp_path, lambda number: True, lambda begin: 15.0 * (begin >= 2) + 20.0 * (begin >= 2.6)
    )
    sound = read_audio(path).numpy()
    for begin, at in ((0, 0), (2.0, 17.0), (2.6, 37.6)):
        piece = noise[round(begin * 16000) :][:8000]
        assert sound[round(at * 16000) :][:8000] == pytest.approx(piece, abs=1e-4)


def test_looking_ahead_loses_no_frames():
    ahead, seen = audio._Lookahead(iter(audio_frames(*range(5)))), []
    for frame in ahead:
        ahead.confirm(frame, is_gap=True)
        seen.append(frame.time)
    assert seen == [0, 1, 2, 3, 4]


def test_a_fast_track_stays_in_time(tmp_path):
    """Its times run slower than its samples; what overlaps is cut."""
    path, noise = holed(tmp_path, lambda number: True, lambda begin: -0.02 * begin, seconds=20.0)
    sound = read_audio(path).numpy()
    assert abs(len(sound) - 0.98 * len(noise)) < 0.11 * 16000
    found = 0
    for number in range(100, 1000, 100):
        piece = noise[320 * number :][:320]
        score = np.correlate(sound, piece)
        if score.max() > 0.9 * (piece**2).sum():  # it was not cut
            found += 1
            assert abs(score.argmax() - 0.98 * 320 * number) < 0.11 * 16000
    assert found > 5


def test_damaged_sound_keeps_its_length(tmp_path):
    path = write_sound(tmp_path / "a.mp3", "libmp3lame", 44100, "stereo", seconds=6.0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = bytes(3000)
    path.write_bytes(content)
    assert len(read_audio(path)) == pytest.approx(6 * 16000, abs=0.6 * 16000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": -1.0}, r"0 <= start < end, in seconds, got start=-1\.0 end=None"),
        ({"start": 1.0, "end": 1.0}, r"got start=1\.0 end=1\.0"),
        ({"start": float("nan")}, "got start=nan"),
        ({"end": 0.0}, r"got start=None end=0\.0"),
        ({"start": 5.0}, r"start must lie before the end of .*a\.wav' \(2\.000 s\), got 5\.0"),
        ({"track": -1}, "track must be from 0 to 0 in .*, got -1"),
    ],
)
def test_wrong_part_fails(arguments, message, tmp_path):
    path = write_sound(tmp_path / "a.wav")
    with pytest.raises(MediaError, match=message):
        read_audio(path, **arguments)
