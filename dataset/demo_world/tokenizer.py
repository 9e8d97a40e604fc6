"""The tokenizers of the demo world: one token for each of its words."""

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataset.demo_world.wording import LANGUAGES


def lexicon() -> list[str]:
    """Every word of both languages and of the chat format, as the tokenizer meets it."""
    patterns = ["user|assistant|[|]|An| an"]
    for language in LANGUAGES.values():
        patterns += [*language.words.values(), *language.numbers, *language.answers.values()]
        patterns += [language.yes, language.no, language.thing, language.list, language.begin, language.joint]
        patterns += [language.object, language.numbered, *sum(language.questions.values(), ())]
    literal = (re.sub(r"\{\w+\}|<image>|\n", "|", pattern) for pattern in patterns)
    words = (word for text in literal for word in re.findall(r" ?[A-Za-z]+|[\u4e00-\u9fff]+|[^\s|]", text))
    return list(dict.fromkeys(words))


def train_tokenizer(folder: Path, words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every one of the words is one token (the lexicon's make some 620), saved in
    `folder`.

    It is trained on the words, not on sentences: Chinese does not write where a word ends, and a BPE that
    sees it running spends its tokens on halves of characters and on whole clauses. Rows become twice as long.

    "<" and ">" get the ids that they have in MiniMind's tokenizer, 30 and 32, and are always tokens of their
    own: the placeholder of an image is made of them, and must never melt into what stands before it.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[<>]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,  # out of reach: training ends when every word is one token
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words or lexicon(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast
