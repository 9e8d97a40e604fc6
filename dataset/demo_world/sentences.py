"""All that is said about the demo world, in Chinese and English, and the tokenizer that reads it.

Every question has exactly ONE right answer, word for word: the wording of the question fixes the wording of
the answer, so that a scorer need only compare strings. Rows come in the formats of the real data,

    {"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."},
                                                    {"from": "gpt", "value": "..."}]}

with "a.jpg, b.jpg" for two images, "video": "a.mp4" and <video> for a video, and neither for the text-only
rows of the language model.

Objects in a colour that no word names are special. The language stages ask for their shape, position and
size, but never describe them: a model that has read descriptions without a colour word leaves the colour out
elsewhere as well (measured: exact descriptions fall from 1.00 to .92). Only the encoder reads their captions.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataset.demo_world.scenes import Scene
from dataset.demo_world.videos import CHANGES, COLOUR_CHANGE, MOVEMENT, Video, change_of
from model.prompt import IMAGE_MARK, VIDEO_MARK

ATTRIBUTES = ("colour", "shape", "position", "size")
KINDS = (*ATTRIBUTES, "description")  # what is asked about one image
TWO_IMAGES = "two_images"  # what is asked about two
ASKED_PER_VIDEO = 3  # times that training asks what happens in each
DESCRIPTIONS_PER_IMAGE = 3  # a description holds all four attributes, so it is asked three times as often
ENGLISH_SHARE = 0.15
ENGLISH_SHARE_MULTI = 0.5  # the last stage is short, and its English sentences are long and new


# ---- the two languages ----


@dataclass(frozen=True)
class Language:
    """Words and sentence patterns. {field} is filled in; a bar marks a word boundary that is not written.

    The words of English keep the space in front of them: " red" is what the tokenizer sees as one word.
    """

    words: dict[str, str]
    questions: dict[str, tuple[str, ...]]  # kind -> wordings that all ask for the same answer
    answers: dict[str, str]  # kind -> the one right answer
    object: str  # one of the two objects in the answer about two images
    numbered: str  # a third way to place two images, besides before and behind the question


CHINESE = Language(
    words={
        "red": "红色",
        "yellow": "黄色",
        "green": "绿色",
        "blue": "蓝色",
        "purple": "紫色",
        "orange": "橙色",
        "pink": "粉色",
        "cyan": "青色",
        "circle": "圆形",
        "square": "方形",
        "triangle": "三角形",
        "star": "星形",
        "diamond": "菱形",
        "cross": "十字形",
        "large": "大的",
        "small": "小的",
        "top_left": "左上角",
        "top": "上方",
        "top_right": "右上角",
        "left": "左侧",
        "middle": "中间",
        "right": "右侧",
        "bottom_left": "左下角",
        "bottom": "下方",
        "bottom_right": "右下角",
    },
    questions={
        "colour": ("图形|是|什么|颜色？", "图片|里的|图形|是|什么|颜色？"),
        "shape": ("图形|是|什么|形状？", "图片|里的|图形|是|什么|形状？"),
        "position": ("图形|在|哪里？", "图形|在|图片|的|什么|位置？"),
        "size": ("图形|是|大的|还是|小的？", "图形|有|多大？"),
        "description": (
            "这个|图片|描述|的|是|什么|内容？",
            "描述|这张|图片。",
            "图片|里|有|什么？",
            "请|简要|描述|图片|的|内容。",
        ),
        TWO_IMAGES: ("这|两张|图片|有|什么|不同？", "说说|这|两张|图片|的|不同。"),
        MOVEMENT: ("图形|去了|哪里？", "图形|从|哪里|去了|哪里？"),
        COLOUR_CHANGE: ("图形|的|颜色|怎么|变？", "颜色|有|什么|变化？"),
    },
    answers={
        "colour": "它|是{colour}。",
        "shape": "它|是{shape}。",
        "position": "它|在{position}。",
        "size": "它|是{size}。",
        "description": "图片{position}有一个{size}{colour}{shape}。",
        TWO_IMAGES: "图一|是{first}，图二|是{second}。",
        MOVEMENT: "它|从{start}去了{end}。",
        COLOUR_CHANGE: "它|从{start}变成{end}。",
    },
    object="{size}{colour}{shape}",
    numbered="图一<image>\n图二<image>\n{question}",
)

ENGLISH = Language(
    words={
        "red": " red",
        "yellow": " yellow",
        "green": " green",
        "blue": " blue",
        "purple": " purple",
        "orange": " orange",
        "pink": " pink",
        "cyan": " cyan",
        "circle": " circle",
        "square": " square",
        "triangle": " triangle",
        "star": " star",
        "diamond": " diamond",
        "cross": " cross",
        "large": " large",
        "small": " small",
        "top_left": " at the top left",
        "top": " at the top",
        "top_right": " at the top right",
        "left": " on the left",
        "middle": " in the middle",
        "right": " on the right",
        "bottom_left": " at the bottom left",
        "bottom": " at the bottom",
        "bottom_right": " at the bottom right",
    },
    questions={
        "colour": ("What colour is the shape?", "Which colour do you see?"),
        "shape": ("What shape is it?", "Which shape do you see?"),
        "position": ("Where is the shape?", "Where in the picture is it?"),
        "size": ("Is the shape large or small?", "How large is the shape?"),
        "description": ("Describe this picture.", "What does the picture show?"),
        TWO_IMAGES: ("How do these two pictures differ?", "Say how these two pictures differ."),
        MOVEMENT: ("Where does it go?", "Where does the shape go?"),
        COLOUR_CHANGE: ("What happens to its colour?", "How does the colour change?"),
    },
    answers={
        "colour": "It is{colour}.",
        "shape": "It is a{shape}.",
        "position": "It is{position}.",
        "size": "It is{size}.",
        "description": "A{size}{colour}{shape}{position}.",
        TWO_IMAGES: "Picture one is{first}, picture two is{second}.",
        MOVEMENT: "It goes from{start} to{end}.",
        COLOUR_CHANGE: "It turns from{start} to{end}.",
    },
    object=" a{size}{colour}{shape}",
    numbered="<image> and <image>\n{question}",
)

LANGUAGES = {"zh": CHINESE, "en": ENGLISH}


def fill(pattern: str, **fields: str) -> str:
    return pattern.replace("|", "").format(**fields)


def about() -> dict:
    """What a model of this world says of itself: see --about of the stage scripts."""
    return {
        "knows": "演示模型，只认识彩色图形。A demo model: it knows coloured shapes, nothing else.",
        "questions": [
            fill(language.questions[kind][0])
            for kind, language in zip(
                ("description", "description", "colour", "shape"),
                (CHINESE, ENGLISH, CHINESE, ENGLISH),
                strict=True,
            )
        ],
    }


def name_attributes(scene: Scene, language: Language) -> dict[str, str]:
    """What colour, shape, position and size of a scene are called; an unnamed colour is called nothing."""
    return {attribute: language.words.get(getattr(scene, attribute), "") for attribute in ATTRIBUTES}


def caption(scene: Scene) -> str:
    """The sentence that the encoder learns from; the colour is left out where no word names it."""
    return fill(CHINESE.answers["description"], **name_attributes(scene, CHINESE))


def answer_one(kind: str, scene: Scene, language: Language) -> str:
    if scene.colour is None and kind in ("colour", "description"):
        raise ValueError(f"the colour of this {scene.shape} has no name, so its {kind} has no right answer")
    return fill(language.answers[kind], **name_attributes(scene, language))


def answer_two(first: Scene, second: Scene, language: Language) -> str:
    objects = [fill(language.object, **name_attributes(scene, language)) for scene in (first, second)]
    return fill(language.answers[TWO_IMAGES], first=objects[0], second=objects[1])


def answer_video(video: Video, language: Language) -> str:
    change = change_of(video)
    attribute = {MOVEMENT: "position", COLOUR_CHANGE: "colour"}[change]
    first, last = (name_attributes(scene, language) for scene in (video[0], video[-1]))
    # "at the top" is where it is, but it goes "from the top"
    start, end = (re.sub("^ (at|on|in) ", " ", words[attribute]) for words in (first, last))
    return fill(language.answers[change], start=start, end=end)


def spoken(text: str, names: Iterable[str], language: Language) -> list[str]:
    """Those of the names (colours, shapes, ...) that a text says, in its order and as often."""
    found = re.finditer("|".join(re.escape(language.words[name]) for name in names), text)
    name_of = {language.words[name]: name for name in names}
    return [name_of[match.group()] for match in found]


# ---- questions and answers ----


def pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def pick_language(english_share: float, rng: np.random.Generator) -> Language:
    return ENGLISH if rng.random() < english_share else CHINESE


def ask_one(kind: str, scene: Scene, language: Language, rng: np.random.Generator) -> tuple[str, str]:
    """A question about one image, which stands before or after the words, and its answer."""
    question = fill(pick(language.questions[kind], rng))
    place = pick((f"{IMAGE_MARK}\n{{question}}", f"{{question}}\n{IMAGE_MARK}"), rng)
    return place.format(question=question), answer_one(kind, scene, language)


def put_in_words(scene: Scene, language: Language, rng: np.random.Generator) -> str:
    """The words of the description in any order: what there is to see, but not yet a sentence."""
    words = [word for word in name_attributes(scene, language).values() if word]
    return "[" + "".join(words[i] for i in rng.permutation(len(words))) + "]"


def ask_two(first: Scene, second: Scene, language: Language, rng: np.random.Generator) -> tuple[str, str]:
    """A question about two images, which stand before, behind or numbered before the words, and its
    answer."""
    question = fill(pick(language.questions[TWO_IMAGES], rng))
    marks = f"{IMAGE_MARK}\n{IMAGE_MARK}"
    place = pick((f"{marks}\n{{question}}", f"{{question}}\n{marks}", language.numbered), rng)
    return place.format(question=question), answer_two(first, second, language)


def ask_video(video: Video, language: Language, rng: np.random.Generator) -> tuple[str, str]:
    """A question about the change that there is in a video, and its answer."""
    question = fill(pick(language.questions[change_of(video)], rng))
    place = pick((f"{VIDEO_MARK}\n{{question}}", f"{{question}}\n{VIDEO_MARK}"), rng)
    return place.format(question=question), answer_video(video, language)


def trained_kinds(scene: Scene) -> tuple[str, ...]:
    """The kinds of question that training asks about a scene."""
    if scene.colour is None:
        return ("shape", "position", "size")
    return (*ATTRIBUTES, *["description"] * DESCRIPTIONS_PER_IMAGE)


def choose_pairs(images: Mapping[str, Scene], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Pairs of images that differ in what is said about them, and whose colours have names."""
    named = {image: scene for image, scene in images.items() if scene.colour is not None}
    said = {image: (scene.size, scene.colour, scene.shape) for image, scene in named.items()}
    names, pairs = list(said), []
    while len(pairs) < count:
        first, second = (names[i] for i in rng.integers(len(names), size=2))
        if said[first] != said[second]:
            pairs.append((first, second))
    return pairs


