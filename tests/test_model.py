"""The network: sizes, positions, the placeholder overwrite, the loss, the cache."""

import json

import pytest
import torch
import torch.nn.functional as F

from model.data.batch import IGNORE_INDEX
from model.LMConfig import LMConfig
from model.transformer import Attention, FeedForward, Transformer, apply_rope, rope_table
from model.vision_proj import find_image_slots, overwrite_image_slots, placeholder_ids


@pytest.mark.parametrize(
    ("dim", "n_layers", "llm", "vlm"), [(512, 8, 26_878_464, 27_271_680), (768, 16, 108_749_568, 109_339_392)]
)
def test_parameter_counts_are_those_of_minimind(dim, n_layers, llm, vlm):
    with torch.device("meta"):
        assert Transformer(LMConfig(dim=dim, n_layers=n_layers, vision_dim=0)).num_parameters() == llm
        assert Transformer(LMConfig(dim=dim, n_layers=n_layers)).num_parameters() == vlm


def test_config_names_every_size_that_does_not_fit():
    with pytest.raises(ValueError, match="n_heads 7.*n_heads 7 is not a multiple of n_kv_heads 2"):
        LMConfig(dim=64, n_heads=7, n_kv_heads=2)
    with pytest.raises(ValueError, match="dim must be at least 1.*n_layers must be at least 1"):
        LMConfig(dim=0, n_layers=0)


def test_config_survives_a_description():
    """What lies beside the weights; other programs put keys of their own into theirs."""
    config = LMConfig(dim=768, n_layers=16, max_seq_len=200)
    written = json.loads(json.dumps(config.to_dict() | {"torch_dtype": "float32", "hidden_dim": None}))
    assert LMConfig.from_dict(written) == config


def test_what_blocks_add_to_the_stream_starts_smaller():
    """Once the depth-scaled initialisation sat on w3; it belongs on the two matrices that write to the
    residual stream."""
    config = LMConfig(dim=256, n_layers=8, vision_dim=0)
    model = Transformer(config)
    scaled = 0.02 / 4
    for module in model.modules():
        if isinstance(module, Attention):
            assert (
                abs(module.wo.weight.std() / scaled - 1) < 0.05
                and abs(module.wq.weight.std() / 0.02 - 1) < 0.05
            )
        if isinstance(module, FeedForward):
            assert (
                abs(module.w2.weight.std() / scaled - 1) < 0.05
                and abs(module.w3.weight.std() / 0.02 - 1) < 0.05
            )


def test_rope_turns_neighbouring_pairs():
    config = LMConfig(dim=64, n_heads=4, n_kv_heads=2)
    x = torch.randn(2, 9, 4, 16)
    turned = apply_rope(x, rope_table(config, 9, x.device))
    for position in range(9):
        for pair in range(8):
            angle = torch.tensor(position * 10000.0 ** (-2 * pair / 16))
            matrix = torch.stack(
                [torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])]
            )
            torch.testing.assert_close(
                turned[:, position, :, 2 * pair : 2 * pair + 2],
                x[:, position, :, 2 * pair : 2 * pair + 2] @ matrix,
            )


def test_positions_stay_exact_when_the_weights_are_cast(model):
    """A complex or fp32 buffer would be destroyed by .to(bfloat16)."""
    before = model.rope(64, torch.device("cpu")).clone()
    model.to(torch.bfloat16)
    assert model.rope(64, torch.device("cpu")).dtype == torch.complex64
    assert torch.equal(model.rope(64, torch.device("cpu")), before)


