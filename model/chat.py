"""Everything that an answer needs, loaded and ready: weights, tokenizer, CLIP.

    chat = load_chat("out/512_vlm_sft.pth", "model/minimind_tokenizer",
                     "model/clip_model/clip-vit-base-patch32")
    for text in chat.stream([{"from": "human", "value": "<image>\\nWhat is this?"}], [Image.open("a.jpg")]):
        print(text, end="", flush=True)
"""
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from model.checkpoint import LoadReport, config_of, load_weights, read_description, read_state_dict
from model.decode import Decoder, pack_linears
from model.generate import Sampling, TextStreamer, generate
from model.model import Transformer
from model.prompt import Prompt, load_tokenizer, render_conversation
from model.video import Frame, lay_out
from model.vision_utils import get_img_embedding, get_img_process, get_vision_model, num_image_tokens

TOKENIZER_PATH = "model/minimind_tokenizer"
CLIP_PATH = "model/clip_model/clip-vit-base-patch32"
ANSWER_ROOM = 32        # tokens; a longer answer takes what the question leaves


class Chat:
    """A model that answers; holds no conversation, so one object can serve many people."""

    def __init__(self, decoder: Decoder, tokenizer, vision_model, image_processor, report: LoadReport):
        self.decoder, self.tokenizer, self.report = decoder, tokenizer, report
        self.vision_model, self.image_processor = vision_model, image_processor

    def encode(self, images: list[Image.Image]) -> Tensor:
        """Pictures to image features, (M, N, vision_dim)."""
        side = self.image_processor.size
        pixels = [get_img_process(image, self.image_processor) for image in images]
        pixel_values = torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side)
        return get_img_embedding(pixel_values.to(self.decoder.device), self.vision_model)

    def render(self, turns: list[dict]) -> Prompt:
        return render_conversation(turns, self.tokenizer, self.decoder.config.num_image_tokens)

    def lay_out(self, turns: list[dict], files: list[Path],
                max_frames: int = 8) -> tuple[list[list[Path | Frame]], list[dict]]:
        """Pictures and films to what is encoded, and turns with a mark for each; see video.lay_out(). Films
        leave room for an answer."""
        config = self.decoder.config
        return lay_out(turns, files, self.tokenizer, config.num_image_tokens,
                       config.max_seq_len - ANSWER_ROOM, max_frames, frames_per_second=1.0)

    def stream(self, turns: list[dict], images: list[Image.Image],
               sampling: Sampling | None = None) -> Iterator[str]:
        """The answer to one conversation, piece by piece as it is made."""
        streamer = TextStreamer(self.tokenizer)
        ids = generate(self.decoder, [self.render(turns)], self.tokenizer.eos_token_id, sampling,
                       self.encode(images))
        for token, in ids:
            yield streamer.push(token)
        yield streamer.finish()

    def answer_batch(self, conversations: list[list[dict]], image_features: Tensor,
                     sampling: Sampling | None = None) -> list[str]:
        """The answers to many conversations at once; image_features (M, N, vision_dim) in reading order."""
        prompts = [self.render(turns) for turns in conversations]
        answers: list[list[int]] = [[] for _ in prompts]
        for ids in generate(self.decoder, prompts, self.tokenizer.eos_token_id, sampling, image_features):
            for answer, token in zip(answers, ids, strict=True):
                if token is not None:
                    answer.append(token)
        return [self.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


def load_chat(weights: str | Path, tokenizer_path: str | Path | None = None,
              clip_path: str | Path | None = None, device: torch.device | str = "cpu",
              dtype: torch.dtype = torch.float32, batch_size: int = 1) -> Chat:
    """Load a weight file with its tokenizer and CLIP, laid out for about batch_size conversations at once.

    Paths that are None are taken from the .json beside the weights (what they were trained with), else v1's
    places. Raises FileNotFoundError or ValueError, naming the file and the cure.
    """
    cure = "train it (README, 'Stages') or download it (README, 'Weights')"
    config, description = config_of(weights, read_state_dict(weights, cure)), read_description(weights)
    if not config.vision_dim:
        raise ValueError(f"{weights} is a language model without a vision projection: "
                         "train it with 1-pretrain_vlm.py first")
    tokenizer = load_tokenizer(tokenizer_path or description.get("tokenizer_path", TOKENIZER_PATH))
    clip_path = clip_path or description.get("clip_path", CLIP_PATH)
    # On the meta device the model costs nothing; the decoder's layout is then the only copy of its weights.
    with torch.device("meta"):
        model = Transformer(config)
    report = load_weights(model, weights, cure=cure)
    decoder = Decoder(model.to(device, dtype), batch_size)
    vision_model, image_processor = get_vision_model(clip_path)
    check_fit(config, tokenizer, vision_model, weights, clip_path)
    vision_model.to(device, dtype)
    if dtype != torch.float32:      # in fp32 CLIP stays mapped from its file: a packed copy would double it
        pack_linears(vision_model, config.num_image_tokens)
    return Chat(decoder, tokenizer, vision_model, image_processor, report)


def check_fit(config, tokenizer, vision_model, weights, clip_path) -> None:
    """Raise ValueError unless the language model, the tokenizer and CLIP have the same sizes."""
    width, tokens = vision_model.config.hidden_size, num_image_tokens(vision_model)
    if (width, tokens) != (config.vision_dim, config.num_image_tokens):
        raise ValueError(f"{weights} was made for image features of {config.num_image_tokens} x "
                         f"{config.vision_dim}, but the CLIP at {clip_path} gives {tokens} x {width}: "
                         "name the right one with --clip_path")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens but {weights} knows "
                         f"{config.vocab_size}: name the right one with --tokenizer_path")
