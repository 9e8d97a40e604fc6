"""The chat page: images, a question, a streaming answer, and what it rests on (Gradio 6)."""

import argparse
import contextlib
import html
import secrets
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import gradio as gr

from model.chat import Chat
from model.description import read_description
from model.generate import Sampling
from model.images import check_is_file, find_images
from model.printable import one_line
from serving.conversation import (
    DEFAULT_QUESTION,
    READING,
    ask,
    in_both,
    is_asking,
    notice,
    question_of,
    reply,
    settle,
    shown,
    without_answer,
)
from serving.look import FOCUS, LANGUAGE, WHY, draw_pad
from serving.site import Site
from serving.visitors import address_of
from serving.why import MEASURING, Explainer, Why, frame

SHOWN_BY_BROWSERS = (".jpg", ".jpeg", ".png", ".webp")
EXAMPLES = (DEFAULT_QUESTION, "Describe this picture.", "图片里有什么？", "What does the picture show?")
META = {"meta": {"_type": "gradio.FileData"}}
# Two languages in one text, of which the page shows one (page.js).
HINT = "提问 / Ask about an image"
WELCOME = """看图问答：添加、粘贴、拖入或画一张图片，然后提问。{}
Add, paste, drop or draw an image, and ask about it. {}"""
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
    active = f" ({decoder.num_active / 1e6:.1f} M active)" if decoder.config.use_moe else ""
    facts = [
        weights.name,
        f"{decoder.num_parameters / 1e6:.1f} M{active}",
        f"{decoder.device} {str(decoder.dtype).removeprefix('torch.')}",
    ]
    lines = [" · ".join(facts), *filter(None, [chat.about.get("knows")])]
    return LANGUAGE + "<h1>MiniMind-V</h1>" + "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def add_settings(args: argparse.Namespace, max_seq_len: int) -> list[gr.components.Component]:
    """The sampling settings, in the order of Sampling's fields."""

    def slider(low, high, value, step, label, info):
        return gr.Slider(low, high, value, step=step, label=label, info=info, buttons=[])

    with gr.Accordion("生成设置 / Sampling", open=False, elem_id="settings"):
        with gr.Row():
            temperature = slider(
                0, 2, args.temperature, 0.05, "温度 / Temperature", "0 = 最可能的词 / 0 = the likeliest word"
            )
            top_k = slider(0, 200, 0, 1, "Top-k", "0 = 全部 / 0 = all")
            top_p = slider(0.05, 1, 1, 0.05, "Top-p", "1 = 全部 / 1 = all")
        with gr.Row():
            penalty = slider(1, 2, 1, 0.05, "重复惩罚 / Penalty", "1 = 无 / 1 = none for repeating")
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
                placeholder="随机 / random",
                info="空 = 每次不同；温度为 0 时无效 / empty = another one each time; unused at 0",
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
            placeholder=f'<div class="welcome">{in_both(WELCOME.format(*memory))}</div>',
            buttons=["copy"],
            elem_id="chat",
            show_label=False,
            allow_file_downloads=False,
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
        with gr.Row(elem_id="tools"):
            gr.HTML(draw_pad(), elem_id="pad", padding=False)
            settings = add_settings(args, chat.decoder.config.max_seq_len)
        why = gr.HTML("", elem_id="why", js_on_load=WHY, padding=False)
        connect(args.max_rounds, site, chatbot, box, settings, why)
    return page


