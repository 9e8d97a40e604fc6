"""Text to ids without transformers: ids, texts and fingerprints as AutoTokenizer gives them; folders that
need more are left to it."""

import json
import pickle
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import model.tokenizer
from model.fingerprint import fingerprint_tokenizer
from model.tokenizer import read_tokenizer, read_tokenizer_json

SPECIALS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
TEXTS = [
    "",
    " ",
    "\n",
    "\r\n\t",
    "plain words, and more",
    "<s>user\nhi</s>\n<s>assistant\n",
    "</s></s><s>",
    "<unk>",
    "a<s>b </s> c",
    "<extra> in the text",
    " <",
    "<<<< >>>> <>",
    "<image>\n这张图片里有什么？",
    "龘靐齉爨",
    "e\u0301 \u00e9 \ufb01 \u3000 \u200b \u00a0",  # combined, ligature, spaces of several kinds
    "🐳👩‍👩‍👧‍👦",
    "\x00\x07",
    "   leading and trailing   ",
    "▁lower▁one▁eighth",
    "x" * 3000,
]


def random_texts(count: int, seed: int) -> list[str]:
    random_ = random.Random(seed)
    pieces = [*TEXTS, "<", ">", "s", "/", " ", "图", "\n", "1", "ü", "🙂"]
    return ["".join(random_.choices(pieces, k=random_.randint(1, 8))) for _ in range(count)]


