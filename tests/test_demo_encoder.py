"""The demo world's encoder: training reproduces to the bit, whoever reads it finds a real CLIP, and the one
that lies here sees."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import check_same
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, CLIPVisionModel

from dataset.demo_world import cosines, encoder, eye, patches, scenes, wording
from dataset.demo_world.build import hash_file
from dataset.demo_world.colours import COLOURS
from dataset.demo_world.encoder import EyeRecipe, EyeTraining, clip_tokenizer, clip_words
from dataset.demo_world.patches import UNNAMED, Crowd
from dataset.demo_world.recipe import PRESETS
from dataset.demo_world.things import POSITIONS, SHAPES, SIDE, SIZES
from dataset.demo_world.tokenizer import train_tokenizer
from dataset.demo_world.wording import CHINESE, describe
from model.vision_utils import ImageProcessor, get_img_embedding, get_img_process, get_vision_model
from trainer.script import clean_exit

FEW = EyeRecipe(steps=3, forms_of_a_kind=2, batch_size=24, warmup=2)
SHIPPED_LIMIT = 3_000_000  # bytes of weights that a repository may well hold


@pytest.fixture(scope="module", autouse=True)
def few_tests():
    """Scores of untrained encoders are of no interest here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encoder, "TEST_EACH", 1)
        patched.setattr(encoder, "TEST_SCENES", 20)
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip_words")
    train_tokenizer(folder, clip_words())
    return clip_tokenizer(folder)


@pytest.fixture(scope="module")
def trained(tokenizer) -> EyeTraining:
    """After three steps."""
    return train_to_the_end(EyeTraining(FEW, tokenizer))


