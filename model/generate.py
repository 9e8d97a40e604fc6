"""From a prompt to an answer, token by token: one prefill, then one step per token, each choosing the next.

Letters: B prompts, T tokens of the longest, M images, N tokens per image, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.data.batch import flat_slots, pad_rows
from model.decode import Decoder, KVCache
from model.prompt import Prompt
from model.vision_proj import check_each_row


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises ValueError with every setting that makes no sense."""

    temperature: float = 0.0  # 0 = always the likeliest token
    top_k: int = 0  # keep only the k likeliest; 0 = all
    top_p: float = 1.0  # keep the likeliest tokens that together hold this probability
    repetition_penalty: float = 1.0  # > 1 makes tokens of the prompt and of the answer so far less likely
    max_new_tokens: int = 256  # of the answer alone, whatever the prompt's length
    seed: int = 0  # row b of a batch draws from its own stream, seed + b

    def __post_init__(self):
        problems = []
        if not self.temperature >= 0:
            problems.append(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            problems.append(f"top_k must be 0 (all) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not self.repetition_penalty > 0:
            problems.append(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if problems:
            raise ValueError("; ".join(problems))


def generate(
    decoder: Decoder,
    prompts: list[Prompt],
    eos_id: int,
    sampling: Sampling | None = None,
    image_features: list[Tensor] | None = None,
    streams: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """Answer a batch of prompts of any lengths.

    image_features  of each prompt the features of its images, (n, N, vision_dim), n may be 0
    streams         of each prompt what is added to the seed, where that is not its row
    yields          one id per prompt and step; None for a prompt whose answer has ended (at eos_id, which is
                    not yielded, after max_new_tokens, or where the model's context is full)
    raises          ValueError if a prompt does not fit the context, or holds another number of placeholders
                    than it has images
    """
    sampling = sampling or Sampling()
    limit = decoder.config.max_seq_len
    input_ids, lengths, logits, cache = read_prompts(
        decoder, prompts, sampling.max_new_tokens, image_features
    )
    num_steps = min(sampling.max_new_tokens, limit - min(lengths))
    sampler = TokenSampler(sampling, input_ids, lengths, decoder.config.vocab_size, streams)

    rows = list(range(len(prompts)))  # the prompts that the cache holds
    answering = set(rows)
    for step in range(num_steps):
        next_ids = sampler(logits)  # (rows,)
        tokens: list[int | None] = [None] * len(prompts)
        for row, token in zip(rows, next_ids.tolist(), strict=True):
            if row in answering and token != eos_id and lengths[row] + step < limit:
                tokens[row] = token
            else:
                answering.discard(row)
        if not answering:
            return
        yield tokens
        if step + 1 == num_steps:
            return
        if len(answering) <= 0.75 * len(rows):  # enough have ended to be worth a copy of the cache
            still = [place for place, row in enumerate(rows) if row in answering]
            rows = [rows[place] for place in still]
            next_ids = next_ids[still]
            cache.select(still)
            sampler.select(still)
        logits = decoder.step(next_ids, cache)


def check_prompts(prompts: list[Prompt], max_seq_len: int) -> None:
    """Raise ValueError if one leaves no room for an answer."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    if longest >= max_seq_len:
        raise ValueError(
            f"the prompt has {longest} tokens, but the model's context holds {max_seq_len} with the answer"
        )


def read_prompts(
    decoder: Decoder, prompts: list[Prompt], max_new_tokens: int, image_features: list[Tensor] | None
) -> tuple[Tensor, list[int], Tensor, KVCache]:
    """Prompts of any lengths, checked and read in one call, as generate() takes them.

    returns  their ids (B, T), padded on the right; their lengths; the logits of the token after each (B, V);
             and the cache, with room for max_new_tokens or what the context leaves
    """
    lengths = [len(prompt.input_ids) for prompt in prompts]
    check_prompts(prompts, decoder.config.max_seq_len)
    room = decoder.config.max_seq_len - min(lengths)
    if image_features is not None:
        check_each_row(
            [len(prompt.image_slots) for prompt in prompts], [len(part) for part in image_features]
        )
        image_features = torch.cat(image_features)  # (M, N, V)
    input_ids = pad_rows([torch.tensor(prompt.input_ids) for prompt in prompts], 0)  # (B, T)
    input_ids = input_ids.to(decoder.device)
    slots = [
        torch.tensor(prompt.image_slots, dtype=torch.long).view(-1, decoder.config.num_image_tokens)
        for prompt in prompts
    ]
    slots = flat_slots(slots, input_ids.shape[1]).to(decoder.device)  # (M, N)
    logits, cache = decoder.prefill(
        input_ids,
        torch.tensor(lengths, device=decoder.device),
        min(max_new_tokens, room),
        image_features,
        slots,
    )
    return input_ids, lengths, logits, cache


class TokenSampler:
    """Chooses the next token of every row; equal to transformers' logits processors in the order they apply
    them."""

    def __init__(
        self,
        sampling: Sampling,
        input_ids: Tensor,
        lengths: list[int],
        vocab_size: int,
        streams: Sequence[int] = (),
    ):
        self.sampling = sampling
        self.seen = torch.zeros(len(lengths), vocab_size, dtype=torch.bool, device=input_ids.device)  # (B, V)
        for row, length in enumerate(lengths):
            self.seen[row, input_ids[row, :length]] = True
        # One generator per row: an answer does not depend on what else is in the batch.
        self.generators = [
            torch.Generator(input_ids.device).manual_seed(sampling.seed + stream)
            for stream in streams or range(len(lengths))
        ]

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (B, V) -> ids (B,)"""
        logits = self.penalise(logits.float())
        if self.sampling.temperature == 0:
            next_ids = logits.argmax(-1)
        else:
            probabilities = self.filter(logits / self.sampling.temperature).softmax(-1)
            next_ids = torch.cat(
                [
                    torch.multinomial(row, 1, generator=generator)
                    for row, generator in zip(probabilities, self.generators, strict=True)
                ]
            )
        if self.sampling.repetition_penalty != 1:
            self.seen[torch.arange(len(next_ids)), next_ids] = True
        return next_ids

    def select(self, rows: list[int]) -> None:
        """Forget all rows but these, in their order."""
        self.seen, self.generators = self.seen[rows], [self.generators[row] for row in rows]

    def penalise(self, logits: Tensor) -> Tensor:
        """Make seen tokens less likely: a positive logit is divided, a negative one multiplied (dividing
        would raise it)."""
        if self.sampling.repetition_penalty == 1:
            return logits
        penalised = torch.where(
            logits > 0, logits / self.sampling.repetition_penalty, logits * self.sampling.repetition_penalty
        )
        return torch.where(self.seen, penalised, logits)

    def filter(self, logits: Tensor) -> Tensor:
        """Set the logits outside top_k and top_p to -inf."""
        if self.sampling.top_k:
            kth = logits.topk(min(self.sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, 1)
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if self.sampling.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            # Before each token: the probability of all likelier ones.
            before = F.pad(ordered.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
            logits = logits.masked_fill(
                (before >= self.sampling.top_p).scatter(-1, order, before >= self.sampling.top_p),
                float("-inf"),
            )
        return logits


class TextStreamer:
    """Ids in, text out, never half a character: a Chinese character can span several byte-level tokens."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; often empty, or several characters."""
        self.ids.append(token_id)
        return self._advance(self._decode().rstrip("\ufffd"))

    def finish(self) -> str:
        """Whatever is still held back."""
        return self._advance(self._decode())

    def _decode(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def _advance(self, text: str) -> str:
        new, self.shown = text[len(self.shown) :], text
        return new


class StopWords:
    """Cuts a text that comes in pieces before the first of some words; no piece of a word is let through that
    may still become one.

    found  has one of them come? The rest of the text is then of no use.
    """

    def __init__(self, words: tuple[str, ...]):
        self.words, self.held, self.found = words, "", False

    def push(self, text: str) -> str:
        """What of the text is certain to stay."""
        text = self.held + text
        ends = [place for word in self.words if (place := text.find(word)) >= 0]
        if ends:
            self.held, self.found = "", True
            return text[: min(ends)]
        longest = max(map(len, self.words), default=1) - 1
        held = next(
            (size for size in range(min(longest, len(text)), 0, -1) if self.may_begin(text[-size:])), 0
        )
        self.held = text[len(text) - held :]
        return text[: len(text) - held]

    def may_begin(self, text: str) -> bool:
        return any(word.startswith(text) for word in self.words)

    def finish(self) -> str:
        """Whatever is still held back."""
        held, self.held = self.held, ""
        return held
