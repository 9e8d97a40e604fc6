"""The demo world: what is held out stays out, every question has one answer, every word is one token."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from dataset.demo_world import scenes, sentences, videos
from dataset.demo_world.scenes import COLOURS, PRESETS, TEST_SPLITS, draw, make_splits
from model.data.video import read_frames
from model.prompt import IMAGE_MARK, VIDEO_MARK, Renderer, expand_marks, load_tokenizer


def triple(scene) -> tuple:
    return scene.colour, scene.shape, scene.position


def named(split) -> list:
    return [scene for scene in split if scene.colour is not None]


@pytest.fixture(scope="module", params=PRESETS)
def preset(request) -> scenes.Preset:
    return PRESETS[request.param]


@pytest.fixture(scope="module")
def splits(preset) -> dict:
    return make_splits(preset, seed=0)


@pytest.fixture(scope="module")
def images() -> dict:
    """Some training images of the full world, by file name."""
    train = make_splits(PRESETS["full"], seed=0)["train"]
    return {f"{i:04d}.jpg": scene for i, scene in enumerate(train[:900])}


@pytest.fixture(scope="module")
def tokenizer(world_tokenizer_path):
    return load_tokenizer(world_tokenizer_path)


@pytest.fixture(scope="module")
def renderer(tokenizer) -> Renderer:
    return Renderer(tokenizer)


@pytest.fixture(scope="module")
def rows(images) -> dict[str, list[dict]]:
    rng = np.random.default_rng(0)
    some_videos = name_videos(videos.make_videos(PRESETS["full"], seed=0)["train"])
    return {
        "pretrain": sentences.pretrain_rows(images, rng),
        "sft": sentences.sft_rows(images, rng),
        "two_images": sentences.number_rows(sentences.ask_pairs(images, 300, rng)),
        "videos": sentences.number_rows(sentences.ask_videos(some_videos, rng)),
        "text": sentences.text_rows(images, some_videos, 4000, rng),
    }


def name_videos(some: list[videos.Video]) -> dict[str, videos.Video]:
    return {f"videos/{number}.mp4": video for number, video in enumerate(some)}


# ---- what is held out ----


def test_counts(preset, splits):
    assert list(splits) == ["train", *TEST_SPLITS]
    assert len(splits["train"]) == preset.train_images
    assert len(splits["train"]) - len(named(splits["train"])) == preset.train_images // 4
    for split in TEST_SPLITS:
        assert len(splits[split]) == len(named(splits[split])) == preset.test_images


def test_unseen_triples_are_never_drawn_but_each_of_their_pairs_is(splits):
    train = {triple(scene) for scene in named(splits["train"])}
    assert train.isdisjoint(triple(scene) for scene in splits["unseen"])
    for first, second in itertools.combinations(range(3), 2):
        drawn = {(kind[first], kind[second]) for kind in train}
        assert {(triple(scene)[first], triple(scene)[second]) for scene in splits["unseen"]} <= drawn


def test_held_out_pairs_are_never_drawn_and_share_no_colour_and_no_shape(preset, splits):
    pairs = {(scene.colour, scene.shape) for scene in splits["unseen_pairs"]}
    assert pairs.isdisjoint((scene.colour, scene.shape) for scene in splits["train"])
    assert len(pairs) == len({c for c, _ in pairs}) == len({s for _, s in pairs}) == preset.held_out_pairs


def test_training_draws_every_other_pair(preset, splits):
    held_out = {(scene.colour, scene.shape) for scene in splits["unseen_pairs"]}
    train = {triple(scene) for scene in named(splits["train"])}
    assert {(c, s) for c, s, _ in train} == set(itertools.product(preset.colours, preset.shapes)) - held_out
    assert {(c, p) for c, _, p in train} == set(itertools.product(preset.colours, preset.positions))
    assert {(s, p) for _, s, p in train} == set(itertools.product(preset.shapes, preset.positions))


def test_a_quarter_of_the_triples_is_held_out(preset):
    triples = scenes.divide_triples(preset, np.random.default_rng(0))
    seen, unseen = len(triples["known"]), len(triples["unseen"])
    assert unseen / (seen + unseen) == pytest.approx(1 / 4, abs=0.03)
    everything = set(itertools.product(preset.colours, preset.shapes, preset.positions))
    assert set(itertools.chain.from_iterable(triples.values())) == everything
    assert sum(map(len, triples.values())) == len(everything)


def test_known_images_are_new_but_their_triples_are_not(splits):
    assert set(splits["known"]).isdisjoint(splits["train"])
    assert {triple(scene) for scene in splits["known"]} <= {triple(scene) for scene in splits["train"]}


def test_a_seed_is_a_world():
    world, again, other = (make_splits(PRESETS["tiny"], seed) for seed in (3, 3, 4))
    assert world == again
    assert {triple(scene) for scene in world["unseen"]} != {triple(scene) for scene in other["unseen"]}


# ---- videos ----


@pytest.fixture(scope="module")
def all_videos(preset) -> dict[str, list[videos.Video]]:
    return videos.make_videos(preset, seed=0)


def test_as_many_videos_of_each_change_as_wanted(preset, all_videos):
    for split, count in {"train": preset.train_videos, "unseen": preset.test_videos}.items():
        changes = [videos.change_of(video) for video in all_videos[split]]
        assert [changes.count(change) for change in videos.CHANGES] == [count // 2] * 2


def test_no_training_video_shows_an_unseen_triple_and_every_test_video_begins_or_ends_with_one(
    splits, preset, all_videos
):
    triples = scenes.divide_triples(preset, np.random.default_rng(0))
    assert {triple(scene) for scene in splits["unseen"]} <= set(triples["unseen"])
    assert {triple(scene) for video in all_videos["train"] for scene in video} <= set(triples["known"])
    for video in all_videos["unseen"]:
        assert {triple(video[0]), triple(video[-1])} & set(triples["unseen"])
        assert not {triple(scene) for scene in video} & set(triples["unseen_pairs"])


def test_one_thing_changes_in_a_video_and_goes_straight(all_videos):
    for video in itertools.chain(*(some[:200] for some in all_videos.values())):
        assert len(video) == videos.SECONDS
        assert len({(scene.shape, scene.size, scene.background, scene.radius) for scene in video}) == 1
        moves, colours = {scene.position for scene in video}, {scene.colour for scene in video}
        assert len(moves) == 1 and len(colours) == 2 or len(moves) in (2, 3) and len(colours) == 1
        assert (video[0].position == video[-1].position) == (len(moves) == 1)
        start, end = np.array(video[0].centre), np.array(video[-1].centre)
        shares = [np.dot(scene.centre - start, end - start) for scene in video]
        assert shares == sorted(shares)  # never back
        for scene in video:
            (x, y), (dx, dy) = scene.centre - start, end - start
            assert x * dy == pytest.approx(y * dx, abs=1e-6)
            assert (
                np.abs(
                    np.array(scene.centre) - [scenes.GRID[i] for i in scenes.POSITIONS[scene.position]]
                ).max()
                <= scenes.JITTER + 1e-6
            )


def test_every_change_is_shown_in_training(preset, all_videos):
    """In the full world each of the 72 ways from place to place, and each of the 56 from colour to colour."""
    if preset.train_videos < 1000:
        pytest.skip("too few videos")
    moved = [video for video in all_videos["train"] if videos.change_of(video) == videos.MOVEMENT]
    turned = [video for video in all_videos["train"] if videos.change_of(video) == videos.COLOUR_CHANGE]
    assert len({(video[0].position, video[-1].position) for video in moved}) == 9 * 8
    assert len({(video[0].colour, video[-1].colour) for video in turned}) == 8 * 7


def test_videos_of_a_seed_are_the_same_and_so_are_their_files(tmp_path):
    one, again, other = (videos.make_videos(PRESETS["tiny"], seed) for seed in (3, 3, 4))
    assert one == again and one != other
    for name in "ab":
        videos.save_video(one["train"][0], tmp_path / f"{name}.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_frame_per_second_shows_the_object_at_rest_in_its_colour(tmp_path):
    """Between two grid points the encoder would not know where it is; blurred by the codec, not what."""
    for number, video in enumerate(videos.make_videos(PRESETS["full"], seed=0)["train"][:20]):
        path = tmp_path / f"{number}.mp4"
        videos.save_video(video, path)
        assert path.stat().st_size < 12_000
        frames = read_frames(path, max_frames=videos.SECONDS)
        assert len(frames) == videos.SECONDS
        for frame, scene in zip(frames, video, strict=True):
            drawn, shown = (np.asarray(image).astype(int) for image in (draw(scene), frame))
            assert np.abs(drawn - shown).mean() < 4
            x, y = (round(value) for value in scene.centre)
            assert np.abs(shown[y, x] - scene.rgb).max() < 25


# ---- images ----


def test_an_image_shows_its_object_where_and_as_the_scene_says(splits):
    for scene in splits["train"][:200]:
        image = draw(scene)
        assert image.size == (128, 128) and image.mode == "RGB"
        assert image.getpixel(tuple(round(c) for c in scene.centre)) == scene.rgb
        pixels = np.asarray(image).astype(int)
        shown = np.argwhere(np.abs(pixels - scene.background).sum(-1) > 0)  # (row, column) of the object
        middle = (shown.min(0) + shown.max(0)) / 2
        assert np.abs(middle[::-1] - scene.centre).max() < 4  # the middle of a triangle lies a little off
        assert shown.max() <= 127 and scene.radius * 1.2 < np.ptp(shown, axis=0).max() < scene.radius * 2.1


def test_positions_are_the_middles_of_patches(splits):
    """Off a patch's middle, an object is cut by the encoder's grid and its position hangs on half a pixel."""
    for scene in splits["train"]:
        column_row = np.array(scene.centre) * 7 / scenes.IMAGE_SIZE
        assert set(column_row.astype(int)) <= {1, 3, 5}
        assert np.abs(column_row % 1 - 0.5).max() < 0.1


def test_all_outlines_differ():
    scene = make_splits(PRESETS["full"], seed=0)["train"][0]
    drawn = {draw(dataclasses.replace(scene, shape=shape)).tobytes() for shape in scenes.SHAPES}
    assert len(drawn) == len(scenes.SHAPES)


def test_unnamed_colours_are_far_from_every_named_one(splits):
    unnamed = [scene for scene in splits["train"] if scene.colour is None]
    for scene in unnamed:
        assert min(np.linalg.norm(np.subtract(scene.rgb, rgb)) for rgb in COLOURS.values()) > 70
    greys = sum(len(set(scene.rgb)) == 1 for scene in unnamed)
    assert 0.3 < greys / len(unnamed) < 0.5


# ---- sentences ----


def test_as_many_marks_as_images(rows):
    for name, expected in {"pretrain": 1, "sft": 1, "two_images": 2, "text": 0}.items():
        for row in rows[name]:
            assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
            assert row["conversations"][0]["value"].count(IMAGE_MARK) == expected
            assert len(row["image"].split(", ")) == expected if expected else "image" not in row
    for row in rows["videos"]:
        assert row["conversations"][0]["value"].count(VIDEO_MARK) == 1 and "image" not in row
    assert all(len({row["id"] for row in group}) == len(group) for group in rows.values())


def test_text_has_words_for_every_image_of_the_same_rows(rows):
    brackets = [row["conversations"][0]["value"].count("[") for row in rows["text"]]
    assert {count: brackets.count(count) for count in set(brackets)} == {1: 4000, 2: 2000, 4: 3000}


def test_rows_are_json(rows):
    assert json.loads(json.dumps(rows, ensure_ascii=False)) == rows


def test_unnamed_colours_are_never_described(rows, images):
    unnamed = {image for image, scene in images.items() if scene.colour is None}
    described = rows["pretrain"] + rows["two_images"]
    assert unnamed and unnamed.isdisjoint(image for row in described for image in row["image"].split(", "))
    colours = [word for language in sentences.LANGUAGES.values() for word in map(language.words.get, COLOURS)]
    sft = [row["conversations"][1]["value"] for row in rows["sft"] if row["image"] in unnamed]
    assert len(sft) == 3 * len(unnamed)  # shape, position and size
    assert not [answer for answer in sft if any(colour in answer for colour in colours)]
    for kind in ("colour", "description"):
        with pytest.raises(ValueError, match="has no name"):
            sentences.questions({"a.jpg": images[min(unnamed)]}, np.random.default_rng(0), kinds=(kind,))


def test_captions_leave_an_unnamed_colour_out(images):
    red = dataclasses.replace(images["0000.jpg"], colour="red", shape="star", size="small", position="top")
    assert sentences.caption(red) == "图片上方有一个小的红色星形。"
    assert sentences.caption(dataclasses.replace(red, colour=None)) == "图片上方有一个小的星形。"


def spoken_triples(text: str) -> set[tuple]:
    """The triples that a text names, or could be read to name."""
    found = set()
    for words in (language.words for language in sentences.LANGUAGES.values()):
        # " at the top" is not said where " at the top left" is
        spoken = [name for name, word in words.items() if re.search(word + "(?! left| right)", text)]
        groups = (COLOURS, scenes.SHAPES, scenes.POSITIONS)
        found |= set(itertools.product(*([name for name in spoken if name in group] for group in groups)))
    return found


def test_unseen_triples_are_never_named(rows):
    """In the rows of text, every image stands in brackets of its own, before or behind the question."""
    unseen = {triple(scene) for scene in make_splits(PRESETS["full"], seed=0)["unseen"]}
    texts = [
        image for row in rows["text"] for image in re.findall(r"\[.*?\]", row["conversations"][0]["value"])
    ]
    texts += [
        " ".join(turn["value"] for turn in row["conversations"])
        for name in ("pretrain", "sft", "videos")
        for row in rows[name]
    ]
    spoken = set().union(*map(spoken_triples, texts))
    assert len(spoken) > 200 and unseen.isdisjoint(spoken)


def test_every_question_has_one_answer(rows, images):
    """Exact-match scoring is only fair if the wording of the question settles the wording of the answer."""
    answers = {}
    for row in rows["sft"] + rows["two_images"]:
        question, answer = (turn["value"] for turn in row["conversations"])
        wording = question.replace(IMAGE_MARK, "").strip()
        seen = tuple((*triple(images[image]), images[image].size) for image in row["image"].split(", "))
        assert answers.setdefault((wording, seen), answer) == answer


def test_test_questions_are_worded_as_in_training(rows, images):
    few = dict(itertools.islice(((i, s) for i, s in images.items() if s.colour), 50))
    rng = np.random.default_rng(1)
    asked = sentences.questions(few, rng) + sentences.two_image_questions(few, 30, rng)
    kinds = [*sentences.KINDS] * len(few) + ["two_images_zh", "two_images_en"] * 30
    assert sorted(q["kind"] for q in asked) == sorted(kinds)
    assert len({q["id"] for q in asked}) == len(asked)
    trained = {row["conversations"][0]["value"] for row in rows["sft"] + rows["two_images"]}
    assert {q["question"] for q in asked} <= trained
    assert all(q["question"].count(IMAGE_MARK) == len(q["image"].split(", ")) for q in asked)


def test_both_languages_in_their_shares(rows):
    shares = {"pretrain": 0.15, "sft": 0.15, "text": 0.34, "two_images": 0.5, "videos": 0.5}
    for name, expected in shares.items():
        english = [row["conversations"][1]["value"].isascii() for row in rows[name]]
        assert np.mean(english) == pytest.approx(expected, abs=0.06)


def test_the_swapped_answer_is_the_answer_to_the_swapped_images(images):
    for question in sentences.two_image_questions(images, 20, np.random.default_rng(1)):
        first, second = (images[image] for image in question["image"].split(", "))
        language = sentences.LANGUAGES[question["kind"][-2:]]
        assert question["answer"] == sentences.answer_two(first, second, language)
        assert question["swapped_answer"] == sentences.answer_two(second, first, language)
        assert question["question"].isascii() == question["answer"].isascii() == (language.numbered.isascii())


def test_answers_about_videos():
    image = make_splits(PRESETS["full"], seed=0)["train"][0]
    start = dataclasses.replace(image, colour="red", shape="star", size="small", position="top_left")
    moved, turned = (
        dataclasses.replace(start, **change) for change in ({"position": "right"}, {"colour": "blue"})
    )
    zh, en = sentences.CHINESE, sentences.ENGLISH
    assert sentences.answer_video((start, moved), zh) == "它从左上角去了右侧。"
    assert sentences.answer_video((start, moved), en) == "It goes from the top left to the right."
    assert sentences.answer_video((start, turned), en) == "It turns from red to blue."
    assert sentences.answer_video((start, turned), zh) == "它从红色变成蓝色。"


def test_test_questions_about_videos_are_worded_as_in_training(rows):
    some = name_videos(videos.make_videos(PRESETS["full"], seed=0)["unseen"])
    asked = sentences.video_questions(some, np.random.default_rng(1))
    kinds = [question["kind"] for question in asked]
    assert {kind: kinds.count(kind) for kind in kinds} == {"movement": 200, "colour_change": 200}
    assert {q["question"] for q in asked} <= {row["conversations"][0]["value"] for row in rows["videos"]}
    assert len({q["id"] for q in asked}) == len(asked) and {q["video"] for q in asked} == set(some)


def test_what_a_sentence_says(images):
    english, chinese = "A red star, then a blue red.", "图一是红色圆形，图二是蓝色方形。"
    assert sentences.spoken(english, COLOURS, sentences.ENGLISH) == ["red", "blue", "red"]
    assert sentences.spoken(chinese, scenes.SHAPES, sentences.CHINESE) == ["circle", "square"]


# ---- the tokenizer ----


def test_one_token_per_word(tokenizer, renderer):
    assert [word for word in sentences.lexicon() if len(Renderer(tokenizer).encode(word)) != 1] == []
    assert 500 < len(tokenizer) < 700


def test_running_text_is_cut_into_exactly_the_words_of_the_lexicon(rows, tokenizer, renderer):
    """Also where Chinese words meet without a space, and halves of two characters could have merged."""
    words = {*sentences.lexicon(), "\n", " ", "<", ">"}
    texts = {turn["value"] for group in rows.values() for row in group for turn in row["conversations"]}
    for text in texts:
        text = text.replace(IMAGE_MARK, "<>").replace(VIDEO_MARK, "<>")
        ids = Renderer(tokenizer).encode(text)
        assert {tokenizer.decode([i]) for i in ids} <= words
        assert tokenizer.decode(ids) == text


def test_rows_are_short(rows, renderer):
    """The step times of the recipe hold for these lengths."""
    for name, longest in {"pretrain": 76, "sft": 76, "two_images": 136, "text": 105, "videos": 247}.items():
        turns = [expand_marks(row["conversations"], [videos.SECONDS]) for row in rows[name]]
        assert max(len(renderer.render(turn).input_ids) for turn in turns) <= longest


@pytest.mark.parametrize("before", ["", " ", "\n", "a", "图片", "a <", "<>", "。"])
def test_the_placeholder_is_50_tokens_in_every_context(tokenizer, before):
    around = tokenizer(before).input_ids, tokenizer("图").input_ids
    ids = tokenizer(before + "<" * 25 + ">" * 25 + "图").input_ids
    assert ids == around[0] + [30] * 25 + [32] * 25 + around[1]


def test_special_tokens(tokenizer, world_tokenizer_path, renderer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<", ">"]) == [0, 1, 2, 30, 32]
    as_markup = AutoTokenizer.from_pretrained(world_tokenizer_path)("<s>user").input_ids
    as_text = Renderer(tokenizer).encode("<s>user</s>")
    assert as_markup[0] == 1 and not {1, 2} & set(as_text)
    assert tokenizer.decode(as_text) == "<s>user</s>"


@pytest.mark.parametrize("text", ["Ünknown wörds, 1234", "鲸鱼🐳", "  two  spaces\n\n\ttab", "<image> <<>>"])
def test_any_text_survives(tokenizer, renderer, text):
    assert tokenizer.decode(Renderer(tokenizer).encode(text)) == text