def train(tokenizer: Tokenizer, trainer, specials: dict = SPECIALS) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator([*TEXTS, "user assistant image words"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def byte_level(folder: Path) -> None:
    """As MiniMind's: "<<<<" and " <" are tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIALS.values()],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    train(tokenizer, trainer).save_pretrained(folder)


def sentencepiece_like(folder: Path) -> None:
    """As Llama's: spaces are letters, bytes are the last resort."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIALS.values(), *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    train(tokenizer, trainer).save_pretrained(folder)


def unigram(folder: Path) -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[*SPECIALS.values()], unk_token="<unk>", show_progress=False
    )
    train(tokenizer, trainer).save_pretrained(folder)


def configure(folder: Path, **values) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def as_v1_wrote_it(folder: Path) -> None:
    """transformers 4.44: every added token in tokenizer_config.json, and the specials once more in a file."""
    byte_level(folder)
    details = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    configure(
        folder,
        added_tokens_decoder={
            str(n): {"content": token} | details for n, token in enumerate(SPECIALS.values())
        },
        tokenizer_class="PreTrainedTokenizerFast",
        add_bos_token=False,
        add_eos_token=True,
        add_prefix_space=False,
        additional_special_tokens=[],
        clean_up_tokenization_spaces=False,
        legacy=True,
        pad_token=None,
        sp_model_kwargs={},
        spaces_between_special_tokens=False,
        chat_template="{{ messages }}",
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<unk>"}))  # passed over


def with_a_map_of_specials(folder: Path) -> None:
    """Without added_tokens_decoder the file beside it decides."""
    byte_level(folder)
    configure(folder, bos_token=None, eos_token="<s>")
    details = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"} | details, "eos_token": "</s>"})
    )


def that_cuts_and_pads(folder: Path) -> None:
    """tokenizer.json remembers truncation and padding that somebody switched on."""
    byte_level(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=16, pad_token="</s>", pad_id=2)
    tokenizer.save(str(folder / "tokenizer.json"))


def with_more_tokens(folder: Path) -> None:
    """One that is special, one that is not, one that takes the spaces before it."""
    byte_level(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<extra>", lstrip=True)]})
    tokenizer.add_tokens(["words"])
    tokenizer.save_pretrained(folder)


ALONE = [byte_level, sentencepiece_like, unigram, as_v1_wrote_it, with_a_map_of_specials, that_cuts_and_pads]
ALONE += [with_more_tokens]


def check_equal(folder: Path) -> None:
    """Ours and AutoTokenizer's, asked all that is asked of a tokenizer here, on many texts."""
    ours = read_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(ours) == len(theirs) and fingerprint_tokenizer(ours) == fingerprint_tokenizer(theirs)
    for name in ("bos_token", "eos_token", "bos_token_id", "eos_token_id", "unk_token", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    tokens = ["<", ">", "<s>", "user", "no such token", "图"]
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_ids("<s>") == theirs.convert_tokens_to_ids("<s>")
    for text in [*TEXTS, *random_texts(200, seed=1)]:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours(text, add_special_tokens=False, split_special_tokens=True).input_ids == ids, repr(text)
        ids += theirs(text).input_ids  # as markup, too: special tokens among them
        for skip in (False, True):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected, repr(text)
            assert ours.decode(torch.tensor(ids, dtype=torch.long), skip_special_tokens=skip) == expected
    random_ids = random.Random(2).choices(range(len(theirs)), k=500)
    assert ours.decode(random_ids) == theirs.decode(random_ids)


@pytest.mark.parametrize("save", ALONE, ids=lambda save: save.__name__)
def test_ids_and_text_are_those_of_transformers(tmp_path, monkeypatch, save):
    save(tmp_path)
    monkeypatch.setattr(model.tokenizer, "ask_transformers", None)  # not needed
    check_equal(tmp_path)


def test_the_demo_tokenizer_is_read_without_transformers(tokenizer_path, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "ask_transformers", None)
    check_equal(tokenizer_path)


def of_another_class(folder: Path) -> None:
    """Which builds its own normalizer, whatever tokenizer.json says."""
    sentencepiece_like(folder)
    configure(folder, tokenizer_class="LlamaTokenizerFast")


def with_a_special_to_be_added(folder: Path) -> None:
    byte_level(folder)
    configure(folder, eos_token="<end>")


def with_an_extra_to_be_added(folder: Path) -> None:
    byte_level(folder)
    configure(folder, additional_special_tokens=["<extra>"])


def that_pads_with_a_token_to_be_added(folder: Path) -> None:
    byte_level(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.save(str(folder / "tokenizer.json"))


def with_a_token_described_otherwise(folder: Path) -> None:
    """tokenizer_config.json says that "words" is a token; tokenizer.json does not."""
    byte_level(folder)
    configure(folder, added_tokens_decoder={"400": {"content": "words", "special": False}})


def of_sentencepiece_alone(folder: Path) -> None:
    """As Llama-family folders without a tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "texts").write_text("\n".join(["user assistant words", "<image> 图片里有什么", "abc def"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(SPECIALS | {"tokenizer_class": "LlamaTokenizer"})
    )


ASKING = [of_another_class, with_a_special_to_be_added, with_an_extra_to_be_added]
ASKING += [that_pads_with_a_token_to_be_added, with_a_token_described_otherwise, of_sentencepiece_alone]


@pytest.mark.parametrize("save", ASKING, ids=lambda save: save.__name__)
def test_where_more_is_to_be_done_transformers_does_it(tmp_path, save):
    save(tmp_path)
    assert read_tokenizer_json(tmp_path) is None
    check_equal(tmp_path)


def test_a_tokenizer_survives_the_way_to_a_worker_that_is_spawned(tokenizer):
    """The library's own pickle forgets that special tokens are to be text."""
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy("<s>user</s>").input_ids == tokenizer("<s>user</s>").input_ids
    assert not {1, 2} & set(copy("<s>user</s>").input_ids)
    assert (copy.bos_token_id, copy.eos_token_id, len(copy)) == (1, 2, len(tokenizer))


def test_threads_share_a_tokenizer(tokenizer):
    """transformers' class switches its backend between text and markup with each call."""
    texts = random_texts(300, seed=3)
    expected = [tokenizer(text).input_ids for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: tokenizer(text).input_ids, texts)) == expected


def test_a_name_that_is_not_utf_8_is_read(tokenizer_path, tmp_path):
    folder = shutil.copytree(tokenizer_path, Path(f"{tmp_path}/\udcff"))
    assert len(read_tokenizer(folder)) == len(read_tokenizer(tokenizer_path))
