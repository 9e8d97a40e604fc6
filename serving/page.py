"""The chat page: an image, a question, a streaming answer (Gradio 6)."""

import argparse
import html
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import gradio as gr

from model.chat import Chat, Round
from model.description import read_description
from model.generate import Sampling
from model.images import find_images, open_image

SHOWN_BY_BROWSERS = (".jpg", ".jpeg", ".png", ".webp")
DEFAULT_QUESTION = "这个图片描述的是什么内容？"
EXAMPLES = (DEFAULT_QUESTION, "Describe this picture.", "图片里有什么？", "What does the picture show?")
NO_IMAGE = "请先添加一张图片，再来提问。\nPlease add an image first, then ask about it."
BAD_IMAGE = "这个文件不能作为图片读取，请换一张。\nThis file cannot be read as an image; try another one."
NOT_POSSIBLE = "请缩短问题或修改设置。\nShorten the question or change the settings:\n"
NO_ANSWER = "（模型没有给出回答 / the model gave no answer）"
HINT = "提问 / Ask about an image"
NOTICES = (NO_IMAGE, BAD_IMAGE, NOT_POSSIBLE, NO_ANSWER)  # what the page says, not the model
WELCOME = """## 看图问答 · Ask about an image
用回形针添加图片并提问；不写问题则描述图片。{}

Add an image with the paper clip and ask. {}"""
MEMORY = ("只记得最近几轮和最近的图片。", "The latest rounds and your latest image are remembered.")
NO_MEMORY = ("每次只看最近的图片，不记前文。", "Each question stands alone and is about your latest image.")
FONTS = [
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "sans-serif",
]
CSS = """
.gradio-container > .main { max-width: 900px !important; padding: 12px 16px !important; }
.gradio-container .column { gap: 10px; }
#head h1 { font-size: 22px; margin: 0; }
#head p { font-size: 13px; margin: 0; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
#chat, #box, #settings { border: 1px solid var(--border-color-primary) !important; }
#chat, #box, #settings, .form:has(> #box) { border-radius: 10px !important; }
#chat { min-height: 380px; }
#chat .message .md { white-space: pre-wrap; overflow-wrap: anywhere; }
#chat .message-row:has(img) + .message-buttons { display: none; } /* "share" would upload the image */
#chat .placeholder { margin: auto; padding: 12px 16px 0; text-align: center; }
#chat .placeholder h2 { margin: 0 0 8px; font-size: 20px; }
#chat .placeholder p { margin: 2px 0; color: var(--body-text-color-subdued); }
#chat .examples { width: 100%; max-width: 640px; gap: 8px; padding: 16px; }
#chat .example { padding: 8px 12px; border: 1px solid var(--border-color-primary); }
#chat .example-content { flex-direction: row; align-items: center; gap: 12px; text-align: left; }
#chat .example-icons-grid { width: auto; }
#settings [data-testid="block-info"] { padding: 0; background: none; color: inherit; white-space: nowrap; }
@media (max-width: 600px) {
    .gradio-container > .main { padding: 8px !important; }
    #box textarea { font-size: 16px; }      /* phones zoom into anything smaller */
    #settings .form > .block { min-width: 100% !important; }
}
"""
# The copy button hands over what the Chatbot was given, escaped (see shown): make it as typed again.
# Without https or loopback there is no navigator.clipboard: it then copies from a textarea off the screen.
COPY = """() => {
    const marks = {amp: "&", lt: "<", gt: ">", quot: '"', "#x27": "'"}, board = navigator.clipboard;
    const typed = text => text.replace(/&(amp|lt|gt|quot|#x27);/g, (all, name) => marks[name]);
    if (board) { const write = board.writeText.bind(board); board.writeText = text => write(typed(text)); }
    document.addEventListener("copy", event => { if (event.target.style?.left === "-999999px") {
        event.clipboardData.setData("text/plain", typed(event.target.value)); event.preventDefault(); } });
}"""


# ---- a conversation: [{"role": "user" or "assistant", "content": [{"path": image}, ..., text]}, ...] -----


def ask(text: str, images: list[str], messages: list[dict]) -> list[dict]:
    """The conversation with one more question; an empty one asks for a description."""
    content = [*({"path": str(image)} for image in images), text.strip() or DEFAULT_QUESTION]
    return [*messages, {"role": "user", "content": content}]


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


def reply(chat: Chat, messages: list[dict], settings: dict, max_rounds: int) -> Iterator[str]:
    """The answer to the last question, growing; or one friendly line about what is missing."""
    answer = ""
    try:
        sampling = Sampling(**settings)
        turns, paths = chat.recall(rounds_of(messages), sampling.max_new_tokens, max_rounds)
        if not paths:
            yield NO_IMAGE
            return
        try:
            images = [open_image(path) for path in paths]
        except Exception:  # on damaged files the decoders raise anything, struct.error and EOFError too
            yield BAD_IMAGE
            return
        for piece in chat.stream(turns, images, sampling):
            if piece:
                answer += piece
                yield answer
    except ValueError as error:  # a question that does not fit the context, settings that make no sense
        yield f"{NOT_POSSIBLE}{error}"
        return
    if not answer.strip():
        yield NO_ANSWER