@pytest.fixture(scope="module")
def clip_folder(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    encoder.save_encoder(trained.model.eval(), trained.tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def images() -> list:
    """Drawn images of the world."""
    few = dataclasses.replace(PRESETS["full"], train_images=30, test_images=1)
    return list(map(scenes.draw, scenes.make_splits(few, seed=0)["train"]))


def train_to_the_end(training: EyeTraining) -> EyeTraining:
    while training.step < training.recipe.steps:
        training.take_step()
    return training


# ---- training ----


def test_training_reproduces_bit_for_bit(trained, tokenizer):
    torch.manual_seed(99)  # the global generators must not matter, and must not be disturbed
    np.random.seed(99)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    again = train_to_the_end(EyeTraining(FEW, tokenizer))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
    check_same(again.model.state_dict(), trained.model.state_dict())
    other = train_to_the_end(EyeTraining(dataclasses.replace(FEW, seed=1), tokenizer))
    name = "visual_projection.weight"
    assert not torch.equal(other.model.state_dict()[name], trained.model.state_dict()[name])


def test_training_moves_all_weights_but_the_filters(trained, tokenizer):
    fresh = EyeTraining(FEW, tokenizer).model.state_dict()
    still = {name for name, weight in trained.model.state_dict().items() if torch.equal(weight, fresh[name])}
    assert still == {"vision_model.embeddings.patch_embedding.weight"}


def test_training_learns(trained):
    """One batch again and again: all three losses fall."""
    training = EyeTraining(dataclasses.replace(FEW, steps=30), trained.tokenizer)
    state = training.rng.bit_generator.state
    losses = []
    for _ in range(30):
        training.rng.bit_generator.state = state
        training.step = 10
        losses.append(training.take_step())
    for name in ("image_loss", "thing_loss", "word_loss"):
        assert losses[-1][name] < 0.9 * losses[0][name], name


def test_going_on_from_a_saved_state_is_the_same_to_the_bit(trained, tokenizer, tmp_path):
    training = EyeTraining(FEW, tokenizer)
    training.take_step()
    torch.save(training.state_dict(), tmp_path / "state.pt")
    went_on = EyeTraining(FEW, tokenizer)
    went_on.take_step()
    went_on.take_step()  # and somewhere else it was
    went_on.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    assert went_on.step == 1
    train_to_the_end(went_on)
    check_same(went_on.model.state_dict(), trained.model.state_dict())
    assert torch.equal(went_on.thing_scale, trained.thing_scale)


def test_scoring_changes_nothing_and_names_what_it_tells(trained, tokenizer):
    training = EyeTraining(FEW, tokenizer)
    scores = training.score()
    assert list(scores) == ["known", "unseen", "unseen_pairs", "unseen_of_3"]
    for split, values in scores.items():
        image = [] if split == "unseen_of_3" else ["image"]
        assert list(values) == ["colour", "shape", "position", "size", *image]
        assert all(0 <= value <= 1 for value in values.values())
    assert training.score() == scores
    check_same(train_to_the_end(training).model.state_dict(), trained.model.state_dict())


def test_learning_rate_warms_up_and_falls_to_a_hundredth():
    recipe = EyeRecipe(steps=1000, lr=2.0, warmup=50)
    rates = [encoder.learning_rate(step, recipe) for step in range(recipe.steps)]
    assert rates[0] == pytest.approx(2 / 50, rel=1e-3)
    assert max(rates) == pytest.approx(2, rel=0.01)
    assert rates[-1] == pytest.approx(2 / 100, rel=1e-3)
    peak = int(np.argmax(rates))
    assert 40 < peak < 60 and rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_what_is_hard_to_tell_comes_up_more_often(trained):
    recipe = dataclasses.replace(FEW, shapes=("cross", "cross", "star"), sizes=("small",), batch_size=200)
    crowd = encoder.draw_batch(recipe, 0, trained.bank, np.random.default_rng(0))
    things = crowd.things()
    shapes, sizes = (
        np.array(names)[numbers[things]]
        for names, numbers in ((SHAPES, crowd.shape), (list(SIZES), crowd.size))
    )
    assert set(sizes) == {"small"} and set(shapes) == {"cross", "star"}
    assert 0.55 < (shapes == "cross").mean() < 0.75


def test_thin_lines_come_when_the_recipe_says(trained):
    """And a run that is taken up afterwards has the same ones."""
    recipe = dataclasses.replace(FEW, steps=4, lr=1e-3, thin_from=2)
    whole = EyeTraining(recipe, trained.tokenizer)
    banks, states = [], []
    while whole.step < 4:
        banks.append(whole.bank.line)
        whole.take_step()
        states.append(copy.deepcopy(whole.state_dict()))
    assert banks[0] is banks[1] and banks[2] is banks[1] and banks[3] is not banks[1]
    again = EyeTraining(recipe, trained.tokenizer)
    again.load_state_dict(states[2])
    again.take_step()
    assert torch.equal(again.bank.line, whole.bank.line)
    weights = whole.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in again.model.state_dict().items())


def test_batches_hold_all_colours_two_or_one(trained):
    """Where the colour nearly tells which words are right, shape, size and position need not be seen."""
    rng = np.random.default_rng(0)
    recipe = dataclasses.replace(FEW, batch_size=64)
    unnamed = np.zeros(3)
    for step in range(9):
        crowd = encoder.draw_batch(recipe, step, trained.bank, rng)
        assert len(crowd.count) == 64 and set(crowd.count) <= {1, 2, 3, 4, 5}
        drawn = crowd.colour[crowd.things()]
        named = set(drawn[drawn != UNNAMED].tolist())
        assert len(named) == (8, 2, 1)[step % 3]
        unnamed[step % 3] += (drawn == UNNAMED).mean() / 3
    assert unnamed[2] < unnamed[:2].min() - 0.1 and 0.1 < unnamed.min() < unnamed.max() < 0.6


def some_crowd(*scenes_of_words: tuple[tuple, ...]) -> Crowd:
    """Scenes of (colour, shape, position, size); the forms play no part."""
    most = max(map(len, scenes_of_words))
    numbers = np.zeros((4, len(scenes_of_words), most), int)
    lists = ([*COLOURS, None], list(SHAPES), list(POSITIONS), list(SIZES))
    for scene, things in enumerate(scenes_of_words):
        for k, thing in enumerate(things):
            numbers[:, scene, k] = [names.index(name) for names, name in zip(lists, thing, strict=True)]
    counts = np.array(list(map(len, scenes_of_words)))
    return Crowd(counts, *numbers, form=np.zeros_like(numbers[0]))


def test_captions_are_in_reading_order_and_leave_an_unnamed_colour_out():
    crowd = some_crowd(
        (("red", "star", "bottom", "small"), ("blue", "circle", "top_right", "large")),
        ((None, "cross", "left", "small"),),
        (
            ("red", "star", "right", "small"),
            (None, "cross", "left", "large"),
            ("red", "cross", "top", "small"),
        ),
    )
    assert encoder.captions(crowd) == [
        "图片右上角有一个大的蓝色圆形，下方有一个小的红色星形。",
        "图片左侧有一个小的十字形。",
        "图片上方有一个小的红色十字形，左侧有一个大的十字形，右侧有一个小的红色星形。",
    ]


def test_captions_are_the_descriptions_of_the_language_stages():
    """Word for word, but for the number of things that these begin with."""
    few = dataclasses.replace(PRESETS["full"], train_images=60, test_images=1, unnamed_share=0)
    train = scenes.make_splits(few, seed=0)["train"]
    words = [
        tuple((t.colour, t.shape, t.position, t.size) for t in reversed(scene.things)) for scene in train
    ]
    told = [describe(scene, CHINESE).rpartition("：")[2].removeprefix(CHINESE.begin) for scene in train]
    assert encoder.captions(some_crowd(*words)) == [CHINESE.begin + sentence for sentence in told]


def test_equal_captions_share_the_target():
    """Otherwise equal images would have to be told apart, which only noise can do."""
    of, texts = encoder.number_texts(["b", "a", "b", "b"])
    assert texts == ["a", "b"] and of.tolist() == [1, 0, 1, 1]
    assert encoder.shares(of, 2).sum(0).tolist() == [1, 1]
    same = torch.zeros(4, dtype=torch.long)
    for logits in (torch.zeros(4, 1), torch.full((4, 1), 7.0)):
        # Back to the images: the loss of indifference, its minimum here.
        assert encoder.match(logits, same).item() == pytest.approx(math.log(4) / 2)
    right = torch.full((4, 2), -20.0)
    right[torch.arange(4), of] = 20
    assert encoder.match(right, of).item() == pytest.approx(0.5 * (math.log(3) / 2), abs=1e-4)


def test_untrained_it_matches_by_chance(trained, tokenizer):
    """Losses of a model that knows nothing are near those of guessing: nothing of the answer leaks in."""
    training = EyeTraining(dataclasses.replace(FEW, batch_size=64), tokenizer)
    losses = training.take_step()
    assert losses["image_loss"] > 0.7 * math.log(64) / 2
    assert losses["thing_loss"] > 0.7 * math.log(100)
    assert losses["word_loss"] > 0.7 * (math.log(len(SHAPES)) + math.log(len(COLOURS)))


# ---- the model ----


def test_cosines_are_orthogonal_within_a_colour_axis():
    filters = cosines.cosines(8).flatten(1)
    products = filters @ filters.T
    assert torch.allclose(products, torch.diag(products.diagonal()), atol=1e-2)
    assert cosines.frequency_sums(8).view(8, 8).diagonal().tolist() == list(range(0, 16, 2))
    crossings = (filters.view(8, 8, 32, 32).sign().diff(dim=3) != 0).sum(3).amax(2)  # (v, u)
    assert crossings.tolist() == [list(range(8))] * 8


def test_colour_axes_are_apart_from_brightness():
    """Grey says nothing on an axis of colour."""
    grey = torch.ones(3)
    assert (cosines.AXES @ grey).tolist() == pytest.approx([1, 0, 0])
    assert torch.linalg.matrix_rank(cosines.AXES) == 3


def test_chosen_filters_are_all_of_brightness_and_the_coarsest_of_colour():
    chosen = cosines.chosen_filters(10, 30)
    axis, cosine = chosen // 100, chosen % 100
    assert len(set(chosen.tolist())) == 160
    assert [(axis == n).sum().item() for n in range(3)] == [100, 30, 30]
    sums = cosines.frequency_sums(10)
    for n in (1, 2):
        left_out = set(range(100)) - set(cosine[axis == n].tolist())
        assert sums[cosine[axis == n]].max() <= sums[list(left_out)].min()


def test_the_frozen_filters_are_the_cosines_and_are_not_trained(clip_folder):
    weight = CLIPModel.from_pretrained(clip_folder).vision_model.embeddings.patch_embedding.weight
    chosen = cosines.filter_weights(FEW.frequencies, FEW.coarse, torch.ones(len(weight)))
    scale = (weight * chosen).sum((1, 2, 3)) / chosen.square().sum((1, 2, 3))
    assert weight.shape == (160, 3, 32, 32) and (scale > 0).all()
    error = (weight - chosen * scale[:, None, None, None]).abs().amax((1, 2, 3))
    assert (error <= weight.abs().amax((1, 2, 3)) * 2**-10).all()  # float16's


def test_training_hears_what_the_filters_say(trained, images):
    """What training composes without images is as loud as what the saved filters say of drawn ones."""
    pixels = torch.stack([get_img_process(image, ImageProcessor(cosines.SIDE_PIXELS)) for image in images])
    with torch.no_grad():
        said = trained.model.vision_model.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    crowd = patches.draw_crowd(np.resize([1, 2, 3], 60), trained.bank, np.random.default_rng(0))
    heard = trained.hear(crowd, trained.bank, np.random.default_rng(0)) * trained.loudness
    ratio = said.square().mean((0, 1)).sqrt() / heard.square().mean((0, 1)).sqrt()
    assert 0.7 < ratio.median() < 1.4


@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPModel])
def test_stock_models_load_without_a_missing_weight_in_single_precision(kind, clip_folder):
    model, report = kind.from_pretrained(clip_folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_is_saved_is_what_was_trained_but_for_half_precision(clip_folder, trained):
    saved = CLIPModel.from_pretrained(clip_folder).state_dict()
    for name, weight in trained.model.state_dict().items():
        torch.testing.assert_close(saved[name], weight.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("which", ["clip_folder", "shipped"])
def test_training_computes_what_the_stock_model_does(which, request, images):
    """Both towers, over all 50 tokens, though training never sees pixels."""
    folder = request.getfixturevalue(which)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    texts = ["图片上方有一个小的星形。", encoder.NOTHING, CHINESE.words["red"]]
    inputs = processor(text=texts, images=images[:6], padding=True, return_tensors="pt")
    with torch.no_grad():
        said = model.vision_model.embeddings.patch_embedding(inputs.pixel_values)
        tokens = encoder.embed_patches(model, said.flatten(2).transpose(1, 2))
        stock = vector_of(model.get_image_features(inputs.pixel_values))
        torch.testing.assert_close(tokens[:, 0], stock, atol=1e-5, rtol=0)
        hidden = model.vision_model(inputs.pixel_values).last_hidden_state
        stock = model.visual_projection(model.vision_model.post_layernorm(hidden))
        stock = torch.nn.functional.normalize(stock, dim=-1)
        torch.testing.assert_close(tokens, stock, atol=1e-5, rtol=0)
        stock = vector_of(model.get_text_features(inputs.input_ids, inputs.attention_mask))
        ours = encoder.embed_text(model, processor.tokenizer, texts)
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)


def vector_of(features) -> torch.Tensor:
    """Normalised; newer transformers wrap them."""
    return torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)


