"""Every fast form of model/fast.py is the plain one of transformer.py or moe.py: the same values and the same
gradients, in every dtype that it serves."""

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.data.batch import IGNORE_INDEX
from model.fast import (
    QUERY_BLOCK,
    FastAttention,
    FastFeedForward,
    FastRMSNorm,
    GroupedExperts,
    LeanRMSNorm,
    SwiGLU,
    SwiGLUDown,
    attend_in_blocks,
    attend_repeated,
    can_group,
    choose_attend,
    grouped,
    rotate_real,
    use_fast_kernels,
)
from model.LMConfig import LMConfig
from model.moe import MixtureOfExperts, one_by_one
from model.transformer import Attention, FeedForward, RMSNorm, Transformer, apply_rope, rope_table
from model.vision_proj import placeholder_ids

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How far two forms may lie apart, over the size of the whole result: a few roundings of the dtype.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 0.003}
SCALE = 2**12  # of a loss, as a gradient scaler would: float16 knows no small gradients
LENGTHS = (1, 2, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK, 2 * QUERY_BLOCK + 1, 250)
plain_attend = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)


def loud(module: nn.Module) -> nn.Module:
    """With weights of 0.02 most of a result would be what was put in."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(1 if parameter.ndim == 1 else 0, 0.2, generator=generator)
    return module


def as_fast(module: nn.Module, kind: type, **attributes) -> nn.Module:
    """A copy in its fast form, put on as use_fast_kernels does."""
    fast = copy.deepcopy(module)
    fast.__class__ = kind
    for name, value in attributes.items():
        setattr(fast, name, value)
    return fast


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def values_and_gradients(
    function: Callable[..., Tensor], inputs: Iterable[Tensor], parameters: Iterable[Tensor] = ()
) -> list[Tensor]:
    """function(*inputs), and the gradients of its inputs and parameters, for one random gradient of it."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    return [out.detach(), *torch.autograd.grad((out.float() * weight).sum(), [*inputs, *parameters])]


def check_equal(fast: list[Tensor], plain: list[Tensor], dtype: torch.dtype) -> None:
    assert len(fast) == len(plain)
    for number, (one, two) in enumerate(zip(fast, plain, strict=True)):
        one, two = one.float(), two.float()
        assert one.shape == two.shape and one.isfinite().all(), number
        # The last term: where a token attends to itself alone, q and k have no gradient but rounding.
        assert (one - two).norm() <= ROUNDING[dtype] * two.norm() + 1e-5, (number, one, two)


# ---- one function at a time --------------------------------------------------------------------------------


def test_backward_passes_written_out_are_those_of_the_forward_passes():
    """Against finite differences, in float64."""
    torch.manual_seed(0)
    x, a, b = (torch.randn(2, 3, 8, dtype=torch.double, requires_grad=True) for _ in range(3))
    weight = torch.randn(8, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(LeanRMSNorm.apply(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))
    torch.testing.assert_close(SwiGLU.apply(a, b), F.silu(a) * b)
    assert torch.autograd.gradcheck(LeanRMSNorm.apply, (x, weight, 1e-5))
    assert torch.autograd.gradcheck(SwiGLU.apply, (a, b))
    down = torch.randn(5, 8, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(SwiGLUDown.apply(a, b, down), F.linear(F.silu(a) * b, down))
    assert torch.autograd.gradcheck(SwiGLUDown.apply, (a, b, down))


def test_a_frozen_matrix_lets_the_gradient_through():
    """--train projection freezes all of the language model, and trains what stands before it."""
    torch.manual_seed(0)
    plain = FeedForward(LMConfig(dim=16, n_heads=2, n_kv_heads=1)).requires_grad_(False)
    x = torch.randn(2, 5, 16)
    fast = as_fast(plain, FastFeedForward)
    check_equal(values_and_gradients(fast, [x]), values_and_gradients(plain, [x]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7, 16), (0, 16)], ids=["some", "none"])
def test_the_norm(dtype, shape):
    """In autocast it also casts its result, once for all the matrices that read it. A batch without targets
    leaves no token for the last norm."""
    plain = loud(RMSNorm(16, 1e-5))
    fast, x = as_fast(plain, FastRMSNorm), 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with autocast(dtype):
        got = values_and_gradients(fast, [x], fast.parameters())
        expected = values_and_gradients(plain, [x], plain.parameters())
    assert got[0].dtype == dtype
    check_equal(got, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_what_is_in_half_precision_already(dtype):
    plain = loud(RMSNorm(16, 1e-5)).to(dtype)
    fast, x = as_fast(plain, FastRMSNorm), torch.randn(3, 7, 16).to(dtype)
    check_equal(
        values_and_gradients(fast, [x], fast.parameters()),
        values_and_gradients(plain, [x], plain.parameters()),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7, 16), (5, 16), (0, 16)], ids=["rows", "targets", "none"])
