"""A conversation on the page: what it holds, what of it the model sees, what the page says beside the model.

[{"role": "user", "content": [{"path": name of an image}, ..., text]},
 {"role": "assistant", "content": [text], ...}, ...]

An answer may also hold:
    facts      how it was made, in both languages (facts_of); only once it is complete
    settings   it was asked with
    is_growing
    is_notice  the page says this, not the model
    is_waiting a notice that goes by itself
    puts_back  the question before it has no answer and goes back into the box: "all", or its "text" alone
"""

import asyncio
import contextlib
import html
from collections.abc import AsyncIterator
from dataclasses import dataclass

from PIL import Image

from model.chat import Chat, Round
from model.generate import Sampling
from serving.answer import AlreadyWaiting, Answer, LineFull
from serving.site import Site

# In Chinese, in English, and what is added to both: a line each.
DEFAULT_QUESTION = "这个图片描述的是什么内容？"
NO_IMAGE = (
    "请先添加或画一张图片，问题已为您保留。\nPlease add an image first, or draw one: your question is kept."
)
BAD_IMAGE = "这个文件不能作为图片读取，请换一张。\nThis file cannot be read as an image; try another one."
GONE = "这张图片已经不在这里了，请重新添加。\nThis image is no longer here: please add it again."
TOO_MANY_IMAGES = "一个问题最多 {0} 张图片。\nAt most {0} images in a question."
NOT_POSSIBLE = "请缩短问题或修改设置：\nShorten the question or change the settings:\n"
NO_ANSWER = "（模型没有给出回答）\n(the model gave no answer)"
READING = "正在看图……\nLooking …"
IN_LINE = "正在排队，您是第 {0} 位。\nYou are number {0} in line."
LINE_FULL = (
    "现在提问的人太多，请过一两分钟再问。\nMany people are asking: please ask again in a minute or two."
)
STILL_WAITING = "您的上一个问题还在排队。\nYour question before this one is still in line."
FACTS = "{0} 个词元，每秒 {1} 个，{2} 秒后出现第一个{3}\n{0} tokens, {1}/s, {2} s to the first{3}"
MOST_MESSAGES = 100  # of a conversation; the oldest go


@dataclass(frozen=True)
class Asked:
    """What the model is shown for the last question of a conversation; names: of the images."""

    turns: list[dict]
    names: list[str]
    images: list[Image.Image]
    sampling: Sampling


# ---- what it holds -----------------------------------------------------------------------------------------


def ask(text: str, images: list[str], messages: list[dict]) -> list[dict]:
    """The conversation with one more question; an empty one asks for a description."""
    content = [*({"path": str(image)} for image in images), text.strip() or DEFAULT_QUESTION]
    if messages and messages[-1].get("puts_back"):  # it was put back into the box, and is asked again
        messages = messages[:-2]
    recent = messages[-MOST_MESSAGES:]
    while recent and recent[0]["role"] != "user":
        recent = recent[1:]
    return [*recent, {"role": "user", "content": content}]


def say(text: str, **more) -> dict:
    return {"role": "assistant", "content": [text]} | more


def notice(text: str, **more) -> dict:
    return say(text, is_notice=True, **more)


def is_asking(messages: list[dict]) -> bool:
    """Does it end with a question?"""
    return bool(messages) and messages[-1]["role"] == "user"


def without_answer(messages: list[dict]) -> list[dict]:
    """Up to the last question."""
    while messages and not is_asking(messages):
        messages = messages[:-1]
    return messages


def settle(messages: list[dict]) -> tuple[list[dict], dict | None]:
    """A conversation in which nothing grows any more, and what goes back into the box: the question that got
    no answer, or None."""
    if is_asking(messages):
        return messages[:-1], question_of(messages[-1])
    if messages and (kept := messages[-1].get("puts_back")):
        return messages, question_of(messages[-2], with_images=kept == "all")
    return [{name: message[name] for name in message if name != "is_growing"} for message in messages], None


def question_of(message: dict, with_images: bool = True) -> dict:
    """As the box holds it."""
    *images, text = message["content"]
    return {"text": text, "files": [image["path"] for image in images] if with_images else []}


def rounds_of(messages: list[dict]) -> list[Round]:
    """The conversation as the model may see it: what the page itself said is no answer."""
    rounds = []
    for message in messages:
        *images, text = message["content"]
        if message["role"] == "user":
            rounds.append(Round(text, [part["path"] for part in images]))
        elif not message.get("is_notice"):
            rounds[-1].answer = text
    return rounds