def connect(
    max_rounds: int,
    site: Site,
    chatbot: gr.Chatbot,
    box: gr.MultimodalTextbox,
    settings: list,
    why: gr.HTML,
) -> None:
    """What happens when. A visitor's conversation lies in a gr.State: one per visitor, on the server.

    Not gr.ChatInterface, and nothing but a number (of an example, an answer, a word) is taken back from the
    browser: a forged conversation or example could name any file below the working directory, which Gradio
    would then hand out.
    """
    messages = gr.State([])

    def busy() -> dict:  # a fresh one every time: Gradio takes the value out of the dictionary it is given
        return gr.update(value=None, interactive=False, submit_btn=False, stop_btn="停止 / Stop")

    def begin(messages: list[dict]) -> tuple[list, list, dict]:
        """That the question has come is seen at once."""
        return shown([*messages, notice(READING)]), messages, busy()

    def finish(messages: list[dict]) -> tuple[list, list, dict]:
        """Whatever has ended, by itself or not: a question without an answer goes back into the box."""
        messages, question = settle(messages)
        given = {"value": question} if question else {}
        return (
            shown(messages),
            messages,
            gr.update(interactive=True, submit_btn=True, stop_btn=False, **given),
        )

    async def submit(request: gr.Request, question: dict | None, messages: list[dict]):
        question = question or {"text": "", "files": []}
        names = [file["path"] for file in question["files"]]
        site.images.claim(names, request.session_hash)
        return begin(ask(question["text"], names, messages))

    async def pick(messages: list[dict], event: gr.SelectData):
        if event.index not in range(len(chatbot.examples)):  # forged
            return finish(messages)
        example = chatbot.examples[event.index]
        return begin(ask(example["text"], [file["path"] for file in example["files"]], messages))

    async def retry(messages: list[dict]):
        return begin(without_answer(messages))

    async def undo(messages: list[dict]):
        """The last question goes back into the box, to be asked differently."""
        question = without_answer(messages)[-1:]
        messages = without_answer(messages)[:-1]
        return shown(messages), messages, gr.update(value=question_of(question[0]) if question else None)

    async def answer(request: gr.Request, messages: list[dict], *values):
        if not is_asking(messages):  # nothing was asked
            yield shown(messages), messages
            return
        chosen = read_settings(values)
        replies = reply(site, request.session_hash, messages, chosen, max_rounds)
        async with contextlib.aclosing(replies):
            async for last in replies:
                grown = [*messages, last]
                yield shown(grown), messages if last.get("is_waiting") else grown

    async def clear():
        return finish([])

    here = [chatbot, messages, box]
    # As the browser sends it: the guard has looked through it already.
    raw = {"preprocess": False, "show_progress": "hidden"}
    quick = raw | {"queue": False}
    own = quick | {"api_visibility": "private"}
    asked = [
        box.submit(submit, [box, messages], here, api_name="ask", **quick),
        chatbot.example_select(pick, messages, here, **own),
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
    again = chatbot.retry(retry, messages, here, **own)
    answering.append(
        again.then(answer, [messages, *settings], [chatbot, messages], api_visibility="private", **raw)
    )
    for event in answering:
        event.then(finish, messages, here, **own).then(None, js=FOCUS)
        # The browser takes no further step after an error but this one: the box once stayed locked.
        event.failure(finish, messages, here, **own)
    chatbot.undo(undo, messages, here, **own).then(None, js=FOCUS)
    box.stop(finish, messages, here, cancels=answering, **own)
    # First stop, then empty: at the same time, an answer under way would bring the conversation back.
    chatbot.clear(None, cancels=answering, api_visibility="private").then(clear, None, here, **own)
    connect_why(Explainer(site, max_rounds), messages, why)


def read_settings(values: Sequence[float | None]) -> dict:
    """Of the boxes, by the names of Sampling's fields; None where one was emptied. No seed: a random one."""
    kinds = [(field.name, field.type) for field in fields(Sampling)]
    chosen = {
        name: kind(value) for (name, kind), value in zip(kinds, values, strict=True) if value is not None
    }
    return {"seed": secrets.randbelow(2**31)} | chosen


def connect_why(explainer: Explainer, messages: gr.State, why: gr.HTML) -> None:
    """The button under an answer, and the words in what it opens."""
    found = gr.State(None)

    async def explain(messages: list[dict], event: gr.EventData):
        yield frame(f"<p>{in_both(MEASURING)}</p>"), None
        explanation = await explainer.explain(messages, event.index)
        if isinstance(explanation, str):
            yield frame(f"<p>{in_both(explanation)}</p>"), None
        else:
            yield explainer.draw(explanation, -1), explanation

    async def choose(explanation: Why | None, event: gr.EventData):
        return explainer.draw(explanation, event.index) if explanation else gr.skip()

    raw = {"preprocess": False, "show_progress": "hidden", "api_visibility": "private"}
    why.click(explain, messages, [why, found], trigger_mode="multiple", **raw)
    why.select(choose, found, why, queue=False, **raw)
