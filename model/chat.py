"""Everything that an answer needs, loaded and ready: weights, tokenizer, CLIP.

chat = load_chat("out/512_vlm_sft.pth", "model/minimind_tokenizer",
                 "model/clip_model/clip-vit-base-patch32")
for text in chat.stream([{"from": "human", "value": "<image>\\nWhat is this?"}], [open_image("a.jpg")]):
    print(text, end="", flush=True)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from model.checkpoint import LoadReport, config_of, load_weights, read_state_dict
from model.data.video import Frame, expand_videos
from model.decode import Decoder
from model.description import input_paths, read_description
from model.device import without_memory
from model.fingerprint import check_inputs
from model.generate import Sampling, TextStreamer, generate
from model.packing import pack_linears
from model.prompt import IMAGE_MARK, Prompt, Renderer, load_tokenizer, put_marks
from model.transformer import Transformer
from model.vision_utils import check_fit, get_img_embedding, get_img_process, get_vision_model

ANSWER_ROOM = 32  # tokens; a longer answer takes what the question leaves


class Chat:
    """A model that answers; holds no conversation, so one object can serve many people."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer,
        vision_model,
        image_processor,
        report: LoadReport,
        about: dict | None = None,
    ):
        """about: what the weights say of themselves: knows, questions, image_dir, max_rounds"""
        self.decoder, self.tokenizer, self.report, self.about = decoder, tokenizer, report, about or {}
        self.vision_model, self.image_processor = vision_model, image_processor
        config = decoder.config
        self.renderer = Renderer(tokenizer, config.num_image_tokens, config.max_seq_len, config.placeholder)

    @property
    def max_rounds(self) -> int:
        """Rounds of a chat to show where no flag says: 1 for a model that learned single rounds alone,
        else 0, all that fit."""
        return 1 if self.about.get("max_rounds") == 1 else 0

    def encode(self, images: list[Image.Image]) -> Tensor:
        """Images to image features, (M, N, vision_dim)."""
        side = self.image_processor.size
        pixels = [get_img_process(image, self.image_processor) for image in images]
        pixel_values = torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side)
        return get_img_embedding(pixel_values.to(self.decoder.device), self.vision_model)

    def render(self, turns: list[dict]) -> Prompt:
        return self.renderer.render(turns)

    def prepare(
        self, turns: list[dict], files: list[Path], max_frames: int = 8
    ) -> tuple[list[list[Path | Frame]], list[dict]]:
        """What is encoded of images and videos, and turns with a mark for each; see expand_videos(). Videos
        leave room for an answer."""
        context = replace(self.renderer, max_seq_len=self.renderer.max_seq_len - ANSWER_ROOM)
        return expand_videos(turns, files, context, max_frames, frames_per_second=1.0)

    def stream(
        self, turns: list[dict], images: list[Image.Image], sampling: Sampling | None = None
    ) -> Iterator[str]:
        """The answer to one conversation, piece by piece as it is made."""
        streamer = TextStreamer(self.tokenizer)
        ids = generate(
            self.decoder, [self.render(turns)], self.tokenizer.eos_token_id, sampling, [self.encode(images)]
        )
        for (token,) in ids:
            yield streamer.push(token)
        yield streamer.finish()

    def recall(
        self, rounds: list["Round"], max_new_tokens: int, max_rounds: int = 0
    ) -> tuple[list[dict], list]:
        """What stream() is to be given for the last question of a chat: recent_turns() that leave room for an
        answer of max_new_tokens, or for half a context of answer."""
        context = self.decoder.config.max_seq_len
        limit = context - min(max_new_tokens, context // 2)
        return recent_turns(rounds, lambda turns: len(self.render(turns).input_ids) <= limit, max_rounds)

    def answer_batch(
        self, conversations: list[list[dict]], image_features: list[Tensor], sampling: Sampling | None = None
    ) -> list[str]:
        """The answers to many conversations at once; image_features: (n, N, vision_dim) of each."""
        prompts = [self.render(turns) for turns in conversations]
        answers: list[list[int]] = [[] for _ in prompts]
        for ids in generate(self.decoder, prompts, self.tokenizer.eos_token_id, sampling, image_features):
            for answer, token in zip(answers, ids, strict=True):
                if token is not None:
                    answer.append(token)
        return [self.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


def load_chat(
    weights: str | Path,
    tokenizer_path: str | Path | None = None,
    clip_path: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    allow_other_inputs: bool = False,
) -> Chat:
    """Load a weight file or a Hugging Face folder with its tokenizer and CLIP, arranged for about batch_size
    conversations at once.

    Paths that are None are taken from the .json beside the weights (what they were trained with) or are the
    folder itself (if it holds a tokenizer), else v1's places. Raises FileNotFoundError or ValueError, naming
    the file and the cure; also for another tokenizer or CLIP than the weights were trained with, unless
    allow_other_inputs.
    """
    cure = "train it (README, 'Stages') or download it (README, 'Weights')"
    config, description = config_of(weights, read_state_dict(weights, cure)), read_description(weights)
    if not config.vision_dim:
        raise ValueError(
            f"{weights} is a language model without a vision projection, so it cannot see: "
            "train it with 1-pretrain_vlm.py first"
        )
    tokenizer_path, clip_path = input_paths(weights, description, tokenizer_path, clip_path)
    tokenizer = load_tokenizer(tokenizer_path, config.placeholder)
    with without_memory():  # the decoder's copy of the weights is then the only one
        model = Transformer(config)
    report = load_weights(model, weights, cure=cure)
    report.details += [
        f"{config.dim} wide, {config.n_layers} layers, {config.n_heads} heads "
        f"({config.n_kv_heads} key/value), {config.vocab_size} tokens, "
        f"context {config.max_seq_len}; projection from {config.vision_dim}"
        f"{' with a bias' if config.vision_proj_bias else ''}",
        f"tokenizer {tokenizer_path}, CLIP {clip_path}",
    ]
    decoder = Decoder(model.to(device, dtype), batch_size)
    del model  # and with it the mapped file, before another one is read
    vision_model, image_processor = get_vision_model(clip_path)
    check_fit(config, tokenizer, vision_model, weights, clip_path)
    if not allow_other_inputs:
        places = {"CLIP": clip_path, "tokenizer": tokenizer_path}
        check_inputs(weights, description, places, tokenizer, vision_model, image_processor)
    vision_model.to(device, dtype)
    if dtype != torch.float32:  # in fp32 CLIP stays mapped from its file: a packed copy would double it
        pack_linears(vision_model, config.num_image_tokens)
    about = description.get("about", {})
    if "knows" in about:
        report.details.append(about["knows"])
    return Chat(decoder, tokenizer, vision_model, image_processor, report, about)


# ---- a chat of several rounds ------------------------------------------------------------------------------


@dataclass
class Round:
    """One round of a chat: the question as typed, the images shown with it (files or PIL images), the answer
    ("" if there is none, or none yet)."""

    question: str
    images: list = field(default_factory=list)
    answer: str = ""


def mark_images(text: str, num_images: int) -> str:
    """Put the marks into a typed question. A typed `<image>` is one only if every image has its own."""
    if text.count(IMAGE_MARK) != num_images:
        while IMAGE_MARK in text:  # again: "<ima<image>ge>" leaves a new mark behind
            text = text.replace(IMAGE_MARK, "")
    return put_marks(text, num_images)


def recent_turns(
    rounds: list[Round], fits: Callable[[list[dict]], bool], max_rounds: int = 0
) -> tuple[list[dict], list]:
    """What of a chat the model is shown: the newest rounds, as many as fit; if none do, the question alone.

    rounds      the last one asks; others without an answer are left out
    fits        may a prompt be made of these turns?
    max_rounds  the most to show, the question included (0 = all that fit)
    returns     turns for Renderer.render(), and the images of their marks in reading order

    A question without images is about those shown last. So they stay when their round goes: their marks
    then stand in front of the oldest question shown.
    """
    answered, in_view, new = [], [], []
    for asked in rounds:
        if asked.images:
            in_view = new = asked.images
        if asked.answer or asked is rounds[-1]:
            answered.append((asked, in_view, new))
            new = []

    def join(start: int) -> tuple[list[dict], list]:
        turns, images = [], []
        for number, (asked, in_view, new) in enumerate(answered[start:]):
            shown = new if number else in_view
            images += shown
            turns.append({"from": "human", "value": mark_images(asked.question, len(shown))})
            turns.append({"from": "gpt", "value": asked.answer})
        return turns[:-1], images

    start = len(answered) - 1
    oldest = max(0, len(answered) - max_rounds) if max_rounds else 0
    while start > oldest and fits(join(start - 1)[0]):  # an older round never makes a prompt shorter
        start -= 1
    return join(start)
