"""All questions that are asked about the demo world, and their answers, as rows and as test questions.

Every question has exactly ONE right answer, word for word: the wording of the question fixes the wording of
the answer, so that a scorer need only compare strings. Rows come in the formats of the real data,

    {"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."},
                                                    {"from": "gpt", "value": "..."}]}

with several rounds where much is asked about one image, "a.jpg, b.jpg" for two images, "video": "a.mp4" and
<video> for a video, and neither for the text-only rows of the language model.

Things in a colour that no word names are special. The language stages ask for their shape, position and
size, but never describe them: a model that has read descriptions without a colour word leaves the colour out
elsewhere as well (measured: exact descriptions fall from 1.00 to .92). Only the encoder reads their captions.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dataset.demo_world.recipe import Preset
from dataset.demo_world.scenes import HELD_OUT_PAIRS, Scene
from dataset.demo_world.things import POSITIONS, Thing
from dataset.demo_world.videos import CHANGES, Video, change_of
from dataset.demo_world.wording import (
    ATTRIBUTES,
    CHINESE,
    COLOUR_CHANGE,
    DESCRIPTION,
    ENGLISH,
    LANGUAGES,
    MOVEMENT,
    SEVERAL_KINDS,
    TWO_IMAGES,
    Language,
    describe,
    fill,
    name_attributes,
)
from model.prompt import IMAGE_MARK, VIDEO_MARK

ASKED_PER_VIDEO = 2  # times that training asks what happens in each
ENGLISH_SHARE = 0.25
ENGLISH_SHARE_MULTI = 0.5  # the last stage is short, and its English sentences are long and new
# How often training asks each kind about an image of one thing, and of several. One thing is never asked for
# by a word ("what colour is the star?"): the only one there is right, whatever the word, and whoever learns
# that does not learn to look for it. By its shape is harder to find than by its colour, so it is asked most.
SINGLE_WEIGHTS = dict.fromkeys((*ATTRIBUTES, "count"), 1)
SEVERAL_WEIGHTS = {"colour_of": 4, "shape_of": 1, "where": 3, "presence": 1, "count": 1, "left_of": 1}
# So many dialogues of several things begin with it: whether the shape seen is the one asked for is easier to
# learn while no other round has named shapes.
PRESENCE_FIRST_SHARE = 0.5
# Descriptions stand alone: among other questions they would be where the answers are copied from.
DESCRIPTION_SHARES = {"one": 0.5, "several": 0.25}  # of the dialogues about so many things
# The image behind the words in so many dialogues of instruction tuning. Not in the language model's own text:
# then it learnt less of how things are found by their words (measured).
BEHIND_SHARE = 0.1
UNNAMED_KINDS = ("shape", "position", "size", "count")
HOW_MANY = ("one", "two", "three")


def about() -> dict:
    """What a model of this world says of itself: see --about of the stage scripts."""
    asked = ((DESCRIPTION, CHINESE), (DESCRIPTION, ENGLISH), ("count", CHINESE), ("colour", ENGLISH))
    return {
        "knows": "演示模型，只认识彩色图形。A demo model: it knows coloured shapes, nothing else.",
        "questions": [fill(language.questions[kind][0]) for kind, language in asked],
    }


# ---- one question ----


@dataclass(frozen=True)
class Asked:
    """A question with its answer, before it becomes a row.

    question  without marks of images
    """

    kind: str
    question: str
    answer: str


def pick(options: Sequence, rng: np.random.Generator):
    return options[int(rng.integers(len(options)))]


def pick_language(english_share: float, rng: np.random.Generator) -> Language:
    return ENGLISH if rng.random() < english_share else CHINESE


def ask(
    kind: str,
    scene: Scene,
    language: Language,
    preset: Preset,
    rng: np.random.Generator,
    present: bool | None = None,
) -> Asked | None:
    """A question of this kind about a scene; None if it has no single right answer here.

    present  whether what "is there a ...?" asks for is there (None: by lot)

    Raises ValueError where a colour without a name would have to be told.
    """
    if kind not in UNNAMED_KINDS and not is_named(scene):
        raise ValueError(f"a colour of this image has no name, so its {kind} has no right answer")
    if kind == "presence":
        present = bool(rng.random() < 0.5) if present is None else present
        return ask_presence(scene, language, preset, rng, present)
    chosen = choose_things(kind, scene, rng)
    if not chosen:
        return None
    asked_for, told = (name_attributes(thing, language) for thing in chosen)
    if kind == DESCRIPTION:
        answer = describe(scene, language)
    else:
        number = language.numbers[len(scene.things) - 1]
        named = {f"asked_{attribute}": word for attribute, word in asked_for.items()}
        answer = fill(language.answers[kind], **told, **named, number=number)
    return Asked(kind, fill(pick(language.questions[kind], rng), **asked_for), answer)


def choose_things(kind: str, scene: Scene, rng: np.random.Generator) -> tuple[Thing, Thing] | None:
    """The thing that a question names, and the thing that its answer tells of; None if neither is clear."""
    things = scene.things
    shapes, colours = (Counter(getattr(thing, name) for thing in things) for name in ("shape", "colour"))
    clear = [(thing, thing) for thing in things]
    if kind in ATTRIBUTES and len(things) > 1:
        clear = []  # "the shape" is none of them
    elif kind == "colour_of":
        clear = [(thing, thing) for thing in things if shapes[thing.shape] == 1]
    elif kind == "shape_of":
        clear = [(thing, thing) for thing in things if colours[thing.colour] == 1]
    elif kind == "left_of":
        columns = Counter(column(thing) for thing in things)
        lefts = {thing: [other for other in things if column(other) < column(thing)] for thing in things}
        clear = [
            (thing, left[0])
            for thing, left in lefts.items()
            if len(left) == shapes[thing.shape] == columns[column(thing)] == 1
        ]
    return pick(clear, rng) if clear else None


def column(thing: Thing) -> int:
    return POSITIONS[thing.position][0]


def ask_presence(
    scene: Scene, language: Language, preset: Preset, rng: np.random.Generator, present: bool
) -> Asked:
    """Is there such a thing? Most that are not are near misses: the colour of one thing with the shape of
    another, or one word wrong."""
    here = {(thing.colour, thing.shape) for thing in scene.things}
    colour, shape = pick(sorted(here), rng)
    while not present and ((colour, shape) in here or (colour, shape) in HELD_OUT_PAIRS):
        colour, shape = pick(sorted(here), rng)
        miss = rng.random()
        if miss < 0.35:
            shape = pick(sorted(here), rng)[1]
        elif miss < 0.6:
            shape = pick(preset.shapes, rng)
        else:
            colour = pick(preset.colours, rng)
    words = {"colour": language.words[colour], "shape": language.words[shape]}
    question = fill(pick(language.questions["presence"], rng), **words)
    shapes = [language.words[thing.shape] for thing in scene.things if thing.colour == colour]
    pattern = ("absence", "presence", "presence_of_more")[min(len(shapes), 2)]
    seen = fill(
        language.answers[pattern],
        colour=words["colour"],
        shapes=language.answers["presence_joint"].join(shapes),
    )
    return Asked("presence", question, seen + fill(language.yes if present else language.no, **words))


def show_first(question: str, mark: str = IMAGE_MARK) -> str:
    """The image before the words, as chat and page place it. With the words first in half of the questions,
    two ways of looking had to be learnt, and neither was in the time there is (measured)."""
    return f"{mark}\n{question}"


def show_behind(question: str) -> str:
    return f"{question}\n{IMAGE_MARK}"


def show_anywhere(question: str, rng: np.random.Generator) -> str:
    """The image before or behind the words. So captions are placed: where the image always lay equally far
    from the answer, the model learnt its patches by their distance, and found nothing by what it is."""
    return pick((show_first(question), show_behind(question)), rng)


def ask_two(first: Scene, second: Scene, language: Language, rng: np.random.Generator) -> Asked:
    """A question about two images of one thing each, their marks one after the other or numbered."""
    words = fill(pick(language.questions[TWO_IMAGES], rng))
    place = pick((f"{IMAGE_MARK}\n{IMAGE_MARK}\n{{question}}", language.numbered), rng)
    return Asked(TWO_IMAGES, place.format(question=words), answer_two(first, second, language))


def answer_two(first: Scene, second: Scene, language: Language) -> str:
    objects = [
        fill(language.object, **name_attributes(scene.things[0], language)) for scene in (first, second)
    ]
    return fill(language.answers[TWO_IMAGES], first=objects[0], second=objects[1])


def ask_video(video: Video, language: Language, rng: np.random.Generator) -> Asked:
    """A question about the change that there is in a video."""
    change = change_of(video)
    words = fill(pick(language.questions[change], rng))
    return Asked(change, show_first(words, VIDEO_MARK), answer_video(video, language))


def answer_video(video: Video, language: Language) -> str:
    change = change_of(video)
    attribute = {MOVEMENT: "position", COLOUR_CHANGE: "colour"}[change]
    first, last = (name_attributes(scene.things[0], language) for scene in (video[0], video[-1]))
    # "at the top" is where it is, but it goes "from the top"
    start, end = (re.sub("^ (at|on|in) ", " ", words[attribute]) for words in (first, last))
    return fill(language.answers[change], start=start, end=end)


def spoken(text: str, names: Iterable[str], language: Language) -> list[str]:
    """Those of the names (colours, shapes, ...) that a text says, in its order and as often."""
    found = re.finditer("|".join(re.escape(language.words[name]) for name in names), text)
    name_of = {language.words[name]: name for name in names}
    return [name_of[match.group()] for match in found]


# ---- rows for training; images are given as {file name: scene} ----


@dataclass(frozen=True)
class Dialogue:
    """Questions about the same images or video, before they become a row.

    shown   the row's "image" or "video"
    scenes  what its images or frames show, in order
    """

    shown: dict[str, str]
    scenes: tuple[Scene, ...]
    language: Language
    rounds: tuple[Asked, ...]  # the first question has the marks

    def shown_behind(self) -> "Dialogue":
        """The same with its image behind the words of the first question."""
        first, *others = self.rounds
        words = first.question.removeprefix(f"{IMAGE_MARK}\n")
        return replace(self, rounds=(replace(first, question=show_behind(words)), *others))

    def row(self, number: int) -> dict:
        return {"id": f"{number:06d}", **self.shown, "conversations": turns(self.rounds)}

    def text_row(self, number: int, rng: np.random.Generator) -> dict:
        """The same with words in the place of the images, for a model that cannot see yet."""
        first, *others = self.rounds
        words = [put_in_words(scene, self.language, rng) for scene in self.scenes]
        question = first.question.replace(VIDEO_MARK, IMAGE_MARK * len(words))
        for word in words:
            question = question.replace(IMAGE_MARK, word, 1)
        rounds = (Asked(first.kind, question, first.answer), *others)
        return {"id": f"{number:06d}", "conversations": turns(rounds)}


def turns(rounds: Iterable[Asked]) -> list[dict[str, str]]:
    said = []
    for asked in rounds:
        said += [{"from": "human", "value": asked.question}, {"from": "gpt", "value": asked.answer}]
    return said


def put_in_words(scene: Scene, language: Language, rng: np.random.Generator) -> str:
    """The words of each thing's description in any order: what there is to see, but not yet a sentence."""
    things = []
    for thing in scene.things:
        words = [word for word in name_attributes(thing, language).values() if word]
        things.append("".join(words[i] for i in rng.permutation(len(words))))
    return "[" + "][".join(things) + "]"


