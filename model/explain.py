"""What mattered in the image: parts of it are made blank, and the answer's log-probability is measured again.

    explanation = explain(chat, "What colour is the star?", open_image("a.jpg"))
    explanation.total           # (7, 7): nats that the answer loses with each patch
    explanation.maps[3]         # (7, 7): of them, those that its fourth word loses
    draw_heat(explanation.image, explanation.total).save("heat.png")        # model/heat.py

This is occlusion (Zeiler & Fergus 2014), on image features. A window of 2 x 2 patches slides over the image,
beyond its edges too, so that 64 windows cover every patch four times; a patch's drop is the mean of its four.
Single patches do not do: what one shows, its neighbours have seen as well.

    blank            what CLIP says of an empty sheet in the image's median colour, at the same places
    the class token  is blank throughout, before and after: it has seen the whole image, and would go on
                     saying what a hidden patch has shown

A drop is what the answer loses with a window: it is negative where that makes the answer likelier. Attention
says less. It is given for comparison only: where a model looks is not yet what it uses
(benchmarks/RESULTS.md, "What mattered in the image").

Letters: M images, N tokens per image, S side of the patch grid (7), W windows, T tokens of prompt and answer,
A tokens of the answer, D model width.
"""

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.chat import Chat
from model.decode import Decoder
from model.generate import Sampling, TextStreamer, generate
from model.image_modes import to_rgb
from model.prompt import Prompt, put_marks
from model.vision_proj import check_each_row

UNITS = 7  # a window is two units wide, of which so many make a side: one patch each at 7 x 7, two at 14 x 14
ROWS = 8  # windows that are read at once, behind what they share: on a CPU more were not faster
# Between these no space is written, so every token begins a word.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
LETTER, JOINT = rf"[^\W{UNSPACED}]", "['\u2019-]"
INSIDE_A_WORD = re.compile(f"{LETTER}{LETTER}|{LETTER}{JOINT}|{JOINT}{LETTER}")


@dataclass(frozen=True)
class Explanation:
    """What mattered in one image for one answer. All figures are natural logarithms (nats).

    image      as the model was shown it: RGB, upright
    words      of the answer, with the spaces in front of them: "".join(words) is the answer
    log_probs  (words,) of each word, after those before it, with everything in view
    maps       (words, S, S) float32: what each word loses with each patch; below 0, what it gains
    attention  (S, S), its sum is 1: how the answer's attention to the image spreads over it, the mean of all
               layers and heads; for comparison only
    """

    image: Image.Image
    words: list[str]
    log_probs: np.ndarray
    maps: np.ndarray
    attention: np.ndarray

    @property
    def answer(self) -> str:
        return "".join(self.words)

    @property
    def total(self) -> np.ndarray:
        """(S, S): what the whole answer loses with each patch, the sum of its words."""
        return self.maps.sum(0)


def explain(
    chat: Chat, question: str, image: Image.Image, answer: str | None = None, sampling: Sampling | None = None
) -> Explanation:
    """What mattered in an image for the answer to a question about it.

    question  as typed; an image mark that it does not hold is put in front
    answer    one that somebody else gives, or the page has shown; None: the model's own, by `sampling`
    raises    ValueError if the answer is empty, or does not fit the context with the question
    """
    turns = [{"from": "human", "value": put_marks(question, 1)}]
    return explain_chat(chat, turns, [image], answer, sampling)[0]


@torch.inference_mode()
def explain_chat(
    chat: Chat,
    turns: list[dict],
    images: list[Image.Image],
    answer: str | None = None,
    sampling: Sampling | None = None,
) -> list[Explanation]:
    """explain() for a conversation, as Chat.stream() takes it: for each image an explanation, all of the
    same answer, with maps of its own."""
    if not images:
        raise ValueError("nothing is shown with this question, so there is no image to explain")
    images = [to_rgb(image) for image in images]
    features = chat.encode([*images, *map(blank_sheet, images)])  # (2 M, N, vision_dim)
    seen, blank = features.split(len(images))
    prompt = chat.render(turns)
    check_each_row([len(prompt.image_slots)], [len(images)])
    if answer is None:
        steps = generate(chat.decoder, [prompt], chat.tokenizer.eos_token_id, sampling, [seen])
        ids = [token for (token,) in steps]
    else:
        ids = chat.renderer.encode(answer)
    words, tokens_of = split_words(chat.tokenizer, ids)
    if not words:
        raise ValueError("the answer is empty, so there is nothing to explain")
    check_length(len(prompt.input_ids) + len(ids), chat.decoder.config.max_seq_len)
    windows = windows_of(math.isqrt(seen.shape[1]))  # a class token does not change the root
    log_probs, drops, attention = occlude(chat.decoder, prompt, ids, seen, blank, windows)
    per_word = drops.new_zeros(len(drops), len(words), *drops.shape[2:]).index_add_(1, tokens_of, drops)
    of_words = log_probs.new_zeros(len(words)).index_add_(0, tokens_of, log_probs)
    return [
        Explanation(image, words, of_words.numpy(), maps.numpy(), looked_at.numpy())
        for image, maps, looked_at in zip(images, per_word, attention, strict=True)
    ]


def blank_sheet(image: Image.Image) -> Image.Image:
    """An empty sheet in the median colour of an image, so that an image without anything in it is one."""
    small = image.resize((64, 64), Image.Resampling.BOX, reducing_gap=2)
    colour = np.median(np.asarray(small).reshape(-1, 3), axis=0)
    return Image.new("RGB", (1, 1), tuple(int(value) for value in colour))


def check_length(length: int, limit: int) -> None:
    if length > limit:
        raise ValueError(
            f"the question and the answer have {length} tokens with what is shown, but the model's context "
            f"holds {limit}"
        )