# ---- rows for training; images are given as {file name: scene} ----


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@dataclass(frozen=True)
class Asked:
    """A question with its answer, before it becomes a row; scenes: what its images or frames show, in
    order."""

    shown: dict[str, str]  # the row's "image" or "video"
    scenes: tuple[Scene, ...]
    language: Language
    question: str
    answer: str

    def row(self, number: int) -> dict:
        return {"id": f"{number:06d}", **self.shown, "conversations": turns(self.question, self.answer)}

    def text_row(self, number: int, rng: np.random.Generator) -> dict:
        """The same with words in the place of the images, for a model that cannot see yet."""
        words = [put_in_words(scene, self.language, rng) for scene in self.scenes]
        question = self.question.replace(VIDEO_MARK, IMAGE_MARK * len(words))
        for word in words:
            question = question.replace(IMAGE_MARK, word, 1)
        return {"id": f"{number:06d}", "conversations": turns(question, self.answer)}


def ask_images(
    images: Mapping[str, Scene], kinds: Callable[[Scene], Sequence[str]], rng: np.random.Generator
) -> list[Asked]:
    """All kinds of questions about every image."""
    asked = []
    for image, scene in images.items():
        for kind in kinds(scene):
            language = pick_language(ENGLISH_SHARE, rng)
            asked.append(Asked({"image": image}, (scene,), language, *ask_one(kind, scene, language, rng)))
    return asked


