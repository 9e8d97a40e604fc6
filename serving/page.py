"""The chat page: an image, a question, a streaming answer (Gradio 6)."""

import argparse
import contextlib
import html
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import gradio as gr

from model.chat import Chat
from model.description import read_description
from model.generate import Sampling
from model.images import check_is_file, find_images
from model.printable import one_line
from serving.answer import AlreadyWaiting, LineFull
from serving.conversation import (
    DEFAULT_QUESTION,
    IN_LINE,
    LINE_FULL,
    STILL_WAITING,
    ask,
    reply,
    shown,
)
from serving.site import Site
from serving.visitors import address_of

SHOWN_BY_BROWSERS = (".jpg", ".jpeg", ".png", ".webp")
EXAMPLES = (DEFAULT_QUESTION, "Describe this picture.", "图片里有什么？", "What does the picture show?")
META = {"meta": {"_type": "gradio.FileData"}}
HINT = "提问 / Ask about an image"
WELCOME = """## 看图问答 · Ask about an image
用回形针添加图片并提问；不写问题则描述图片。{}

Add an image with the paper clip and ask. {}"""
MEMORY = ("只记得最近几轮和最近的图片。", "The latest rounds and your latest image are remembered.")
NO_MEMORY = ("每次只看最近的图片，不记前文。", "Each question stands alone and is about your latest image.")


def find_examples(image_dir: str | Path, several: bool, questions: Sequence[str] = EXAMPLES) -> list[dict]:
    """Up to four example questions about the images of a folder; one about two if the model can do that."""
    paths = [str(path) for path in find_images(Path(image_dir), SHOWN_BY_BROWSERS)]
    examples = [{"text": text, "files": [path]} for path, text in zip(paths, questions[:4], strict=False)]
    if several and len(paths) > 1:
        examples[-1] = {"text": "这两张图片有什么不同？", "files": paths[:2]}
    return examples


def keep_examples(site: Site, examples: list[dict]) -> list[dict]:
    """The examples whose images can be read, for gr.Chatbot; reduced, as the images of visitors are."""
    kept = []
    for example in examples:
        try:
            reduced = [site.reducer.reduce_now(read_file(path)) for path in example["files"]]
        except (OSError, ValueError) as error:
            print(one_line(f"no example: {', '.join(example['files'])}: {error}"), flush=True)
            continue
        names = [site.images.add("", image) for image in reduced]
        files = [{"path": name, "url": address_of(name), "mime_type": "image/jpeg"} | META for name in names]
        kept.append({"text": example["text"], "files": files})
    return kept


def read_file(path: str) -> bytes:
    check_is_file(path)
    return Path(path).read_bytes()


def takes_several(weights: Path) -> bool:
    """Do these weights know rows of several images? Their description says so, whatever they are called."""
    return read_description(weights).get("stage", weights.stem).endswith("multi")


def describe(chat: Chat, weights: Path) -> str:
    """The head of the page, as HTML: which model answers here."""
    decoder = chat.decoder
    active = f" ({decoder.num_active / 1e6:.1f} M 活跃 / active)" if decoder.config.use_moe else ""
    facts = [
        weights.name,
        f"{decoder.num_parameters / 1e6:.1f} M 参数 / params{active}",
        f"{decoder.device} {str(decoder.dtype).removeprefix('torch.')}",
    ]
    lines = [" · ".join(facts), *filter(None, [chat.about.get("knows")])]
    return "<h1>MiniMind-V</h1>" + "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def add_settings(args: argparse.Namespace, max_seq_len: int) -> list[gr.components.Component]:
    """The sampling settings, in the order of Sampling's fields."""

    def slider(low, high, value, step, label, info):
        return gr.Slider(low, high, value, step=step, label=label, info=info, buttons=[])

    with gr.Accordion("生成设置 / Sampling", open=False, elem_id="settings"):
        with gr.Row():
            temperature = slider(
                0, 2, args.temperature, 0.05, "温度 / Temperature", "0 = 最可能的词 / likeliest"
            )
            top_k = slider(0, 200, 0, 1, "Top-k", "0 = 全部 / all")
            top_p = slider(0.05, 1, 1, 0.05, "Top-p", "1 = 全部 / all")
        with gr.Row():
            penalty = slider(1, 2, 1, 0.05, "重复惩罚 / Penalty", "1 = 无 / none for repeating")
            length = slider(
                1,
                max_seq_len,
                min(args.max_new_tokens, max_seq_len),
                1,
                "长度 / Length",
                "最多生成词数 / most tokens",
            )
            seed = gr.Number(
                args.seed,
                precision=0,
                minimum=0,
                maximum=2**31 - 1,
                label="种子 / Seed",
                info="温度为 0 时无效 / unused at 0",
            )
    return [temperature, top_k, top_p, penalty, length, seed]


