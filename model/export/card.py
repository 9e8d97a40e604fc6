"""The model card (README.md) of an exported folder: what was trained, on what, how well, how it is used."""

from pathlib import Path

from model.export.gguf_file import gguf_name
from model.files import read_json
from model.LMConfig import LMConfig

TAGS = {
    "llava": ("transformers", "image-text-to-text", "LlavaForConditionalGeneration"),
    "llama": ("transformers", "text-generation", "LlamaForCausalLM"),
    "qwen2_moe": ("transformers", "text-generation", "Qwen2MoeForCausalLM"),
    "gguf": ("gguf", "text-generation", "llama.cpp"),
}
USAGE = {  # what the model does -> five lines that show it
    "image-text-to-text": """\
from transformers import pipeline
ask = pipeline("image-text-to-text", model="{name}")
question = [{{"type": "image", "url": "a.jpg"}}, {{"type": "text", "text": "What is this?"}}]
chat = [{{"role": "user", "content": question}}]
print(ask(text=chat, return_full_text=False)[0]["generated_text"])""",
    "text-generation": """\
from transformers import pipeline
ask = pipeline("text-generation", model="{name}")
chat = [{{"role": "user", "content": "Who are you?"}}]
print(ask(chat, return_full_text=False)[0]["generated_text"])""",
}
RECIPE = (
    "batch_size",
    "accumulation_steps",
    "processes",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "grad_clip",
    "train",
    "max_seq_len",
    "dtype",
    "seed",
    "rows",
)
LICENCES = """\
What the data and the models that training began from are licensed under goes with the weights. Keep the lines
that apply, and name a `license:` at the top.

- MiniMind (language model, tokenizer): Apache-2.0. OpenAI's CLIP: MIT.
- LLaVA-Pretrain (captions of CC3M): the captions may be used freely, the images belong to their owners.
- LLaVA-Instruct: CC BY-NC 4.0, and OpenAI's terms, for GPT-4 wrote its answers; COCO's images: Flickr's.
- Drawn data (the demo world): none.
"""


def write_card(source, kind: str, folder: Path, report: dict | None) -> str:
    """source: a folder.Source; report: what 3-eval_chat.py --report wrote, or None"""
    library, pipeline, opened_by = TAGS[kind]
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: {pipeline}\ntags:\n- minimind-v\n---\n",
        f"# {folder.absolute().name}\n",
        f"A MiniMind{'-V' if kind == 'llava' else ''} model for `{opened_by}`, without code of its own.\n",
        table(("", ""), describe_sizes(source)),
        "## Training\n",
        table(("", ""), describe_training(source.description)),
    ]
    if report:
        parts += ["## Scores\n", describe_report(report)]
    parts += ["## Licences\n", LICENCES, "## Use\n", describe_usage(kind, folder, gguf_name(source.dtype))]
    return "\n".join(parts)


def describe_sizes(source) -> list[tuple]:
    config: LMConfig = source.config
    tensors = (tensor.numel() for name, tensor in source.state.items() if name != "output.weight")  # tied
    rows = [
        ("parameters of the language model" + (" and the projection" if config.vision_dim else ""),
         f"{sum(tensors):,}"),
        ("width, layers, heads (key/value)",
         f"{config.dim}, {config.n_layers}, {config.n_heads} ({config.n_kv_heads})"),
        ("tokens, context", f"{config.vocab_size:,}, {config.max_seq_len:,}"),
    ]  # fmt: skip
    if config.use_moe:
        rows.append(
            ("experts", f"{config.n_routed_experts}, of which a token uses {config.num_experts_per_tok}; "
                        f"shared: {config.n_shared_experts}")
        )  # fmt: skip
    if source.vision_model is not None:
        number = sum(parameter.numel() for parameter in source.vision_model.parameters())
        rows.append(("parameters of the frozen CLIP", f"{number:,}"))
        rows.append(("tokens per image", config.num_image_tokens))
    return rows


def describe_training(description: dict) -> list[tuple]:
    settings = description.get("settings", {})
    rows = [
        ("stage", description.get("stage", "not recorded")),
        ("step", f"{description.get('step', '?')} of {description.get('total_steps', '?')}"),
        ("fingerprint of the data", settings.get("data", "not recorded")),
        *((f"fingerprint of {name}", value) for name, value in description.get("inputs", {}).items()),
        (
            "recipe",
            ", ".join(f"{name} {settings[name]}" for name in RECIPE if name in settings) or "not recorded",
        ),
    ]
    knows = description.get("about", {}).get("knows")
    return [*rows, ("knows", knows)] if knows else rows


def read_report(path: Path) -> dict:
    """split -> kind -> control -> share. Raises FileNotFoundError or ValueError for what is no report."""
    if not path.is_file():
        raise FileNotFoundError(f"--report: there is no file {path}")
    report = read_json(path, "name what 3-eval_chat.py --report wrote")
    scores = [
        kinds for split in report.values() for kinds in (split.values() if isinstance(split, dict) else [0])
    ]
    if not all(
        isinstance(one, dict) and all(isinstance(n, int | float) for n in one.values()) for one in scores
    ):
        raise ValueError(
            f"--report: {path} is not a report of questions: name what 3-eval_chat.py --report wrote"
        )
    return report


def describe_report(report: dict) -> str:
    """The shares of right answers with the image and under the controls; the visual gain is what the image
    brings beyond the better of no image and another question's image."""
    controls, rows = [], []
    for kinds in report.values():
        for scores in kinds.values():
            controls += [name for name in scores if name not in controls]
    for split, kinds in report.items():
        for kind, scores in kinds.items():
            guessed = [scores[name] for name in ("blank", "shuffled") if name in scores]
            gain = f"{scores['real'] - max(guessed):.2f}" if guessed and "real" in scores else ""
            shown = (f"{scores[name]:.2f}" if name in scores else "" for name in controls)
            rows.append((split, kind, *shown, gain))
    return table(("", "", *controls, "visual gain"), rows)


def table(head: tuple, rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(clean, line))} |" for line in lines) + "\n"


def clean(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")


def describe_usage(kind: str, folder: Path, file: str) -> str:
    """file: that of a GGUF"""
    name = folder.absolute().name
    usage = f"```bash\nllama-cli -m {name}/{file} -p 'Who are you?'\n```\n"
    if kind != "gguf":
        usage = f"```python\n{USAGE[TAGS[kind][1]].format(name=name)}\n```\n"
    return usage + f"\n```bash\nhf upload YOUR_NAME/{name} {folder} .\n```\n"
