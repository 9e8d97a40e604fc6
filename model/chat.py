"""Everything that an answer needs, loaded and ready: weights, tokenizer, CLIP.

from model.chat import load_chat
chat = load_chat("out/512_vlm_sft.pth")
print(chat.ask("What is this?", "a.jpg"))

for text in chat.stream("What happens?", "a.mp4", temperature=0.7, seed=1):
    print(text, end="", flush=True)
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from model.checkpoint import LoadReport, config_of, load_weights, read_state_dict
from model.data.video import Frame, expand_videos, open_images
from model.decode import Decoder
from model.description import input_paths, read_description
from model.device import without_memory
from model.download_table import COMMAND, find_download
from model.fingerprint import check_inputs, fingerprint_clip, fingerprint_tokenizer
from model.generate import Sampling, TextStreamer, generate
from model.likelihood import log_probabilities
from model.names import is_video_name
from model.packing import pack_linears
from model.prompt import IMAGE_MARK, MARK, VIDEO_MARK, Prompt, Renderer, load_tokenizer, put_marks
from model.transformer import Transformer
from model.vision_utils import check_fit, get_img_embedding, get_img_process, get_vision_model

ANSWER_ROOM = 32  # tokens; a longer answer takes what the question leaves
Shown = str | Path | Frame | Image.Image  # an image or a video: a file, a frame of one, or a PIL image


class Chat:
    """A model that answers; holds no conversation, so one object can serve many people."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer,
        vision_model=None,
        image_processor=None,
        report: LoadReport | None = None,
        about: dict | None = None,
        inputs: dict[str, str] | None = None,
    ):
        """
        vision_model, image_processor  not needed where nothing is encoded
        about                          what the weights say of themselves: knows, questions, image_dir,
                                       max_rounds
        inputs                         fingerprints of the CLIP and the tokenizer in use
        """
        self.decoder, self.tokenizer, self.report, self.about = decoder, tokenizer, report, about or {}
        self.inputs = inputs or {}
        self.vision_model, self.image_processor = vision_model, image_processor
        config = decoder.config
        self.renderer = Renderer(tokenizer, config.num_image_tokens, config.max_seq_len, config.placeholder)

    def __repr__(self) -> str:
        decoder = self.decoder
        facts = [
            str(self.report.path),
            f"{decoder.num_parameters / 1e6:.1f} M parameters",
            f"{decoder.device} {str(decoder.dtype).removeprefix('torch.')}",
            f"context of {decoder.config.max_seq_len} tokens",
            *filter(None, [self.knows]),
        ]
        return f"Chat({', '.join(facts)})"

    @property
    def knows(self) -> str:
        """What the weights say that they know ("coloured shapes and nothing else"), or ""."""
        return self.about.get("knows", "")

    @property
    def questions(self) -> list[str]:
        """Questions that the weights name as examples."""
        return self.about.get("questions", [])

    @property
    def max_rounds(self) -> int:
        """Rounds of a chat to show where no flag says: 1 for a model that learned single rounds alone,
        else 0, all that fit."""
        return 1 if self.about.get("max_rounds") == 1 else 0

    @property
    def most_images(self) -> int:
        """In one question: with more there would be no room for words."""
        config = self.decoder.config
        return max(1, (config.max_seq_len - 1) // config.num_image_tokens)

    @functools.cached_property
    def most_characters(self) -> int:
        """That the context could hold, all in the longest token; counting a text's tokens takes long."""
        vocabulary = self.tokenizer.backend_tokenizer.get_vocab()
        return max(map(len, vocabulary)) * self.decoder.config.max_seq_len

    def encode(self, images: Iterable[Shown]) -> Tensor:
        """Images to image features, (M, N, vision_dim)."""
        return self.encode_pixels(self.read_pixels(images))

    def read_pixels(self, images: Iterable[Shown]) -> Tensor:
        """Images to what CLIP takes, (M, 3, S, S). One is open at a time: a photograph takes 300 MB."""
        side = self.image_processor.size
        pixels = [get_img_process(image, self.image_processor) for image in open_images(images)]
        return torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side)

    def encode_pixels(self, pixel_values: Tensor) -> Tensor:
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

    def ask(
        self,
        question: str | list[dict],
        images: Shown | Sequence[Shown] = (),
        sampling: Sampling | None = None,
        **settings,
    ) -> str:
        """The answer to a question; all that is said of stream() holds."""
        return "".join(self.stream(question, images, sampling, **settings)).strip()

    def stream(
        self,
        question: str | list[dict],
        images: Shown | Sequence[Shown] = (),
        sampling: Sampling | None = None,
        **settings,
    ) -> Iterator[str]:
        """The answer, piece by piece as it is made.

        question  as typed; or a conversation, turns of which the last asks, with a mark for each image
        images    what it is about, one or several: paths of images or (known by their names) of videos, PIL
                  images; none for a question in words alone
        settings  of Sampling, by their names: temperature=0.7, max_new_tokens=50, ...
        raises    FileNotFoundError or ValueError, naming the file or the setting
        """
        if sampling and settings:
            raise ValueError(f"give sampling, or {', '.join(settings)}, not both")
        sampling = sampling or Sampling(**settings)
        shown = [images] if isinstance(images, Shown) else list(images)
        turns = question
        if isinstance(question, str):
            videos = [image for image in shown if is_video(image)]
            stills = [image for image in shown if not is_video(image)]
            turns, shown = self.recall([self.compose(question, stills, videos)], sampling.max_new_tokens)
        streamer = TextStreamer(self.tokenizer)
        ids = generate(
            self.decoder, [self.render(turns)], self.tokenizer.eos_token_id, sampling, [self.encode(shown)]
        )
        for (token,) in ids:
            yield streamer.push(token)
        yield streamer.finish()

    def compose(
        self,
        question: str,
        images: Sequence[Shown] = (),
        videos: Sequence[str | Path] = (),
        max_frames: int = 8,
    ) -> "Round":
        """A round of a chat: a question as typed, the images and the frames of the videos shown with it.
        Raises FileNotFoundError or ValueError, naming the video."""
        if not videos:
            return Round(question, list(images))
        if (question.count(IMAGE_MARK), question.count(VIDEO_MARK)) != (len(images), len(videos)):
            question = without(question, IMAGE_MARK, VIDEO_MARK)
        marked = put_marks(question, len(images), len(videos))
        stills, moving = iter(images), iter(map(Path, videos))
        files = [next(stills if mark == IMAGE_MARK else moving) for mark in MARK.findall(marked)]
        parts, turns = self.prepare([{"from": "human", "value": marked}], files, max_frames)
        return Round(turns[0]["value"], [image for part in parts for image in part])

    def recall(
        self, rounds: list["Round"], max_new_tokens: int, max_rounds: int = 0, system: str = ""
    ) -> tuple[list[dict], list]:
        """What stream() is to be given for the last question of a chat: recent_turns() that leave room for an
        answer of max_new_tokens, or for half a context of answer; in front of them a system text."""
        context = self.decoder.config.max_seq_len
        limit = context - min(max_new_tokens, context // 2)
        front = [{"from": "system", "value": system}] if system else []

        def fits(turns: list[dict]) -> bool:
            num_characters = sum(len(turn["value"]) for turn in turns)
            return (
                num_characters <= self.most_characters and len(self.render(front + turns).input_ids) <= limit
            )

        turns, images = recent_turns(rounds, fits, max_rounds)
        return front + turns, images

    def answer_batch(
        self, conversations: list[list[dict]], image_features: list[Tensor], sampling: Sampling | None = None
    ) -> list[str]:
        """The answers to many conversations at once; image_features: (n, N, vision_dim) of each."""
        return [self.read(ids) for ids in self.answer_ids(conversations, image_features, sampling)]

    def answer_ids(
        self,
        conversations: list[list[dict]],
        image_features: list[Tensor],
        sampling: Sampling | None = None,
        streams: Sequence[int] = (),
    ) -> list[list[int]]:
        """The same as token ids, without the closing </s>; streams: as for generate()."""
        prompts = [self.render(turns) for turns in conversations]
        answers: list[list[int]] = [[] for _ in prompts]
        eos_id = self.tokenizer.eos_token_id
        for ids in generate(self.decoder, prompts, eos_id, sampling, image_features, streams):
            for answer, token in zip(answers, ids, strict=True):
                if token is not None:
                    answer.append(token)
        return answers

    def read(self, ids: list[int]) -> str:
        """An answer's ids as text."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def encode_answer(self, answer: str) -> list[int]:
        """An answer as training learns it: its tokens and the closing </s>."""
        return [*self.renderer.encode(answer), self.tokenizer.eos_token_id]

    def log_probabilities(
        self, conversations: list[list[dict]], answers: list[list[str]], image_features: list[Tensor]
    ) -> list[list[Tensor]]:
        """For each conversation and each of the answers that it might get, the log-probability of every token
        of that answer, the closing </s> included, (tokens,) float32."""
        prompts = [self.render(turns) for turns in conversations]
        ids = [[self.encode_answer(answer) for answer in given] for given in answers]
        return log_probabilities(self.decoder, prompts, ids, image_features)


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
    command = find_download(weights) or f"{COMMAND} vlm"
    cure = f"train it (README, 'Stages'), or download v1's with {command}"
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
    inputs = {
        "CLIP": fingerprint_clip(vision_model, image_processor),
        "tokenizer": fingerprint_tokenizer(tokenizer),
    }
    if not allow_other_inputs:
        check_inputs(weights, description, {"CLIP": clip_path, "tokenizer": tokenizer_path}, inputs)
    vision_model.to(device, dtype)
    if dtype != torch.float32:  # in fp32 CLIP stays mapped from its file: a packed copy would double it
        pack_linears(vision_model, config.num_image_tokens)
    about = description.get("about", {})
    if "knows" in about:
        report.details.append(about["knows"])
    return Chat(decoder, tokenizer, vision_model, image_processor, report, about, inputs)


# ---- what is shown -----------------------------------------------------------------------------------------


def is_video(shown: Shown) -> bool:
    return isinstance(shown, str | Path) and is_video_name(shown)


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
    return put_marks(text if text.count(IMAGE_MARK) == num_images else without(text, IMAGE_MARK), num_images)


def without(text: str, *marks: str) -> str:
    while any(mark in text for mark in marks):  # again: "<ima<image>ge>" leaves a new mark behind
        text = re.sub("|".join(marks), "", text)
    return text


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
