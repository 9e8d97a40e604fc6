"""What mattered in the image, on the page: drawn over each image, for an answer or one of its words."""

import asyncio
import base64
import html
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from model.explain import explain_chat
from model.heat import draw_heat, scale_of
from model.images import open_image
from serving.conversation import GONE, NOT_POSSIBLE, in_both, is_asking, prepare
from serving.decoding import Upload
from serving.site import Site

TITLE = "回答依据图中何处\nWhat mattered in the image"
MEASURING = (
    "正在逐处遮住图片，重新测量回答……\nHiding the image part by part, and measuring the answer again …"
)
HOW = (
    "暖色：遮住此处，回答的概率下降；蓝色：上升。请点一个词。\n"
    "Warm: without this part the answer becomes less likely. Blue: more likely. Choose a word."
)
WHOLE, CLOSE = "整个回答\nThe whole answer", "关闭\nClose"
STRONGEST = "最大的下降：{0:.1f} 纳特\nLargest drop: {0:.1f} nats"


@dataclass(frozen=True)
class Why:
    """Of one answer.

    maps   of each image (words, S, S): nats that each word loses with each patch
    names  of these images
    """

    words: list[str]
    maps: list[np.ndarray]
    names: list[str]

    def chosen(self, word: int) -> list[np.ndarray]:
        """(S, S) of each image; for the whole answer if there is no such word."""
        return [of[word] if 0 <= word < len(self.words) else of.sum(0) for of in self.maps]


class Explainer:
    def __init__(self, site: Site, max_rounds: int):
        self.site, self.max_rounds = site, max_rounds
        self.turn = (
            asyncio.Lock()
        )  # each takes the model for a while: answers go on beside one, not beside many

    async def explain(self, messages: list[dict], at: int) -> Why | str:
        """The answer that is message number `at`; or one friendly line."""
        if not 0 < at < len(messages) or is_asking(messages[: at + 1]) or not is_asking(messages[:at]):
            return GONE
        async with self.turn:
            try:
                return await asyncio.to_thread(self.measure, messages, at)
            except ValueError as error:
                return f"{NOT_POSSIBLE}{error}"

    def measure(self, messages: list[dict], at: int) -> Why | str:
        answer = messages[at]
        if answer.get("is_notice"):
            return GONE
        asked = prepare(self.site, messages[:at], answer["settings"], self.max_rounds)
        if isinstance(asked, dict):
            return asked["content"][0]
        found = explain_chat(self.site.engine.chat, asked.turns, asked.images, answer["content"][0])
        return Why(found[0].words, [each.maps for each in found], asked.names)

    def draw(self, why: Why, word: int) -> str:
        """HTML: the images with the drop over them, and the words to choose from."""
        chosen = why.chosen(word)
        scale = scale_of(*chosen)
        kept = [self.site.images.get(name) for name in why.names]
        if not all(kept):
            return frame(in_both(GONE))
        heats = [
            draw_heat(open_image(Upload(image.reduced.shown)), drops, scale)
            for image, drops in zip(kept, chosen, strict=True)
        ]
        images = "".join(f'<img src="{as_address(heat)}" alt="">' for heat in heats)
        strongest = in_both(STRONGEST.format(max(float(drops.max()) for drops in chosen)))
        return frame(
            f'<div class="images">{images}</div><p class="words">{draw_words(why, word)}</p>'
            f"<p>{strongest}</p><p>{in_both(HOW)}</p>"
        )


def draw_words(why: Why, chosen: int) -> str:
    """A button for the answer and for each of its words, the deeper the more it loses."""
    losses = [max(float(of[word].max()) for of in why.maps) for word in range(len(why.words))]
    most = max(0.1, *losses)
    labels = [(-1, in_both(WHOLE), 0.0)]
    labels += [
        (word, html.escape(text), max(0.0, loss / most))
        for word, (text, loss) in enumerate(zip(why.words, losses, strict=True))
    ]
    if not 0 <= chosen < len(why.words):
        chosen = -1
    return " ".join(
        f'<button type="button" data-word="{word}" aria-pressed="{"true" if word == chosen else "false"}" '
        f'style="--loss: {loss:.2f}"{" autofocus" if word == chosen else ""}>{text}</button>'
        for word, text, loss in labels
    )


def frame(content: str) -> str:
    """The dialog around it."""
    return (
        f'<dialog class="card" aria-labelledby="why-title"><h2 id="why-title">{in_both(TITLE)}</h2>{content}'
        f'<form method="dialog"><button>{in_both(CLOSE)}</button></form></dialog>'
    )


def as_address(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
