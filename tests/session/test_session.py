"""Sessions: what they take, what they say, what they save, and what they refuse."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tokenprune
from tests.releases import WATCHER
from tokenprune import Session, prune
from tokenprune.core.context import ModelShape
from tokenprune.core.site import Input
from tokenprune.engine.cache import CACHE_NAME
from tokenprune.errors import MediaError, RecipeError, TokenPruneError, UnsupportedModelError
from tokenprune.eval.mini.sample import write_sample
from tokenprune.inputs import read_media
from tokenprune.media import read_video
from tokenprune.models.load import load_model
from tokenprune.session.file import identity
from tokenprune.session.prefill import GroupPrefill


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_model(str(checkpoint(WATCHER)), device="cpu")


@pytest.fixture
def session(loaded):
    return Session(loaded.model, loaded.processor, "uniform(keep=0.5)", group=4)


@pytest.fixture(scope="module")
def saved(loaded, files, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "kept.safetensors"
    with Session(loaded.model, loaded.processor, "uniform(keep=0.5)", group=4) as session:
        session.watch(files.video, frames=8)
        session.save(path)
        return path, session.ask("what?", max_new_tokens=4)


def frames(count, side=56):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def load(path, loaded):
    return Session.load(path, loaded.model, loaded.processor)


# -- watching


def test_a_file_is_watched_group_by_group(session, files):
    groups = session.watch(files.video, frames=10)

    assert session.groups == groups
    assert [group.frames for group in groups] == [4, 4, 2]
    assert [group.first_frame for group in groups] == [0, 4, 8]
    assert session.frames == 10
    for before, group in zip([None, *groups], groups, strict=False):
        seconds = group.seconds
        assert seconds.decode >= 0
        assert min(seconds.process, seconds.encode, seconds.prefill) > 0
        spent = seconds.decode + seconds.process + seconds.prefill
        if before is not None:
            assert group.began_seconds >= before.began_seconds + before.seconds.prefill
            assert group.kv_bytes.after > before.kv_bytes.after
        assert spent < 600
    tokens = session.media_tokens
    assert tokens.before == sum(group.media_tokens.before for group in groups)
    assert tokens.after == tokens.per_site[Input()] == round(tokens.before / 2)
    assert 0 < session.kv_bytes.after < session.kv_bytes.before


def test_layouts_tell_the_whole_video(session, loaded, files):
    session.watch(files.video, frames=10)
    media = read_media(files.video, loaded, frames=10)
    inputs, seconds = loaded.encode(media, "what?"), loaded.frame_seconds(media.video)
    recipe = "uniform(keep=0.5)"
    with torch.no_grad(), prune(loaded.model, recipe, frame_seconds=seconds) as report:
        loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    (whole,) = report.calls[0].layouts
    parts = [call.layouts[0] for call in session.report.calls]

    for column in ("position", "modality", "item", "canvas", "frame", "row", "column", "seconds"):
        joined = torch.cat([getattr(part, column) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, column))


def test_frames_may_come_one_by_one(loaded, files):
    video = read_video(files.video, fps=10, size=(56, 84))
    question = {"max_new_tokens": 5, "do_sample": False}
    whole = Session(loaded.model, loaded.processor, "uniform(keep=0.5)", group=4)
    assert [one.frames for one in whole.watch(video.frames, fps=10.0)] == [4, 4]
    assert whole.frames == len(video.frames) == 10  # two wait for their group to fill
    live = Session(loaded.model, loaded.processor, "uniform(keep=0.5)", group=4)
    live.watch(video.frames[:1], fps=10.0)
    for one in video.frames[1:]:
        live.watch(one[None])

    assert torch.equal(live.generate("what?", **question), whole.generate("what?", **question))
    assert [group.frames for group in live.groups] == [4, 4, 2]
    assert live.kv_bytes == whole.kv_bytes


def test_frames_that_failed_may_be_given_again(loaded, files, monkeypatch):
    """Of the call that failed none wait; those that waited before it still do."""
    clip = read_video(files.video, fps=10, size=(56, 84)).frames
    plain, session = (
        Session(loaded.model, loaded.processor, "uniform(keep=0.5)", group=4) for _ in range(2)
    )
    plain.watch(clip, fps=10.0)
    expected = plain.generate("what?", max_new_tokens=4)
    session.watch(clip[:5], fps=10.0)  # one waits
    forward = GroupPrefill._forward
    left = [0]

    def fail(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of memory")
        return forward(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(GroupPrefill, "_forward", fail)
        for watch in (lambda: session.watch(clip[5:]), lambda: session.ask("what?")):
            with pytest.raises(RuntimeError, match="out of memory"):
                watch()
            assert (session.frames, len(session.groups)) == (5, 1)
        left[0] = 1  # the second group of the call fails
        with pytest.raises(RuntimeError, match="out of memory"):
            session.watch(torch.cat([clip[5:], clip]))
        assert (session.frames, len(session.groups)) == (8, 2)
    session.watch(clip[8:])

    assert torch.equal(session.generate("what?", max_new_tokens=4), expected)


def test_later_frames_are_brought_to_the_first_ones_size(session):
    session.watch(frames(4), fps=2.0)
    session.watch(frames(4, side=112))
    first, second = session.groups

    assert first.media_tokens == second.media_tokens


def test_questions_may_come_between_groups(session, files):
    session.watch(files.video, frames=8)
    early = session.generate("what?", max_new_tokens=4)
    session.watch(files.video, frames=8)
    late = session.generate("what?", max_new_tokens=4)

    assert late.shape[1] > early.shape[1]
    assert session.frames == 16
    indices = [call.layouts[0].frame for call in session.report.calls]
    assert torch.cat(indices).unique().tolist() == list(range(8))


def test_watching_inside_prune_fails(session, loaded, files):
    with prune(loaded.model, "none"), pytest.raises(UnsupportedModelError, match="already inside"):
        session.watch(files.video, frames=4)
    assert session.frames == 0
    session.watch(files.video, frames=4)
    with prune(loaded.model, "none"), pytest.raises(UnsupportedModelError, match="already inside"):
        session.ask("what?")
    assert session.ask("what?", max_new_tokens=1).frames == 4


@pytest.mark.parametrize(
    "source, settings, error",
    [
        (torch.zeros(2, 3, 56, 56), {"fps": 1.0}, r"frames must be \[F, 3, H, W\] uint8, got"),
        (torch.zeros(3, 56, 56, dtype=torch.uint8), {"fps": 1.0}, "frames must be"),
        (torch.zeros(0, 3, 56, 56, dtype=torch.uint8), {"fps": 1.0}, "frames must be"),
        (frames(2), {}, "frames need their rate: give fps"),
        (frames(2), {"fps": 0.0}, "fps must be a number above 0, got 0.0"),
        (frames(2), {"fps": float("nan")}, "fps must be a number above 0, got nan"),
        (frames(2), {"fps": 1.0, "frames": 2}, "frames=2 go with a file"),
        ("/nowhere.mp4", {}, "nowhere"),
    ],
)
def test_watch_fails(source, settings, error, session):
    with pytest.raises(MediaError, match=error):
        session.watch(source, **settings)
    assert session.frames == 0
    session.watch(frames(4), fps=2.0)
    assert session.frames == 4


def test_another_rate_fails(session, files):
    session.watch(frames(4), fps=2.0)
    with pytest.raises(MediaError, match="got 3 frames per second after 2; choose fps=2"):
        session.watch(frames(4), fps=3.0)
    with pytest.raises(MediaError, match="frames per second after 2"):
        session.watch(files.video, fps=5)
    assert session.frames == 4


# -- asking


def test_an_answer_tells_what_it_cost(session, files):
    session.watch(files.video, frames=8)
    answer = session.ask("what?", max_new_tokens=3)

    assert answer.answer and answer.frames == 8
    assert answer.media_tokens == session.media_tokens
    assert answer.kv_bytes == session.kv_bytes
    assert answer.recipe == "uniform(keep=0.5)"
    seconds = answer.seconds
    assert seconds.index == seconds.decode == seconds.encode == 0
    assert seconds.prefill > 0 and seconds.per_token > 0
    assert session.ask("what?", max_new_tokens=1).seconds.per_token == 0
    assert len(session.report.calls) == 2  # questions bring no media


def test_ten_questions_cost_one_prefill(session, loaded, files):
    lengths = []

    def note(module, inputs, arguments):
        lengths.append(arguments["inputs_embeds"].shape[1])

    decoder = loaded.model.get_decoder()
    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    encoder = loaded.model.model.visual.register_forward_pre_hook(lambda *_: lengths.append(-1))
    try:
        session.watch(files.video, frames=8)
        watched, lengths[:] = list(lengths), []
        answers = [session.ask(f"what is in part {n}?", max_new_tokens=2) for n in range(10)]
    finally:
        hook.remove()
        encoder.remove()

    assert watched.count(-1) == 2 and max(watched) > 40
    # A question goes in once, then token after token; no frame is encoded or read again.
    assert len(lengths) == 20 and -1 not in lengths
    assert set(lengths[1::2]) == {1} and max(lengths) < 40
    assert len({answer.kv_bytes.after for answer in answers}) == 1


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"question": " "}, "a question must have words"),
        ({"question": "<|video_pad|>"}, r"a question cannot hold '<\|video_pad\|>'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({CACHE_NAME: None}, f"{CACHE_NAME} belong to the session"),
        ({"input_ids": torch.zeros(1, 1)}, "input_ids belong to the session"),
        ({"use_cache": False}, "use_cache=False would forget what was watched"),
        ({"cache_implementation": "static"}, "cache_implementation"),
    ],
)
def test_ask_fails_and_the_session_goes_on(settings, error, session, files):
    session.watch(files.video, frames=8)
    expected = session.ask("what?", max_new_tokens=4).answer
    with pytest.raises((TokenPruneError, ValueError), match=error):
        session.ask(**{"question": "what?", **settings})
    assert session.ask("what?", max_new_tokens=4).answer == expected


def test_nothing_to_ask_about_fails(session, tmp_path):
    with pytest.raises(TokenPruneError, match="nothing was watched yet; call watch"):
        session.ask("what?")
    with pytest.raises(TokenPruneError, match="nothing was watched yet; call watch"):
        session.save(tmp_path / "kept.safetensors")


def test_a_closed_session_fails(session, files, tmp_path):
    session.watch(files.video, frames=4)
    session.close()
    session.close()
    for use in (
        lambda: session.watch(files.video),
        lambda: session.ask("what?"),
        lambda: session.save(tmp_path / "kept.safetensors"),
    ):
        with pytest.raises(TokenPruneError, match="this session is closed"):
            use()


# -- what cannot be


def test_a_question_dependent_method_fails(loaded):
    with pytest.raises(RecipeError, match="plphp decides by the question, but a session prunes"):
        Session(loaded.model, loaded.processor, "uniform(keep=0.5) + plphp(keep=0.5)")


@pytest.mark.parametrize("group", [0, -2, 3])
def test_a_group_of_broken_patches_fails(group, loaded):
    with pytest.raises(TokenPruneError, match=f"a multiple of 2, .*, got {group}"):
        Session(loaded.model, loaded.processor, "none", group=group)


def test_a_model_that_only_hears_fails(checkpoint):
    one = load_model(str(checkpoint("qwen2_audio")), device="cpu")
    with pytest.raises(UnsupportedModelError, match="understands sound only"):
        Session(one.model, one.processor, "none")


def test_settings_that_do_not_fit_the_model_fail(loaded):
    layers = loaded.model.get_decoder().config.num_hidden_layers
    assert isinstance(loaded.adapter.shape, ModelShape)
    with pytest.raises(RecipeError, match=f"layers 0 to {layers - 1}"):
        Session(loaded.model, loaded.processor, "uniform(keep=0.5 at=99)")


# -- files


def test_a_saved_file_says_what_it_is(saved, loaded):
    path, _ = saved
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["tokenprune"])
        names = set(file.keys())

    assert header["version"] == tokenprune.__version__
    assert header["recipe"] == "uniform(keep=0.5)"
    assert header["identity"] == identity(loaded.model)
    assert {"0.keys", "0.values", "0.index", "tokens.ids"} <= names
    assert list(path.parent.iterdir()) == [path]  # nothing half-written is left


def test_a_loaded_session_is_the_saved_one(saved, loaded, tmp_path):
    path, answer = saved
    with load(path, loaded) as session:
        assert session.frames == 8
        assert session.ask("what?", max_new_tokens=4).as_dict() == {
            **answer.as_dict(),
            "seconds": pytest.approx(answer.seconds.as_dict(), abs=600),
        }
        session.save(tmp_path / "again.safetensors")
    first, second = load_file(path), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_cache_in_a_file_is_as_small_as_what_is_kept(saved):
    path, answer = saved
    stored = load_file(path)
    size = sum(
        one.numel() * one.element_size()
        for name, one in stored.items()
        if name.endswith(("keys", "values"))
    )

    assert size == answer.kv_bytes.after


def test_another_model_fails(saved, checkpoint):
    one = load_model(str(checkpoint("llava_onevision")), device="cpu")
    with pytest.raises(TokenPruneError, match=f"of type {WATCHER}, but this one's is llava"):
        load(saved[0], one)


def test_other_weights_fail(saved, checkpoint):
    one = load_model(str(checkpoint(WATCHER)), device="cpu")
    load(saved[0], one)
    with torch.no_grad():
        one.model.get_decoder().layers[1].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(TokenPruneError, match=f"a {WATCHER} with other weights; load the same"):
        load(saved[0], one)


def test_another_configuration_or_dtype_fails(saved, checkpoint):
    one = load_model(str(checkpoint(WATCHER)), device="cpu")
    one.model.config.vision_config.tokens_per_second = 7
    with pytest.raises(TokenPruneError, match="of configuration"):
        load(saved[0], one)
    half = load_model(str(checkpoint(WATCHER)), device="cpu", dtype=torch.bfloat16)
    with pytest.raises(TokenPruneError, match="of dtype float32, but this one's is bfloat16"):
        load(saved[0], half)


def test_another_processor_fails(saved, loaded, checkpoint):
    other = load_model(str(checkpoint(WATCHER)), device="cpu").processor
    other.chat_template = "Answer in one word. " + other.chat_template
    with pytest.raises(TokenPruneError, match="a processor that writes prompts otherwise"):
        load(saved[0], replace(loaded, processor=other))


def damaged(path, folder, change):
    content = bytearray(path.read_bytes())
    (folder / "damaged.safetensors").write_bytes(change(content))
    return folder / "damaged.safetensors"


def flip(content, place):
    content[place] ^= 1
    return content


def in_header(content):
    start = content.index(b"uniform(keep=0.5)")
    content[start : start + 17] = b"uniform(keep=0.6)"
    return content


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:4],
        lambda content: b"",
        lambda content: content + b"more",
        lambda content: flip(content, -1),
        lambda content: flip(content, -len(content) // 3),
        in_header,
        lambda content: struct.pack("<Q", 2**60) + content[8:],
    ],
    ids=["last", "half", "start", "empty", "longer", "end", "middle", "header", "length"],
)
def test_a_damaged_file_fails(change, saved, loaded, tmp_path):
    with pytest.raises(MediaError, match="is damaged or cut short"):
        load(damaged(saved[0], tmp_path, change), loaded)


def test_files_of_others_fail(loaded, files, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(MediaError, match="holds nothing that was watched"):
        load(tmp_path / "other.safetensors", loaded)
    with pytest.raises(MediaError, match="there is no file"):
        load(tmp_path / "nothing.safetensors", loaded)
    with pytest.raises(MediaError, match="is damaged"):
        load(files.video, loaded)


def test_a_newer_format_fails(saved, loaded, tmp_path):
    with safe_open(saved[0], framework="pt") as file:
        metadata = file.metadata()
    metadata["tokenprune"] = metadata["tokenprune"].replace('"format": 4', '"format": 5')
    save_file(load_file(saved[0]), tmp_path / "new.safetensors", metadata=metadata)
    with pytest.raises(MediaError, match="is of format 5, .* this one reads format 4"):
        load(tmp_path / "new.safetensors", loaded)


@pytest.mark.parametrize("name", ["kept.pt", "kept", "nowhere/kept.safetensors"])
def test_a_place_that_cannot_be_written_fails(name, session, files, tmp_path):
    session.watch(files.video, frames=4)
    with pytest.raises(MediaError, match=r"\.safetensors|a folder that exists"):
        session.save(tmp_path / name)


def test_the_mini_model_answers_in_another_process(tmp_path):
    questions = write_sample(tmp_path / "sample.mp4", seconds=16, seed=3)[:4]
    one = load_model("mini-video", device="cpu")
    with Session(one.model, one.processor, "uniform(keep=0.6)", name="mini-video") as session:
        session.watch(tmp_path / "sample.mp4", frames=24)
        session.save(tmp_path / "kept.safetensors")
        here = [session.ask(each["question"]).answer for each in questions]
        tokens = session.media_tokens
    script = (
        "import json, sys\n"
        "from tokenprune import Session\n"
        "from tokenprune.models.load import load_model\n"
        "path, *questions = sys.argv[1:]\n"
        "one = load_model('mini-video', device='cpu')\n"
        "with Session.load(path, one.model, one.processor) as session:\n"
        "    print(json.dumps([session.ask(each).answer for each in questions]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "kept.safetensors")]
    command += [each["question"] for each in questions]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)

    assert json.loads(ran.stdout) == here
    assert tokens.after < 0.7 * tokens.before
    # It was trained on such videos; by chance it would hardly name one right.
    assert sum(a == each["answer"] for a, each in zip(here, questions, strict=True)) >= 2


# -- the command line


def test_watch_and_ask(command, checkpoint, files, tmp_path):
    kept = tmp_path / "kept.safetensors"
    model = ["--model", checkpoint(WATCHER)]
    watched = command(
        *("watch", files.video, "--save", kept, *model, "--frames", 6, "--group", 4, "--json")
    )
    asked = command("ask", kept, "what?", "--max-new-tokens", 2, "--json")
    table = command("ask", kept, "what?", "--max-new-tokens", 2, *model)

    assert (watched.code, asked.code, table.code) == (0, 0, 0)
    found, answer = json.loads(watched.out), json.loads(asked.out)
    assert found["recipe"] == answer["recipe"] == "vflowopt(keep=0.25)"
    assert [group["frames"] for group in found["groups"]] == [4, 2]
    assert found["media_tokens"] == answer["media_tokens"]
    assert (answer["frames"], answer["model"]) == (6, str(checkpoint(WATCHER)))
    assert answer["answer"] in table.out and "media tokens" in table.out
    assert str(kept) in watched.err
    summary = command("watch", files.video, "--save", kept, *model, "--fps", 5, "--recipe", "none")
    assert "frames        5 in 1 groups" in summary.out


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--frames", 0], "frames must be a whole number of at least 1, got 0"),
        (["--frames", 4, "--fps", 2], "give --frames or --fps, got both (4 and 2.0)"),
        (["--recipe", "plphp(keep=0.5)"], "plphp decides by the question"),
        (["--recipe", "magic"], "no method 'magic'"),
        (["--save", "kept.pt"], "what was watched is saved as .safetensors, got 'kept.pt'"),
        (["--save", "/nowhere/kept.safetensors"], "give a file in a folder that exists"),
    ],
)
def test_a_bad_watch_fails_before_anything_is_loaded(arguments, error, command, files, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    ran = command("watch", files.video, "--save", "kept.safetensors", *arguments)

    assert (ran.code, ran.out) == (2, "")
    assert error in ran.error


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--recipe", "none"], "--recipe"),
        (["--frames", 4], "--frames"),
        (["--fps", 2, "--compare"], "--fps and --compare"),
        (["--overlay", "kept.png"], "--overlay"),
    ],
)
def test_what_was_settled_when_watching_cannot_be_chosen(arguments, named, command, saved):
    ran = command("ask", saved[0], "what?", *arguments)

    assert (ran.code, ran.out) == (2, "")
    assert f"was watched already, without its frames: leave out {named}, or" in ran.error


def test_asking_a_broken_file_fails(command, saved, tmp_path):
    ran = command("ask", damaged(saved[0], tmp_path, lambda content: content[:-9]), "what?")

    assert (ran.code, ran.out) == (2, "")
    assert "is damaged or cut short" in ran.error


# -- recipes that say how much is prefilled at once


def test_the_recipe_says_how_many_frames_are_a_group(loaded, files):
    with Session(loaded.model, loaded.processor, "groups(size=4) + uniform(keep=0.5)") as session:
        assert [group.frames for group in session.watch(files.video, frames=8)] == [4, 4]
        grouped = session.ask("what?", max_new_tokens=4).answer
    recipe = "uniform(keep=0.5)"
    with Session(loaded.model, loaded.processor, recipe, group=4) as session:
        session.watch(files.video, frames=8)
        assert session.ask("what?", max_new_tokens=4).answer == grouped
    recipe = "groups(size=5 per=token) + random(keep=0.5 at=cache)"
    with Session(loaded.model, loaded.processor, recipe, group=4) as session:
        # Within a group of frames the recipe goes on to divide.
        session.watch(files.video, frames=8)
        assert all(int(call.groups[0].max()) > 0 for call in session.report.calls)
        assert session.ask("what?", max_new_tokens=4).answer