def test_overwrite_equals_a_slow_loop_gradients_included():
    h, embeds = torch.randn(3, 20, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    slots = torch.tensor([[4, 5, 6, 7, 8], [47, 48, 49, 50, 51]])
    fast = overwrite_image_slots(h, embeds, slots)
    slow = h.clone()
    for image in range(2):
        for token in range(5):
            row, column = divmod(int(slots[image, token]), 20)
            slow[row, column] = embeds[image, token]
    assert torch.equal(fast, slow)
    weight = torch.randn_like(h)
    fast_grads = torch.autograd.grad((fast * weight).sum(), (h, embeds))
    slow_grads = torch.autograd.grad((slow * weight).sum(), (h, embeds))
    assert all(torch.equal(a, b) for a, b in zip(fast_grads, slow_grads, strict=True))


def test_the_image_is_seen_and_only_after_its_place(model, config):
    ids = torch.tensor([[1, 5, *placeholder_ids(), 7, 8]])
    features = torch.randn(2, 1, 50, 24)
    first, second = (model(ids, one)[0] for one in features)
    assert torch.equal(first[:, :2], second[:, :2])
    assert (first[:, 2:] - second[:, 2:]).abs().amax(-1).min() > 0


def test_placeholders_and_images_must_match(model):
    ids = torch.tensor([[1, *placeholder_ids(), 7, *placeholder_ids()]])
    assert find_image_slots(ids).shape == (2, 50)
    with pytest.raises(ValueError, match=r"2 image placeholder\(s\) but 1 image"):
        model(ids, torch.randn(1, 50, 24))
    with pytest.raises(ValueError, match="1 features|50 tokens"):
        model(ids, torch.randn(2, 49, 24))
    with pytest.raises(ValueError, match="no images were given"):
        model(ids, image_slots=find_image_slots(ids))


def test_images_are_counted_prompt_by_prompt(model):
    """Three placeholders and three images in all, but one prompt lacks an image and the other a placeholder:
    compared by their totals alone, the first would be shown an image of the second."""
    image = placeholder_ids()
    ids = torch.tensor([[1, *image, 7, *image], [1, *image, *[7] * 51]])
    features, num_images = torch.randn(3, 50, 24), torch.tensor([1, 2])
    for slots in (None, find_image_slots(ids)):
        with pytest.raises(
            ValueError, match=r"row 1 of the batch: the prompt holds 2 image placeholder\(s\) but 1 image"
        ):
            model(ids, features, slots, num_images=num_images)
        assert model(ids, features, slots, num_images=num_images.flip(0))[0].isfinite().all()
    with pytest.raises(ValueError, match="row 2 of the batch: .*holds 1 .* but 0 image"):
        model(ids, features[:2], num_images=torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="no images were given"):
        model(ids, num_images=num_images.flip(0))


def make_batch(vocab_size: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(3, T, dtype=torch.long)
    labels = torch.full((3, T), IGNORE_INDEX)
    for row, length in enumerate((60, 17, 5)):
        ids[row, :length] = torch.randint(3, vocab_size, (length,), generator=generator)
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
    return ids, labels


def test_loss_is_that_of_full_logits(model, config):
    ids, labels = make_batch(config.vocab_size, 64)
    logits, loss = model(ids, labels=labels)
    full, _ = model(ids)
    expected = F.cross_entropy(full.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    targets = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    assert logits.shape == (len(targets), config.vocab_size)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, full.flatten(0, 1)[targets])
    assert torch.equal(model(ids, labels=labels, target_positions=targets)[1], loss)


def test_padding_changes_nothing(model, config):
    """Padded to 512 or to the longest row: the same loss and the same gradients."""
    results = []
    for T in (60, 512):
        ids, labels = make_batch(config.vocab_size, T)
        model.zero_grad()
        loss = model(ids, labels=labels)[1]
        loss.backward()
        results.append(
            (
                loss.detach(),
                [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None],
            )
        )
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-7)
    for short, long in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-6)


def test_nothing_to_learn_is_harmless(model):
    loss = model(
        torch.ones(2, 4, dtype=torch.long),
        torch.zeros(0, 50, 24),
        torch.zeros(0, 50, dtype=torch.long),
        labels=torch.full((2, 4), IGNORE_INDEX),
    )[1]
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
