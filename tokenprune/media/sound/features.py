"""Audio features that models take: resampled, and as log-mel spectrograms; by torchaudio."""

from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import MediaError, MissingExtraError

__all__ = ["log_mel", "resample"]

FLOOR = 1e-10  # the least power that has a logarithm here
RANGE = 8.0  # powers of ten below the loudest that are told apart


def resample(samples: Tensor, rate: int, new_rate: int) -> Tensor:
    """Resample audio to another rate.

    Args:
        samples: float `[..., T]`.
        rate: its samples per second.
        new_rate: those wanted.

    Returns:
        float `[..., ceil(T * new_rate / rate)]`.

    Raises:
        MediaError: a rate is below 1 per second.
        MissingExtraError: torchaudio is not installed.
    """
    for name, value in (("rate", rate), ("new_rate", new_rate)):
        if value < 1:
            raise MediaError(f"{name} must be at least 1 per second, got {value}")
    resampled: Tensor = _torchaudio().functional.resample(samples, rate, new_rate)
    return resampled


def log_mel(samples: Tensor, *, mels: int = 128, sampling_rate: int = 16000) -> Tensor:
    """The log-mel spectrogram of Whisper, which Qwen's audio models take, too.

    All samples are used, however many; feature extractors cut them, to 30 or 300 seconds.

    Args:
        samples: float `[T]`, full scale is -1 to 1.
        mels: bands: 80 in Whisper, 128 in its third version and in Qwen2-Audio and Qwen2.5-Omni.
        sampling_rate: samples per second. A frame is 10 ms, seen through a window of 25 ms.

    Returns:
        float32 `[mels, T // hop]`, where hop is a hundredth of the rate; values in about -1 to 2.

    Raises:
        MediaError: the sound is not of one channel or shorter than a window, or a number is not
            valid.
        MissingExtraError: torchaudio is not installed.
    """
    if mels < 1:
        raise MediaError(f"mels must be at least 1, got {mels}")
    if sampling_rate < 1000 or sampling_rate % 200:
        raise MediaError(
            f"sampling_rate must be a multiple of 200 from 1000 per second on, got {sampling_rate}"
        )
    window, hop = sampling_rate // 40, sampling_rate // 100
    if samples.dim() != 1 or len(samples) < window:
        raise MediaError(
            f"samples must be [T], one channel of at least {window} samples, got"
            f" {list(samples.shape)}"
        )
    spectrogram = _torchaudio().transforms.MelSpectrogram(
        sampling_rate, n_fft=window, hop_length=hop, n_mels=mels, norm="slaney", mel_scale="slaney"
    )
    power: Tensor = spectrogram.to(samples.device)(samples.float())[:, : len(samples) // hop]
    logarithm = power.clamp(min=FLOOR).log10()
    return (torch.maximum(logarithm, logarithm.max() - RANGE) + 4) / 4


def _torchaudio() -> Any:
    try:
        import torchaudio
    except Exception as error:  # whatever a broken library raises when it is loaded
        raise MissingExtraError(
            f'torchaudio is needed: pip install "tokenprune-mm[audio]" ({error})'
        ) from error
    return torchaudio
