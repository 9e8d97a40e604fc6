"""The two languages of the demo world: its words, and the patterns of its questions and answers.

An answer about one of several things names it again ("the star is red", not "it is red"): as in a
description, the words right before the answer then say which thing to look at. Whether there is a green cross
is answered by what there is of green ("The green one is a circle. A green cross? No."): a bare verdict, one
bit per answer, teaches nothing (measured: it stays at chance).
"""

import re
from dataclasses import dataclass

from dataset.demo_world.scenes import Scene
from dataset.demo_world.things import Thing

ATTRIBUTES = ("colour", "shape", "position", "size")
DESCRIPTION = "description"
SEVERAL = "description_of_more"  # how many there are is said first: none is then told twice or left out
# About an image of one thing, which the question need not name; then about any image.
SINGLE_KINDS = (*ATTRIBUTES, DESCRIPTION)
SEVERAL_KINDS = ("count", "colour_of", "shape_of", "where", "presence", "left_of", DESCRIPTION)
TWO_IMAGES = "two_images"
MOVEMENT, COLOUR_CHANGE = "movement", "colour_change"  # what is asked about a video


@dataclass(frozen=True)
class Language:
    """Words and sentence patterns. {field} is filled in; a bar marks a word boundary that is not written.

    The words of English keep the space in front of them: " red" is what the tokenizer sees as one word.
    """

    words: dict[str, str]
    numbers: tuple[str, ...]  # one, two, three
    questions: dict[str, tuple[str, ...]]  # kind -> wordings that all ask for the same answer
    # Kind -> the one right answer; about presence it tells of one thing, of more, joined, or of none.
    answers: dict[str, str]
    yes: str  # how an answer about presence ends
    no: str
    thing: str  # one of the things of a description
    list: str  # a description of one, begun by `begin`
    begin: str
    joint: str
    object: str  # one of the two objects in the answer about two images
    numbered: str  # another way to place two images than one after the other


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
    numbers=("一个", "两个", "三个"),
    questions={
        "colour": ("图形|是|什么|颜色？", "图片|里的|图形|是|什么|颜色？"),
        "shape": ("图形|是|什么|形状？", "图片|里的|图形|是|什么|形状？"),
        "position": ("图形|在|哪里？", "图形|在|图片|的|什么|位置？"),
        "size": ("图形|是|大的|还是|小的？", "图形|有|多大？"),
        DESCRIPTION: (
            "这个|图片|描述|的|是|什么|内容？",
            "描述|这张|图片。",
            "图片|里|有|什么？",
            "请|简要|描述|图片|的|内容。",
        ),
        "count": ("图片|里|有|几个|图形？", "一共|有|几个|图形？"),
        "colour_of": ("{shape}|是|什么|颜色？", "图片|里的|{shape}|是|什么|颜色？"),
        "shape_of": ("{colour}|的|是|什么|形状？", "{colour}|图形|是|什么|形状？"),
        "where": ("{colour}{shape}|在|哪里？", "{colour}{shape}|在|图片|的|什么|位置？"),
        "presence": ("图片|里|有|{colour}{shape}|吗？", "有|没有|{colour}{shape}？"),
        "left_of": ("{shape}|的|左边|是|什么？", "{shape}|左边|有|什么？"),
        TWO_IMAGES: ("这|两张|图片|有|什么|不同？", "说说|这|两张|图片|的|不同。"),
        MOVEMENT: ("图形|去了|哪里？", "图形|从|哪里|去了|哪里？"),
        COLOUR_CHANGE: ("图形|的|颜色|怎么|变？", "颜色|有|什么|变化？"),
    },
    answers={
        "colour": "它|是{colour}。",
        "shape": "它|是{shape}。",
        "position": "它|在{position}。",
        "size": "它|是{size}。",
        "count": "有{number}|图形。",
        SEVERAL: "有{number}|图形：{things}。",
        "colour_of": "{asked_shape}是{colour}。",
        "shape_of": "{asked_colour}图形|是{shape}。",
        "where": "{asked_colour}{asked_shape}在{position}。",
        "presence": "{colour}图形|是{shapes}。",
        "presence_of_more": "{colour}图形|是{shapes}。",
        "presence_joint": "和",
        "absence": "没有|{colour}图形。",
        "left_of": "{asked_shape}的|左边|是{colour}{shape}。",
        TWO_IMAGES: "图一|是{first}，图二|是{second}。",
        MOVEMENT: "它|从{start}去了{end}。",
        COLOUR_CHANGE: "它|从{start}变成{end}。",
    },
    yes="{colour}{shape}？|有。",
    no="{colour}{shape}？|没有。",
    thing="{position}有一个{size}{colour}{shape}",
    list="{things}。",
    begin="图片",
    joint="，",
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
    numbers=(" one", " two", " three"),
    questions={
        "colour": ("What colour is the shape?", "Which colour do you see?"),
        "shape": ("What shape is it?", "Which shape do you see?"),
        "position": ("Where is the shape?", "Where in the picture is it?"),
        "size": ("Is the shape large or small?", "How large is the shape?"),
        DESCRIPTION: ("Describe this picture.", "What does the picture show?"),
        "count": ("How many shapes are there?", "How many shapes do you see?"),
        "colour_of": ("What colour is the{shape}?", "Which colour is the{shape}?"),
        "shape_of": ("What shape is the{colour} one?", "Which shape is{colour}?"),
        "where": ("Where is the{colour}{shape}?", "Where in the picture is the{colour}{shape}?"),
        "presence": ("Is there a{colour}{shape}?", "Do you see a{colour}{shape}?"),
        "left_of": ("What is left of the{shape}?", "What do you see left of the{shape}?"),
        TWO_IMAGES: ("How do these two pictures differ?", "Say how these two pictures differ."),
        MOVEMENT: ("Where does it go?", "Where does the shape go?"),
        COLOUR_CHANGE: ("What happens to its colour?", "How does the colour change?"),
    },
    answers={
        "colour": "It is{colour}.",
        "shape": "It is a{shape}.",
        "position": "It is{position}.",
        "size": "It is{size}.",
        "count": "There are{number}.",
        SEVERAL: "There are{number}: a{things}.",
        "colour_of": "The{asked_shape} is{colour}.",
        "shape_of": "The{asked_colour} one is a{shape}.",
        "where": "The{asked_colour}{asked_shape} is{position}.",
        "presence": "The{colour} one is a{shapes}.",
        "presence_of_more": "The{colour} ones are a{shapes}.",
        "presence_joint": " and a",
        "absence": "Nothing is{colour}.",
        "left_of": "Left of the{asked_shape} is a{colour}{shape}.",
        TWO_IMAGES: "Picture one is{first}, picture two is{second}.",
        MOVEMENT: "It goes from{start} to{end}.",
        COLOUR_CHANGE: "It turns from{start} to{end}.",
    },
    yes=" A{colour}{shape}? Yes.",
    no=" A{colour}{shape}? No.",
    thing="{size}{colour}{shape}{position}",
    list="{things}.",
    begin="A",
    joint=", a",
    object=" a{size}{colour}{shape}",
    numbered="<image> and <image>\n{question}",
)

LANGUAGES = {"zh": CHINESE, "en": ENGLISH}


def fill(pattern: str, **fields: str) -> str:
    text = pattern.replace("|", "").format(**fields)
    return re.sub("([Aa])( orange)", r"\1n\2", text)  # an orange star


def name_attributes(thing: Thing, language: Language) -> dict[str, str]:
    """What colour, shape, position and size of a thing are called; an unnamed colour is called nothing."""
    return {attribute: language.words.get(getattr(thing, attribute), "") for attribute in ATTRIBUTES}


def describe(scene: Scene, language: Language) -> str:
    """All things of a scene in one sentence, in reading order."""
    things = [fill(language.thing, **name_attributes(thing, language)) for thing in scene.things]
    if len(things) == 1:
        return fill(language.list, things=language.begin + things[0])
    number = language.numbers[len(things) - 1]
    return fill(language.answers[SEVERAL], number=number, things=language.joint.join(things))
