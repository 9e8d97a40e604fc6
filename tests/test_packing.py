"""However weights are stored for answering, the product is the same; the machine decides how they are."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F

from model import packing
from model.packing import LAYOUTS, SMALLEST, USUAL, Half, Packer, can_pack, computing_dtype, pack_linears
from model.vision_utils import get_img_embedding, get_vision_model

CLOSE = {torch.bfloat16: {"rtol": 2e-2, "atol": 1e-1}, torch.float16: {"rtol": 2e-3, "atol": 1e-2}}


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request, monkeypatch) -> bool:
    """As on a CPU that does not compute in 16 bits, and as on one that does; the real one decides nothing."""
    monkeypatch.setattr(packing, "is_emulated", lambda dtype: request.param)
    return request.param


def two_weights(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Their widths fill no block of 32."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, 48, generator=generator).to(dtype) for n in (37, 64))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_product(layout, rows):
    a, b = two_weights()
    x = torch.randn(2, rows, 48, generator=torch.Generator().manual_seed(1))
    pack = Packer(1, torch.float32, layout)
    for weights in ([a, b], [b]):
        expected, product = F.linear(x, torch.cat(weights)), pack(*weights)
        b.add_(1)  # changes nothing any more: an original may be mapped from a file
        torch.testing.assert_close(product(x), expected)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_packed_product_is_the_product(emulated, dtype, num_rows, rows):
    a, b = two_weights(dtype)
    pack = Packer(num_rows, computing_dtype(a))
    x = torch.randn(2, rows, 48, generator=torch.Generator().manual_seed(1)).to(pack.dtype)
    expected = F.linear(x, torch.cat([a, b]).to(pack.dtype))
    torch.testing.assert_close(pack(a, b)(x), expected, **CLOSE.get(pack.dtype, {}))


@pytest.mark.parametrize("fast", LAYOUTS)
def test_the_layout_that_is_fast_here_is_chosen(monkeypatch, fast):
    """Blocks of 32 columns were once taken everywhere, as one processor liked them best; another then
    answered in float32 more slowly than transformers."""

    def slowed(layout):
        return layout._replace(multiply=lambda *args: (time.sleep(0.02), layout.multiply(*args))[1])

    slow = {name: layout if name == fast else slowed(layout) for name, layout in LAYOUTS.items()}
    monkeypatch.setattr(packing, "LAYOUTS", slow)
    monkeypatch.setattr(packing, "SCRATCH", 2**20)
    monkeypatch.setattr(packing, "WINDOW", SMALLEST)
    pack = Packer(1, torch.float32)
    pack(torch.ones(SMALLEST // 256, 256))
    assert pack.chosen == {(SMALLEST // 256, 256): fast}


def test_a_choice_is_made_once_per_shape_and_not_by_chance(monkeypatch):
    """Nothing is timed where a layout is forced, where a cache holds the weight, or for several rows."""
    asked = []

    def time_layouts(scratch, n, D):
        asked.append((n, D))
        return dict.fromkeys(LAYOUTS, 1.0) | {"rows": 0.97 if D == 512 else 0.9}

    monkeypatch.setattr(packing, "time_layouts", time_layouts)
    pack = Packer(1, torch.float32)
    for shape in [(512, 512), (512, 640), (512, 512), (512, 640), (64, 512)]:
        pack(torch.zeros(shape))
    assert asked == [(512, 512), (512, 640)]
    assert pack.chosen == {(512, 512): USUAL, (512, 640): "rows"}
    Packer(1, torch.float32, "blocks")(torch.zeros(512, 512))
    Packer(8, torch.float32)(torch.zeros(512, 512))
    assert len(asked) == 2


@pytest.mark.parametrize("shape", [(31, 512), (512, 512), (6400, 768), (300, 4000)])
def test_any_shape_can_be_timed(monkeypatch, shape):
    """Also those that are larger than what is read at a time, or no multiple of a block."""
    seconds = packing.time_layouts(torch.ones(2**22), *shape)
    assert seconds.keys() == LAYOUTS.keys() and all(0 < value < 60 for value in seconds.values())


@pytest.mark.skipif(not packing.has_half_products(), reason="PyTorch for x86 only")
def test_half_keeps_the_values_of_bfloat16(emulated):
    """float16 has three bits more than bfloat16, but a smaller range."""
    weight = (torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    weight[0, :4] = torch.tensor([1e-30, 4e-8, -3e-5, 6e4])
    x = torch.eye(48)
    torch.testing.assert_close(Half(weight, None)(x), weight.float().t(), rtol=0, atol=3e-8)
    bias = torch.randn(64)
    torch.testing.assert_close(Half(weight, bias)(x), weight.float().t() + bias)
    # Both of them are used, and only where the processor has no 16 bits of its own.
    for dtype in (torch.bfloat16, torch.float16):
        assert computing_dtype(weight.to(dtype)) == (torch.float32 if emulated else dtype)
    assert computing_dtype(weight.float()) == torch.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_a_packed_clip_is_the_same_clip(clip_path, emulated, pixels, dtype, tolerance):
    """Also where the processor has no packed form in bfloat16: packing once ended the program there, and then
    an image took a hundred times as long as in float32."""
    clip = get_vision_model(clip_path)[0]
    expected = get_img_embedding(pixels, clip)
    packed = copy.deepcopy(clip).to(dtype)
    pack_linears(packed, 50)
    half = dtype == torch.bfloat16 and emulated and packing.has_half_products()
    assert packed.dtype == (torch.float32 if half else dtype)
    is_packed = not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    assert is_packed == (half or can_pack(torch.zeros(1, 1, dtype=dtype)))
    features = get_img_embedding(pixels, packed).float()
    torch.testing.assert_close(features, expected, rtol=tolerance, atol=tolerance)