def shown(messages: list[dict]) -> list[dict]:
    """The conversation for the Chatbot, which takes all text for HTML, even with render_markdown=False.

    Escaped, it appears exactly as typed; as {"type": "text"}, because a bare string loses its indentation.
    """

    def escape(part):
        return {"type": "text", "text": html.escape(part)} if isinstance(part, str) else part

    return [message | {"content": [escape(part) for part in message["content"]]} for message in messages]


# ---- the page ---------------------------------------------------------------------------------------------


def find_examples(image_dir: str | Path, several: bool, questions: Sequence[str] = EXAMPLES) -> list[dict]:
    """Up to four example questions about the images of a folder; one about two if the model can do that."""
    paths = [str(path) for path in find_images(Path(image_dir), SHOWN_BY_BROWSERS)]
    examples = [{"text": text, "files": [path]} for path, text in zip(paths, questions[:4], strict=False)]
    if several and len(paths) > 1:
        examples[-1] = {"text": "这两张图片有什么不同？", "files": paths[:2]}
    return examples


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


def build_page(chat: Chat, weights: Path, args: argparse.Namespace) -> gr.Blocks:
    """The whole page; args: the flags of web_server.py."""
    several = takes_several(weights)
    memory = NO_MEMORY if args.max_rounds == 1 else MEMORY
    with gr.Blocks(title="MiniMind-V", delete_cache=(3600, 24 * 3600)) as page:
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
            examples=find_examples(args.image_dir, several, chat.about.get("questions") or EXAMPLES),
        )
        chatbot.keep_in_cache.update(chatbot.temp_files)  # delete_cache must spare the examples
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
        connect(chat, args.max_rounds, chatbot, box, settings)
    return page


def connect(
    chat: Chat, max_rounds: int, chatbot: gr.Chatbot, box: gr.MultimodalTextbox, settings: list
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

    def submit(question: dict, messages: list[dict]):
        messages = ask(question["text"], question["files"], messages)
        return shown(messages), messages, busy()

    def pick(messages: list[dict], event: gr.SelectData):
        example = chatbot.examples[event.index]
        messages = ask(example["text"], [file["path"] for file in example["files"]], messages)
        return shown(messages), messages, busy()

    def answer(messages: list[dict], *values):
        names = [field.name for field in fields(Sampling)]  # a value is None where its box was emptied
        chosen = {name: value for name, value in zip(names, values, strict=True) if value is not None}
        for text in reply(chat, messages, chosen, max_rounds):
            grown = [*messages, {"role": "assistant", "content": [text]}]
            yield shown(grown), grown

    here, quick = [chatbot, messages, box], {"queue": False, "show_progress": "hidden"}
    asked = [
        box.submit(submit, [box, messages], here, api_name="ask", **quick),
        chatbot.example_select(pick, messages, here, api_visibility="private", **quick),
    ]
    # One answer at a time: others wait in the queue, and a model on a CPU would not be faster for two.
    answering = [
        event.then(
            answer,
            [messages, *settings],
            [chatbot, messages],
            concurrency_limit=1,
            concurrency_id="model",
            api_name="answer",
            api_visibility=visibility,
            show_progress="hidden",
        )
        for event, visibility in zip(asked, ("public", "private"), strict=True)
    ]
    for event in answering:
        event.then(ready, None, box, api_visibility="private", **quick)
    box.stop(ready, None, box, cancels=answering, api_visibility="private", **quick)
    # First stop, then empty: at the same time, an answer under way would bring the conversation back.
    chatbot.clear(None, cancels=answering, api_visibility="private").then(
        lambda: ([], [], ready()), None, here, api_visibility="private", **quick
    )


# ---- the server ------------------------------------------------------------------------------------------


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until interrupted.

    host  a name or an address, of IPv6 too
    port  0 = any free one
    """
    host = f"[{host}]" if ":" in host else host
    port = port or find_free_port()
    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"]
    )
    try:
        page.queue(max_size=32).launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size="20mb",
            theme=theme,
            css=CSS,
            js=COPY,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
        )
    except OSError:
        raise OSError(f"cannot serve on {host}:{port}: is it taken? Try another --port") from None
    if not (host.startswith("127.") or host in ("localhost", "[::1]")):
        print(
            f"warning: whoever can reach {host} can use this page; no password, no encryption",
            file=sys.stderr,
            flush=True,
        )
    print(f"http://{host}:{port}  (Ctrl+C ends it)", flush=True)
    page.block_thread()


def find_free_port() -> int:
    """A port that is free now; Gradio itself would search near its own default."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