def build_page(chat: Chat, weights: Path, args: argparse.Namespace, site: Site) -> gr.Blocks:
    """The whole page; args: the flags of web_server.py."""
    several = takes_several(weights)
    memory = NO_MEMORY if args.max_rounds == 1 else MEMORY
    examples = find_examples(args.image_dir, several, chat.about.get("questions") or EXAMPLES)
    with gr.Blocks(title="MiniMind-V") as page:
        gr.HTML(describe(chat, weights), elem_id="head")
        chatbot = gr.Chatbot(
            render_markdown=False,
            latex_delimiters=[],
            placeholder=WELCOME.format(*memory),
            buttons=["copy"],
            elem_id="chat",
            show_label=False,
            allow_file_downloads=False,
            height="calc(100dvh - 224px)",
            examples=keep_examples(site, examples),
        )
        box = gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple" if several else "single",
            placeholder=HINT,
            show_label=False,
            autofocus=True,
            max_plain_text_length=100_000,
            elem_id="box",
        )
        settings = add_settings(args, chat.decoder.config.max_seq_len)
        connect(args.max_rounds, site, chatbot, box, settings)
    return page


def connect(
    max_rounds: int, site: Site, chatbot: gr.Chatbot, box: gr.MultimodalTextbox, settings: list
) -> None:
    """What happens when. A visitor's conversation lies in a gr.State: one per visitor, on the server.

    Not gr.ChatInterface, and nothing but an example's number is taken back from the browser: a forged
    conversation or example could name any file below the working directory, which Gradio would then hand out.
    """
    messages = gr.State([])

    def busy() -> dict:  # a fresh one every time: Gradio takes the value out of the dictionary it is given
        return gr.update(value=None, interactive=False, submit_btn=False, stop_btn="停止 Stop")

    def ready() -> dict:
        return gr.update(interactive=True, submit_btn=True, stop_btn=False)

    def add(text: str, names: list[str], messages: list[dict]) -> tuple[list, list, dict]:
        messages = ask(text, names, messages)
        return shown(messages), messages, busy()

    async def submit(request: gr.Request, question: dict | None, messages: list[dict]):
        question = question or {"text": "", "files": []}
        names = [file["path"] for file in question["files"]]
        site.images.claim(names, request.session_hash)
        return add(question["text"], names, messages)

    async def pick(messages: list[dict], event: gr.SelectData):
        if event.index not in range(len(chatbot.examples)):  # forged
            return shown(messages), messages, ready()
        example = chatbot.examples[event.index]
        return add(example["text"], [file["path"] for file in example["files"]], messages)

    async def answer(request: gr.Request, messages: list[dict], *values):
        if not messages or messages[-1]["role"] != "user":  # nothing was asked
            yield shown(messages), messages
            return
        kinds = [(field.name, field.type) for field in fields(Sampling)]  # None where a box was emptied
        chosen = {
            name: kind(value) for (name, kind), value in zip(kinds, values, strict=True) if value is not None
        }

        def grow(text: str) -> list[dict]:
            return [*messages, {"role": "assistant", "content": [text]}]

        try:
            texts = reply(site, request.session_hash, messages, chosen, max_rounds)
            async with contextlib.aclosing(texts):
                async for text in texts:
                    waits = isinstance(text, int)
                    grown = grow(IN_LINE.format(text) if waits else text)
                    yield shown(grown), messages if waits else grown
        except (AlreadyWaiting, LineFull) as error:
            yield shown(grow(LINE_FULL if isinstance(error, LineFull) else STILL_WAITING)), messages

    async def stop(messages: list[dict]):  # what is said of the line goes
        return shown(messages), ready()

    here = [chatbot, messages, box]
    # As the browser sends it: the guard has looked through it already.
    raw = {"preprocess": False, "show_progress": "hidden"}
    quick = raw | {"queue": False}
    asked = [
        box.submit(submit, [box, messages], here, api_name="ask", **quick),
        chatbot.example_select(pick, messages, here, api_visibility="private", **quick),
    ]
    answering = [
        event.then(
            answer,
            [messages, *settings],
            [chatbot, messages],
            api_name="answer",
            api_visibility=visibility,
            **raw,
        )
        for event, visibility in zip(asked, ("public", "private"), strict=True)
    ]
    for event in answering:
        event.then(ready, None, box, api_visibility="private", **quick)
        # The browser takes no further step after an error but this one: the box once stayed locked.
        event.failure(ready, None, box, api_visibility="private", **quick)
    box.stop(stop, messages, [chatbot, box], cancels=answering, api_visibility="private", **quick)
    # First stop, then empty: at the same time, an answer under way would bring the conversation back.
    chatbot.clear(None, cancels=answering, api_visibility="private").then(
        lambda: ([], [], ready()), None, here, api_visibility="private", **quick
    )
