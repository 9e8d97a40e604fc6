"""What is said in the demo world: every question has one answer, nothing held out is named, every word is one
token."""

import dataclasses
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer

from dataset.demo_world import report, scenes, sentences, videos
from dataset.demo_world.colours import COLOURS
from dataset.demo_world.recipe import PRESETS
from dataset.demo_world.scenes import HELD_OUT_PAIRS, Scene, make_splits
from dataset.demo_world.sentences import Dialogue, spoken
from dataset.demo_world.things import BANDS, POSITIONS, SHAPES, SIZES, Thing
from dataset.demo_world.tokenizer import lexicon
from dataset.demo_world.wording import (
    ATTRIBUTES,
    CHINESE,
    DESCRIPTION,
    ENGLISH,
    LANGUAGES,
    SEVERAL_KINDS,
    SINGLE_KINDS,
    Language,
    describe,
    fill,
    name_attributes,
)
from model.prompt import IMAGE_MARK, VIDEO_MARK, Renderer, expand_marks, load_tokenizer, put_marks

FULL = PRESETS["full"]
SOME = dataclasses.replace(  # of the full world
    FULL, train_images=1500, text_rows=2400, two_image_rows=500, train_videos=200, test_videos=100
)


def is_named(scene: Scene) -> bool:
    return all(thing.colour is not None for thing in scene.things)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Scene]]:
    return make_splits(SOME, seed=0)


@pytest.fixture(scope="module")
def images(splits) -> dict[str, Scene]:
    """Training images by file name."""
    return {f"{i:04d}.jpg": scene for i, scene in enumerate(splits["train"])}


@pytest.fixture(scope="module")
def some_videos() -> dict[str, dict[str, videos.Video]]:
    made = videos.make_videos(SOME, seed=0)
    return {split: {f"videos/{n}.mp4": video for n, video in enumerate(some)} for split, some in made.items()}


@pytest.fixture(scope="module")
def dialogues(images) -> list[Dialogue]:
    return sentences.all_dialogues(images, SOME, np.random.default_rng(0))


@pytest.fixture(scope="module")
def rows(images, some_videos, dialogues) -> dict[str, list[dict]]:
    rng = np.random.default_rng(0)
    return {
        "pretrain": sentences.pretrain_rows(images, SOME, rng),
        "sft": sentences.number_rows(dialogues),
        "sft_file": sentences.sft_rows(images, SOME, np.random.default_rng(0)),
        "two_images": sentences.number_rows(sentences.talk_about_pairs(images, SOME.two_image_rows, rng)),
        "videos": sentences.number_rows(sentences.talk_about_videos(some_videos["train"], rng)),
        "text": sentences.text_rows(images, some_videos["train"], SOME, rng),
    }


@pytest.fixture(scope="module")
def questions(splits) -> dict[str, list[tuple[dict, Scene]]]:
    """Every question of the test of images, with the scene that it is about."""

    def with_names(split: str) -> dict[str, Scene]:
        return {f"{split}_{i:04d}.jpg": scene for i, scene in enumerate(splits[split])}

    asked = {}
    for split in scenes.TEST_SPLITS:
        shown = with_names(split)
        if split in scenes.SINGLE_SPLITS:
            made = sentences.questions(shown, SINGLE_KINDS, SOME, np.random.default_rng(1))
        else:
            singles = with_names(split.removeprefix("several_"))
            made = sentences.several_questions(shown, singles, SOME, np.random.default_rng(1))
            shown |= singles
        asked[split] = [(question, shown[question["image"]]) for question in made]
    return asked


@pytest.fixture(scope="module")
def tokenizer(world_tokenizer_path):
    return load_tokenizer(world_tokenizer_path)


@pytest.fixture(scope="module")
def renderer(tokenizer) -> Renderer:
    return Renderer(tokenizer)


def rounds_of(row: dict) -> list[tuple[str, str]]:
    """Its (question, answer) pairs."""
    said = [turn["value"] for turn in row["conversations"]]
    return list(zip(said[::2], said[1::2], strict=True))


def language_of(answer: str) -> Language:
    return ENGLISH if answer.isascii() else CHINESE


# ---- rows ----


