"""What a session knows of a group, as plain data and back."""

from __future__ import annotations

import json

from tokenprune.core.site import Input
from tokenprune.report.change import Change, MediaTokens
from tokenprune.report.seconds import Phases, Seconds
from tokenprune.session.watched import WatchedGroup


def test_a_watched_group_goes_into_json_and_back() -> None:
    group = WatchedGroup(
        first_frame=4,
        frames=4,
        media_tokens=MediaTokens(64, 16, {Input(): 16}),
        kv_bytes=Change(2**25, 2**23),
        began_seconds=1.5,
        seconds=Seconds(index=0.0, decode=0.1, process=0.2, encode=0.3, prefill=0.4),
        phases=Phases(process=((1.5, 1.7),)),
    )
    plain = json.loads(json.dumps(group.as_dict()))

    assert list(plain) == [
        *("first_frame", "frames", "media_tokens", "kv_bytes", "began_seconds"),
        *("index_seconds", "decode_seconds", "process_seconds"),
        *("encode_seconds", "prefill_seconds", "spans"),
    ]
    assert plain["process_seconds"] == 0.2
    assert WatchedGroup.from_dict(plain) == group
