"""The chat behind a web page: an image, a question, a streaming answer. And for programs, as OpenAI's API
speaks: /v1/chat/completions (serving/README.md).

reads    the best weights in out/ (*_vlm_sft_multi.pth, else *_vlm_sft.pth, else *_vlm_pretrain.pth;
         --load_from names others), the tokenizer and CLIP that the .json beside them names, and
         example images
serves   http://127.0.0.1:7860, to this computer alone (--host can name another address, with a warning);
         needs no network; answers to the names of this computer alone (--allow_host adds others)
keeps    nothing: what a visitor sends is seen by that visitor only, stands in memory alone, and goes two
         minutes after the visitor

    python web_server.py
    python web_server.py @dataset/demo/eval.args              # the demo world, on any laptop
    python web_server.py --load_from out/768_vlm_sft.pth --port 8080
    python web_server.py --load_from model/minimind-v-v1      # v1's own weights
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from model.names import find_recorded
from model.printable import printable
from serving.hosts import is_host
from trainer.script import Checked, Parser, add_loading_flags, at_least, choose_weights, clean_exit

BATCH = 8  # the weights are stored for about so many answers at once
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
# Nobody is told what people do here, and nothing is kept for it.
GRADIO_SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000000",
}
STAGES = ("vlm_sft_multi", "vlm_sft", "vlm_pretrain")  # the furthest that has weights is served


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_loading_flags(parser)
    add = parser.add_argument_group("the page").add_argument
    add("--image_dir", help="example images (default: what the weights say, else dataset/eval_images)")
    add(
        "--host",
        default="127.0.0.1",
        help="address of this computer to serve on; any but the default lets "
        "others in, without password or encryption",
    )
    add(
        "--port",
        type=Checked(int, lambda value: 0 <= value <= 65535, "0 to 65535"),
        default=7860,
        help="TCP port (0 = any free one)",
    )
    add(
        "--allow_host",
        type=Checked(str, lambda names: all(map(is_host, names)), "NAME or NAME:PORT"),
        nargs="+",
        default=[],
        metavar="NAME",
        help="other names under which people reach the page, through a reverse proxy or a tunnel: NAME (any "
        "port) or NAME:PORT (default: none)",
    )
    add(
        "--auth",
        type=Checked(str, lambda text: all(text.partition(":")), "USER:PASSWORD"),
        metavar="USER:PASSWORD",
        help="what everybody is asked for, programs as their API key; others on this computer can read it in "
        "the list of processes, and without https so can the network (default: nobody is asked)",
    )
    add("--max_queue", type=at_least(1), default=100, help="questions that wait; more are told to come back")
    add("--max_upload_mb", type=at_least(1), default=20, help="largest image file that visitors may send, MB")
    add(
        "--max_rounds",
        type=at_least(0),
        help="rounds of a chat that the model sees, the question included (0 = all that fit its context, "
        "1 = each question stands alone; default: 1 for weights that learned single rounds, else 0)",
    )
    add("--max_new_tokens", type=at_least(1), default=256, help="longest answer, at first")
    add("--temperature", type=at_least(0, float), default=0.0, help="at first; 0 = always the likeliest word")
    add(
        "--seed",
        type=at_least(0, below=2**31),
        help="at first; the same seed gives the same answer (default: another one for each answer)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    weights = choose_weights(args, STAGES)

    os.environ |= GRADIO_SETTINGS
    # The page needs no network: no proxy may come between.
    for name in [name for name in os.environ if name.lower() in PROXIES]:
        del os.environ[name]
    # So that what was started and made is removed then too, undisturbed by a second signal.
    signal.signal(signal.SIGTERM, lambda number, _: (signal.signal(number, signal.SIG_IGN), sys.exit(0)))
    with tempfile.TemporaryDirectory(prefix="minimind_v_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # else it makes /tmp/gradio, as soon as it is imported
        run(args, weights, folder)


def run(args: argparse.Namespace, weights: Path, folder: str) -> None:
    """Load the weights and serve the page; folder: for what Gradio keeps in files."""
    from model.chat import load_chat  # only now: loading PyTorch and Gradio takes seconds
    from model.device import choose_device, choose_dtype
    from model.generate import Sampling
    from serving.page import build_page
    from serving.server import serve
    from serving.site import Defaults, make_site

    device = choose_device(args.device)
    chat = load_chat(
        weights,
        args.tokenizer_path,
        args.clip_path,
        device,
        choose_dtype(args.dtype, device),
        BATCH,
        allow_other_inputs=args.allow_other_inputs,
    )
    print(printable(str(chat.report)), flush=True)
    if args.max_rounds is None:  # what no flag says, the weights do
        args.max_rounds = chat.max_rounds
    if not args.image_dir:
        args.image_dir = find_recorded(chat.about.get("image_dir", "dataset/eval_images"), weights)
    sampling = Sampling(args.temperature, max_new_tokens=args.max_new_tokens, seed=args.seed or 0)
    defaults = Defaults(weights.stem, sampling, args.max_rounds)
    site = make_site(folder, chat, defaults, args.max_queue, args.max_upload_mb << 20)
    serve(build_page(chat, weights, args, site), site, args.host, args.port, args.allow_host, args.auth or "")


if __name__ == "__main__":
    clean_exit(main)