def test_as_many_marks_as_images_and_all_before_the_first_answer(rows):
    for name, expected in {"pretrain": 1, "sft": 1, "sft_file": 1, "two_images": 2, "text": 0}.items():
        for row in rows[name]:
            (first, _), *others = rounds_of(row)
            assert first.count(IMAGE_MARK) == expected
            assert not any(IMAGE_MARK in text for text in itertools.chain(*others))
            assert len(row["image"].split(", ")) == expected if expected else "image" not in row
    for row in rows["videos"]:
        ((question, _),) = rounds_of(row)
        assert question.count(VIDEO_MARK) == 1 and "image" not in row
    for group in rows.values():
        assert len({row["id"] for row in group}) == len(group)
        for row in group:
            speakers = [turn["from"] for turn in row["conversations"]]
            assert speakers == ["human", "gpt"] * (len(speakers) // 2)


def test_captions_have_their_image_before_or_behind_the_words(rows):
    questions = [row["conversations"][0]["value"] for row in rows["pretrain"]]
    before = [question.startswith(f"{IMAGE_MARK}\n") for question in questions]
    assert all(first or q.endswith(f"\n{IMAGE_MARK}") for first, q in zip(before, questions, strict=True))
    assert np.mean(before) == pytest.approx(1 / 2, abs=0.06)


def test_a_tenth_of_the_dialogues_has_it_behind(rows):
    """Whoever types it there is answered too: without such rows not one of 800 questions was. They say what
    the others say."""
    moved = 0
    for row, first in zip(rows["sft_file"], rows["sft"], strict=True):
        (question, _), *_ = rounds_of(row)
        if question.endswith(f"\n{IMAGE_MARK}"):
            moved += 1
            row["conversations"][0]["value"] = (
                f"{IMAGE_MARK}\n{question.removesuffix(f'{chr(10)}{IMAGE_MARK}')}"
            )
        assert row == first
    assert moved / len(rows["sft"]) == pytest.approx(sentences.BEHIND_SHARE, abs=0.02)


def test_all_else_has_it_before_as_the_chat_places_it(rows, questions):
    for name, mark in {"sft": IMAGE_MARK, "videos": VIDEO_MARK}.items():
        for row in rows[name]:
            shown, words = row["conversations"][0]["value"].split("\n")
            assert shown == mark
            assert put_marks(words, mark == IMAGE_MARK, mark == VIDEO_MARK) == f"{mark}\n{words}"
    for question, _ in itertools.chain(*questions.values()):
        assert question["question"].startswith(f"{IMAGE_MARK}\n")
    numbered = [
        not row["conversations"][0]["value"].startswith(f"{IMAGE_MARK}\n{IMAGE_MARK}\n")
        for row in rows["two_images"]
    ]
    assert np.mean(numbered) == pytest.approx(1 / 2, abs=0.06)


def test_rows_are_json(rows):
    assert json.loads(json.dumps(rows, ensure_ascii=False)) == rows


def test_every_image_is_described_once_and_talked_about_once_or_twice(rows, images):
    described = [row["image"] for row in rows["pretrain"]]
    assert sorted(described) == [image for image, scene in images.items() if is_named(scene)]
    for row in rows["pretrain"]:
        ((_, answer),) = rounds_of(row)
        assert answer == describe(images[row["image"]], language_of(answer))
    expected = {image: min(2, len(scene.things)) for image, scene in images.items()}
    assert Counter(row["image"] for row in rows["sft"]) == expected
    shown = [row["image"] for row in rows["sft"]]
    assert shown != sorted(shown)  # in mixed order


def test_a_dialogue_has_as_many_rounds_as_wanted_and_no_answer_that_could_be_copied(dialogues):
    asked_much = [len(dialogue.rounds) for dialogue in dialogues if not is_description(dialogue)]
    assert max(asked_much) == SOME.rounds and min(asked_much) > 1
    assert asked_much.count(SOME.rounds) > 0.8 * len(asked_much)
    for dialogue in dialogues:
        said = [(asked.kind, asked.answer) for asked in dialogue.rounds]
        assert len(set(said)) == len(said)
        assert all(language_of(asked.answer) is dialogue.language for asked in dialogue.rounds)


def is_description(dialogue: Dialogue) -> bool:
    return dialogue.rounds[0].kind == DESCRIPTION


def test_a_description_stands_alone(dialogues):
    """Among other questions it would be where their answers are copied from."""
    described = [dialogue for dialogue in dialogues if is_description(dialogue)]
    assert {len(dialogue.rounds) for dialogue in described} == {1}
    others = [asked for dialogue in dialogues for asked in dialogue.rounds[1:]]
    assert all(asked.kind != DESCRIPTION for asked in others)
    for number, share in sentences.DESCRIPTION_SHARES.items():
        could_be = [
            dialogue
            for dialogue in dialogues
            if is_named(dialogue.scenes[0]) and (len(dialogue.scenes[0].things) == 1) == (number == "one")
        ]
        assert np.mean(list(map(is_description, could_be))) == pytest.approx(share, abs=0.05)


def test_half_of_the_dialogues_begin_with_presence(dialogues):
    several = [d for d in dialogues if len(d.scenes[0].things) > 1 and is_named(d.scenes[0])]
    first = [d.rounds[0].kind == "presence" for d in several if not is_description(d)]
    # and some of the others by chance
    assert sentences.PRESENCE_FIRST_SHARE < np.mean(first) < sentences.PRESENCE_FIRST_SHARE + 0.1


def test_all_kinds_are_asked_in_training(dialogues):
    counts = {
        several: Counter(
            asked.kind
            for dialogue in dialogues
            if is_named(dialogue.scenes[0]) and (len(dialogue.scenes[0].things) > 1) == several
            for asked in dialogue.rounds
        )
        for several in (False, True)
    }
    assert set(SINGLE_KINDS) <= set(counts[False])
    assert set(SEVERAL_KINDS) == set(counts[True])
    for kinds in counts.values():
        assert min(kinds.values()) > 0.01 * sum(kinds.values())


def test_the_last_stage_holds_pairs_videos_and_single_images(images, some_videos):
    shown = {f"images/{name}": scene for name, scene in images.items()}
    preset = dataclasses.replace(SOME, two_image_rows=30, one_image_rows=20)
    made = sentences.multi_rows(shown, some_videos["train"], preset, np.random.default_rng(0))
    kinds = Counter("video" if "video" in row else f"{len(row['image'].split(', '))} images" for row in made)
    assert kinds == {"2 images": 30, "video": 2 * SOME.train_videos, "1 images": 20}
    assert all(path in shown for row in made if "image" in row for path in row["image"].split(", "))
    assert Counter(row["video"] for row in made if "video" in row) == dict.fromkeys(some_videos["train"], 2)


def test_pairs_differ_in_what_is_said_about_them(rows, images):
    for row in rows["two_images"]:
        first, second = (images[image].things for image in row["image"].split(", "))
        assert len(first) == len(second) == 1
        said = [(thing[0].size, thing[0].colour, thing[0].shape) for thing in (first, second)]
        assert said[0] != said[1]


def test_text_has_words_in_brackets_for_every_thing_of_every_image(images, some_videos):
    """For a text row and the row of the same dialogue, only the marks differ, and the brackets in their place
    hold the words of their images' things, in order."""
    rng = np.random.default_rng(0)
    talked = sentences.all_dialogues(images, SOME, rng)[:600]
    talked += sentences.talk_about_pairs(images, 100, rng)
    talked += sentences.talk_about_videos(dict(list(some_videos["train"].items())[:40]), rng)
    for dialogue in talked:
        seeing, reading = (rounds_of(row) for row in (dialogue.row(0), dialogue.text_row(0, rng)))
        assert [answer for _, answer in seeing] == [answer for _, answer in reading]
        assert [question for question, _ in seeing[1:]] == [question for question, _ in reading[1:]]
        found = re.findall(r"\[(.*?)\]", reading[0][0])
        things = [thing for scene in dialogue.scenes for thing in scene.things]
        assert len(found) == len(things)
        for text, thing in zip(found, things, strict=True):
            words = [word for word in name_attributes(thing, dialogue.language).values() if word]
            assert len(words) == (4 if thing.colour else 3)
            assert text in {"".join(order) for order in itertools.permutations(words)}
        without = re.sub(r"\[.*\]", "", reading[0][0], flags=re.DOTALL)
        marked = re.sub(
            f"{IMAGE_MARK}.*{IMAGE_MARK}|{IMAGE_MARK}|{VIDEO_MARK}", "", seeing[0][0], flags=re.DOTALL
        )
        assert without == marked


def test_text_rows_come_from_all_stages(rows):
    assert len(rows["text"]) == SOME.text_rows + SOME.text_rows // 2 + 2 * SOME.train_videos
    marks = Counter(len(re.findall(r"\]\[|\]", rounds_of(row)[0][0])) for row in rows["text"])
    assert set(marks) == {1, 2, 3, 4}


def test_both_languages_in_their_shares(rows):
    one, multi = sentences.ENGLISH_SHARE, sentences.ENGLISH_SHARE_MULTI
    assert 0.1 < one <= multi < 0.9
    shares = {"pretrain": one, "sft": one, "two_images": multi, "videos": multi}
    both = one + (multi - one) * (1 - SOME.text_rows / len(rows["text"]))
    for name, expected in (shares | {"text": both}).items():
        english = [row["conversations"][1]["value"].isascii() for row in rows[name]]
        assert np.mean(english) == pytest.approx(expected, abs=0.06)
        for row in rows[name]:
            assert len({turn["value"].isascii() for turn in row["conversations"]}) == 1


# ---- what is held out, and colours without a name ----


def spoken_triples(text: str) -> set[tuple]:
    """The triples that a text names, or could be read to name."""
    found = set()
    for words in (language.words for language in LANGUAGES.values()):
        # " at the top" is not said where " at the top left" is
        said = [name for name, word in words.items() if re.search(word + "(?! left| right)", text)]
        groups = (COLOURS, SHAPES, POSITIONS)
        found |= set(itertools.product(*([name for name in said if name in group] for group in groups)))
    return found


def clauses_of(row: dict) -> list[str]:
    """Texts about one thing each: words in brackets, the parts of a description, a question or an answer."""
    clauses = []
    for question, answer in rounds_of(row):
        clauses += re.findall(r"\[.*?\]", question)
        question = re.sub(r"\[.*?\]", "", question)
        clauses += [question, *re.split("，|, |的左边是|^Left of.* is a(?= )", answer)]
    return clauses


def test_unseen_triples_are_never_named(rows):
    said = [clause for group in rows.values() for row in group for clause in clauses_of(row)]
    named = set().union(*map(spoken_triples, set(said)))
    known = {kind for kind in scenes.divide_triples(FULL)["known"]}
    assert named <= known and len(named) > 0.99 * len(known)


def test_held_out_pairs_are_never_named(rows):
    """Neither does a question ask whether there is such a thing."""
    clauses = {clause for group in rows.values() for row in group for clause in clauses_of(row)}
    for language in LANGUAGES.values():
        words = language.words
        for colour, shape in HELD_OUT_PAIRS:
            assert not [text for text in clauses if words[colour] in text and words[shape] in text]
            assert [text for text in clauses if words[colour] in text]


def test_things_kept_apart_are_never_described_together(rows):
    """Nor put into words together, for one image."""
    for name in ("pretrain", "sft"):
        for row in rows[name]:
            for _, answer in rounds_of(row):
                check_not_kept_apart(re.split("，|, ", answer), language_of(answer))
    for row in rows["text"][: SOME.text_rows]:  # about one image each
        question, answer = rounds_of(row)[0]
        for image in re.findall(r"(?:\[[^\]]*\])+", question):
            check_not_kept_apart(image.split("]["), language_of(answer))


def check_not_kept_apart(clauses: list[str], language: Language) -> None:
    pairs = [(spoken(text, COLOURS, language), spoken(text, SHAPES, language)) for text in clauses]
    things = [(colour[0], shape[0]) for colour, shape in pairs if len(colour) == len(shape) == 1]
    assert not any(scenes.are_kept_apart(*both) for both in itertools.combinations(things, 2))


def test_unnamed_colours_are_never_described(rows, images):
    unnamed = {image for image, scene in images.items() if not is_named(scene)}
    described = rows["pretrain"] + rows["two_images"]
    assert unnamed and unnamed.isdisjoint(image for row in described for image in row["image"].split(", "))
    said = [text for row in rows["sft"] if row["image"] in unnamed for text in rounds_of(row)]
    assert len(said) > 3 * len(unnamed)
    for question, answer in said:
        language = language_of(answer)
        assert not spoken(question + answer, COLOURS, language)


@pytest.mark.parametrize("kind", ["colour", DESCRIPTION])
def test_a_colour_without_a_name_is_not_asked_for(images, kind):
    unnamed = next(scene for scene in images.values() if not is_named(scene))
    with pytest.raises(ValueError, match="has no name"):
        sentences.questions({"a.jpg": unnamed}, (kind,), SOME, np.random.default_rng(0))


# ---- every question has one answer ----


def right_answers(kind: str, question: str, scene: Scene, language: Language) -> set[str]:
    """All that could be answered, as the image's things are looked at one by one."""
    if kind == DESCRIPTION:
        return {describe(scene, language)}
    colours, shapes = (spoken(question, names, language) for names in (COLOURS, SHAPES))
    meant = [
        thing
        for thing in scene.things
        if (not colours or thing.colour in colours) and (not shapes or thing.shape in shapes)
    ]
    if kind == "presence":
        (asked_shape,) = shapes
        shapes = [language.words[thing.shape] for thing in scene.things if thing.colour in colours]
        pattern = {0: "absence", 1: "presence"}.get(len(shapes), "presence_of_more")
        words = {
            "colour": language.words[colours[0]],
            "shapes": language.answers["presence_joint"].join(shapes),
        }
        asked = {"colour": words["colour"], "shape": language.words[asked_shape]}
        return {
            fill(language.answers[pattern], **words) + fill(language.yes if meant else language.no, **asked)
        }
    if kind == "left_of":
        meant = [
            other
            for thing in meant
            for other in scene.things
            if POSITIONS[other.position][0] < POSITIONS[thing.position][0]
        ]
    fields = {
        "number": language.numbers[len(scene.things) - 1],
        "asked_colour": "".join(language.words[name] for name in colours),
        "asked_shape": "".join(language.words[name] for name in shapes),
    }
    return {fill(language.answers[kind], **name_attributes(thing, language), **fields) for thing in meant}


def test_every_question_of_training_has_one_answer(dialogues):
    for dialogue in dialogues:
        for asked in dialogue.rounds:
            (scene,) = dialogue.scenes
            answers = right_answers(asked.kind, asked.question, scene, dialogue.language)
            assert answers == {asked.answer}, asked


def test_every_question_of_the_test_has_one_answer(questions):
    for question, scene in itertools.chain(*questions.values()):
        kind = question["kind"].partition("_of_t")[0]  # "description_of_two"
        answers = right_answers(kind, question["question"], scene, language_of(question["answer"]))
        assert answers == {question["answer"]}, question


def test_an_answer_first_names_again_what_was_asked_for(dialogues):
    """The words before the answer then say which thing to look at."""
    names = (*COLOURS, *SHAPES)
    asked_kinds = {"colour_of": 1, "shape_of": 1, "left_of": 1, "where": 2, "presence": 2}  # words
    for dialogue in dialogues:
        for asked in dialogue.rounds:
            question, answer = (spoken(t, names, dialogue.language) for t in (asked.question, asked.answer))
            assert len(question) == asked_kinds.get(asked.kind, 0)
            named = 1 if asked.kind == "presence" else len(question)  # there its shape is what is looked for
            assert answer[:named] == question[:named]


def test_what_is_asked_and_seen_settles_the_answer_word_for_word(rows, images):
    """Exact-match scoring is only fair if the wording of the question settles the wording of the answer."""
    answers = {}
    for row in rows["sft"] + rows["two_images"] + rows["pretrain"]:
        seen = tuple(
            (thing.colour, thing.shape, thing.position, thing.size)
            for image in row["image"].split(", ")
            for thing in images[image].things
        )
        for question, answer in rounds_of(row):
            wording = question.replace(IMAGE_MARK, "").strip()
            assert answers.setdefault((wording, seen), answer) == answer


def test_different_kinds_are_worded_differently():
    for language in LANGUAGES.values():
        wordings = [
            fill(wording, colour="·", shape="·") for some in language.questions.values() for wording in some
        ]
        assert len(set(wordings)) == len(wordings)
        assert all(len(some) >= 2 for some in language.questions.values())


def which_row(thing: Thing) -> int:
    """As it is seen, whatever its position is called."""
    return [low <= thing.centre[1] < high for low, high in BANDS].index(True)


def test_a_description_names_all_things_in_reading_order(splits):
    for scene in splits["several_known"]:
        by_place = sorted(scene.things, key=lambda thing: (which_row(thing), thing.centre[0]))
        for language in LANGUAGES.values():
            text = describe(scene, language)
            for names, attribute in ((COLOURS, "colour"), (SHAPES, "shape"), (SIZES, "size")):
                assert spoken(text, names, language) == [getattr(thing, attribute) for thing in by_place]


def test_descriptions_word_for_word(images):
    red = dataclasses.replace(
        images["0000.jpg"].things[0], colour="red", shape="star", size="small", position="top"
    )
    blue = dataclasses.replace(red, colour="blue", shape="circle", size="large", position="left")
    one = dataclasses.replace(images["0000.jpg"], things=(red,))
    two = dataclasses.replace(one, things=(red, blue))
    assert describe(one, CHINESE) == "图片上方有一个小的红色星形。"
    assert describe(one, ENGLISH) == "A small red star at the top."
    assert describe(two, CHINESE) == "有两个图形：上方有一个小的红色星形，左侧有一个大的蓝色圆形。"
    assert describe(two, ENGLISH) == (
        "There are two: a small red star at the top, a large blue circle on the left."
    )
    orange = dataclasses.replace(two, things=(dataclasses.replace(red, colour="orange", size=""), blue))
    assert describe(orange, ENGLISH).startswith("There are two: an orange star")


def says_yes(answer: str) -> bool:
    """Of an answer about presence, as the report counts it."""
    yes, no = answer.endswith(report.YES), answer.endswith(("？没有。", "? No."))
    assert yes != no
    return yes


def test_yes_and_no_word_for_word(images):
    """The answer says what there is of that colour, and then its verdict."""
    rng = np.random.default_rng(0)
    red, blue, other = (
        dataclasses.replace(images["0000.jpg"].things[0], colour=colour, shape=shape, position=position)
        for colour, shape, position in (
            ("red", "star", "top"),
            ("blue", "circle", "middle"),
            ("red", "square", "bottom_left"),
        )
    )
    expected = (
        (CHINESE, (red, blue), {"红色图形是星形。红色星形？有。", "红色图形是星形。红色方形？没有。"}),
        (CHINESE, (red, blue), {"蓝色图形是圆形。蓝色圆形？有。", "没有绿色图形。绿色星形？没有。"}),
        (
            CHINESE,
            (red, other),
            {"红色图形是星形和方形。红色方形？有。", "红色图形是星形和方形。红色圆形？没有。"},
        ),
        (
            ENGLISH,
            (red, blue),
            {"The red one is a star. A red star? Yes.", "Nothing is green. A green star? No."},
        ),
        (ENGLISH, (red, other), {"The red ones are a star and a square. A red square? Yes."}),
    )
    for language, things, answers in expected:
        scene = dataclasses.replace(images["0000.jpg"], things=things)
        said = {sentences.ask("presence", scene, language, SOME, rng).answer for _ in range(300)}
        assert answers <= said
        assert not any("Nothing is red" in answer or "没有红色" in answer for answer in said)


def test_half_of_the_answers_about_presence_are_yes(dialogues, questions):
    asked = [a.answer for dialogue in dialogues for a in dialogue.rounds if a.kind == "presence"]
    assert np.mean([says_yes(answer) for answer in asked]) == pytest.approx(1 / 2, abs=0.05)
    for split in scenes.SEVERAL_SPLITS:
        tested = [says_yes(q["answer"]) for q, _ in questions[split] if q["kind"] == "presence"]
        assert np.mean(tested) == pytest.approx(1 / 2, abs=0.12)


def test_what_is_asked_for_in_vain_is_nearly_there(dialogues, questions):
    """Whoever hears only the colour, or only the shape, of what is asked for cannot tell."""
    no = [
        (asked.question, dialogue.scenes[0])
        for dialogue in dialogues
        for asked in dialogue.rounds
        if asked.kind == "presence" and not says_yes(asked.answer)
    ]
    no += [
        (question["question"], scene)
        for question, scene in itertools.chain(*questions.values())
        if question["kind"] == "presence" and not says_yes(question["answer"])
    ]
    halves = Counter()
    for question, scene in no:
        language = language_of(question)
        (colour,), (shape,) = (spoken(question, names, language) for names in (COLOURS, SHAPES))
        assert (colour, shape) not in {(thing.colour, thing.shape) for thing in scene.things}
        halves[
            colour in {thing.colour for thing in scene.things},
            shape in {thing.shape for thing in scene.things},
            len(scene.things) > 1,
        ] += 1
    assert halves[False, False, True] == halves[False, False, False] == 0
    several = sum(count for (_, _, more), count in halves.items() if more)
    assert halves[True, True, True] > 0.2 * several  # the colour of one with the shape of another
    assert min(halves[True, False, True], halves[False, True, True]) > 0.1 * several


def test_the_thing_to_the_left_is_to_the_left(dialogues, questions):
    """Seen in the image, and there is no other in a column further left."""
    asked = [
        (asked.question, asked.answer, dialogue.scenes[0])
        for dialogue in dialogues
        for asked in dialogue.rounds
        if asked.kind == "left_of"
    ]
    asked += [
        (question["question"], question["answer"], scene)
        for question, scene in itertools.chain(*questions.values())
        if question["kind"] == "left_of"
    ]
    assert len(asked) > 200
    for question, answer, scene in asked:
        language = language_of(answer)
        (shape,), told = spoken(question, SHAPES, language), spoken(answer, SHAPES, language)
        (asked_for,) = [thing for thing in scene.things if thing.shape == shape]
        (left,) = [
            thing
            for thing in scene.things
            if [shape, thing.shape] == told and [thing.colour] == spoken(answer, COLOURS, language)
        ]
        assert left.centre[0] + 5 < asked_for.centre[0]


def test_a_question_without_one_answer_is_not_asked(images):
    rng = np.random.default_rng(0)
    thing = images["0000.jpg"].things[0]

    def scene(*words: str) -> Scene:
        things = []
        for text in words:
            colour, shape, position = text.split()
            things.append(dataclasses.replace(thing, colour=colour, shape=shape, position=position))
        return dataclasses.replace(images["0000.jpg"], things=tuple(things))

    def asked(kind: str, *words: str) -> set[str]:
        made = [sentences.ask(kind, scene(*words), ENGLISH, SOME, rng) for _ in range(40)]
        return {one.answer if one else "" for one in made}

    circles = "red circle top", "blue circle left"
    both = *circles, "blue star bottom_right"
    assert asked("colour_of", *circles) == {""}
    assert asked("colour_of", *both) == {"The star is blue."}  # of the star
    assert asked("shape_of", *circles) == {"The red one is a circle.", "The blue one is a circle."}
    assert asked("shape_of", *both) == {"The red one is a circle."}  # the red one
    assert asked("left_of", *both) == {""}  # two are left of the star
    assert asked("left_of", "red circle top", "blue star right") == {"Left of the star is a red circle."}
    assert asked("left_of", "red circle top", "blue star bottom") == {""}
    assert asked("left_of", "red circle top") == {""}
    for kind in ATTRIBUTES:
        assert asked(kind, *circles) == {""}  # "the shape" is none of them
    assert asked("count", *circles) == {"There are two."} and asked("count", *both) == {"There are three."}


def test_the_swapped_answer_is_the_answer_to_the_swapped_images(images):
    for question in sentences.two_image_questions(images, 20, np.random.default_rng(1)):
        first, second = (images[image] for image in question["image"].split(", "))
        language = LANGUAGES[question["kind"][-2:]]
        assert question["answer"] == sentences.answer_two(first, second, language)
        assert question["swapped_answer"] == sentences.answer_two(second, first, language)
        assert question["swapped_answer"] != question["answer"]
        assert question["question"].isascii() == question["answer"].isascii() == (language is ENGLISH)


def test_answers_about_two_images_word_for_word(images):
    thing = images["0000.jpg"].things[0]
    one, two = (
        dataclasses.replace(images["0000.jpg"], things=(dataclasses.replace(thing, **words),))
        for words in (
            {"colour": "red", "shape": "star", "size": "small"},
            {"colour": "blue", "shape": "square", "size": "large"},
        )
    )
    assert sentences.answer_two(one, two, CHINESE) == "图一是小的红色星形，图二是大的蓝色方形。"
    expected = "Picture one is a small red star, picture two is a large blue square."
    assert sentences.answer_two(one, two, ENGLISH) == expected


def test_answers_about_videos(images):
    thing = dataclasses.replace(
        images["0000.jpg"].things[0], colour="red", shape="star", size="small", position="top_left"
    )
    start, moved, turned = (
        dataclasses.replace(images["0000.jpg"], things=(dataclasses.replace(thing, **change),))
        for change in ({}, {"position": "right"}, {"colour": "blue"})
    )
    assert sentences.answer_video((start, moved), CHINESE) == "它从左上角去了右侧。"
    assert sentences.answer_video((start, moved), ENGLISH) == "It goes from the top left to the right."
    assert sentences.answer_video((start, turned), ENGLISH) == "It turns from red to blue."
    assert sentences.answer_video((start, turned), CHINESE) == "它从红色变成蓝色。"


def test_what_a_sentence_says():
    english, chinese = "A red star, then a blue red.", "图一是红色圆形，图二是蓝色方形。"
    assert spoken(english, COLOURS, ENGLISH) == ["red", "blue", "red"]
    assert spoken(chinese, SHAPES, CHINESE) == ["circle", "square"]


# ---- the questions of the test ----


def pattern(question: str) -> str:
    """A question without marks, and with a blank for every word that names a colour or a shape."""
    words = [language.words[name] for language in LANGUAGES.values() for name in (*COLOURS, *SHAPES)]
    return re.sub("|".join(map(re.escape, words)), "_", question.replace(IMAGE_MARK, "").strip())


def test_test_questions_are_worded_as_in_training(rows, images, questions):
    asked = [question["question"] for some in questions.values() for question, _ in some]
    pairs = sentences.two_image_questions(images, 60, np.random.default_rng(1))
    assert Counter(q["kind"] for q in pairs) == {"two_images_zh": 60, "two_images_en": 60}
    asked += [question["question"] for question in pairs]
    both = rows["sft"] + rows["two_images"]
    trained = {pattern(question) for row in both for question, _ in rounds_of(row)}
    assert {pattern(question) for question in asked} <= trained


def test_every_image_of_the_test_is_asked_all_kinds(splits, questions):
    for split, some in questions.items():
        kinds = Counter(question["kind"] for question, _ in some)
        ids = {question["id"] for question, _ in some}
        assert len(ids) == len(some)
        assert all(question["question"].count(IMAGE_MARK) == 1 for question, _ in some)
        if split in scenes.SINGLE_SPLITS:
            assert kinds == dict.fromkeys(SINGLE_KINDS, len(splits[split]))
        else:
            assert (kinds["description_of_two"], kinds["description_of_three"]) == (200, 100)
            for kind in ("where", "presence", "count", "colour_of", "shape_of"):
                assert kinds[kind] == SOME.test_images
            assert kinds["left_of"] > 0.4 * SOME.test_images


def test_one_two_and_three_things_are_to_be_counted_equally_often(questions):
    for split in scenes.SEVERAL_SPLITS:
        counts = Counter(len(scene.things) for q, scene in questions[split] if q["kind"] == "count")
        assert set(counts) == {1, 2, 3} and max(counts.values()) - min(counts.values()) <= 1


def test_test_questions_about_videos_are_worded_as_in_training(rows, some_videos):
    some = some_videos["unseen"]
    asked = sentences.video_questions(some, np.random.default_rng(1))
    kinds = [question["kind"] for question in asked]
    assert kinds == ["movement"] * 50 + ["colour_change"] * 50
    assert {q["question"] for q in asked} <= {row["conversations"][0]["value"] for row in rows["videos"]}
    assert len({q["id"] for q in asked}) == len(asked) and {q["video"] for q in asked} == set(some)


def test_what_the_model_says_of_itself_are_questions_of_its_training(rows):
    said = [question for row in rows["sft"] for question, _ in rounds_of(row)]
    trained = {question.replace(IMAGE_MARK, "").strip() for question in said}
    assert set(sentences.about()["questions"]) <= trained


# ---- the tokenizer ----


def test_one_token_per_word(tokenizer, renderer):
    assert [word for word in lexicon() if len(renderer.encode(word)) != 1] == []
    assert 500 < len(tokenizer) < 700


def test_running_text_is_cut_into_exactly_the_words_of_the_lexicon(rows, tokenizer, renderer):
    """Also where Chinese words meet without a space, and halves of two characters could have merged."""
    words = {*lexicon(), "\n", " ", "<", ">"}
    texts = {turn["value"] for group in rows.values() for row in group for turn in row["conversations"]}
    for text in texts:
        text = text.replace(IMAGE_MARK, "<>").replace(VIDEO_MARK, "<>")
        ids = renderer.encode(text)
        assert {tokenizer.decode([i]) for i in ids} <= words
        assert tokenizer.decode(ids) == text


def test_rows_are_short(rows, renderer):
    """The step times of the recipe hold for these lengths."""
    bounds = {"pretrain": 100, "sft": 200, "two_images": 136, "text": 180, "videos": 247}
    for name, longest in bounds.items():
        turns = [expand_marks(row["conversations"], [videos.SECONDS]) for row in rows[name]]
        lengths = [len(renderer.render(turn).input_ids) for turn in turns]
        assert 0.7 * longest < max(lengths) <= longest, name


@pytest.mark.parametrize("before", ["", " ", "\n", "a", "图片", "a <", "<>", "。"])
def test_the_placeholder_is_50_tokens_in_every_context(tokenizer, before):
    around = tokenizer(before).input_ids, tokenizer("图").input_ids
    ids = tokenizer(before + "<" * 25 + ">" * 25 + "图").input_ids
    assert ids == around[0] + [30] * 25 + [32] * 25 + around[1]


def test_special_tokens(tokenizer, world_tokenizer_path, renderer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<", ">"]) == [0, 1, 2, 30, 32]
    as_markup = AutoTokenizer.from_pretrained(world_tokenizer_path)("<s>user").input_ids
    as_text = renderer.encode("<s>user</s>")
    assert as_markup[0] == 1 and not {1, 2} & set(as_text)
    assert tokenizer.decode(as_text) == "<s>user</s>"


@pytest.mark.parametrize("text", ["Ünknown wörds, 1234", "鲸鱼🐳", "  two  spaces\n\n\ttab", "<image> <<>>"])
def test_any_text_survives(tokenizer, renderer, text):
    assert tokenizer.decode(renderer.encode(text)) == text
