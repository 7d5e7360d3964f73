"""Intra refresh, whose rounds are marked as keyframes though decoding cannot begin there."""

import numpy as np
import pytest

from tests.media.clips import decode_sequentially, encode, x264
from tokenprune.errors import DecodeError
from tokenprune.media import index_video, read_video
from tokenprune.media.decode.demux import PacketReader
from tokenprune.media.index import mp4

ROUNDS = x264("intra-refresh=1:keyint=20:bframes=0")


@pytest.fixture(scope="module", params=["mp4", "ts", "mkv"])
def refreshed(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("refreshed") / f"r.{request.param}"
    return encode(path, numbers=range(150), options=ROUNDS).path


def test_decoding_begins_at_true_keyframes_only(refreshed):
    """The pixels tell: a frame in a later round still shows what came before its round."""
    truth = decode_sequentially(refreshed)
    for rank in (15, 38, 75, 101, 149):
        video = read_video(refreshed, indices=[rank], workers=1)
        assert np.array_equal(video.frames[0].numpy(), truth[rank])
        assert video.damaged == 0


def test_rounds_are_no_starts(refreshed, tmp_path):
    assert index_video(refreshed).starts.tolist() == [0]
    plain = encode(tmp_path / "p.mp4", numbers=range(60), options=x264("keyint=20:scenecut=0"))
    assert index_video(plain.path).starts.tolist() == [0, 20, 40]
    open_gop = x264("open-gop=1:keyint=20:min-keyint=20:scenecut=0:bframes=3")
    plain = encode(tmp_path / "o.mp4", numbers=range(60), options=open_gop)
    assert len(index_video(plain.path).starts) == 3


def test_a_round_that_the_sample_table_hid_is_noticed(tmp_path, monkeypatch):
    path = encode(tmp_path / "r.mp4", numbers=range(60), options=ROUNDS).path
    with monkeypatch.context() as patch:
        patch.setattr(mp4, "_has_intra_refresh", lambda *_: False)
        index = index_video(path)
    assert not index.scanned and index.starts.tolist() == [0, 20, 40]

    reader = PacketReader(index)
    with pytest.raises(DecodeError, match="changed since it was opened"):
        list(reader.packets(20, 30))
    reader.close()