# ---- an answer ---------------------------------------------------------------------------------------------


async def reply(
    site: Site, session: str, messages: list[dict], settings: dict, max_rounds: int
) -> AsyncIterator[dict]:
    """What follows the last question, as it grows: a notice of the place in the line, then the answer; or one
    friendly line about what is missing."""
    since, text = site.visitors.clock(), ""
    try:
        asked = await asyncio.to_thread(prepare, site, messages, settings, max_rounds)
        if isinstance(asked, dict):
            yield asked
            return
        answer = site.engine.submit(asked.turns, asked.images, asked.sampling, owner=session)
        events = answer.events(lambda: site.visitors.awaits(session, since))
        async with contextlib.aclosing(events):
            async for event in events:
                text += event if isinstance(event, str) else ""
                waiting = notice(IN_LINE.format(event), is_waiting=True)
                yield say(text, is_growing=True, settings=settings) if text else waiting
    except ValueError as error:  # a question that does not fit the context, settings that make no sense
        yield notice(f"{NOT_POSSIBLE}{error}", puts_back="all")
    except (AlreadyWaiting, LineFull) as error:
        yield notice(LINE_FULL if isinstance(error, LineFull) else STILL_WAITING, puts_back="all")
    else:
        if text.strip():
            yield say(text, settings=settings, facts=facts_of(answer))
        elif answer.finish_reason != "stopped":
            yield notice(NO_ANSWER)


def prepare(site: Site, messages: list[dict], settings: dict, max_rounds: int) -> Asked | dict:
    """What the engine is asked; or a notice of what is missing. Raises ValueError."""
    chat, sampling = site.engine.chat, Sampling(**settings)
    rounds = rounds_of(messages)
    if len(rounds[-1].images) > (most := most_images(chat)):
        return notice(TOO_MANY_IMAGES.format(most), puts_back="all")
    turns, names = chat.recall(rounds, sampling.max_new_tokens, max_rounds)
    if not names:
        return notice(NO_IMAGE, puts_back="all")
    sent = [site.images.get(name) for name in names]
    if missing := [image for image in sent if image is None or image.reduced is None]:
        problem = GONE if missing[0] is None else f"{BAD_IMAGE}\n({missing[0].problem})"
        return notice(problem, puts_back="text")
    return Asked(turns, names, [image.reduced.image for image in sent], sampling)


def most_images(chat: Chat) -> int:
    """In one question of a visitor."""
    return min(16, chat.most_images)


def facts_of(answer: Answer) -> str:
    """How long it took, and where chance had a part, the seed that gives the same answer again."""
    sampling, speed = answer.sampling, answer.tokens_per_second
    seed = f" · seed {sampling.seed}" if sampling.temperature > 0 else ""
    speed = f"{speed:.0f}" if speed == speed else "–"  # nan: there was but one
    return FACTS.format(answer.num_tokens, speed, f"{answer.seconds_to_first:.1f}", seed)


# ---- as the Chatbot shows it -------------------------------------------------------------------------------


def shown(messages: list[dict]) -> list[dict]:
    """The conversation for the Chatbot, which takes all text for HTML, even with render_markdown=False.

    Escaped, it appears exactly as typed; as {"type": "text"}, because a bare string loses its indentation.
    What the page adds is the only markup.
    """
    return [
        {"role": message["role"], "content": [show_part(part, message, at) for part in message["content"]]}
        for at, message in enumerate(messages)
    ]


def show_part(part: str | dict, message: dict, at: int) -> dict:
    if not isinstance(part, str):
        return part
    if message.get("is_notice"):
        return {"type": "text", "text": f'<span class="notice" role="status">{in_both(part)}</span>'}
    text = html.escape(part)
    if message["role"] == "assistant" and not message.get("is_growing"):
        facts = in_both(message["facts"]) if "facts" in message else ""
        why = in_both("图中依据\nWhat mattered?")
        button = f'<button type="button" class="why at-{at}">{why}</button>'
        text += f'<span class="facts">{facts}{button}</span>'
    return {"type": "text", "text": text}


def in_both(text: str) -> str:
    """HTML of a text in Chinese and in English, a line each, and what is added to both; one is visible."""
    chinese, english, *added = text.split("\n", 2)
    more = "".join(f"\n{line}" for line in added)
    pair = (("zh", chinese), ("en", english))
    return "".join(f'<span lang="{lang}">{html.escape(words + more)}</span>' for lang, words in pair)