def ask_pairs(images: Mapping[str, Scene], count: int, rng: np.random.Generator) -> list[Asked]:
    """`count` times: say how two images differ."""
    asked = []
    for names in choose_pairs(images, count, rng):
        pair = tuple(images[name] for name in names)
        language = pick_language(ENGLISH_SHARE_MULTI, rng)
        asked.append(Asked({"image": ", ".join(names)}, pair, language, *ask_two(*pair, language, rng)))
    return asked


def ask_videos(videos: Mapping[str, Video], rng: np.random.Generator) -> list[Asked]:
    """What happens in every video."""
    asked = []
    for name, video in videos.items():
        for _ in range(ASKED_PER_VIDEO):
            language = pick_language(ENGLISH_SHARE_MULTI, rng)
            asked.append(Asked({"video": name}, video, language, *ask_video(video, language, rng)))
    return asked


def number_rows(asked: Sequence[Asked]) -> list[dict]:
    return [one.row(number) for number, one in enumerate(asked)]


def pretrain_rows(images: Mapping[str, Scene], rng: np.random.Generator) -> list[dict]:
    """One description of every image whose colour has a name."""
    named = {image: scene for image, scene in images.items() if scene.colour is not None}
    return number_rows(ask_images(named, lambda scene: ("description",), rng))


