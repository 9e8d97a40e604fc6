"""Text to ids and back, by the library `tokenizers` alone.

A tokenizer.json says all there is to say, so transformers, which takes two seconds to import, is asked only
for folders without one, or where it would build on what that file says.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import tokenizers

from model.files import read_json

MAX_BYTES = 256 << 20  # of tokenizer.json and its like; those of 250,000 tokens have 35 MB
# tokenizer_class in tokenizer_config.json: those that take tokenizer.json as it is; others rebuild it.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Those that transformers is asked for, with and without "Fast" behind them, and the model_type in config.json
# that may take part in the choice. A folder must not choose what code reads it.
CLASSES = (
    "Llama",
    "CodeLlama",
    "GPT2",
    "Qwen2",
    "Gemma",
    "GPTNeoX",
    "CodeGen",
    "Bloom",
    "Cohere",
    "T5",
    "CLIP",
)
CLASSES += ("Bert", "Roberta", "XLMRoberta", "Siglip", "DebertaV2", "Albert", "PreTrained")
MODEL_TYPES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "gemma",
    "gemma2",
    "gpt2",
    "gpt_neox",
)
CHATML = "<|im_start|>"  # opens a turn in Qwen's format; its tokenizers do not name it as theirs
# What it may see of the folder.
FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
FILES += ("special_tokens_map.json", "added_tokens.json")


class Encoded(NamedTuple):
    input_ids: list[int]


class Tokenizer:
    """As much of transformers' tokenizers as is used here, and with the same results.

    Text is text: a "<s>" in it does not become the token of that name. Nothing changes after __init__, so
    threads can share one, and as no text is shared out among threads of its own, it can be forked.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_token: str | None,
        eos_token: str | None,
        unk_token: str | None = None,
    ):
        self.backend_tokenizer = backend
        backend.encode_special_tokens = True  # as ordinary text
        backend.no_truncation()
        backend.no_padding()
        if bos_token is None and backend.token_to_id(CHATML) is not None:
            bos_token = CHATML
        self.bos_token, self.eos_token, self.unk_token = bos_token, eos_token, unk_token
        self.bos_token_id, self.eos_token_id, self.unk_token_id = (
            None if token is None else backend.token_to_id(token)
            for token in (bos_token, eos_token, unk_token)
        )

    def __reduce__(self):
        # To a worker that is spawned: the library's own pickle forgets encode_special_tokens.
        return Tokenizer, (self.backend_tokenizer, self.bos_token, self.eos_token, self.unk_token)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def __call__(
        self, text: str, *, add_special_tokens: bool = False, split_special_tokens: bool = True
    ) -> Encoded:
        """The arguments are there for transformers' classes, which stand in for this one in tests."""
        assert split_special_tokens and not add_special_tokens
        return Encoded(self.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        """ids: a list, an array or a tensor"""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | None | list[int | None]:
        """One id or a list of them; that of unk_token for what is none of the tokens."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        number = self.backend_tokenizer.token_to_id(tokens)
        return self.unk_token_id if number is None else number


def read_tokenizer(path: Path) -> Tokenizer:
    """From a folder. Raises whatever the libraries raise where it cannot be read."""
    for name in FILES:
        if (path / name).is_file() and (size := (path / name).stat().st_size) > MAX_BYTES:
            raise ValueError(f"{name} has {size:,} bytes: at most {MAX_BYTES:,} are read")
    try:
        return read_tokenizer_json(path) or ask_transformers(path)
    except Exception:
        raise
    except BaseException as error:  # a library in Rust raises one that is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"a library cannot read it: {error}") from None


def read_tokenizer_json(path: Path) -> Tokenizer | None:
    """None where transformers would do more than read it: a class of its own, or tokens to be added."""
    config = read_json(path / "tokenizer_config.json")
    if config.get("tokenizer_class") not in PLAIN_CLASSES or not (path / "tokenizer.json").is_file():
        return None
    backend = tokenizers.Tokenizer.from_buffer((path / "tokenizer.json").read_bytes())
    added = backend.get_added_tokens_decoder().values()
    named = [token.content for token in added]
    if "added_tokens_decoder" in config:
        described = [tokenizers.AddedToken(**token) for token in config["added_tokens_decoder"].values()]
        if not {*map(repr, described)} <= {*map(repr, added)}:
            return None
    elif (path / "special_tokens_map.json").is_file():
        config |= read_json(path / "special_tokens_map.json")
    special = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in config.items()
        if name.endswith("_token") and isinstance(token, str | dict)  # add_bos_token is neither
    }
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = [*(more.values() if isinstance(more, dict) else more)]  # by a name of their own, or a list
    if backend.padding:
        more.append(backend.padding["pad_token"])
    if not all(token in named for token in [*special.values(), *more]):
        return None
    return Tokenizer(backend, *(special.get(name) for name in ("bos_token", "eos_token", "unk_token")))


def ask_transformers(path: Path) -> Tokenizer:
    """Of a copy of the folder that names no code, no kernels and no other files."""
    config = read_json(path / "tokenizer_config.json")
    kind = config.get("tokenizer_class")
    known = {f"{name}Tokenizer{ending}" for name in CLASSES for ending in ("", "Fast")} | {
        *PLAIN_CLASSES,
        None,
    }
    if not isinstance(kind, str | None) or kind not in known or (kind is None and "auto_map" in config):
        raise ValueError(
            f"tokenizer_config.json: tokenizer_class is {str(kind)[:80]}, which is not read here"
        )
    config = {
        name: value
        for name, value in config.items()
        if name not in ("auto_map", "name_or_path", "chat_template", "custom_generate")
        and not name.startswith("_")
        and not name.endswith(("_file", "_files"))
    }
    model_type = (
        read_json(path / "config.json").get("model_type") if (path / "config.json").is_file() else None
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            if (path / name).is_file():
                shutil.copyfile(path / name, Path(folder, name))
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
        if model_type in MODEL_TYPES:
            Path(folder, "config.json").write_text(json.dumps({"model_type": model_type}))
        return load_copy(folder)


def load_copy(folder: str) -> Tokenizer:
    from transformers import AutoTokenizer  # only here: it takes two seconds

    # Said, not left out: transformers would ask at the terminal whether to run the code of a folder.
    found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not getattr(found, "backend_tokenizer", None):
        raise ValueError(f"transformers has no fast tokenizer for {type(found).__name__}")
    return Tokenizer(found.backend_tokenizer, found.bos_token, found.eos_token, found.unk_token)