def test_padding_does_not_change_a_text(trained):
    short, long = "大的", "图片上方有一个小的红色星形，左侧有一个大的蓝色圆形。"
    with torch.no_grad():
        alone, padded = (
            encoder.embed_text(trained.model, trained.tokenizer, texts)[0]
            for texts in ([short], [short, long])
        )
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=0)


def test_the_stock_processor_reads_the_folder(clip_folder, images):
    """Images come out as in model/vision_utils.py, captions end in the mark where the text is read off."""
    processor = CLIPProcessor.from_pretrained(clip_folder)
    _, ours = get_vision_model(clip_folder)
    texts = ["图片上方有一个小的星形。", "a star"]
    inputs = processor(text=texts, images=images[:4], padding=True, return_tensors="pt")
    expected = torch.stack([get_img_process(image, ours) for image in images[:4]])
    torch.testing.assert_close(inputs.pixel_values, expected, atol=1e-5, rtol=0)
    model = CLIPModel.from_pretrained(clip_folder)
    end = model.config.text_config.eos_token_id
    assert end == processor.tokenizer.eos_token_id == len(processor.tokenizer) - 1
    assert (inputs.input_ids == end).any(1).all()
    assert (inputs.input_ids[:, 0] == processor.tokenizer.bos_token_id).all()
    model(**inputs)