def test_the_feed_forward(dtype, shape):
    plain = loud(FeedForward(LMConfig(dim=16, n_heads=2, n_kv_heads=1)))
    fast, x = as_fast(plain, FastFeedForward), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with autocast(dtype):
        got = values_and_gradients(fast, [x], fast.parameters())
        expected = values_and_gradients(plain, [x], plain.parameters())
    assert got[0].dtype == expected[0].dtype
    check_equal(got, expected, dtype)


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_turned_with_real_numbers(dtype, T):
    config = LMConfig(dim=64, n_heads=4, n_kv_heads=2)
    rope = rope_table(config, T, CPU)
    x = torch.randn(2, T, 4, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, expected = (
        values_and_gradients(lambda x, rotate=rotate: rotate(x, rope), [x])
        for rotate in (rotate_real, apply_rope)
    )
    assert got[0].dtype == expected[0].dtype == dtype
    check_equal(got, expected, dtype)


# ---- attention ---------------------------------------------------------------------------------------------


def make_qkv(T: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Four query heads, two of keys and values."""
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(2, heads, T, 16, generator=generator).to(dtype) for heads in (4, 2, 2)]


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("attend", [attend_in_blocks, attend_repeated])
def test_attention_number_by_number(attend, T):
    """In float32, where a wrong place at the edge of a block cannot hide behind rounding."""
    qkv = make_qkv(T)
    for one, two in zip(
        values_and_gradients(attend, qkv), values_and_gradients(plain_attend, qkv), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(
    ("attend", "dtype"), [(attend_in_blocks, torch.bfloat16), (attend_repeated, torch.float16)]
)
def test_attention_in_half_precision(attend, dtype, T):
    qkv = make_qkv(T, dtype)
    got, expected = values_and_gradients(attend, qkv), values_and_gradients(plain_attend, qkv)
    assert got[0].dtype == dtype
    check_equal(got, expected, dtype)


@pytest.mark.parametrize("place", [QUERY_BLOCK - 1, QUERY_BLOCK, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_later_is_not_seen(dtype, place):
    qkv = make_qkv(250, dtype)
    changed = [tensor.clone() for tensor in qkv]
    for tensor in changed:
        tensor[:, :, place:] = 7.0
    seen, unseen = attend_in_blocks(*qkv), attend_in_blocks(*changed)
    assert torch.equal(seen[:, :, :place], unseen[:, :, :place])
    assert not torch.equal(seen[:, :, place:], unseen[:, :, place:])


@pytest.mark.parametrize("T", [5, QUERY_BLOCK + 1])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rotate", [apply_rope, rotate_real])
@pytest.mark.parametrize(
    ("attend", "dtype"),
    [(attend, dtype) for attend in (plain_attend, attend_repeated) for dtype in DTYPES]
    + [(attend_in_blocks, torch.bfloat16)],
)
def test_attention_as_a_module(attend, rotate, dtype, T, qk_norm):
    """Whatever functions are chosen for it."""
    config = LMConfig(dim=64, n_heads=4, n_kv_heads=2, qk_norm=qk_norm)
    plain, rope = loud(Attention(config)), rope_table(config, T, CPU)
    fast = as_fast(plain, FastAttention, rotate=rotate, attend=attend)
    for norm in (fast.q_norm, fast.k_norm) if qk_norm and attend is attend_in_blocks else ():
        norm.__class__ = FastRMSNorm  # they come together
    x = torch.randn(2, T, 64, generator=torch.Generator().manual_seed(1))
    with autocast(dtype):
        got = values_and_gradients(lambda x: fast(x, rope), [x], fast.parameters())
        expected = values_and_gradients(lambda x: plain(x, rope), [x], plain.parameters())
    check_equal(got, expected, dtype)


def test_each_device_gets_the_attention_that_serves_it():
    """As far as it can be said without the device."""
    cuda = torch.device("cuda")
    assert choose_attend(CPU, torch.bfloat16) is attend_in_blocks
    assert choose_attend(cuda, torch.float32) is attend_repeated
    for device, dtype in ((CPU, torch.float32), (CPU, torch.float16), (cuda, torch.bfloat16)):
        attend = choose_attend(device, dtype)
        assert attend not in (attend_in_blocks, attend_repeated)
        assert torch.equal(attend(*make_qkv(9)), plain_attend(*make_qkv(9)))


# ---- experts -----------------------------------------------------------------------------------------------


def make_mixture(**sizes) -> MixtureOfExperts:
    return loud(
        MixtureOfExperts(LMConfig(dim=16, n_heads=2, n_kv_heads=1, use_moe=True, **sizes), FeedForward)
    )


@pytest.mark.parametrize("counts", [[13, 0, 1, 15], [0, 0, 0, 3], [8, 8, 8, 8], [0, 0, 0, 0]])
def test_the_grouped_products_of_a_gpu_are_those_of_the_loop(counts):
    """On a CPU PyTorch computes them too, in its own loop. Experts without a row are among them, and groups
    that end at the alignment and beside it."""
    experts = make_mixture().to(torch.bfloat16).experts
    rows = torch.randn(sum(counts), 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    got, expected = (
        values_and_gradients(
            lambda rows, compute=compute: compute(experts, rows, torch.tensor(counts)),
            [rows],
            experts.parameters(),
        )
        for compute in (grouped, one_by_one)
    )
    check_equal(got, expected, torch.bfloat16)


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_grouped_experts_as_a_module(num_tokens):
    """bfloat16 by autocast, as in training: the weights stay float32. With one token some experts have none:
    their gradient is zero, but there is one."""
    plain = make_mixture()
    fast = as_fast(plain, GroupedExperts)
    x = torch.randn(1, num_tokens, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    with autocast(torch.bfloat16):
        got = values_and_gradients(fast, [x], fast.parameters())
        expected = values_and_gradients(plain, [x], plain.parameters())
    check_equal(got, expected, torch.bfloat16)
    assert num_tokens > 1 or any(not gradient.any() for gradient in expected)


def test_experts_are_grouped_on_no_cpu_and_in_no_other_dtype():
    assert not can_group(CPU, torch.bfloat16)
    assert not can_group(torch.device("cuda"), torch.float32)


# ---- the whole network -------------------------------------------------------------------------------------


@pytest.fixture(params=["dense", "experts", "qwen3"])
def config(request, tokenizer) -> LMConfig:
    """Every expert is chosen: where only some are, rounding may turn a near tie the other way, and the
    networks would differ by more than rounding."""
    more = {
        "dense": {},
        "experts": {"use_moe": True, "num_experts_per_tok": 4},
        "qwen3": {"qk_norm": True, "head_dim": 12, "tied": False},  # another base, see --llm
    }
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 256, "vision_dim": 24}
    return LMConfig(**sizes, vocab_size=len(tokenizer), **more[request.param])


@pytest.fixture
def batch(config) -> dict[str, Tensor]:
    """Three rows, an image in each, of lengths that fill several blocks of queries and part of one."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.zeros(3, 250, dtype=torch.long)
    labels = torch.full((3, 250), IGNORE_INDEX)
    for row, length in enumerate((250, 2 * QUERY_BLOCK, 60)):
        ids = torch.randint(40, config.vocab_size, (length,), generator=generator)
        ids[3:53] = torch.tensor(placeholder_ids())
        input_ids[row, :length], labels[row, 53 : length - 1] = ids, ids[54:]
    return {
        "input_ids": input_ids,
        "image_features": torch.randn(3, 50, 24, generator=generator),
        "labels": labels,
        "num_images": torch.ones(3, dtype=torch.long),
    }


def outcome(model: Transformer, batch: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Logits of all tokens and of the targets, the loss, and every gradient."""
    model.zero_grad()
    with autocast(dtype):
        with torch.no_grad():
            whole = model(batch["input_ids"], batch["image_features"])[0]
        logits, loss = model(**batch)
    (loss * SCALE).backward()
    return [
        whole[batch["labels"] != IGNORE_INDEX],
        logits.detach(),
        loss.detach(),
        *(parameter.grad for parameter in model.parameters()),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_network(model, batch, dtype):
    fast = copy.deepcopy(model)
    use_fast_kernels(fast, CPU, dtype)
    got, expected = outcome(fast, batch, dtype), outcome(model, batch, dtype)
    check_equal(got, expected, dtype)
    assert expected[2] == pytest.approx(math.log(model.config.vocab_size), rel=0.1)  # it was a loss


def test_of_the_two_experts_that_a_token_chooses_too(tokenizer, batch):
    """In float32, where nothing but a tie to seven digits could turn."""
    torch.manual_seed(1)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vision_dim": 24, "use_moe": True}
    plain = Transformer(LMConfig(**sizes, vocab_size=len(tokenizer)))
    fast = copy.deepcopy(plain)
    use_fast_kernels(fast, CPU, torch.float32)
    check_equal(outcome(fast, batch, torch.float32), outcome(plain, batch, torch.float32), torch.float32)


def kinds_of(model: Transformer) -> set[type]:
    return {type(module) for module in model.modules()}


def test_names_and_weights_stay_as_they_are(model):
    """Weight files, optimizer and DDP go by them."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    for dtype in DTYPES:
        use_fast_kernels(model, CPU, dtype)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert all(now is parameters[name] for name, now in model.named_parameters())
    assert {FastRMSNorm, FastFeedForward, FastAttention} <= kinds_of(model)


def test_called_again_it_chooses_anew(model, batch):
    expected = {dtype: outcome(copy.deepcopy(model), batch, dtype) for dtype in DTYPES}
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16):
        use_fast_kernels(model, CPU, dtype)
        in_blocks = [layer.attention.attend is attend_in_blocks for layer in model.layers]
        assert in_blocks == [dtype == torch.bfloat16] * 2
        check_equal(outcome(model, batch, dtype), expected[dtype], dtype)


def test_for_the_compiler_norms_and_feed_forwards_stay_plain(model, batch):
    """It fuses them itself. Positions are turned with real numbers, because it knows no complex ones. Nothing
    is compiled before the first step, and none is taken here: see test_gpu_paths.py."""
    use_fast_kernels(model, CPU, torch.float32)
    use_fast_kernels(model, CPU, torch.float32, compiled=True)
    kinds = kinds_of(model)
    assert {RMSNorm, FeedForward} <= kinds and not {FastRMSNorm, FastFeedForward} & kinds
    assert all(layer.attention.rotate is rotate_real for layer in model.layers)
