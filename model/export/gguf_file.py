"""The language model as one GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio).

llama.cpp turns the channels of Llama in neighbouring pairs, as we do, so wq and wk go as they are; those of
Qwen3 it turns as transformers does. Images stay behind: its own path for LLaVA does not give 50 tokens.
"""

from pathlib import Path

import torch
from torch import Tensor

from model.export.text import chat_template, tokenizer_json
from model.LMConfig import LMConfig
from model.stock_config import text_type
from model.stock_weights import ROTATED, half_split

WORDS = (  # parts of a tensor's name, ours and llama.cpp's
    ("tok_embeddings.", "token_embd."),
    ("layers.", "blk."),
    ("attention.wq.", "attn_q."),
    ("attention.wk.", "attn_k."),
    ("attention.wv.", "attn_v."),
    ("attention.wo.", "attn_output."),
    ("attention.q_norm.", "attn_q_norm."),
    ("attention.k_norm.", "attn_k_norm."),
    ("attention_norm.", "attn_norm."),
    ("feed_forward.w1.", "ffn_gate."),
    ("feed_forward.w2.", "ffn_down."),
    ("feed_forward.w3.", "ffn_up."),
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {  # llama.cpp's names of ways to split a text into words, as tokenizer.json describes them
    "gpt-2": [BYTES],  # MiniMind's
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False},
        BYTES | {"use_regex": False},
    ],
}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # kinds of tokens
SHORT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def gguf_name(dtype: torch.dtype) -> str:
    return f"model-{SHORT[dtype]}.gguf"


def find_writer():
    """The package of llama.cpp's authors. Raises ValueError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError("--to gguf needs a package that is not installed: pip install gguf") from None
    return gguf


def write_gguf(source, path: Path) -> None:
    """source: a folder.Source; raises ValueError for a tokenizer that llama.cpp has no equal of."""
    gguf, config, kind = find_writer(), source.config, text_type(source.config)
    writer = gguf.GGUFWriter(path, kind)
    add_sizes(writer, config)
    add_words(writer, source.tokenizer, config)
    for name, tensor in gguf_tensors(source.state, config).items():
        if tensor.dtype == torch.bfloat16:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(state: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Under llama.cpp's names; its norms are float32."""
    tensors = {}
    for name, tensor in state.items():
        if config.tied and name.startswith("output."):
            continue
        if config.qk_norm and ROTATED.fullmatch(name):
            tensor = half_split(tensor, config.head_dim)
        if name == "norm.weight":
            name = "output_norm.weight"
        for ours, theirs in WORDS:
            name = name.replace(ours, theirs)
        tensors[name] = tensor.detach() if tensor.ndim > 1 else tensor.detach().float()
    return tensors


def add_sizes(writer, config: LMConfig) -> None:
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_words(writer, tokenizer, config: LMConfig) -> None:
    """The tokenizer and the chat format."""
    parts = tokenizer_json(tokenizer)
    numbers = parts["model"]["vocab"] if parts["model"]["type"] == "BPE" else {}
    numbers = {**numbers, **{token["content"]: token["id"] for token in parts["added_tokens"]}}
    special = {token["id"] for token in parts["added_tokens"] if token["special"]}
    names = {number: token for token, number in numbers.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name_splitter(parts))
    writer.add_token_list([names.get(number, f"[unused {number}]") for number in range(config.vocab_size)])
    writer.add_token_types(
        [
            UNUSED if number not in names else CONTROL if number in special else NORMAL
            for number in range(config.vocab_size)
        ]
    )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)  # the template writes it
    writer.add_chat_template(chat_template(tokenizer.bos_token, tokenizer.eos_token, for_training=False))


def name_splitter(parts: dict) -> str:
    """What llama.cpp calls the way in which a tokenizer splits text. The demo's takes "<" and ">" apart from
    other signs as well, which has no name there. Raises ValueError for what has none at all."""
    splitter = parts["pre_tokenizer"] or {}
    steps = [
        {name: value for name, value in step.items() if name != "trim_offsets"}
        for step in splitter.get("pretokenizers", [splitter])
        if step.get("pattern") != {"Regex": "[<>]"}
    ]
    for name, known in SPLITTERS.items():
        if parts["model"]["type"] == "BPE" and steps == known:
            return name
    raise ValueError(
        "llama.cpp has no name for the way in which this tokenizer splits text: --to llama exports it"
    )