def test_the_repository_reads_the_folder(clip_folder, images):
    vision_model, image_processor = get_vision_model(clip_folder)
    assert image_processor.size == 224
    pixels = torch.stack([get_img_process(image, image_processor) for image in images[:2]])
    assert get_img_embedding(pixels, vision_model).shape == (2, 50, 160)


def test_captions_are_one_token_a_word_and_its_tokenizer_is_its_own(clip_folder, world_tokenizer_path):
    """CLIP's two marks must not leak into the tokenizer of the language model."""
    clip = AutoTokenizer.from_pretrained(clip_folder)
    assert [word for word in clip_words() if len(clip(word).input_ids) != 3] == []
    words = AutoTokenizer.from_pretrained(world_tokenizer_path).get_vocab()
    assert not {encoder.TEXT_START, encoder.TEXT_END} & set(words)


# ---- eye.py ----


SOURCE = '''"""Old."""
A = 1  # a comment


class B:
    """Old."""

    b = "text"

    def c(self):
        "Old."
        return (1 +
            2)
'''


def test_the_code_of_a_module_is_not_its_comments():
    other = SOURCE.replace("  # a comment", "").replace("1 +\n            2", "1 + 2")
    other = other.replace("Old.", "New.").replace(
        '"New."\n        return', '"""New,\n        longer."""\n        return'
    )
    assert "longer" in other and "comment" not in other
    assert eye.code_of(other) == eye.code_of(SOURCE)
    for before, after in (("A = 1", "A = 2"), ('"text"', '"other"'), ("def c", "def d"), ("2)", "3)")):
        assert before in SOURCE and eye.code_of(SOURCE.replace(before, after)) != eye.code_of(SOURCE)