def split_words(tokenizer, ids: list[int]) -> tuple[list[str], Tensor]:
    """The words of an answer, together all of its text, and which of them each token belongs to, (ids,).

    Letters that follow each other are one word, of however many tokens, and so is each mark of punctuation;
    where no spaces are written, in Chinese, every token is one. A token that only begins a character belongs
    to the word that has the character.
    """
    streamer = TextStreamer(tokenizer)
    pieces = [streamer.push(token) for token in ids]
    if pieces:
        pieces[-1] += streamer.finish()
    words: list[str] = []
    tokens_of: list[int] = []
    for count, piece in enumerate(pieces, 1):
        if piece and words and INSIDE_A_WORD.fullmatch(words[-1][-1] + piece[0]):
            words[-1] += piece
        elif piece:
            words.append(piece)
        if piece or count == len(pieces):  # with the tokens that waited for it
            tokens_of += [len(words) - 1] * (count - len(tokens_of))
    return words, torch.tensor(tokens_of, dtype=torch.long)


# ---- occlusion ---------------------------------------------------------------------------------------------


def windows_of(side: int) -> Tensor:
    """(W, side, side) bool: the patches that each window hides. Windows stand half a window apart, so every
    patch is hidden by four."""
    unit = max(1, round(side / UNITS))
    starts = range(-unit, side, unit)
    windows = torch.zeros(len(starts) ** 2, side, side, dtype=torch.bool)
    for window, (top, left) in zip(windows, itertools.product(starts, starts), strict=True):
        window[max(0, top) : top + 2 * unit, max(0, left) : left + 2 * unit] = True
    return windows


def occlude(
    decoder: Decoder, prompt: Prompt, answer_ids: list[int], seen: Tensor, blank: Tensor, windows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Measure an answer with every window hidden in turn.

    seen, blank  (M, N, vision_dim): features of the images, and of nothing
    windows      (W, S, S) bool; tokens of an image beyond S * S stand in front, for no patch: a class token
    returns      log-probabilities of the answer's tokens (A,), their drops (M, A, S, S), attention (M, S, S)
    """
    device, side = decoder.device, windows.shape[-1]
    (M, N), windows = seen.shape[:2], windows.flatten(1).to(device)  # (W, patches)
    has_class = N - windows.shape[1]
    input_ids = torch.tensor([prompt.input_ids + answer_ids[:-1]], device=device)  # (1, T)
    slots = torch.tensor(prompt.image_slots, device=device)  # (M, N)
    answer = torch.tensor(answer_ids, device=device)
    real, empty = (decoder.embed(input_ids, features, slots)[0] for features in (seen, blank))  # (T, D)

    hidden = torch.zeros(M, len(windows), len(real), dtype=torch.bool, device=device)
    for image, places in enumerate(slots[:, has_class:]):
        hidden[image][:, places] = windows
    base = real.clone()
    base[slots[:, :has_class]] = empty[slots[:, :has_class]]

    logits, _ = decoder.read(real[None], len(answer))
    before, after = measure_hidden(decoder, base, empty, hidden.flatten(0, 1), answer)  # (A,), (M * W, A)
    drops = (before - after).view(M, len(windows), -1)
    covering = windows.float() / windows.sum(0)  # (W, patches)
    drops = torch.einsum("mwa,wp->map", drops, covering).unflatten(-1, (side, side))
    looked = attend(decoder, real[None], len(answer))[slots[:, has_class:]]  # (M, patches)
    looked = (looked / looked.sum(-1, keepdim=True)).unflatten(-1, (side, side))
    return log_probs_of(logits, answer)[0].cpu(), drops.cpu(), looked.cpu()


def measure_hidden(
    decoder: Decoder, base: Tensor, empty: Tensor, hidden: Tensor, answer: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of an answer's tokens (A,) behind the embeddings `base` (T, D); and, (R, A), behind
    rows that have `empty` (T, D) in their place where `hidden` (R, T) says so.

    What stands before the first hidden token of a row has the same keys and values as in `base`, so it is not
    read again: the causal network makes that exact.
    """
    logits, read = decoder.read(base[None], len(answer))
    before = log_probs_of(logits, answer)[0]
    after = before.new_empty(len(hidden), len(answer))
    first = hidden.int().argmax(1)
    for rows in first.argsort(stable=True).split(ROWS):
        start = int(first[rows[0]])
        h = torch.where(hidden[rows, start:, None], empty[start:], base[start:])  # (rows, T - start, D)
        prefix = [(keys[:, :, :start], values[:, :, :start]) for keys, values in read]
        after[rows] = log_probs_of(decoder.read(h, len(answer), prefix)[0], answer)
    return before, after


def log_probs_of(logits: Tensor, answer: Tensor) -> Tensor:
    """logits (B, A, V), answer (A,) -> (B, A)"""
    log_probs = logits.float().log_softmax(-1)
    return log_probs.gather(-1, answer.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1)


def attend(decoder: Decoder, h: Tensor, num_last: int) -> Tensor:
    """How much the tokens that predict an answer attend to every token, (T,): the mean of all layers, heads
    and of those num_last tokens of h (1, T, D)."""
    T = h.shape[1]
    seen = torch.ones(T, T, dtype=torch.bool, device=h.device).tril()
    looked = torch.zeros(T, device=h.device)
    for layer in decoder.layers:
        q, k, v = decoder.project(layer, h, decoder.rope[:T])
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)  # (1, H, T, T)
        looked += weights[0, :, -num_last:].mean((0, 1)) / len(decoder.layers)
        h = decoder.finish(layer, h, weights.to(v.dtype) @ v)
    return looked