def weights_of_kinds(scene: Scene) -> dict[str, int]:
    """What training asks about a scene, and how often."""
    if not is_named(scene):
        return dict.fromkeys(UNNAMED_KINDS, 1)
    return SEVERAL_WEIGHTS if len(scene.things) > 1 else SINGLE_WEIGHTS


def talk_about(
    image: str, scene: Scene, kinds: Mapping[str, int], rounds: int, preset: Preset, rng: np.random.Generator
) -> Dialogue:
    """Up to `rounds` different questions of these kinds (and how often each) about one image."""
    language = pick_language(ENGLISH_SHARE, rng)
    names, shares = list(kinds), np.array(list(kinds.values())) / sum(kinds.values())
    told: list[Asked] = []
    said: dict[str, set[str]] = {}  # kind -> answers: asked in other words, it would only be copied
    present = [bool(rng.random() < 0.5)]
    present.append(not present[0])  # or no would be the better guess: there is more that is not there
    begins_with_presence = rounds > 1 and "presence" in kinds and rng.random() < PRESENCE_FIRST_SHARE
    for attempt in itertools.count():
        if len(told) == rounds or told and attempt == 3 * rounds:
            break
        kind = "presence" if begins_with_presence and not attempt else str(rng.choice(names, p=shares))
        if kind == "presence" and not present:
            continue
        asked = ask(kind, scene, language, preset, rng, *present[: kind == "presence"])
        if asked and asked.answer not in said.setdefault(asked.kind, set()):
            said[asked.kind].add(asked.answer)
            told.append(asked)
            del present[: kind == "presence"]
    told[0] = replace(told[0], question=show_first(told[0].question))
    return Dialogue({"image": image}, (scene,), language, tuple(told))