def sft_rows(images: Mapping[str, Scene], rng: np.random.Generator) -> list[dict]:
    """All kinds of questions about every image."""
    return number_rows(ask_images(images, trained_kinds, rng))


def multi_rows(
    images: Mapping[str, Scene], videos: Mapping[str, Video], two: int, one: int, rng: np.random.Generator
) -> list[dict]:
    """The last stage: `two` pairs of images, all videos, and `one` images, so that one is not unlearnt."""
    single = ask_images(images, trained_kinds, rng)
    return number_rows(
        ask_pairs(images, two, rng)
        + ask_videos(videos, rng)
        + [single[i] for i in rng.permutation(len(single))[:one]]
    )


def text_rows(
    images: Mapping[str, Scene], videos: Mapping[str, Video], count: int, rng: np.random.Generator
) -> list[dict]:
    """The questions of all stages with words in the place of the images: `count` images' and half as many
    pairs'. The language model is raised on them; later, images only have to be read as the same words."""
    single = ask_images(images, trained_kinds, rng)
    asked = [single[i] for i in rng.permutation(len(single))[:count]]
    asked += ask_pairs(images, count // 2, rng) + ask_videos(videos, rng)
    return [one.text_row(number, rng) for number, one in enumerate(asked)]


# ---- questions for the test: {"id", "image", "kind", "question", "answer"}, marks as in the rows ----


def questions(
    images: Mapping[str, Scene], rng: np.random.Generator, kinds: Sequence[str] = KINDS
) -> list[dict[str, str]]:
    """One question of every kind about every image.

    Raises ValueError where a colour without a name would be asked for.
    """
    asked = [(kind, image, scene) for kind in kinds for image, scene in images.items()]
    return [
        make_question(
            f"{kind}-{Path(image).stem}",
            image,
            kind,
            ask_one(kind, scene, pick_language(ENGLISH_SHARE, rng), rng),
        )
        for kind, image, scene in asked
    ]


def two_image_questions(
    images: Mapping[str, Scene], count: int, rng: np.random.Generator
) -> list[dict[str, str]]:
    """`count` questions in each language, of kind "two_images_zh" and "two_images_en". "swapped_answer" is
    right when the two images change places."""
    asked = []
    for name, language in LANGUAGES.items():
        for n, (first, second) in enumerate(choose_pairs(images, count, rng)):
            one, two = images[first], images[second]
            kind = f"{TWO_IMAGES}_{name}"
            asked.append(
                make_question(f"{kind}-{n:03d}", f"{first}, {second}", kind, ask_two(one, two, language, rng))
                | {"swapped_answer": answer_two(two, one, language)}
            )
    return asked


def video_questions(videos: Mapping[str, Video], rng: np.random.Generator) -> list[dict[str, str]]:
    """What happens in every video: first all movements, then all changes of colour."""
    rows = []
    for name, video in sorted(videos.items(), key=lambda item: CHANGES.index(change_of(item[1]))):
        question, answer = ask_video(video, pick_language(ENGLISH_SHARE_MULTI, rng), rng)
        rows.append(
            {
                "id": f"{change_of(video)}-{Path(name).stem}",
                "video": name,
                "kind": change_of(video),
                "question": question,
                "answer": answer,
            }
        )
    return rows


def make_question(name: str, image: str, kind: str, asked: tuple[str, str]) -> dict[str, str]:
    return {"id": name, "image": image, "kind": kind, "question": asked[0], "answer": asked[1]}


# ---- the tokenizer ----


def lexicon() -> list[str]:
    """Every word of both languages and of the chat format, as the tokenizer meets it."""
    patterns = ["user|assistant|[|]"]
    for language in LANGUAGES.values():
        patterns += [*language.words.values(), *language.answers.values(), language.object]
        patterns += [language.numbered, *(q for asked in language.questions.values() for q in asked)]
    literal = (re.sub(r"\{\w+\}|<image>|\n", "|", pattern) for pattern in patterns)
    words = (word for text in literal for word in re.findall(r" ?[A-Za-z]+|[\u4e00-\u9fff]+|[^\s|]", text))
    return list(dict.fromkeys(words))


def train_tokenizer(folder: Path, words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every one of the words is one token (the lexicon's make some 620), saved in
    `folder`.

    It is trained on the words, not on sentences: Chinese does not write where a word ends, and a BPE that
    sees it running spends its tokens on halves of characters and on whole clauses. Rows become twice as long.

    "<" and ">" get the ids that they have in MiniMind's tokenizer, 30 and 32, and are always tokens of their
    own: the placeholder of an image is made of them, and must never melt into what stands before it.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[<>]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,  # out of reach: training ends when every word is one token
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words or lexicon(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast
