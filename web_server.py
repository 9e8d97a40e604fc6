"""The chat behind a web page: a picture, a question, a streaming answer.

reads    the best weights in out/ (*_vlm_sft_multi.pth, else *_vlm_sft.pth, else *_vlm_pretrain.pth;
         --load_from names others), the tokenizer and CLIP that the .json beside them names, and
         example pictures
serves   http://127.0.0.1:7860, to this computer alone (--host can name another address, with a warning);
         needs no network
keeps    nothing: what a visitor sends is seen by that visitor only, and deleted after a day or at the end

    python web_server.py
    python web_server.py @dataset/demo/eval.args              # the demo world, on any laptop
    python web_server.py --load_from out/768_vlm_sft.pth --port 8080
    python web_server.py --load_from model/minimind-v-v1      # v1's own weights
"""
import argparse
import html
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import gradio as gr

from model.chat import CLIP_PATH, TOKENIZER_PATH, Chat, load_chat
from model.device import DTYPES, choose_device, choose_dtype
from model.generate import Sampling
from model.prompt import Round
from model.vision_utils import open_image

DEFAULT_QUESTION = "这个图片描述的是什么内容？"
EXAMPLES = (DEFAULT_QUESTION, "Describe this picture.", "图片里有什么？", "What does the picture show?")
NO_PICTURE = "请先添加一张图片，再来提问。\nPlease add a picture first, then ask about it."
BAD_PICTURE = "这个文件不能作为图片读取，请换一张。\nThis file cannot be read as a picture; try another one."
NOT_POSSIBLE = "请缩短问题或修改设置。\nShorten the question or change the settings:\n"
NO_ANSWER = "（模型没有给出回答 / the model gave no answer）"
HINT = "提问 / Ask about a picture"
NOTICES = (NO_PICTURE, BAD_PICTURE, NOT_POSSIBLE, NO_ANSWER)        # what the page says, not the model
WELCOME = """## 看图问答 · Ask about a picture
用回形针添加图片并提问；不写问题则描述图片。{}

Add a picture with the paper clip and ask. {}"""
MEMORY = ("只记得最近几轮和最近的图片。", "The latest rounds and your latest picture are remembered.")
NO_MEMORY = ("每次只看最近的图片，不记前文。", "Each question stands alone and is about your latest picture.")
FONTS = ["system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC",
         "sans-serif"]
CSS = """
.gradio-container > .main { max-width: 900px !important; padding: 12px 16px !important; }
.gradio-container .column { gap: 10px; }
#head h1 { font-size: 22px; margin: 0; }
#head p { font-size: 13px; margin: 0; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
#chat, #box, #settings { border: 1px solid var(--border-color-primary) !important; }
#chat, #box, #settings, .form:has(> #box) { border-radius: 10px !important; }
#chat { min-height: 380px; }
#chat .message .md { white-space: pre-wrap; overflow-wrap: anywhere; }
#chat .message-row:has(img) + .message-buttons { display: none; } /* "share" would upload the picture */
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


class Parser(argparse.ArgumentParser):
    """argparse with recipes (@file.args, as in every script here) and with errors of one line."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    fromfile_prefix_chars="@", allow_abbrev=False)
    add = parser.add_argument
    add("--load_from", "--load", type=Path, metavar="PATH",
        help="weight file (also v1's own) or Hugging Face folder (default: the best file in --out_dir)")
    add("--out_dir", default="out", help="folder to look for weights in (default: %(default)s)")
    add("--dim", type=int, default=0, help="look only for weights of this width (0 = any)")
    add("--use_moe", nargs="?", const="True", choices=["True", "False"],
        help="look only for weights of a mixture of experts, or (False) only for others")
    add("--tokenizer_path", help=f"tokenizer folder (default: what the weights name, else {TOKENIZER_PATH})")
    add("--clip_path", help=f"CLIP folder (default: what the weights name, else {CLIP_PATH})")
    add("--image_dir", default="dataset/eval_images", help="example pictures, if any (default: %(default)s)")
    add("--device", default="auto", help="auto (CUDA if there is any, else CPU), cpu, cuda, cuda:N, mps")
    add("--dtype", default="auto", choices=["auto", *DTYPES],
        help="arithmetic; auto: bfloat16 on GPUs that have it, else float32")
    add("--host", default="127.0.0.1", help="address of this computer to serve on; any but the default lets "
        "others in, without password or encryption (default: %(default)s)")
    add("--port", type=int, default=7860, help="TCP port (default: %(default)s)")
    add("--max_rounds", type=int, default=0, help="rounds of a chat that the model sees, the question "
        "included (0 = all that fit its context, 1 = each question stands alone)")
    add("--max_new_tokens", type=int, default=256, help="longest answer, at first (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="at first; 0 = always the likeliest word")
    add("--seed", type=int, default=0, help="at first; the same seed gives the same answer")
    return parser.parse_args(argv)


def find_weights(out_dir: str | Path, dim: int = 0, use_moe: str | None = None) -> Path:
    """The furthest stage that has weights in out_dir, and of several sizes the newest file."""
    for stage in ("vlm_sft_multi", "vlm_sft", "vlm_pretrain"):
        found = [path for path in Path(out_dir).glob(f"{dim or ''}*_{stage}.pth")
                 if use_moe in (None, str("_moe_" in path.name))]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    others = ", ".join(sorted(path.name for path in Path(out_dir).glob("*_vlm_*.pth")))
    if others:
        raise FileNotFoundError(f"no weights in {out_dir} that --dim and --use_moe allow, but {others}: "
                                "change these flags, or name a file with --load_from")
    raise FileNotFoundError(f"no *_vlm_*.pth in {out_dir}: train them (README, 'Stages'), download them "
                            "(README, 'Weights'), or name a file with --load_from")


# ---- a conversation: [{"role": "user" or "assistant", "content": [{"path": picture}, ..., text]}, ...] -----


def ask(text: str, pictures: list[str], messages: list[dict]) -> list[dict]:
    """The conversation with one more question; an empty one asks for a description."""
    content = [*({"path": str(picture)} for picture in pictures), text.strip() or DEFAULT_QUESTION]
    return [*messages, {"role": "user", "content": content}]


def rounds_of(messages: list[dict]) -> list[Round]:
    """The conversation as the model may see it: what the page itself said is no answer."""
    rounds = []
    for message in messages:
        *pictures, text = message["content"]
        if message["role"] == "user":
            rounds.append(Round(text, [part["path"] for part in pictures]))
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
            yield NO_PICTURE
            return
        try:
            pictures = [open_image(path) for path in paths]
        except Exception:       # on damaged files the decoders raise anything, struct.error and EOFError too
            yield BAD_PICTURE
            return
        for piece in chat.stream(turns, pictures, sampling):
            if piece:
                answer += piece
                yield answer
    except ValueError as error:     # a question that does not fit the context, settings that make no sense
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


def find_examples(image_dir: str | Path, several: bool) -> list[dict]:
    """Up to four example questions about the pictures of a folder; one about two if the model can do that."""
    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    paths = sorted(str(path) for path in Path(image_dir).glob("*") if path.suffix.lower() in suffixes)
    examples = [{"text": text, "files": [path]} for path, text in zip(paths, EXAMPLES, strict=False)]
    if several and len(paths) > 1:
        examples[-1] = {"text": "这两张图片有什么不同？", "files": paths[:2]}
    return examples


def describe(chat: Chat, weights: Path) -> str:
    """The head of the page, as HTML: which model answers here."""
    decoder = chat.decoder
    active = f" ({decoder.num_active / 1e6:.1f} M 活跃 / active)" if decoder.config.use_moe else ""
    facts = [weights.name, f"{decoder.num_parameters / 1e6:.1f} M 参数 / params{active}",
             f"{decoder.device} {str(decoder.dtype).removeprefix('torch.')}"]
    return f"<h1>MiniMind-V</h1><p>{html.escape(' · '.join(facts))}</p>"


def add_settings(args: argparse.Namespace, max_seq_len: int) -> list[gr.components.Component]:
    """The sampling settings, in the order of Sampling's fields."""
    def slider(low, high, value, step, label, info):
        return gr.Slider(low, high, value, step=step, label=label, info=info, buttons=[])

    with gr.Accordion("生成设置 / Sampling", open=False, elem_id="settings"):
        with gr.Row():
            temperature = slider(0, 2, args.temperature, 0.05, "温度 / Temperature",
                                 "0 = 最可能的词 / likeliest")
            top_k = slider(0, 200, 0, 1, "Top-k", "0 = 全部 / all")
            top_p = slider(0.05, 1, 1, 0.05, "Top-p", "1 = 全部 / all")
        with gr.Row():
            penalty = slider(1, 2, 1, 0.05, "重复惩罚 / Penalty", "1 = 无 / none for repeating")
            length = slider(1, max_seq_len, min(args.max_new_tokens, max_seq_len), 1, "长度 / Length",
                            "最多生成词数 / most tokens")
            seed = gr.Number(args.seed, precision=0, minimum=0, maximum=2**31 - 1, label="种子 / Seed",
                             info="温度为 0 时无效 / unused at 0")
    return [temperature, top_k, top_p, penalty, length, seed]


def build_page(chat: Chat, weights: Path, args: argparse.Namespace) -> gr.Blocks:
    several = weights.stem.endswith("multi")
    memory = NO_MEMORY if args.max_rounds == 1 else MEMORY
    with gr.Blocks(title="MiniMind-V", delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML(describe(chat, weights), elem_id="head")
        chatbot = gr.Chatbot(
            render_markdown=False, latex_delimiters=[], placeholder=WELCOME.format(*memory),
            buttons=["copy"], elem_id="chat", show_label=False, allow_file_downloads=False,
            height="calc(100dvh - 224px)", examples=find_examples(args.image_dir, several))
        chatbot.keep_in_cache.update(chatbot.temp_files)        # delete_cache must spare the examples
        box = gr.MultimodalTextbox(
            file_types=["image"], file_count="multiple" if several else "single", placeholder=HINT,
            show_label=False, autofocus=True, max_plain_text_length=100_000, elem_id="box")
        settings = add_settings(args, chat.decoder.config.max_seq_len)
        connect(chat, args.max_rounds, chatbot, box, settings)
    return page


def connect(chat: Chat, max_rounds: int, chatbot: gr.Chatbot, box: gr.MultimodalTextbox,
            settings: list) -> None:
    """What happens when. A visitor's conversation lies in a gr.State: one per visitor, on the server.

    Not gr.ChatInterface, and nothing but an example's number is taken back from the browser: a forged
    conversation or example could name any file below the working directory, which Gradio would then hand out.
    """
    messages = gr.State([])

    def busy() -> dict:     # a fresh one every time: Gradio takes the value out of the dictionary it is given
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
        names = [field.name for field in fields(Sampling)]      # a value is None where its box was emptied
        chosen = {name: value for name, value in zip(names, values, strict=True) if value is not None}
        for text in reply(chat, messages, chosen, max_rounds):
            grown = [*messages, {"role": "assistant", "content": [text]}]
            yield shown(grown), grown

    here, quick = [chatbot, messages, box], {"queue": False, "show_progress": "hidden"}
    asked = [box.submit(submit, [box, messages], here, api_name="ask", **quick),
             chatbot.example_select(pick, messages, here, api_visibility="private", **quick)]
    # One answer at a time: others wait in the queue, and a model on a CPU would not be faster for two.
    answering = [event.then(answer, [messages, *settings], [chatbot, messages], concurrency_limit=1,
                            concurrency_id="model", api_name="answer", api_visibility=visibility,
                            show_progress="hidden")
                 for event, visibility in zip(asked, ("public", "private"), strict=True)]
    for event in answering:
        event.then(ready, None, box, api_visibility="private", **quick)
    box.stop(ready, None, box, cancels=answering, api_visibility="private", **quick)
    # First stop, then empty: at the same time, an answer under way would bring the conversation back.
    chatbot.clear(None, cancels=answering, api_visibility="private").then(
        lambda: ([], [], ready()), None, here, api_visibility="private", **quick)


# ---- the server ------------------------------------------------------------------------------------------


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until interrupted."""
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=FONTS,
                           font_mono=["ui-monospace", "monospace"])
    try:
        page.queue(max_size=32).launch(
            server_name=host, server_port=port, share=False, max_file_size="20mb", theme=theme, css=CSS,
            js=COPY, footer_links=[], quiet=True, prevent_thread_lock=True, ssr_mode=False, run_history=False,
            enable_monitoring=False)
    except OSError:
        raise OSError(f"cannot serve on {host}:{port}: is it taken? Try another --port") from None
    if not (host.startswith("127.") or host in ("localhost", "::1")):
        print(f"warning: whoever can reach {host} can use this page; no password, no encryption",
              file=sys.stderr, flush=True)
    print(f"http://{host}:{port}  (Ctrl+C ends it)", flush=True)
    page.block_thread()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = choose_device(args.device)
    Sampling(args.temperature, max_new_tokens=args.max_new_tokens)      # complains now
    weights = args.load_from or find_weights(args.out_dir, args.dim, args.use_moe)
    chat = load_chat(weights, args.tokenizer_path, args.clip_path, device, choose_dtype(args.dtype, device))
    print(chat.report, flush=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio asks its own address whether it is up: a proxy from the environment must not be asked instead.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join([os.environ.get(name, ""), args.host, "localhost"]).lstrip(",")
    # So that the folder below goes then, too, and a second signal does not disturb that.
    signal.signal(signal.SIGTERM, lambda number, _: (signal.signal(number, signal.SIG_IGN), sys.exit(0)))
    with tempfile.TemporaryDirectory(prefix="minimind_v_") as folder:       # /tmp/gradio is shared
        os.environ["GRADIO_TEMP_DIR"] = folder
        serve(build_page(chat, weights, args), args.host, args.port)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:      # what the user can cure: one line, no traceback
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
