"""The eye of the demo world: a very small CLIP, trained in a minute and saved in the format of the real one.

CLIP learns by matching. A batch of images and their captions go through two towers, each image must find
its own caption among all of them, and in doing so the vision tower comes to say what the caption says. A few
hundred steps on a few thousand images are next to nothing for that. Four things make them do, all measured:

1. The patch filters are not learnt. They are the lowest frequencies of a cosine transform (JPEG's) on three
   colour axes, so every patch arrives as a readable description of itself. And since they are frozen, their
   output is computed once for all images: a training step never touches a pixel.
2. The loss compares whole captions. One classifier per attribute looks like the natural choice, but it learns
   that a pair which training never showed does not exist: such shapes were recognised once in ten times.
3. Half of the batches hold only two colours. In a mixed batch the colour nearly tells which caption is right;
   in these it does not, and shape, size and position have to be seen.
4. A slow start: quiet position embeddings, a long warm-up, clipped gradients. Started loud and fast, some
   seeds spent half of the training on a plateau and told shapes apart in 62 % of cases instead of 99 %.

Letters: B images in a batch, P patches per image (7 * 7 = 49), T tokens of a caption, W width of the
vision tower, which is the number of filters (3 * 8 * 8 = 192).
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import processors
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.modeling_clip import CLIPAttention

from dataset.demo_world.scenes import Preset, Scene, Stage
from dataset.demo_world.sentences import caption
from model.images import open_image
from model.vision_utils import ImageProcessor, get_img_process

IMAGE_SIDE, PATCH_SIDE = 224, 32  # ViT-B/32's, hence its 50 tokens per image
POSITION_STD = 0.35  # CLIP's 0.02 drowns in the patches (positions were never learnt), 1.0 drowns the patches
TEXT_START, TEXT_END = "<|startoftext|>", "<|endoftext|>"
WARMUP_SHARE = 0.15  # of all steps
MAX_GRAD_NORM = 1.0
MAX_LOGIT_SCALE = 50.0  # CLIP clamps at 100, for batches of 32,768; fewer captions need less contrast
IMAGES_AT_ONCE = 64  # decoded in memory while patches are computed; also the sample that fits the filters


# ---- the model ----


def clip_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The demo's tokenizer, read from `folder`, with CLIP's own two marks around every text.

    They come last in the vocabulary, as in the real CLIP. "</s>" must not end a caption: its id is 2, and an
    end token of id 2 is transformers' sign of a CLIP saved before 2023, whose text is read off elsewhere.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": TEXT_START, "eos_token": TEXT_END, "pad_token": TEXT_END})
    marks = [(TEXT_START, tokenizer.bos_token_id), (TEXT_END, tokenizer.eos_token_id)]
    template = processors.TemplateProcessing(single=f"{TEXT_START} $A {TEXT_END}", special_tokens=marks)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def new_clip(preset: Preset, tokenizer: PreTrainedTokenizerFast, sample: Tensor, seed: int) -> CLIPModel:
    """An untrained CLIP of the preset's size; its patch filters are fitted to `sample` (B, 3, 224, 224)."""
    sizes = {"num_hidden_layers": preset.clip_layers, "projection_dim": preset.clip_projection_dim}
    config = CLIPConfig(
        projection_dim=preset.clip_projection_dim,
        vision_config=sizes
        | {
            "image_size": IMAGE_SIDE,
            "patch_size": PATCH_SIDE,
            "hidden_size": 3 * preset.clip_frequencies**2,
            "num_attention_heads": preset.clip_heads,
            "intermediate_size": preset.clip_hidden_dim,
        },
        text_config=sizes
        | {
            "vocab_size": len(tokenizer),
            "hidden_size": preset.clip_text_dim,
            "num_attention_heads": 4,
            "intermediate_size": 2 * preset.clip_text_dim,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator
        torch.manual_seed(seed)
        model = CLIPModel(config)
        embeddings = model.vision_model.embeddings
        torch.nn.init.normal_(embeddings.position_embedding.weight, std=POSITION_STD)
    embeddings.patch_embedding.weight.data = fit_patch_filters(preset.clip_frequencies, sample)
    embeddings.patch_embedding.requires_grad_(False)
    return model


def fit_patch_filters(frequencies: int, sample: Tensor) -> Tensor:
    """The patch convolution (W, 3, 32, 32): cosines on three colour axes, each brought to a known loudness.

    Divided by its rms response every filter speaks equally loudly; the weight 4/(1+u+v) then gives the low
    frequencies the larger part back. Without it the many fine ones shout down the few that tell the colour.
    """
    filters, frequency = cosine_filters(frequencies)
    responses = F.conv2d(sample, filters, stride=PATCH_SIDE)  # (B, W, 7, 7)
    rms = responses.square().mean((0, 2, 3)).sqrt()
    rms = rms.clamp(min=0.002 * rms.max())  # what the images hardly contain is noise, and stays quiet
    loudness = 4 / (1 + frequency) / 3
    return filters * (loudness / rms)[:, None, None, None]


def cosine_filters(frequencies: int) -> tuple[Tensor, Tensor]:
    """The lowest n x n frequencies of the DCT-II on three colour axes.

    returns  filters (3nn, 3, 32, 32), not normalised, and the frequency u + v of each (3nn,)
    """
    brightness, red_green, yellow_blue = [1 / 3, 1 / 3, 1 / 3], [1, -1, 0], [0.5, 0.5, -1]
    axes = torch.tensor([brightness, red_green, yellow_blue])
    u, x = torch.arange(frequencies)[:, None], torch.arange(PATCH_SIDE)[None]
    cosines = torch.cos(math.pi * (2 * x + 1) * u / (2 * PATCH_SIDE))  # (n, 32)
    filters = torch.einsum("ac,vy,ux->avucyx", axes, cosines, cosines)
    frequency = (u + u.T).expand(3, -1, -1)
    return filters.reshape(-1, 3, PATCH_SIDE, PATCH_SIDE), frequency.reshape(-1)


def load_pixels(paths: Sequence[Path]) -> Tensor:
    """Image files to CLIP's input (B, 3, 224, 224), by the same functions that the later stages use."""
    processor = ImageProcessor(size=IMAGE_SIDE)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # PIL lets other threads run while it works
        images = pool.map(open_image, paths)
        return torch.stack(list(pool.map(get_img_process, images, [processor] * len(paths))))


@torch.no_grad()
def encode_patches(model: CLIPModel, images: Sequence[Path]) -> Tensor:
    """What the frozen filters make of all images: (number of images, P, W)."""
    patch_embedding, patches = model.vision_model.embeddings.patch_embedding, []
    for start in range(0, len(images), IMAGES_AT_ONCE):
        maps = patch_embedding(load_pixels(images[start : start + IMAGES_AT_ONCE]))  # (B, W, 7, 7)
        patches.append(maps.flatten(2).transpose(1, 2))
    return torch.cat(patches)


def embed_patches(model: CLIPModel, patches: Tensor) -> Tensor:
    """The rest of the vision tower: patches (B, P, W) to unit vectors (B, projection_dim).

    The loss reads nothing but the class token, so the last layer computes nothing else: the same numbers as
    `model.get_image_features`, in two thirds of the time.
    """
    vision = model.vision_model
    class_token = vision.embeddings.class_embedding.expand(len(patches), 1, -1)
    hidden = torch.cat([class_token, patches], dim=1) + vision.embeddings.position_embedding.weight
    hidden = vision.pre_layrnorm(hidden)  # (B, 1 + P, W)
    *layers, last = vision.encoder.layers
    for layer in layers:
        hidden = layer(hidden, attention_mask=None)
    class_token = hidden[:, :1] + attend_from_class_token(last.self_attn, last.layer_norm1(hidden))
    class_token = class_token + last.mlp(last.layer_norm2(class_token))  # (B, 1, W)
    return F.normalize(model.visual_projection(vision.post_layernorm(class_token[:, 0])), dim=-1)


def attend_from_class_token(attention: CLIPAttention, hidden: Tensor) -> Tensor:
    """The first row of CLIP's self-attention: hidden (B, 1 + P, W) to (B, 1, W)."""
    query, key, value = attention.q_proj(hidden[:, :1]), attention.k_proj(hidden), attention.v_proj(hidden)
    heads = [x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
    return attention.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def embed_text(model: CLIPModel, input_ids: Tensor) -> Tensor:
    """Captions (B, T) to unit vectors (B, projection_dim); causal and padded right, so it needs no mask."""
    return F.normalize(model.text_projection(model.text_model(input_ids).pooler_output), dim=-1)


# ---- its training ----


def train_encoder(
    images: Sequence[Path],
    scenes: Sequence[Scene],
    tokenizer: PreTrainedTokenizerFast,
    preset: Preset,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[CLIPModel, float]:
    """Train a CLIP on image files and the captions of their scenes.

    tokenizer  from `clip_tokenizer`
    progress   called after every step with the number of steps done and the loss
    returns    the model, and its mean loss over the last tenth of the steps
    """
    rng = np.random.default_rng(seed)
    sample = rng.choice(len(images), min(IMAGES_AT_ONCE, len(images)), replace=False)
    model = new_clip(preset, tokenizer, load_pixels([images[i] for i in sample]), seed)
    patches = encode_patches(model, images)
    input_ids, caption_of = tokenize_captions(scenes, tokenizer)
    colours = np.array([scene.colour or "" for scene in scenes])

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    losses = []
    for step in range(preset.clip.steps):
        picked = draw_batch(colours, step, preset.clip.batch_size, rng)
        optimizer.param_groups[0]["lr"] = learning_rate(step, preset.clip)
        loss = contrastive_loss(model, patches[picked], input_ids, caption_of[picked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))
        losses.append(loss.item())
        if progress:
            progress(step + 1, losses[-1])
    return model.eval(), float(np.mean(losses[-math.ceil(len(losses) / 10) :]))


def tokenize_captions(scenes: Sequence[Scene], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """The different captions as ids (number of captions, T), and which of them each scene has (N,)."""
    captions = [caption(scene) for scene in scenes]
    number = {text: n for n, text in enumerate(sorted(set(captions)))}
    input_ids = tokenizer(list(number), padding=True, return_tensors="pt").input_ids
    return input_ids, torch.tensor([number[text] for text in captions])


def draw_batch(colours: np.ndarray, step: int, size: int, rng: np.random.Generator) -> Tensor:
    """Indices of a batch: any images at even steps, those of two named colours at odd ones; none twice."""
    pool = np.arange(len(colours))
    if step % 2:
        two = rng.choice(np.unique(colours[colours != ""]), 2, replace=False)
        pool = np.flatnonzero(np.isin(colours, two))
    return torch.from_numpy(rng.choice(pool, min(size, len(pool)), replace=False))


def learning_rate(step: int, stage: Stage) -> float:
    """A straight rise, then a cosine down to a tenth."""
    cosine = (1 + math.cos(math.pi * step / stage.steps)) / 2
    warmth = min(1.0, (step + 1) / (WARMUP_SHARE * stage.steps))
    return stage.lr * warmth * (0.1 + 0.9 * cosine)


def contrastive_loss(model: CLIPModel, patches: Tensor, input_ids: Tensor, caption_of: Tensor) -> Tensor:
    """InfoNCE (van den Oord et al., 2018) as in CLIP, from image to caption and back.

    patches (B, P, W); input_ids of all captions; caption_of (B,), rows of input_ids.
    Images with the same caption share the target: nothing but noise could tell them apart.
    """
    similarity = embed_patches(model, patches) @ embed_text(model, input_ids[caption_of]).T  # (B, B)
    logits = similarity * model.logit_scale.exp()
    same = (caption_of[:, None] == caption_of[None]).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def save_encoder(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write what the folder of openai/clip-vit-base-patch32 holds: model, tokenizer, image processor.

    The newest transformers keep the image processor inside processor_config.json; everything older reads
    preprocessor_config.json, so both are there. Images are squashed to a square, not cropped.
    """
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    image_processor = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    model.save_pretrained(folder)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    image_processor.save_pretrained(folder)