def test_the_fingerprint_is_of_recipe_code_and_rules(monkeypatch):
    first = eye.fingerprint(EyeRecipe())
    assert eye.fingerprint(EyeRecipe()) == first
    assert eye.fingerprint(EyeRecipe(warmup=1)) != first and eye.fingerprint(EyeRecipe(seed=1)) != first
    for module, name, value in (
        (wording, "CHINESE", dataclasses.replace(wording.CHINESE, joint="、")),
        (patches, "SPLIT_TABLE", patches.SPLIT_TABLE[:1]),
        (patches, "TOGETHER_TABLE", ~patches.TOGETHER_TABLE),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            assert eye.fingerprint(EyeRecipe()) != first, name
    with monkeypatch.context() as patched:
        patched.setattr(eye, "code_of", lambda source: source)
        assert eye.fingerprint(EyeRecipe()) != first
    assert eye.fingerprint(EyeRecipe()) == first


class Stopped(Exception):
    pass


@pytest.fixture
def quick(monkeypatch):
    """make_eye() takes six steps, and saves after every second."""
    monkeypatch.setattr(encoder, "EyeRecipe", lambda: dataclasses.replace(FEW, steps=6))
    monkeypatch.setattr(eye, "SCORE_EVERY", 2)
    monkeypatch.setattr(eye, "LOG_EVERY", 1)


def stop_after(monkeypatch, steps: int) -> list[int]:
    """Let training die once it has taken so many steps; the list says which it took."""
    original, taken = EyeTraining.take_step, []

    def take_step(self):
        if len(taken) == steps:
            raise Stopped
        taken.append(self.step)
        return original(self)

    monkeypatch.setattr(EyeTraining, "take_step", take_step)
    return taken


def test_an_interrupted_training_goes_on_to_the_same_bits(quick, monkeypatch, tmp_path):
    eye.make_eye(tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(Stopped):
            eye.make_eye(tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    taken = stop_after(monkeypatch, 100)
    eye.make_eye(tmp_path / "cut")
    assert taken == [2, 3, 4, 5]  # from the saved state on
    for name in (*eye.CLIP_FILES, "training.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for name in ("cut", "whole"):
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files == {*eye.CLIP_FILES, "eye.json", "training.jsonl", "training.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"cut", "whole"}


def test_the_state_of_another_recipe_is_not_gone_on_from(quick, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(Stopped):
            eye.make_eye(tmp_path / "clip")
    monkeypatch.setattr(encoder, "EyeRecipe", lambda: dataclasses.replace(FEW, steps=6, lr=1e-4))
    taken = stop_after(monkeypatch, 100)
    eye.make_eye(tmp_path / "clip")
    assert taken == [0, 1, 2, 3, 4, 5]


def test_it_says_what_it_was_made_of(quick, tmp_path, capsys):
    eye.main(["--out", str(tmp_path / "clip"), "--steps", "2"])
    about = json.loads((tmp_path / "clip" / "eye.json").read_text())
    recipe = dataclasses.replace(FEW, steps=2)
    assert about["recipe"] == json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert about["fingerprint"] == eye.fingerprint(recipe)
    assert set(about["scores"]) == {"known", "unseen", "unseen_pairs", "unseen_of_3"}
    lines = [json.loads(line) for line in (tmp_path / "clip" / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[-1]["scores"] == about["scores"]
    assert str(tmp_path / "clip") in capsys.readouterr().out


def test_an_existing_folder_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        clean_exit(lambda: eye.main(["--out", str(tmp_path)]))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"error: {tmp_path} exists")
    assert not tmp_path.with_name(tmp_path.name + ".building").exists()


# ---- the encoder that lies here ----


@pytest.fixture(scope="module")
def shipped() -> Path:
    return eye.SHIPPED


def test_the_shipped_encoder_is_the_recipes(shipped):
    about = json.loads((shipped / "eye.json").read_text())
    assert about["fingerprint"] == eye.fingerprint(EyeRecipe()), (
        "make it anew: python -m dataset.demo_world.eye"
    )
    assert about["recipe"] == json.loads(json.dumps(dataclasses.asdict(EyeRecipe())))
    assert (shipped / "model.safetensors").stat().st_size <= SHIPPED_LIMIT
    assert {*eye.CLIP_FILES, "eye.json"} <= {path.name for path in shipped.iterdir()}


def test_the_shipped_encoder_scored_well(shipped):
    scores = json.loads((shipped / "eye.json").read_text())["scores"]
    assert min(scores["unseen"][name] for name in ("colour", "shape", "position", "size")) >= 0.97


def test_the_shipped_encoder_sees_what_no_training_showed(shipped):
    """Measured anew: on images that are really drawn and read from a file, at the patch of each thing's
    centre."""
    preset = dataclasses.replace(PRESETS["full"], train_images=0, test_images=200)
    drawn = scenes.make_splits(preset, seed=11)["unseen"]
    vision_model, image_processor = get_vision_model(shipped)
    model = CLIPModel.from_pretrained(shipped).eval()
    pixels = torch.stack([get_img_process(scenes.draw(scene), image_processor) for scene in drawn])
    sizes = (len(COLOURS), len(SHAPES), len(POSITIONS), len(SIZES))
    kinds = np.stack(np.meshgrid(*map(np.arange, sizes)), -1).reshape(-1, 4)
    with torch.no_grad():
        tokens = model.visual_projection(
            model.vision_model.post_layernorm(get_img_embedding(pixels, vision_model))
        )
        phrases = encoder.embed_text(
            model, AutoTokenizer.from_pretrained(shipped), [encoder.phrase(*kind) for kind in kinds]
        )
    things = [scene.things[0] for scene in drawn]
    cells = [int(thing.centre[1] * 7 / SIDE) * 7 + int(thing.centre[0] * 7 / SIDE) for thing in things]
    at_centre = tokens[torch.arange(len(drawn)), 1 + torch.tensor(cells)]
    told = kinds[(at_centre @ phrases.T).argmax(1)]
    right = [
        (list(COLOURS)[colour], SHAPES[shape]) == (thing.colour, thing.shape)
        for (colour, shape, _, _), thing in zip(told, things, strict=True)
    ]
    assert np.mean(right) >= 0.95


def test_another_encoder_is_another_world(shipped, clip_folder):
    assert hash_file(shipped / "model.safetensors") != hash_file(clip_folder / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="python -m dataset.demo_world.eye --out nowhere"):
        hash_file(Path("nowhere/model.safetensors"))


def test_a_damaged_state_is_not_taken_up(tmp_path):
    """Nor one that holds anything but numbers and names: nothing in it is run."""
    state = tmp_path / "state.pt"
    torch.save({"mark": {"threads": 1}, "log": [{"step": 1}]}, state)
    assert eye.read_state(state)["mark"] == {"threads": 1}
    whole = state.read_bytes()
    for content in (b"", b"no state", whole[: len(whole) // 2]):
        state.write_bytes(content)
        assert eye.read_state(state) == {}
    torch.save([1, 2], state)
    assert eye.read_state(state) == {}
    torch.save({"mark": tmp_path}, state)
    assert eye.read_state(state) == {}
