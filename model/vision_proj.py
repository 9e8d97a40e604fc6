"""What turns a language model into a vision-language model.

A prompt holds, for every image, a run of placeholder tokens: 25 x "<" and 25 x ">". The image's 50 CLIP
features are projected to the width of the language model by ONE bias-free matrix and written over the
embeddings of that run. Everything after that is an ordinary language model.

Letters: B rows, T tokens, D model width, M images in the whole batch, N tokens per image, V CLIP width.
"""

import torch
from torch import Tensor, nn

from model.LMConfig import LMConfig

# Ids of "<" and ">" in MiniMind's vocabulary, fixed because weights are trained around them.
PLACEHOLDER = (LMConfig.open_id, LMConfig.close_id)


def placeholder_ids(num_image_tokens: int = 50, placeholder: tuple[int, int] = PLACEHOLDER) -> list[int]:
    """The ids that stand for one image: half "<", half ">" (one "<" more where the number is odd)."""
    open_id, close_id = placeholder
    num_close = num_image_tokens // 2
    return [open_id] * (num_image_tokens - num_close) + [close_id] * num_close


def make_vision_proj(vision_dim: int, dim: int, bias: bool = False) -> nn.Linear:
    """The whole bridge between CLIP and the language model, as in LLaVA-1: a linear map."""
    return nn.Linear(vision_dim, dim, bias=bias)


def find_image_slots(
    input_ids: Tensor, num_image_tokens: int = 50, placeholder: tuple[int, int] = PLACEHOLDER
) -> Tensor:
    """Search for placeholder runs, for callers that kept only the ids.

    input_ids  (B, T)
    returns    (M, N) int64, flat indices into B * T, in reading order
    """
    B, T = input_ids.shape
    if num_image_tokens > T:
        return input_ids.new_empty(0, num_image_tokens)
    pattern = torch.tensor(placeholder_ids(num_image_tokens, placeholder), device=input_ids.device)
    hits = (input_ids.unfold(1, num_image_tokens, 1) == pattern).all(-1)  # (B, T - N + 1)
    row, start = hits.nonzero(as_tuple=True)
    return (row * T + start).unsqueeze(1) + torch.arange(num_image_tokens, device=input_ids.device)


def settle_image_slots(
    input_ids: Tensor,
    image_features: Tensor | None,
    image_slots: Tensor | None,
    num_images: Tensor | None,
    config: LMConfig,
) -> Tensor | None:
    """The slots (M, N) of a batch's images, searched for where they are not given; arguments are those of
    Transformer.forward. Raises ValueError unless every image has its placeholder and every placeholder its
    image: row by row where num_images (B,) is given, else in the whole batch."""
    if image_slots is None and (image_features is not None or num_images is not None):
        image_slots = find_image_slots(input_ids, config.num_image_tokens, config.placeholder)
    num_slots = 0 if image_slots is None else len(image_slots)
    if num_images is not None:
        found = torch.bincount(image_slots[:, 0] // input_ids.shape[1], minlength=len(input_ids))
        check_each_row(found.tolist(), num_images.tolist())
    if image_features is None:
        if num_slots:
            raise ValueError(f"the prompt holds {num_slots} image placeholder(s) but no images were given")
    elif not config.vision_dim:
        raise ValueError(
            "this is a language model without a vision projection (vision_dim 0); it takes no images"
        )
    elif num_slots != len(image_features):
        raise ValueError(
            f"the prompt holds {num_slots} image placeholder(s) but {len(image_features)} image(s) were "
            "given; was a prompt cut, or an <image> mark forgotten?"
        )
    elif num_slots and image_slots.shape != image_features.shape[:2]:
        raise ValueError(
            f"an image has {image_features.shape[1]} features but its placeholder has "
            f"{image_slots.shape[1]} tokens; num_image_tokens must follow the vision encoder"
        )
    return image_slots


def check_each_row(num_found: list[int], num_given: list[int]) -> None:
    """Raise ValueError, naming the row, unless each has as many placeholders as images: where only the totals
    agree, one prompt would be shown another's images."""
    for row, (found, given) in enumerate(zip(num_found, num_given, strict=True), 1):
        if found != given:
            raise ValueError(
                f"row {row} of the batch: the prompt holds {found} image placeholder(s) but {given} image(s) "
                "were given; was it cut, or an <image> mark forgotten?"
            )


def overwrite_image_slots(h: Tensor, image_embeds: Tensor, image_slots: Tensor) -> Tensor:
    """Write projected image features over the embeddings of their placeholders.

    h             (B, T, D) token embeddings
    image_embeds  (M, N, D) projected features
    image_slots   (M, N)    flat indices into B * T
    returns       (B, T, D); gradients flow to the image embeddings at the slots and to `h` everywhere else
    """
    B, T, D = h.shape
    flat = h.reshape(B * T, D).index_copy(0, image_slots.reshape(-1), image_embeds.reshape(-1, D).to(h.dtype))
    return flat.view(B, T, D)
