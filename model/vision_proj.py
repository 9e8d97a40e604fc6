"""What turns a language model into a vision-language model.

A prompt holds, for every image, a run of placeholder tokens: 25 x "<" and 25 x ">". The image's 50 CLIP
features are projected to the width of the language model by ONE bias-free matrix and written over the
embeddings of that run. Everything after that is an ordinary language model.

Letters: B rows, T tokens, D model width, M images in the whole batch, N tokens per image, V CLIP width.
"""
import torch
from torch import Tensor, nn

# Ids of "<" and ">" in MiniMind's vocabulary, fixed because weights are trained around them.
OPEN_ID, CLOSE_ID = 30, 32


def placeholder_ids(num_image_tokens: int = 50) -> list[int]:
    """The ids that stand for one image: half "<", half ">" (one "<" more where the number is odd)."""
    num_close = num_image_tokens // 2
    return [OPEN_ID] * (num_image_tokens - num_close) + [CLOSE_ID] * num_close


def make_vision_proj(vision_dim: int, dim: int, bias: bool = False) -> nn.Linear:
    """The whole bridge between CLIP and the language model, as in LLaVA-1: a linear map."""
    return nn.Linear(vision_dim, dim, bias=bias)


def find_image_slots(input_ids: Tensor, num_image_tokens: int = 50) -> Tensor:
    """Search for placeholder runs, for callers that kept only the ids.

    input_ids  (B, T)
    returns    (M, N) int64, flat indices into B * T, in reading order
    """
    B, T = input_ids.shape
    if num_image_tokens > T:
        return input_ids.new_empty(0, num_image_tokens)
    pattern = torch.tensor(placeholder_ids(num_image_tokens), device=input_ids.device)
    hits = (input_ids.unfold(1, num_image_tokens, 1) == pattern).all(-1)            # (B, T - N + 1)
    row, start = hits.nonzero(as_tuple=True)
    return (row * T + start).unsqueeze(1) + torch.arange(num_image_tokens, device=input_ids.device)


def check_image_slots(image_slots: Tensor, image_features: Tensor) -> None:
    """Raise ValueError unless every image has its run of placeholders and every run its image."""
    slots, given = tuple(image_slots.shape), tuple(image_features.shape[:2])
    if slots[0] != given[0]:
        raise ValueError(f"the prompt holds {slots[0]} image placeholder(s) but {given[0]} image(s) were "
                         "given; was a prompt cut, or an <image> mark forgotten?")
    if slots[0] and slots != given:
        raise ValueError(f"an image has {given[1]} features but its placeholder has {slots[1]} tokens; "
                         "num_image_tokens must follow the vision encoder")


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
