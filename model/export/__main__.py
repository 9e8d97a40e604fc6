"""Export weights to a folder that other programs open, without code of its own.

    python -m model.export out/512_vlm_sft.pth --to llava exported/minimind-v
    python -m model.export out/512_llm.pth --to llama exported/minimind
    python -m model.export out/512_moe_llm.pth --to qwen2_moe exported/minimind-moe
    python -m model.export out/512_llm.pth --to gguf exported/minimind-gguf

llava       LlavaForConditionalGeneration of transformers (4.57, 5.x): the whole model, CLIP included
llama       LlamaForCausalLM: the language model alone
qwen2_moe   Qwen2MoeForCausalLM: the language model of a mixture of experts
gguf        llama.cpp: the language model alone

--load_from DIR takes the first back, --llm DIR the second.
"""

import argparse
from pathlib import Path

from model.names import CLIP_PATH, DTYPES, TOKENIZER_PATH
from trainer.script import Parser, clean_exit

FORMATS = ("llava", "llama", "qwen2_moe", "gguf")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog = "python -m model.export"
    parser.usage = "%(prog)s WEIGHTS --to FORMAT DIR [flags]"
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="weight file or Hugging Face folder")
    parser.add_argument("folder", type=Path, metavar="DIR", help="new or empty folder")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format, see above")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="of the tensors; float32 loses nothing, the others take half the room",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="what 3-eval_chat.py --report wrote, for the model card"
    )
    parser.add_argument(
        "--tokenizer_path", help=f"tokenizer folder (default: what the weights name, else {TOKENIZER_PATH})"
    )
    parser.add_argument("--clip_path", help=f"CLIP folder (default: what the weights name, else {CLIP_PATH})")
    parser.add_argument(
        "--allow_other_inputs",
        action="store_true",
        help="use another CLIP or tokenizer than the weights were trained with (otherwise refused)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.weights.exists():
        raise FileNotFoundError(f"there is no file or folder {args.weights}")

    import torch  # only now: loading it takes seconds

    from model.export.card import read_report
    from model.export.folder import check_empty, export, load_source

    check_empty(args.folder)
    report = read_report(args.report) if args.report else None
    source = load_source(
        args.weights,
        args.to,
        getattr(torch, args.dtype),
        args.tokenizer_path,
        args.clip_path,
        args.allow_other_inputs,
    )
    for path in export(source, args.to, args.folder, report):
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    clean_exit(main)
