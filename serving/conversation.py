"""A conversation on the page: what it holds, what of it the model sees, what the page says beside the model.

[{"role": "user" or "assistant", "content": [{"path": name of an image}, ..., text]}, ...]
"""

import asyncio
import contextlib
import html
from collections.abc import AsyncIterator

from PIL import Image

from model.chat import Chat, Round
from model.generate import Sampling
from serving.site import Site

DEFAULT_QUESTION = "这个图片描述的是什么内容？"
NO_IMAGE = "请先添加一张图片，再来提问。\nPlease add an image first, then ask about it."
BAD_IMAGE = "这个文件不能作为图片读取，请换一张。\nThis file cannot be read as an image; try another one."
GONE = "这张图片已经不在这里了，请重新添加。\nThis image is no longer here: please add it again."
TOO_MANY_IMAGES = "一个问题最多 {0} 张图片。\nAt most {0} images in a question."
NOT_POSSIBLE = "请缩短问题或修改设置。\nShorten the question or change the settings:\n"
NO_ANSWER = "（模型没有给出回答 / the model gave no answer）"
IN_LINE = "正在排队，您是第 {0} 位。\nYou are number {0} in line."
LINE_FULL = (
    "现在提问的人太多，请过一两分钟再问。\nMany people are asking: please ask again in a minute or two."
)
STILL_WAITING = "您的上一个问题还在排队。\nYour question before this one is still in line."
NOTICES = tuple(  # what the page says, not the model
    text.split("{")[0]
    for text in (
        NO_IMAGE,
        BAD_IMAGE,
        GONE,
        TOO_MANY_IMAGES,
        NOT_POSSIBLE,
        NO_ANSWER,
        IN_LINE,
        LINE_FULL,
        STILL_WAITING,
    )
)
MOST_MESSAGES = 100  # of a conversation; the oldest go


def ask(text: str, images: list[str], messages: list[dict]) -> list[dict]:
    """The conversation with one more question; an empty one asks for a description."""
    content = [*({"path": str(image)} for image in images), text.strip() or DEFAULT_QUESTION]
    recent = messages[-MOST_MESSAGES:]
    while recent and recent[0]["role"] != "user":
        recent = recent[1:]
    return [*recent, {"role": "user", "content": content}]


def rounds_of(messages: list[dict]) -> list[Round]:
    """The conversation as the model may see it: what the page itself said is no answer."""
    rounds = []
    for message in messages:
        *images, text = message["content"]
        if message["role"] == "user":
            rounds.append(Round(text, [part["path"] for part in images]))
        elif not text.startswith(NOTICES):
            rounds[-1].answer = text
    return rounds


async def reply(
    site: Site, session: str, messages: list[dict], settings: dict, max_rounds: int
) -> AsyncIterator[int | str]:
    """Numbers: the place in the line. Texts: the answer to the last question, growing; or one friendly line
    about what is missing. Raises LineFull, AlreadyWaiting."""
    since, text = site.visitors.clock(), ""
    try:
        asked = await asyncio.to_thread(prepare, site, messages, settings, max_rounds)
        if isinstance(asked, str):
            yield asked
            return
        answer = site.engine.submit(*asked, owner=session)
        events = answer.events(lambda: site.visitors.awaits(session, since))
        async with contextlib.aclosing(events):
            async for event in events:
                text += event if isinstance(event, str) else ""
                yield text or event
    except ValueError as error:  # a question that does not fit the context, settings that make no sense
        yield f"{NOT_POSSIBLE}{error}"
        return
    if not text.strip() and answer.finish_reason != "stopped":
        yield NO_ANSWER


def prepare(
    site: Site, messages: list[dict], settings: dict, max_rounds: int
) -> str | tuple[list[dict], list[Image.Image], Sampling]:
    """What the engine is asked; or what is missing. Raises ValueError."""
    chat, sampling = site.engine.chat, Sampling(**settings)
    rounds = rounds_of(messages)
    if len(rounds[-1].images) > (most := most_images(chat)):
        return TOO_MANY_IMAGES.format(most)
    turns, names = chat.recall(rounds, sampling.max_new_tokens, max_rounds)
    if not names:
        return NO_IMAGE
    sent = [site.images.get(name) for name in names]
    if missing := [image for image in sent if image is None or image.reduced is None]:
        return GONE if missing[0] is None else f"{BAD_IMAGE}\n({missing[0].problem})"
    return turns, [image.reduced.image for image in sent], sampling


def most_images(chat: Chat) -> int:
    """In one question of a visitor."""
    return min(16, chat.most_images)


def shown(messages: list[dict]) -> list[dict]:
    """The conversation for the Chatbot, which takes all text for HTML, even with render_markdown=False.

    Escaped, it appears exactly as typed; as {"type": "text"}, because a bare string loses its indentation.
    """

    def escape(part):
        return {"type": "text", "text": html.escape(part)} if isinstance(part, str) else part

    return [message | {"content": [escape(part) for part in message["content"]]} for message in messages]
