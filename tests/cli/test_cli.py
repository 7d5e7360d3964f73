"""The command line: what it prints where, and what it says about bad input."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from tokenprune.core.registry import list_methods
from tokenprune.media import probe
from tokenprune.models import built_in_models

ASK = ["--max-new-tokens", 2, "--frames", 3]


@pytest.fixture
def model(checkpoint):
    return ["--model", checkpoint("qwen2_5_vl")]


# -- what is printed


def test_the_answer_is_a_table(command, model, files, tmp_path):
    overlay = tmp_path / "kept.jpg"
    arguments = [*model, *ASK, "--recipe", "vflowopt(keep=0.5) + plphp(keep=0.4)"]
    ran = command("ask", files.video, "what?", *arguments, "--compare", "--overlay", overlay)

    assert ran.code == 0
    first = [line.split("  ")[0].strip() for line in ran.out.splitlines()]
    for name in ("recipe", "answer", "frames", "media tokens", "in the cache", "KV cache"):
        assert name in ran.out
    assert first[0] == "recipe" and "none" in ran.out.splitlines()[0]
    assert "loading the model" in ran.err and "answering" in ran.err
    assert str(overlay) in ran.err and str(overlay) not in ran.out
    with Image.open(overlay) as picture:
        assert picture.format == "JPEG"


def test_json_is_all_there_is_on_stdout(command, model, files):
    ran = command("ask", files.video, "what?", *model, *ASK, "--json")

    assert ran.code == 0
    assert ran.out.count("\n") == 1
    assert json.loads(ran.out)["frames"] == 3


def test_frames_by_rate(command, model, files):
    ran = command("ask", files.video, "what?", *model, "--max-new-tokens", 1, "--fps", 4, "--json")

    assert json.loads(ran.out)["frames"] == 4
    assert json.loads(ran.out)["seconds"]["per_token"] == 0  # one token comes with the prefill


def test_one_frame(command, checkpoint, files):
    # Qwen3-VL's processor refuses a single frame.
    arguments = ["--model", checkpoint("qwen3_vl"), "--max-new-tokens", 1, "--frames", 1, "--json"]
    ran = command("ask", files.video, "what?", *arguments)

    assert ran.code == 0
    assert json.loads(ran.out)["frames"] == 1


def test_an_animation_is_a_video(command, model, files):
    ran = command("ask", files.animation, "what?", *model, "--max-new-tokens", 1, "--json")

    assert json.loads(ran.out)["frames"] == 6


def test_list(command):
    ran = command("list", "--json")
    found = json.loads(ran.out)
    text = command("list").out

    assert set(found["methods"]) == set(list_methods())
    assert {"llava", "qwen2_5_omni_thinker"} <= set(found["models"])
    assert found["built_in"] == list(built_in_models())
    assert all(name in text for name in [*found["methods"], *found["models"]])


def test_sample(command, tmp_path):
    ran = command("sample", tmp_path / "a.mp4", "--seconds", 4, "--seed", 3)
    questions = json.loads((tmp_path / "a.json").read_text())

    assert ran.code == 0
    assert f"a.mp4: 4 seconds, {len(questions)} questions in" in ran.out
    assert all(set(one) == {"question", "answer", "kind"} for one in questions) and questions
    assert probe(tmp_path / "a.mp4").duration_seconds == pytest.approx(4, abs=0.2)


def test_eval(command, tmp_path):
    from tokenprune.eval.mini.model import build_model, save

    save(build_model(), tmp_path)
    arguments = ["--model", tmp_path, "--frames", 3, "--samples", 3, "--seed", 5, "--json"]
    ran = command("eval", *arguments, "--recipe", "none", "--recipe", "uniform(keep=0.4)")

    assert ran.code == 0
    plain, pruned = map(json.loads, ran.out.splitlines())
    for one in (plain, pruned):
        assert set(one) >= {"recipe", "accuracy", "by_kind", "media_tokens"}
        assert 0 <= one["accuracy"] <= 1
        assert one["media_tokens"]["before"] == 54
    assert (plain["recipe"], pruned["recipe"]) == ("none", "uniform(keep=0.4)")
    assert plain["media_tokens"]["per_layer"] == [54] * 4
    assert pruned["media_tokens"]["per_layer"] == [22] * 4


# -- bad input: one clear line, exit code 2


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--frames", 0], "frames must be a whole number of at least 1, got 0"),
        (["--frames", -3], "frames must be a whole number of at least 1, got -3"),
        (["--fps", 0], "fps must be a number above 0, got 0.0"),
        (["--fps", "nan"], "fps must be a number above 0, got nan"),
        (["--frames", 4, "--fps", 2], "give --frames or --fps, got both (4 and 2.0)"),
        (["--max-new-tokens", 0], "--max-new-tokens must be at least 1, got 0"),
        (["--recipe", "magic(keep=0.5)"], "no method 'magic'; known: divprune,"),
        (["--recipe", "vflowopt(hold=0.5)"], "vflowopt has no setting 'hold'; known: keep,"),
        (["--recipe", "vflowopt(keep=0.5"], "cannot read 'vflowopt(keep=0.5' in recipe"),
        (["--recipe", "vflowopt(keep=0.5, t=1)"], "settings are written name=value"),
        (["--recipe", "random(keep=0)"], "keep must be a share in (0, 1] or a count >= 1, got 0"),
        (["--recipe", "random(keep=0.0)"], "keep must be a share in (0, 1] or a count >= 1"),
        (["--recipe", "random(keep=1.5)"], "a share in (0, 1] or a count >= 1, got 1.5"),
        (["--recipe", "random(keep=-1)"], "a share in (0, 1] or a count >= 1, got -1"),
        (["--recipe", "random(keep=1)"], "1.0"),
        (["--overlay", "/nowhere/kept.png"], "give a file in a folder that exists"),
        (["--overlay", "kept.txt"], "use .png, .jpg or .webp"),
        (["--overlay", "kept"], "use .png, .jpg or .webp"),
        (["--overlay", "/tmp"], "cannot write a picture to '/tmp'"),
        (["--model", "/nowhere"], "cannot load model '/nowhere': there is no such folder; give"),
        (["--model", "nothing"], "cannot load model 'nothing': there is no such folder; give"),
    ],
)
def test_a_bad_request_fails_before_anything_is_loaded(
    arguments, error, command, files, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    ran = command("ask", files.image, "what?", *arguments)

    assert (ran.code, ran.out) == (2, "")
    assert error in ran.error


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_fails(question, command, files):
    ran = command("ask", files.image, question)

    assert ran.code == 2
    assert f"must have words, got {question!r}; ask something" in ran.error


def test_a_missing_file_fails(command, files):
    assert (
        "no such file: 'nothing.mp4'; give the path of" in command("ask", "nothing.mp4", "?").error
    )
    assert "is not a file; give the path of" in command("ask", files.folder, "?").error


def test_an_empty_file_fails(command, tmp_path):
    (tmp_path / "empty.mp4").touch()
    ran = command("ask", tmp_path / "empty.mp4", "what?")

    assert ran.code == 2
    assert "empty.mp4' is empty; give a media file" in ran.error


def test_a_text_fails(command, model, tmp_path):
    (tmp_path / "text.mp4").write_text("no video, but words\n" * 40)
    ran = command("ask", tmp_path / "text.mp4", "what?", *model)

    assert ran.code == 2
    assert "text.mp4" in ran.error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_fails(command, model, files, tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(files.silent.read_bytes())
    path.chmod(0)
    ran = command("ask", path, "what?", *model)

    assert ran.code == 2
    assert "Permission denied" in ran.error


def test_a_video_without_a_decoder_fails(command, model, tmp_path):
    frames = [Image.new("RGB", (64, 48), (40 * n, 0, 0)) for n in range(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    ran = command("ask", tmp_path / "a.webp", "what?", *model, "--max-new-tokens", 1)

    # Releases of FFmpeg differ in whether they know animated WebP.
    assert ran.code == 0 or "a.webp" in ran.error


def test_a_damaged_image_fails(command, model, files, tmp_path):
    (tmp_path / "half.png").write_bytes(files.image.read_bytes()[:5000])
    ran = command("ask", tmp_path / "half.png", "what?", *model)

    assert ran.code == 2
    assert "half.png' as an image" in ran.error


def test_a_sound_for_a_model_that_sees_fails(command, model, files):
    ran = command("ask", files.sound, "what?", *model)

    assert ran.code == 2
    assert "has no video stream (only sound); give a video file" in ran.error


def test_files_for_a_model_that_hears_fail(command, checkpoint, files):
    model = ["--model", checkpoint("qwen2_audio")]

    assert "has no sound track" in command("ask", files.silent, "what?", *model).error
    error = command("ask", files.image, "what?", *model).error
    assert "understands audio, but the file holds image; choose another" in error


def test_an_overlay_of_a_sound_fails(command, checkpoint, files, tmp_path):
    model = ["--model", checkpoint("qwen2_audio")]
    ran = command("ask", files.sound, "what?", *model, "--overlay", tmp_path / "kept.png")

    assert ran.code == 2
    assert "an overlay needs frames" in ran.error


def test_a_recipe_that_does_not_fit_the_model_fails(command, checkpoint, model, files):
    error = command("ask", files.video, "what?", *model, "--recipe", "random(at=40)").error
    assert "layers 0 to 4; choose one of these" in error

    arguments = ["--model", checkpoint("qwen2_audio"), "--recipe", "vflowopt"]
    error = command("ask", files.sound, "what?", *arguments).error
    assert "qwen2_audio has only audio tokens" in error


def test_a_picture_that_the_processor_refuses_fails(command, model, tmp_path):
    Image.new("RGB", (900, 2)).save(tmp_path / "line.png")
    ran = command("ask", tmp_path / "line.png", "what?", *model)

    assert ran.code == 2
    assert "processor refuses the file" in ran.error and "aspect ratio" in ran.error


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--task", "chess"], "no task 'chess'; known: mini-story, mini-video"),
        (["--samples", 0], "samples must be at least 1, got 0"),
        (["--frames", 0], "frames must be at least 1, got 0"),
        (["--seed", -1], "seed must be at least 0, got -1"),
        (["--recipe", "magic"], "no method 'magic'"),
        (["--model", "/nowhere"], "there is no such folder"),
    ],
)
def test_a_bad_evaluation_fails(arguments, error, command):
    ran = command("eval", *arguments)

    assert ran.code == 2
    assert error in ran.error


def test_a_bad_sample_fails(command, tmp_path):
    assert (
        "seconds must be at least 3" in command("sample", tmp_path / "a.mp4", "--seconds", 0).error
    )
    assert "nowhere" in command("sample", "/nowhere/a.mp4").error


@pytest.mark.parametrize("arguments", [["ask"], ["ask", "a.mp4"], ["nothing"], ["ask", "--no"]])
def test_usage_errors(arguments, command):
    ran = command(*arguments)

    assert ran.code == 2
    assert ran.out == "" and "Usage:" in ran.err and "Traceback" not in ran.err
