"""The eye of the demo world: a very small CLIP, saved in the format of the real one.

CLIP learns by matching. A batch of images and their captions go through two towers, each image must find its
own caption among all of them, and in doing so the vision tower comes to say what the caption says. What made
so small a tower see shapes anywhere, most of it measured (benchmarks/LOG.md):

1. The patch filters are not learnt: they are cosines, of brightness louder than of colour (cosines.py).
   Training therefore never touches a pixel and takes its scenes, as many as it likes, from a bank of drawn
   forms (patches.py).
2. Not only the class token is matched with the caption of the image, but also the patch in which a thing's
   centre lies with the words about that thing, as RegionCLIP does (Zhong et al., 2022). The language model
   reads all patches: this is where it learns which colour belongs to which shape.
3. Scenes hold up to five things, more than the world's images do: each of them teaches.
4. Some batches hold two colours, some only one. In a mixed batch the colour nearly tells which words are
   right; in these it does not, and shape, size and position have to be seen.
5. Shapes are also asked for by their bare words, but only where the colour has no name: asked everywhere,
   the tower learnt that a pair which training never showed does not exist.
6. Small things, crosses and stars come up more often: they were what it mistook last.

Letters: S scenes in a batch, P = 49 patches, N = 50 tokens, T tokens of a caption, W width of the vision
tower, which is the number of filters, D width of the space in which images and words meet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from dataset.demo_world import cosines
from dataset.demo_world.colours import COLOURS
from dataset.demo_world.patches import UNNAMED, Bank, Crowd, cells, draw_crowd, make_bank, see
from dataset.demo_world.things import POSITIONS, SHAPES, SIZES
from dataset.demo_world.wording import ATTRIBUTES, CHINESE, fill

TEXT_START, TEXT_END = "<|startoftext|>", "<|endoftext|>"
NOTHING = "没有图形"  # what is said of a patch in which no thing has its centre
POSITION_STD = 0.35  # CLIP's 0.02 drowns in the patches (positions were never learnt), 1.0 drowns the patches
MAX_GRAD_NORM = 1.0
MAX_LOGIT_SCALE = 50.0  # CLIP clamps at 100, for batches of 32,768; fewer captions need less contrast
FIRST_LOGIT_SCALE = 1 / 0.07
SAMPLE = 512  # scenes that the filters are fitted to
TEST_EACH, TEST_SCENES = 20, 400  # forms and scenes that training never sees


@dataclass(frozen=True)
class EyeRecipe:
    """Everything that decides what the encoder is."""

    steps: int = 16000
    lr: float = 1.5e-3
    warmup: int = 400
    thin_from: int = 8000  # the step from which on some lines are thin; from the start, they only confuse
    batch_size: int = 64
    weight_decay: float = 0.05
    seed: int = 0
    forms_of_a_kind: int = 250
    # What a scene holds, one as often as another: what is hard to tell comes up more often.
    counts: tuple[int, ...] = (1, 2, 3, 5, 5)
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "star", "star", "diamond", "cross", "cross")
    sizes: tuple[str, ...] = ("large", "small", "small")
    unnamed_share: float = 0.4
    frequencies: int = 10  # of brightness, in both directions
    coarse: int = 30  # filters of each of the two colour axes
    layers: int = 3
    heads: int = 5
    hidden_dim: int = 320
    text_dim: int = 64
    text_layers: int = 2
    projection_dim: int = 96


# ---- the model ----


def clip_words() -> list[str]:
    """The words of all captions."""
    return [*CHINESE.words.values(), CHINESE.begin, CHINESE.joint, "有一个", "。", NOTHING]


def clip_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of the demo, read from `folder`, with CLIP's own two marks around every text.

    They come last in the vocabulary, as in the real CLIP. "</s>" must not end a caption: its id is 2, and an
    end token of id 2 is transformers' sign of a CLIP saved before 2023, whose text is read off elsewhere.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": TEXT_START, "eos_token": TEXT_END, "pad_token": TEXT_END})
    marks = [(TEXT_START, tokenizer.bos_token_id), (TEXT_END, tokenizer.eos_token_id)]
    template = processors.TemplateProcessing(single=f"{TEXT_START} $A {TEXT_END}", special_tokens=marks)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def new_clip(recipe: EyeRecipe, tokenizer: PreTrainedTokenizerFast, rms: Tensor) -> CLIPModel:
    """An untrained CLIP of the recipe's size; rms (W,): of what the filters say."""
    sizes = {"projection_dim": recipe.projection_dim}
    config = CLIPConfig(
        **sizes,
        vision_config=sizes
        | {
            "image_size": cosines.SIDE_PIXELS,
            "patch_size": cosines.PATCH_SIDE,
            "hidden_size": len(rms),
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": recipe.heads,
            "intermediate_size": recipe.hidden_dim,
        },
        text_config=sizes
        | {
            "vocab_size": len(tokenizer),
            "hidden_size": recipe.text_dim,
            "num_hidden_layers": recipe.text_layers,
            "num_attention_heads": 4,
            "intermediate_size": 2 * recipe.text_dim,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
    )
    for part in (config, config.vision_config, config.text_config):
        part.dtype = torch.float32  # what the weights are read as; they are saved in half of the room
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from the global generator
        torch.manual_seed(recipe.seed)
        model = CLIPModel(config)
        embeddings = model.vision_model.embeddings
        nn.init.normal_(embeddings.position_embedding.weight, std=POSITION_STD)
        place = smooth_places(len(rms))
        embeddings.position_embedding.weight.data[1:] = place * (POSITION_STD / place.std())
    embeddings.patch_embedding.weight.data = cosines.filter_weights(recipe.frequencies, recipe.coarse, rms)
    embeddings.patch_embedding.requires_grad_(False)
    return model


def smooth_places(width: int) -> Tensor:
    """Where position embeddings start: sines and cosines of row and column in mixed order, (P, W), so that
    neighbours are alike from the first step on."""
    side, waves = cosines.PATCHES_PER_SIDE, width // 4
    speed = torch.exp(torch.linspace(math.log(math.pi / 2), math.log(math.pi / 16), waves))
    row, column = (
        grid.flatten()[:, None] * speed for grid in torch.meshgrid([torch.arange(side)] * 2, indexing="ij")
    )
    smooth = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    mixed = torch.linalg.qr(torch.randn(width, width)).Q
    return F.pad(smooth, (0, width - smooth.shape[1])) @ mixed


def embed_patches(model: CLIPModel, patches: Tensor) -> Tensor:
    """What the filters say (S, P, W) to unit vectors of all tokens (S, N, D), the class token first."""
    vision = model.vision_model
    class_token = vision.embeddings.class_embedding.expand(len(patches), 1, -1)
    hidden = torch.cat([class_token, patches], dim=1) + vision.embeddings.position_embedding.weight
    hidden = vision.pre_layrnorm(hidden)
    for layer in vision.encoder.layers:
        hidden = layer(hidden, attention_mask=None)
    return F.normalize(model.visual_projection(vision.post_layernorm(hidden)), dim=-1)


def embed_text(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Texts to unit vectors (number of texts, D); causal and padded right, so they need no mask."""
    input_ids = tokenizer(list(texts), padding=True, return_tensors="pt").input_ids
    return F.normalize(model.text_projection(model.text_model(input_ids).pooler_output), dim=-1)


# ---- its training ----


def phrase(colour: int, shape: int, position: int, size: int) -> str:
    """What a caption says of one thing; the colour is left out where no word names it."""
    words = CHINESE.words
    return fill(
        CHINESE.thing,
        colour="" if colour == UNNAMED else words[list(COLOURS)[colour]],
        shape=words[SHAPES[shape]],
        position=words[list(POSITIONS)[position]],
        size=words[list(SIZES)[size]],
    )


def captions(crowd: Crowd) -> list[str]:
    """One sentence about each scene, its things in reading order."""
    sentences = []
    for scene, count in enumerate(crowd.count):
        order = crowd.position[scene, :count].argsort()
        numbers = np.stack([crowd.colour, crowd.shape, crowd.position, crowd.size], axis=-1)[scene, order]
        things = CHINESE.begin + CHINESE.joint.join(phrase(*thing) for thing in numbers)
        sentences.append(fill(CHINESE.list, things=things))
    return sentences


def draw_batch(recipe: EyeRecipe, step: int, bank: Bank, rng: np.random.Generator) -> Crowd:
    """In turn a batch of all colours, of two, and of one."""
    counts = rng.choice(recipe.counts, recipe.batch_size)
    few = (0, 2, 1)[step % 3]
    colours = rng.choice(len(COLOURS), few or len(COLOURS), replace=False)
    shapes, sizes = (
        [SHAPES.index(name) for name in recipe.shapes],
        [list(SIZES).index(name) for name in recipe.sizes],
    )
    unnamed = 0.15 if few == 1 else recipe.unnamed_share
    return draw_crowd(counts, bank, rng, colours, shapes, sizes, unnamed)


class EyeTraining:
    """A CLIP in training on endless scenes of known combinations; every number of it follows from the recipe.

    tokenizer  from `clip_tokenizer`
    """

    def __init__(self, recipe: EyeRecipe, tokenizer: PreTrainedTokenizerFast):
        self.recipe, self.tokenizer, self.step = recipe, tokenizer, 0
        self.rng = np.random.default_rng(recipe.seed)
        self.bank = make_bank(recipe.forms_of_a_kind, recipe.frequencies, self.rng)
        self.has_thin_lines = False
        self.chosen = cosines.chosen_filters(recipe.frequencies, recipe.coarse)
        sample = draw_crowd(self.rng.choice(recipe.counts, SAMPLE), self.bank, self.rng)
        rms = self.hear(sample, self.bank, self.rng).square().mean((0, 1)).sqrt()
        rms = rms.clamp(min=0.002 * rms.max())  # what the images hardly contain is noise, and stays quiet
        self.loudness = cosines.loudness(recipe.frequencies, recipe.coarse) / rms
        self.model = new_clip(recipe, tokenizer, rms)
        self.thing_scale = nn.Parameter(torch.tensor(math.log(FIRST_LOGIT_SCALE)))  # logit_scale, of things
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained = [*trained, self.thing_scale]
        self.optimizer = torch.optim.AdamW(
            self.trained, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
        )
        self.test_rng = np.random.default_rng([recipe.seed, 1])
        self.test_bank = make_bank(TEST_EACH, recipe.frequencies, self.test_rng, clear=True)
        self.tests = {
            f"{split}_of_{count}" if count > 1 else split: self.make_test(split, count)
            for split, count in (("known", 1), ("unseen", 1), ("unseen_pairs", 1), ("unseen", 3))
        }

    def hear(self, crowd: Crowd, bank: Bank, rng: np.random.Generator) -> Tensor:
        """What the chosen filters say of a crowd, before each is brought to its loudness: (S, P, W)."""
        return see(crowd, bank, self.recipe.frequencies, rng).flatten(2)[..., self.chosen]

    def make_test(self, split: str, count: int) -> tuple[Crowd, Tensor]:
        """Scenes of forms that training never sees."""
        crowd = draw_crowd(np.full(TEST_SCENES, count), self.test_bank, self.test_rng, split=split)
        return crowd, self.hear(crowd, self.test_bank, self.test_rng) * self.loudness

    def take_step(self) -> dict[str, float]:
        if self.step >= self.recipe.thin_from and not self.has_thin_lines:
            rng = np.random.default_rng([self.recipe.seed, 2])
            forms, frequencies = self.recipe.forms_of_a_kind, self.recipe.frequencies
            self.bank, self.has_thin_lines = make_bank(forms, frequencies, rng, thin=True), True
        crowd = draw_batch(self.recipe, self.step, self.bank, self.rng)
        patches = self.hear(crowd, self.bank, self.rng) * self.loudness
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.recipe)
        losses = matching_losses(
            self.model, self.tokenizer, self.thing_scale, patches, crowd, self.bank, self.rng
        )
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()
        for scale in (self.model.logit_scale, self.thing_scale):
            scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))
        self.step += 1
        return {name: round(loss.item(), 4) for name, loss in losses.items()}

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "rng": self.rng.bit_generator.state,
            "model": self.model.state_dict(),
            "thing_scale": self.thing_scale.detach(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.rng.bit_generator.state = state["rng"]
        self.model.load_state_dict(state["model"])
        self.thing_scale.data.copy_(state["thing_scale"])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def score(self) -> dict[str, dict[str, float]]:
        """Split -> the share of scenes in which colour, shape, position and size of the first thing are told
        right, by the phrase that is nearest to the patch; "image": all four at once by the caption nearest to
        the class token."""
        sizes = (len(COLOURS), len(SHAPES), len(POSITIONS), len(SIZES))
        numbers = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(-1, 4)
        phrases = [phrase(*thing) for thing in numbers]
        sentences = [fill(CHINESE.list, things=CHINESE.begin + text) for text in phrases]
        by_phrase, by_sentence = (
            embed_text(self.model, self.tokenizer, texts) for texts in (phrases, sentences)
        )
        scores: dict[str, dict[str, float]] = {}
        for name, (crowd, patches) in self.tests.items():
            tokens = embed_patches(self.model, patches)
            first = np.arange(len(patches)), np.zeros(len(patches), int)
            at = tokens[first[0], 1 + cells(crowd, self.test_bank, *first)]
            right = np.stack([crowd.colour, crowd.shape, crowd.position, crowd.size], -1)[:, 0]
            told = numbers[(at @ by_phrase.T).argmax(1).numpy()]
            scores[name] = dict(zip(ATTRIBUTES, (told == right).mean(0).round(4).tolist(), strict=True))
            if crowd.count.max() == 1:
                told = numbers[(tokens[:, 0] @ by_sentence.T).argmax(1).numpy()]
                scores[name]["image"] = round(float((told == right).all(1).mean()), 4)
        return scores


def learning_rate(step: int, recipe: EyeRecipe) -> float:
    """A straight rise, then a cosine down to a hundredth."""
    cosine = (1 + math.cos(math.pi * step / recipe.steps)) / 2
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup) * (0.01 + 0.99 * cosine)


def matching_losses(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    thing_scale: Tensor,
    patches: Tensor,
    crowd: Crowd,
    bank: Bank,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """How badly images find their captions, and patches what is said of their things, in full or a word."""
    tokens = embed_patches(model, patches)  # (S, N, D)
    of_image, image_texts = number_texts(captions(crowd))
    scene, k = crowd.things()
    things = [array[scene, k] for array in (crowd.colour, crowd.shape, crowd.position, crowd.size)]
    of_thing, thing_texts = number_texts([phrase(*thing) for thing in zip(*things, strict=True)])

    centres = cells(crowd, bank, scene, k)
    thing_tokens = tokens[scene, 1 + centres]
    empty = rng.random(patches.shape[:2])  # one patch of each scene without a thing's centre
    empty[scene, centres] = -1
    empty_tokens = tokens[np.arange(len(tokens)), 1 + empty.argmax(1)]

    words = [CHINESE.words[name] for name in (*SHAPES, *COLOURS)]
    texts = embed_text(model, tokenizer, [*image_texts, *thing_texts, NOTHING, *words])
    image_texts, thing_texts, nothing, shapes, colours = texts.split(
        [len(image_texts), len(thing_texts), 1, len(SHAPES), len(COLOURS)]
    )
    scale = thing_scale.exp()
    unnamed = torch.from_numpy(things[0] == UNNAMED)
    shape, colour = (torch.from_numpy(numbers) for numbers in (things[1], things[0]))
    nowhere = torch.full((len(empty_tokens),), len(thing_texts))
    found = torch.cat([thing_tokens, empty_tokens]) @ torch.cat([thing_texts, nothing]).T * scale
    return {
        "image_loss": match(tokens[:, 0] @ image_texts.T * model.logit_scale.exp(), of_image) / 2,
        "thing_loss": (
            F.cross_entropy(found, torch.cat([of_thing, nowhere]))
            + F.cross_entropy(found[: len(of_thing), :-1].T, shares(of_thing, len(thing_texts)).T)
        )
        / 2,
        "word_loss": mean_loss(thing_tokens[unnamed] @ shapes.T * scale, shape[unnamed])
        + mean_loss(thing_tokens[~unnamed] @ colours.T * scale, colour[~unnamed]),
    }


def number_texts(texts: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Which of the different texts each one is, and these. Whatever has the same words shares the target:
    nothing but noise could tell it apart."""
    different = sorted(set(texts))
    number = {text: n for n, text in enumerate(different)}
    return torch.tensor([number[text] for text in texts]), different


def shares(of: Tensor, count: int) -> Tensor:
    """(n, count): each column's target, spread over those that have this text."""
    same = F.one_hot(of, count).float()
    return same / same.sum(0)


def match(logits: Tensor, of: Tensor) -> Tensor:
    """InfoNCE (van den Oord et al., 2018) as in CLIP, from image to text and back; logits (n, texts)."""
    back = F.cross_entropy(logits.T, shares(of, logits.shape[1]).T)
    return (F.cross_entropy(logits, of) + back) / 2


def mean_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, 0 where there is nothing to ask."""
    return F.cross_entropy(logits, target, reduction="sum") / max(1, len(target))


def save_encoder(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write what the folder of openai/clip-vit-base-patch32 holds: model, tokenizer, image processor.

    The weights take half of their room, in float16; config.json says float32, which is what they are read as.
    The newest transformers keep the image processor inside processor_config.json; everything older reads
    preprocessor_config.json, so both are there. Images are squashed to a square, not cropped.
    """
    side = {"height": cosines.SIDE_PIXELS, "width": cosines.SIDE_PIXELS}
    image_processor = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    model.save_pretrained(folder)
    halves = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    image_processor.save_pretrained(folder)