def all_dialogues(images: Mapping[str, Scene], preset: Preset, rng: np.random.Generator) -> list[Dialogue]:
    """What instruction tuning asks: every image's dialogues, in mixed order."""
    dialogues = []
    for image, scene in images.items():
        for _ in range(preset.dialogues_per_image // (2 if len(scene.things) == 1 else 1)):
            kinds, rounds = weights_of_kinds(scene), preset.rounds
            alone = DESCRIPTION_SHARES["several" if len(scene.things) > 1 else "one"]
            if is_named(scene) and rng.random() < alone:
                kinds, rounds = {DESCRIPTION: 1}, 1
            dialogues.append(talk_about(image, scene, kinds, rounds, preset, rng))
    return [dialogues[i] for i in rng.permutation(len(dialogues))]


def is_named(scene: Scene) -> bool:
    """Whether all colours in it have names."""
    return all(thing.colour is not None for thing in scene.things)


def choose_pairs(images: Mapping[str, Scene], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Pairs of images of one thing that differ in what is said about it, and whose colours have names."""
    said = {
        image: (scene.things[0].size, scene.things[0].colour, scene.things[0].shape)
        for image, scene in images.items()
        if len(scene.things) == 1 and scene.things[0].colour is not None
    }
    names, pairs = list(said), []
    while len(pairs) < count:
        first, second = (names[i] for i in rng.integers(len(names), size=2))
        if said[first] != said[second]:
            pairs.append((first, second))
    return pairs


def talk_about_pairs(images: Mapping[str, Scene], count: int, rng: np.random.Generator) -> list[Dialogue]:
    """`count` times: say how two images differ."""
    dialogues = []
    for names in choose_pairs(images, count, rng):
        pair = tuple(images[name] for name in names)
        language = pick_language(ENGLISH_SHARE_MULTI, rng)
        shown = {"image": ", ".join(names)}
        dialogues.append(Dialogue(shown, pair, language, (ask_two(*pair, language, rng),)))
    return dialogues


def talk_about_videos(videos: Mapping[str, Video], rng: np.random.Generator) -> list[Dialogue]:
    """What happens in every video."""
    dialogues = []
    for name, video in videos.items():
        for _ in range(ASKED_PER_VIDEO):
            language = pick_language(ENGLISH_SHARE_MULTI, rng)
            dialogues.append(Dialogue({"video": name}, video, language, (ask_video(video, language, rng),)))
    return dialogues


def number_rows(dialogues: Sequence[Dialogue]) -> list[dict]:
    return [dialogue.row(number) for number, dialogue in enumerate(dialogues)]


def pretrain_rows(images: Mapping[str, Scene], preset: Preset, rng: np.random.Generator) -> list[dict]:
    """One description of every image whose colours have names."""
    dialogues = []
    for image, scene in images.items():
        if is_named(scene):
            language = pick_language(ENGLISH_SHARE, rng)
            asked = ask(DESCRIPTION, scene, language, preset, rng)
            shown = replace(asked, question=show_anywhere(asked.question, rng))
            dialogues.append(Dialogue({"image": image}, (scene,), language, (shown,)))
    return number_rows(dialogues)


def sft_rows(images: Mapping[str, Scene], preset: Preset, rng: np.random.Generator) -> list[dict]:
    """Dialogues about every image; in a few of them it stands behind the words of the first question."""
    dialogues = all_dialogues(images, preset, rng)
    return number_rows([one.shown_behind() if rng.random() < BEHIND_SHARE else one for one in dialogues])


def multi_rows(
    images: Mapping[str, Scene], videos: Mapping[str, Video], preset: Preset, rng: np.random.Generator
) -> list[dict]:
    """The last stage: pairs of images, all videos, and some single images, so that one is not unlearnt."""
    return number_rows(
        talk_about_pairs(images, preset.two_image_rows, rng)
        + talk_about_videos(videos, rng)
        + all_dialogues(images, preset, rng)[: preset.one_image_rows]
    )


def text_rows(
    images: Mapping[str, Scene], videos: Mapping[str, Video], preset: Preset, rng: np.random.Generator
) -> list[dict]:
    """The questions of all stages with words in the place of the images. The language model is raised on
    them; later, images only have to be read as the same words."""
    dialogues = all_dialogues(images, preset, rng)[: preset.text_rows]
    dialogues += talk_about_pairs(images, preset.text_rows // 2, rng) + talk_about_videos(videos, rng)
    return [dialogue.text_row(number, rng) for number, dialogue in enumerate(dialogues)]


# ---- questions for the test: {"id", "image", "kind", "question", "answer"}, marks as in the rows ----


def questions(
    images: Mapping[str, Scene], kinds: Sequence[str], preset: Preset, rng: np.random.Generator
) -> list[dict[str, str]]:
    """One question of every kind about every image in which it has an answer, at most `preset.test_images` of
    each kind. The descriptions of two and of three things are kinds of their own.

    Raises ValueError where a colour without a name would be asked for.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    for kind in kinds:
        for image, scene in images.items():
            asked = ask(kind, scene, pick_language(ENGLISH_SHARE, rng), preset, rng)
            if asked:
                several = kind == DESCRIPTION and len(scene.things) > 1
                name = f"{DESCRIPTION}_of_{HOW_MANY[len(scene.things) - 1]}" if several else kind
                question = show_first(asked.question)
                row = make_question(name, Path(image).stem, {"image": image}, question, asked.answer)
                rows.setdefault(name, []).append(row)
    return [row for asked in rows.values() for row in asked[: preset.test_images]]


def several_questions(
    images: Mapping[str, Scene], singles: Mapping[str, Scene], preset: Preset, rng: np.random.Generator
) -> list[dict[str, str]]:
    """What is asked about images of several things; some of single ones are among those to be counted, one,
    two and three things equally often."""
    by_number = [
        [(image, scene) for image, scene in {**singles, **images}.items() if len(scene.things) == number]
        for number in (1, 2, 3)
    ]
    fewest = min(map(len, by_number))
    counted = dict(itertools.chain.from_iterable(zip(*(some[:fewest] for some in by_number), strict=True)))
    others = [kind for kind in SEVERAL_KINDS if kind != "count"]
    return questions(counted, ["count"], preset, rng) + questions(images, others, preset, rng)


def make_question(kind: str, name: str, shown: dict[str, str], question: str, answer: str) -> dict[str, str]:
    return {"id": f"{kind}-{name}", **shown, "kind": kind, "question": question, "answer": answer}


def two_image_questions(
    images: Mapping[str, Scene], count: int, rng: np.random.Generator
) -> list[dict[str, str]]:
    """`count` questions in each language, of kind "two_images_zh" and "two_images_en". "swapped_answer" is
    right when the two images change places."""
    rows = []
    for name, language in LANGUAGES.items():
        for n, (first, second) in enumerate(choose_pairs(images, count, rng)):
            one, two = images[first], images[second]
            asked = ask_two(one, two, language, rng)
            row = make_question(
                f"{TWO_IMAGES}_{name}",
                f"{n:03d}",
                {"image": f"{first}, {second}"},
                asked.question,
                asked.answer,
            )
            rows.append(row | {"swapped_answer": answer_two(two, one, language)})
    return rows


def video_questions(videos: Mapping[str, Video], rng: np.random.Generator) -> list[dict[str, str]]:
    """What happens in every video: first all movements, then all changes of colour."""
    rows = []
    for name, video in sorted(videos.items(), key=lambda item: CHANGES.index(change_of(item[1]))):
        asked = ask_video(video, pick_language(ENGLISH_SHARE_MULTI, rng), rng)
        rows.append(make_question(asked.kind, Path(name).stem, {"video": name}, asked.question, asked.answer))
    return rows
