"""Converting an original LongVA checkpoint: same features, same text model, clear refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from tests.checkpoints.base import tokenizer
from tests.checkpoints.llava_kin import save_longva_tower, save_original_longva
from tokenprune import prune
from tokenprune.adapters._longva_processor import LongVAProcessor
from tokenprune.adapters.longva import convert
from tokenprune.adapters.perception_lm import PerceptionLM
from tokenprune.asking import answer
from tokenprune.core.recipe import Recipe
from tokenprune.errors import TokenPruneError, UnsupportedModelError
from tokenprune.models.convert import find_converter
from tokenprune.models.load import load_model
from tokenprune.models.media import Media
from tokenprune.testing.tiny import IMAGE, VIDEO, VOCABULARY, build


@pytest.fixture
def original(tmp_path: Path) -> tuple[Path, Path]:
    """The folders of an original checkpoint and of its tower's, which holds no weights."""
    model = build("longva").model
    # What the authors raised so that the model looks further.
    model.config.text_config.rope_parameters["rope_theta"] = 5e5
    save_original_longva(model, tmp_path / "original")
    save_longva_tower(model, tmp_path / "tower")
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "tower" / "model.safetensors")
    return tmp_path / "original", tmp_path / "tower"


def weights_of(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    return weights


def change(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def change_weights(folder: Path, edit: Any) -> None:
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        edit(weights)
        save_file(weights, file)


@torch.no_grad()
def frames_as_published(folder: Path, tower: Path, frames: Tensor) -> Tensor:
    """Frames `[F, 3, h, w]` to embeddings `[F, 4, D]`: tower, projector, then a mean of 2x2."""
    weights = weights_of(folder)
    config = transformers.CLIPVisionConfig.from_pretrained(tower)
    clip = transformers.CLIPVisionModel(config).eval()
    prefix = "model.vision_tower.vision_tower.vision_model."
    level = "vision_model." if any(n.startswith("vision_model.") for n in clip.state_dict()) else ""
    clip.load_state_dict(
        {
            level + name.removeprefix(prefix): one
            for name, one in weights.items()
            if name.startswith(prefix)
        },
        strict=False,  # position ids are no weights
    )
    hidden = clip(frames, output_hidden_states=True).hidden_states[-2][:, 1:]
    first, last = "model.mm_projector.0", "model.mm_projector.2"
    found = functional.linear(hidden, weights[f"{first}.weight"], weights[f"{first}.bias"])
    found = functional.gelu(found)
    found = functional.linear(found, weights[f"{last}.weight"], weights[f"{last}.bias"])
    grid = found.unflatten(1, (4, 4))
    tokens = [
        grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(dim=(1, 2))
        for row in range(2)
        for column in range(2)
    ]
    return torch.stack(tokens, dim=1)


def test_frames_are_encoded_as_published(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, tower = original
    convert(source, tmp_path / "out", tower)
    model: Any = load_model(str(tmp_path / "out"), device="cpu").model
    frames = torch.randn(3, 3, 56, 56)
    expected = frames_as_published(source, tower, frames)
    with torch.no_grad():
        found = model.model.get_image_features(frames[None], return_dict=True).pooler_output
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Of a block behind the features nothing is left.
    clip = model.model.vision_tower
    assert len(getattr(clip, "vision_model", clip).encoder.layers) == 3


def test_a_tower_taken_for_another_is_fixed(original: tuple[Path, Path], tmp_path: Path) -> None:
    """Early releases of transformers read the tower of any PerceptionLM as one of timm's."""
    source, tower = original
    convert(source, tmp_path / "out", tower)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    config.vision_config = transformers.TimmWrapperConfig()
    fixed = PerceptionLM.fix_config(config).vision_config

    assert isinstance(fixed, transformers.CLIPVisionConfig)
    assert (fixed.hidden_size, fixed.num_hidden_layers) == (32, 3)
    plain = transformers.PerceptionLMConfig()
    assert PerceptionLM.fix_config(plain).vision_config.model_type == "timm_wrapper"


def test_text_model_is_the_original_s(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, tower = original
    convert(source, tmp_path / "out", tower)
    loaded = load_model(str(tmp_path / "out"), device="cpu")
    config = loaded.model.config.text_config
    assert config.model_type == "qwen2"
    assert config.rope_parameters["rope_theta"] == 5e5
    state = loaded.model.state_dict()
    for name, one in weights_of(source).items():
        if "vision_tower" not in name and "mm_projector" not in name:
            target = name.replace("model.", "model.language_model.", 1)
            assert torch.equal(state[target], one), name
    tokens = loaded.processor.tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    assert tokens == [loaded.model.config.image_token_id, loaded.model.config.video_token_id]


def test_processor_writes_the_chat_and_the_tokens_of_frames(
    original: tuple[Path, Path], tmp_path: Path
) -> None:
    source, tower = original
    convert(source, tmp_path / "out", tower)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    content = [{"type": "video"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<video>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    frames = torch.randint(256, (5, 3, 70, 90), dtype=torch.uint8)
    inputs = processor(text=[text], videos=[frames], do_sample_frames=False, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (1, 5, 3, 56, 56)
    assert int((inputs["input_ids"] == VIDEO).sum()) == 5 * 4
    # CLIP's own processor is the one that LongVA calls.
    clip = transformers.CLIPImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    expected = clip(list(frames), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values_videos"][0], expected)


def tiles_as_published(picture: Image.Image, grids: list[tuple[int, int]]) -> list[Image.Image]:
    """Tiles of 56 pixels: shrunk or enlarged into the best of some sizes, in the middle of black.

    The best shows most of the picture's pixels, then wastes least.
    """
    wide, high = picture.size

    def rank(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[0] / wide, grid[1] / high)
        shown = min(int(wide * scale) * int(high * scale), wide * high)
        return shown, shown - grid[0] * grid[1]

    width, height = max(grids, key=rank)  # the first of several
    if width / wide < height / high:
        size = width, min(math.ceil(high * width / wide), height)
    else:
        size = min(math.ceil(wide * height / high), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(picture.resize(size), ((width - size[0]) // 2, (height - size[1]) // 2))
    return [
        canvas.crop((left, top, left + 56, top + 56))
        for top in range(0, height, 56)
        for left in range(0, width, 56)
    ]


GRIDS = [(56, 112), (112, 56), (112, 112)]  # of the synthetic original


@pytest.mark.parametrize(
    ("size", "tiles"),
    [
        ((112, 56), 2),
        ((56, 112), 2),
        ((112, 112), 4),
        ((40, 112), 2),
        ((90, 70), 4),
        ((300, 40), 2),
    ],
)
def test_images_are_tiled_as_published(
    size: tuple[int, int], tiles: int, original: tuple[Path, Path], tmp_path: Path
) -> None:
    source, tower = original
    convert(source, tmp_path / "out", tower)
    loaded = load_model(str(tmp_path / "out"), device="cpu")
    # Smooth, since PIL and torchvision differ where pictures are sharp.
    noise = numpy.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=numpy.uint8)
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    expected = tiles_as_published(picture, GRIDS)
    clip = transformers.CLIPImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    wanted = clip(expected, return_tensors="pt")["pixel_values"]
    text = loaded.prompt([{"type": "image"}], "What?")
    assert "<image>\nWhat?" in text
    inputs = loaded.processor(text=[text], images=[picture], return_tensors="pt")

    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["pixel_values"].shape == (1, tiles, 3, 56, 56)
    exact = size in GRIDS
    # Of 255 levels PIL and torchvision round to different ones.
    levels = (inputs["pixel_values"][0] - wanted).abs() * 255 * 0.27
    assert levels.max() < (0.01 if exact else 3) and levels.mean() < 0.3
    assert int((inputs["input_ids"] == IMAGE).sum()) == tiles * 4
    model: Any = loaded.model
    with torch.no_grad():
        found = model.model.get_image_features(wanted[None], return_dict=True).pooler_output
    torch.testing.assert_close(found, frames_as_published(source, tower, wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "columns"), [((112, 56), 2), ((56, 112), 1), ((112, 112), 2), ((300, 40), 2)]
)
def test_a_picture_of_what_was_kept_shows_all_tiles(
    size: tuple[int, int], columns: int, original: tuple[Path, Path], tmp_path: Path
) -> None:
    """Each of them in its place, and dark where its own tokens are gone."""
    source, tower = original
    convert(source, tmp_path / "out", tower)
    loaded = load_model(str(tmp_path / "out"), device="cpu")
    noise = numpy.random.default_rng(0).integers(100, 255, (4, 4, 3), dtype=numpy.uint8)
    picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    media = Media(torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None])
    expected = tiles_as_published(picture, GRIDS)
    found = answer(loaded, media, "What?", Recipe("random(keep=0.4)"), max_new_tokens=1)

    tiles = torch.stack([torch.from_numpy(numpy.array(one)).permute(2, 0, 1) for one in expected])
    off = (found.pictures.int() - tiles.int()).abs()
    assert off.max() <= (0 if size in GRIDS else 3)
    assert found.columns == columns
    (layout,) = found.report.last.layouts
    kept = torch.isin(layout.position, found.report.last.decisions[0].kept)
    assert 0 < int(kept.sum()) < len(kept) == 4 * len(tiles)
    drawn = numpy.asarray(found.overlay().convert("L")).astype(int)
    step = (drawn.shape[1] + 4) // columns  # of a tile, enlarged, and the gap behind it
    cell = (step - 4) // 2
    for token, here in enumerate(kept.tolist()):
        tile, row, column = token // 4, token // 2 % 2, token % 2
        top = tile // columns * step + row * cell
        left = tile % columns * step + column * cell
        part = drawn[top + 8 : top + cell - 8, left + 8 : left + cell - 8]
        side = slice(28 * row, 28 * row + 28), slice(28 * column, 28 * column + 28)
        shown = numpy.asarray(expected[tile].convert("L")).astype(int)[side][2:-2, 2:-2]
        assert part.mean() == pytest.approx(shown.mean() * (1 if here else 0.16), abs=4)


def pictures_of(*sizes: tuple[int, int]) -> list[Image.Image]:
    random = numpy.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 255, (high, wide, 3), dtype=numpy.uint8))
        for wide, high in sizes
    ]


@pytest.mark.parametrize("recipe", ["none", "vflowopt(keep=0.5)", "random(keep=0.5 per=item)"])
def test_images_of_a_prompt_may_have_different_numbers_of_tiles(
    recipe: str, original: tuple[Path, Path], tmp_path: Path
) -> None:
    source, tower = original
    convert(source, tmp_path / "out", tower)
    loaded = load_model(str(tmp_path / "out"), device="cpu")
    pictures, counts = pictures_of((112, 56), (112, 112), (56, 112)), [2, 4, 2]
    text = loaded.prompt([{"type": "image"}] * 3, "What?")
    inputs = loaded.processor(text=[text], images=pictures, return_tensors="pt")
    each = [
        loaded.processor(text=[text.replace("<image>\n", "", 2)], images=[one], return_tensors="pt")
        for one in pictures
    ]
    tiles = torch.cat([one["pixel_values"][0] for one in each])
    assert torch.equal(inputs["pixel_values"], tiles[None])
    for beams in (1, 2):
        with torch.no_grad(), prune(loaded.model, recipe) as report:
            loaded.model.generate(**inputs, max_new_tokens=2, num_beams=beams, do_sample=False)
        for layout in report.last.layouts:
            assert layout.item.tolist() == [n for n in range(3) for _ in range(4 * counts[n])]
            assert layout.canvas.tolist() == [n for n in range(8) for _ in range(4)]
            where = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
            assert layout.position.tolist() == where.tolist()
        if "per=item" in recipe:
            kept = torch.isin(report.last.layouts[0].position, report.last.decisions[0].kept)
            items = report.last.layouts[0].item[kept]
            assert torch.bincount(items).tolist() == [4, 8, 4]
    # Features of an image are those that it has alone.
    model: Any = loaded.model
    with torch.no_grad():
        one = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    torch.testing.assert_close(one, frames_as_published(source, tower, tiles), rtol=0, atol=1e-5)


def test_the_processor_is_saved_as_it_was_loaded(
    original: tuple[Path, Path], tmp_path: Path
) -> None:
    source, tower = original
    convert(source, tmp_path / "out", tower)
    loaded = load_model(str(tmp_path / "out"), device="cpu")
    for name in ("processor_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "out" / name).unlink()
    loaded.processor.save_pretrained(tmp_path / "out")
    again = load_model(str(tmp_path / "out"), device="cpu")
    text = loaded.prompt([{"type": "image"}] * 2, "What?")
    one, other = (
        each.processor(text=[text], images=pictures_of((112, 56), (112, 112)), return_tensors="pt")
        for each in (loaded, again)
    )

    assert isinstance(again.processor, LongVAProcessor)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_images_with_equally_many_tiles_are_stacked(
    original: tuple[Path, Path], tmp_path: Path
) -> None:
    source, tower = original
    convert(source, tmp_path / "out", tower)
    loaded = load_model(str(tmp_path / "out"), device="cpu")
    text = loaded.prompt([{"type": "image"}] * 2, "What?")
    pictures = pictures_of((112, 56), (56, 112))
    inputs = loaded.processor(text=[text], images=pictures, return_tensors="pt")

    assert inputs["pixel_values"].shape == (2, 2, 3, 56, 56)
    with torch.no_grad(), prune(loaded.model, "none") as report:
        loaded.model.generate(**inputs, max_new_tokens=1)
    assert report.last.layouts[0].item.tolist() == [0] * 8 + [1] * 8


def test_prompts_of_a_batch_with_different_numbers_of_tiles_fail(
    original: tuple[Path, Path], tmp_path: Path
) -> None:
    source, tower = original
    convert(source, tmp_path / "out", tower)
    loaded = load_model(str(tmp_path / "out"), device="cpu")
    text = loaded.prompt([{"type": "image"}], "What?")
    pictures = [[one] for one in pictures_of((112, 56), (112, 112))]
    with pytest.raises(ValueError, match=r"equally many tiles, got \[2, 4\]; give the prompts one"):
        loaded.processor(text=[text] * 2, images=pictures, padding=True, return_tensors="pt")


def test_transformers_alone_does_not_guess(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, tower = original
    convert(source, tmp_path / "out", tower)
    script = (
        "import sys, transformers\n"
        "try:\n"
        "    transformers.AutoProcessor.from_pretrained(sys.argv[1])\n"
        "except Exception as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)

    assert "Unrecognized image processor in" in ran.stdout


def test_processors_of_others_are_looked_for_as_before() -> None:
    """The registry of transformers stumbles over what it registered itself, if that has no name."""
    with pytest.raises(ValueError, match="Could not find module Nothing"):
        transformers.ProcessorMixin.get_possibly_dynamic_module("Nothing")


def test_command_converts(original: tuple[Path, Path], command: Any, files: Any) -> None:
    source, tower = original
    ran = command("convert", "longva", source, "--tower", tower)
    out = source.with_name("original-converted")
    assert (ran.code, ran.out) == (0, f"{out}: use it with --model {out}\n")
    asked = command(
        *("ask", files.video, "what happens?", "--model", out, "--frames", 4),
        *("--json", "--max-new-tokens", 2),
    )
    assert json.loads(asked.out)["media_tokens"]["before"] == 4 * 4


def test_tower_s_weights_come_from_its_checkpoint(
    original: tuple[Path, Path], tmp_path: Path
) -> None:
    source, tower = original
    prefix = "model.vision_tower.vision_tower."
    weights = weights_of(source)
    moved = {n.removeprefix(prefix): one for n, one in weights.items() if n.startswith(prefix)}
    convert(source, tmp_path / "whole", tower)
    save_file(
        moved | {"text_model.final_layer_norm.bias": torch.ones(3)}, tower / "model.safetensors"
    )

    def strip(of_file: dict[str, Tensor]) -> None:
        for name in moved:
            of_file.pop(prefix + name, None)

    change_weights(source, strip)
    convert(source, tmp_path / "parts", tower)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(one, parts[name]) for name, one in whole.items())


def test_what_is_computed_anew_is_left_behind(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, tower = original
    save_file(
        {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.ones(17),
            "model.image_newline": torch.ones(64),
        },
        source / "model-buffers.safetensors",
    )
    convert(source, tmp_path / "out", tower)
    assert len(weights_of(tmp_path / "out")) == len(build("longva").model.state_dict())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model_type", "qwen2"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("mm_projector_type", "linear"),
        ("mm_spatial_pool_mode", "max"),
        ("mm_spatial_pool_stride", 3),
        ("mm_vision_select_feature", "cls_patch"),
        ("image_aspect_ratio", "pad"),
    ],
)
def test_other_models_fail(
    setting: str, value: Any, original: tuple[Path, Path], tmp_path: Path
) -> None:
    source, tower = original
    change(source, **{setting: value})
    with pytest.raises(UnsupportedModelError, match=f"its {setting} must be .*, got {value!r}"):
        convert(source, tmp_path / "out", tower)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer", [-5, 0, 5])
def test_layer_outside_the_tower_fails(
    layer: int, original: tuple[Path, Path], tmp_path: Path
) -> None:
    source, tower = original
    change(source, mm_vision_select_layer=layer)
    with pytest.raises(UnsupportedModelError, match=f"one of the 4 blocks .* got {layer}"):
        convert(source, tmp_path / "out", tower)


@pytest.mark.parametrize("value", ["(1x1),...,(6x6)", None, [336], [], [[56, 100]], [[56, 0]]])
def test_tilings_that_cannot_be_read_fail(
    value: Any, original: tuple[Path, Path], tmp_path: Path
) -> None:
    source, tower = original
    change(source, image_grid_pinpoints=value)
    with pytest.raises(UnsupportedModelError, match="image_grid_pinpoints must be a list"):
        convert(source, tmp_path / "out", tower)
    assert not (tmp_path / "out").exists()


def test_unknown_tower_fails(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = original
    with pytest.raises(TokenPruneError, match="sizes of 'tiny/clip'.* with --tower"):
        convert(source, tmp_path / "out")


def test_known_tower_of_other_sizes_fails(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = original
    change(source, mm_vision_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(TokenPruneError, match=r"has shape .*, but the model has"):
        convert(source, tmp_path / "out")


def test_folder_in_use_fails(original: tuple[Path, Path]) -> None:
    source, tower = original
    with pytest.raises(TokenPruneError, match="is not empty; give a new folder"):
        convert(source, source, tower)


def test_folder_without_a_checkpoint_fails(original: tuple[Path, Path], tmp_path: Path) -> None:
    _, tower = original
    with pytest.raises(TokenPruneError, match=r"cannot read config\.json in"):
        convert(tmp_path, tmp_path / "out", tower)


def test_folder_without_a_tower_fails(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = original
    with pytest.raises(TokenPruneError, match=r"cannot read config\.json in"):
        convert(source, tmp_path / "out", tmp_path)


def test_tower_of_another_kind_fails(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, tower = original
    change(tower, model_type="siglip", vision_config={"model_type": "siglip_vision_model"})
    with pytest.raises(UnsupportedModelError, match="must be a clip_vision_model, got 'siglip_"):
        convert(source, tmp_path / "out", tower)


def test_checkpoint_without_a_tokenizer_fails(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, tower = original
    for file in source.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TokenPruneError, match="cannot read the tokenizer in"):
        convert(source, tmp_path / "out", tower)
    assert not (tmp_path / "out").exists()


def test_other_formats_of_weights_fail(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, tower = original
    for file in source.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(TokenPruneError, match=r"no \.safetensors file in"):
        convert(source, tmp_path / "out", tower)


def test_missing_tensors_fail(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, tower = original
    change_weights(source, lambda weights: weights.pop("model.norm.weight", None))
    with pytest.raises(
        TokenPruneError, match=r"lack 1 tensors, such as model\.language_model\.norm"
    ):
        convert(source, tmp_path / "out", tower)
    assert not (tmp_path / "out").exists()


def test_tensors_without_a_place_fail(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, tower = original
    change_weights(source, lambda weights: weights.update({"model.adapter.weight": torch.ones(2)}))
    with pytest.raises(TokenPruneError, match=r"model\.adapter\.weight .* no such tensor"):
        convert(source, tmp_path / "out", tower)


def test_placeholders_need_room(original: tuple[Path, Path], tmp_path: Path) -> None:
    source, tower = original
    # The tokenizer has numbers for the whole vocabulary, but not these two tokens.
    tokenizer({IMAGE: "<picture>", VIDEO: "<film>"}).save_pretrained(source)
    with pytest.raises(UnsupportedModelError, match=f"all {VOCABULARY} are taken"):
        convert(source, tmp_path / "out", tower)


def test_unknown_family_fails() -> None:
    with pytest.raises(UnsupportedModelError, match="no converter for 'blip'; known: longva"):
        find_converter("blip")
    assert find_converter("longva") is convert
