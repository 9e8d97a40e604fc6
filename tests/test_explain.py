"""What mattered in the image: what is measured of all windows at once is what a slow loop over the textbook
network finds, window by window."""

import copy
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import check_refused, run_clean, save_clip
from PIL import Image

from benchmarks.explain import judge, patches_of
from benchmarks.llava import to_llama
from dataset.demo_world.scenes import make_scene
from model import explain as explaining
from model.chat import Chat
from model.checkpoint import LoadReport
from model.decode import Decoder
from model.explain import attend, blank_sheet, explain, explain_chat, occlude, split_words, windows_of
from model.heat import FLAT, SIDE, colours_of, draw_heat, pale, scale_of, smooth
from model.prompt import render_conversation
from model.transformer import Transformer
from model.vision_utils import get_vision_model
from trainer.explanation import Explanation, choose_words, draw_explanations, shorten

ANSWERS = ["它是蓝色。", "A large green star, at the top left.", "图片里有一个 red 星形 $x^2$，龘。"]


@pytest.fixture
def chat(lively, tokenizer, clip_path) -> Chat:
    """It sees, and knows nothing."""
    vision_model, processor = get_vision_model(clip_path)
    return Chat(Decoder(copy.deepcopy(lively)), tokenizer, vision_model, processor, LoadReport("none", 0))


def noise(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def features_of(seed: int, count: int, tokens: int = 50) -> torch.Tensor:
    return torch.randn(count, tokens, 24, generator=torch.Generator().manual_seed(seed))


# ---- what is measured --------------------------------------------------------------------------------------


def measure_slowly(
    model: Transformer, prompt, answer, seen, blank, windows
) -> tuple[torch.Tensor, torch.Tensor]:
    """occlude(), window by window, with the textbook network and without a cache."""
    has_class = seen.shape[1] - windows[0].numel()

    def log_probs(features: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor([prompt.input_ids + answer])
        slots = torch.tensor(prompt.image_slots)
        logits = model(ids, features, slots)[0].log_softmax(-1)[0, len(prompt.input_ids) - 1 : -1]
        return logits.gather(1, torch.tensor(answer)[:, None]).squeeze(1)

    base = seen.clone()
    base[:, :has_class] = blank[:, :has_class]
    drops = torch.zeros(len(seen), len(answer), *windows.shape[1:])
    for image, window in itertools.product(range(len(seen)), windows):
        hidden = base.clone()
        patches = window.flatten().nonzero().flatten() + has_class
        hidden[image, patches] = blank[image, patches]
        drops[image] += (log_probs(base) - log_probs(hidden))[:, None, None] * window / 4
    return log_probs(seen), drops


@pytest.mark.parametrize(("tokens", "side"), [(50, 7), (49, 7), (17, 4)])  # CLIP, SigLIP, another grid
def test_it_is_what_a_slow_loop_over_the_windows_gives(config, tokenizer, tokens, side):
    """Whatever stands around the images, and where: what rows share is read once."""
    config.num_image_tokens = tokens
    torch.manual_seed(3)
    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.layers.parameters():
        parameter.mul_(4 if parameter.ndim > 1 else 1)
    turns = [
        {"from": "human", "value": "什么颜色？"},
        {"from": "gpt", "value": "红色。"},
        {"from": "human", "value": "<image> A <image>\n描述这张图片。"},
    ]
    prompt = render_conversation(turns, tokenizer, tokens)
    answer = tokenizer(ANSWERS[1]).input_ids
    seen, blank, windows = features_of(1, 2, tokens), features_of(2, 2, tokens), windows_of(side)
    expected = measure_slowly(model, prompt, answer, seen, blank, windows)
    log_probs, drops, _ = occlude(Decoder(copy.deepcopy(model)), prompt, answer, seen, blank, windows)
    torch.testing.assert_close(log_probs, expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(drops, expected[1], rtol=0, atol=1e-4)
    assert drops.abs().amax((1, 2, 3)).min() > 0.01  # both images matter, far beyond rounding


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_all_at_once_is_one_by_one(chat, monkeypatch, rows):
    expected = explain(chat, "描述这张图片。", noise(0), ANSWERS[0])
    monkeypatch.setattr(explaining, "ROWS", rows)
    result = explain(chat, "描述这张图片。", noise(0), ANSWERS[0])
    np.testing.assert_allclose(result.maps, expected.maps, atol=1e-4)


@pytest.mark.parametrize("side", [7, 14, 16, 24, 2])
def test_four_windows_hide_every_patch(side):
    windows = windows_of(side)
    assert (windows.sum(0) == 4).all() and len(windows) <= 81
    if side == 7:
        assert len(windows) == 64 and windows.sum((1, 2)).max() == 4


def test_where_one_patch_alone_differs_from_nothing_the_map_peaks_there(chat):
    """Hiding any other one changes nothing at all; a neighbour shares one or two of its four windows."""
    prompt = chat.render([{"from": "human", "value": "<image>\n什么？"}])
    answer = chat.renderer.encode(ANSWERS[0])
    for row, column in ((2, 3), (0, 6), (6, 0)):
        blank = features_of(4, 1)
        seen = blank.clone()
        seen[0, 1 + 7 * row + column] += 20 * features_of(5, 1)[0, 0]
        _, drops, _ = occlude(chat.decoder, prompt, answer, seen, blank, windows_of(7))
        bell = np.multiply.outer(
            *(np.interp(np.abs(np.arange(7) - at), [0, 1, 2], [1, 0.5, 0]) for at in (row, column))
        )
        total = drops[0].sum(0).numpy()
        assert abs(total[row, column]) > 1e-3
        np.testing.assert_allclose(total, total[row, column] * bell, atol=2e-5)


@pytest.mark.parametrize("colour", ["white", "black", "#3a7d15"])
def test_an_image_without_anything_in_it_is_flat(chat, colour):
    """Nothing is hidden where nothing is, and that of any colour."""
    explanation = explain(chat, "这是什么？", Image.new("RGB", (50, 70), colour), ANSWERS[1])
    assert np.abs(explanation.maps).max() < 1e-3
    assert np.abs(explain(chat, "这是什么？", noise(1), ANSWERS[1]).total).max() > 0.1


def test_each_image_has_maps_of_its_own(chat):
    """Of the same answer; an empty one beside another mattered nowhere."""
    turns = [{"from": "human", "value": "<image><image>\n什么不同？"}]
    empty, full = explain_chat(chat, turns, [Image.new("RGB", (9, 9), "red"), noise(2)], ANSWERS[1])
    assert empty.words == full.words and np.array_equal(empty.log_probs, full.log_probs)
    assert np.abs(empty.total).max() < 1e-3 < 0.1 < np.abs(full.total).max()


def test_the_sheet_that_stands_for_nothing_has_the_colour_of_the_paper():
    image = Image.new("RGB", (200, 100), (250, 240, 10))
    image.paste((0, 0, 255), (150, 50, 200, 100))
    assert blank_sheet(image).getpixel((0, 0)) == (250, 240, 10)


def test_attention_is_that_of_transformers(lively, tokenizer):
    prompt = render_conversation([{"from": "human", "value": "图片里有什么？"}], tokenizer)
    h = lively.tok_embeddings(torch.tensor([prompt.input_ids]))
    llama = to_llama(lively)
    llama.set_attn_implementation("eager")
    weights = llama(inputs_embeds=h, output_attentions=True).attentions  # per layer, (1, H, T, T)
    expected = torch.stack(weights)[:, 0, :, -3:].mean((0, 1, 2))
    result = attend(Decoder(copy.deepcopy(lively)), h, 3)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert result.sum().item() == pytest.approx(1)


# ---- words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_drops_of_the_words_add_up_to_that_of_the_answer(chat, answer):
    """And their log-probabilities to its own; together they are its text."""
    explanation = explain(chat, "What is this?", noise(3), answer)
    prompt = chat.render([{"from": "human", "value": "<image>\nWhat is this?"}])
    seen, blank = chat.encode([noise(3), blank_sheet(noise(3))]).split(1)
    log_probs, drops, _ = occlude(
        chat.decoder, prompt, chat.renderer.encode(answer), seen, blank, windows_of(7)
    )
    assert explanation.answer == answer and explanation.maps.shape == (len(explanation.words), 7, 7)
    np.testing.assert_allclose(explanation.total, drops[0].sum(0), atol=1e-4)
    np.testing.assert_allclose(explanation.log_probs.sum(), log_probs.sum(), rtol=1e-5)
    assert explanation.attention.shape == (7, 7) and explanation.attention.sum() == pytest.approx(1)


def test_without_an_answer_it_is_the_models_own(chat):
    turns = [{"from": "human", "value": "<image>\n这是什么？"}]
    said = "".join(chat.stream(turns, [noise(4)], sampling := explaining.Sampling(max_new_tokens=8)))
    assert explain(chat, "这是什么？", noise(4), sampling=sampling).answer == said != ""


class Pieces:
    """A tokenizer whose tokens are bytes."""

    def __init__(self, *pieces: bytes):
        self.pieces = pieces

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return b"".join(self.pieces[token] for token in ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("pieces", "words", "tokens_of"),
    [
        (["A", " dia", "mond", ", r", "ed", "."], ["A", " diamond", ", red", "."], [0, 1, 1, 2, 2, 3]),
        (["红色", "的", "星", "。"], ["红色", "的", "星", "。"], [0, 1, 2, 3]),
        (["红", b"\xe6\x98", b"\x9f", "x", "y"], ["红", "星", "xy"], [0, 1, 1, 2, 2]),
        (["it", "'", "s", " e-", "mail"], ["it's", " e-mail"], [0, 0, 0, 1, 1]),
        (["3", "朵", "flo", "wer"], ["3", "朵", "flower"], [0, 1, 2, 2]),
        ([b"", "a", b"", b"\xe6"], ["a", "\ufffd"], [0, 0, 1, 1]),
        ([b"", b""], [], None),
    ],
)
def test_words_are_made_of_tokens(pieces, words, tokens_of):
    """A character of several tokens, half a character at the end, tokens without text: none is lost."""
    tokenizer = Pieces(*(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces))
    found, places = split_words(tokenizer, list(range(len(pieces))))
    assert found == words
    if words:
        assert places.tolist() == tokens_of


# ---- drawing -----------------------------------------------------------------------------------------------


def test_heat_lies_where_the_drop_is():
    drops = np.zeros((7, 7))
    drops[1, 5], drops[5, 1] = 2.0, -2.0
    drawn = draw_heat(Image.new("RGB", (140, 70), "white"), drops)
    assert drawn.size == (SIDE, SIDE // 2)
    pixels = np.asarray(drawn, dtype=int)
    warm = pixels[..., 0] - pixels[..., 2]
    y, x = np.unravel_index(warm.argmax(), warm.shape)
    assert (y * 7 // drawn.height, x * 7 // drawn.width) == (1, 5)
    y, x = np.unravel_index(warm.argmin(), warm.shape)
    assert (y * 7 // drawn.height, x * 7 // drawn.width) == (5, 1)


def test_a_flat_map_is_not_stretched_until_it_shows_noise():
    image, drops = noise(5, (SIDE, 300)), np.random.default_rng(0).normal(0, 1e-5, (7, 7))
    assert scale_of(drops) == FLAT
    difference = np.abs(np.asarray(draw_heat(image, drops), int) - np.asarray(pale(image), int))
    assert difference.max() <= 1
    assert scale_of(drops, np.full((7, 7), -3.0)) == 3  # of maps that are compared, the largest


def test_between_patches_nothing_is_beyond_them():
    drops = np.random.default_rng(1).normal(size=(7, 7))
    drawn = smooth(drops, 90, 50)
    assert drawn.shape == (50, 90) and drops.min() < drawn.min() < drawn.max() < drops.max()
    np.testing.assert_allclose(smooth(np.full((4, 4), 0.7), 9, 11), 0.7)
    assert colours_of(np.array([0.3, -0.3])).argmax(-1).tolist() == [0, 2]


def test_the_sheet_takes_any_text_and_names_the_words_that_lose_most():
    """ "$" is no formula, control characters are spelled out, the words stay in their order."""
    words = ["图片", *(f" w{n}$" for n in range(14)), "。", "\x1b"]
    maps = np.zeros((len(words), 7, 7))
    maps[3:13, 2, 2] = 1
    one = Explanation(noise(6), words, np.zeros(len(words)), maps, np.full((7, 7), 1 / 49))
    assert choose_words([one]) == list(range(3, 13))
    assert choose_words([one, Explanation(noise(6), words, one.log_probs, maps[::-1], one.attention)])[0] == 3
    figure = draw_explanations("$\\frac{" * 40, ["a$.jpg", "b.jpg"], [one, one])
    drawn = [text.get_text() for text in figure.texts]
    assert "w2$" in drawn and "w12$" not in drawn and drawn.count("attention") == 2
    figure.savefig("/dev/null", format="png")


def test_long_texts_are_cut_where_the_line_ends():
    assert shorten("a b\n\nc") == "a b c"
    assert shorten("\x1b[2J红") == "\\x1b[2J红"
    assert re.fullmatch(r"x{100}\.\.\.", shorten("x" * 101))
    lines = shorten("红" * 200, 100, 2).split("\n")
    assert len(lines) == 2 and max(map(len, lines)) <= 25 + 3


def test_the_patches_of_a_thing_are_those_that_its_box_touches():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scene = make_scene([("red", "star", "top_left", "small")], rng)
        (thing,) = scene.things
        patches = patches_of(thing, scene)
        column, row = (int(place / 128 * 7) for place in thing.centre)
        assert patches[row, column] and 1 <= patches.sum() <= 9
        assert judge(patches.astype(float) - 0.5, patches) == (1.0, 1.0)


# ---- 3-eval_chat.py --explain ------------------------------------------------------------------------------


def test_the_flag_draws_and_says_what_it_explains(seeing, workplace, capsys):
    out = workplace / "drawn" / "why.png"
    images = [str(workplace / "images" / f"{number}.png") for number in (0, 1)]
    result = run_clean(capsys, "3-eval_chat.py", *seeing, "--explain", images[0], "什么？ $", str(out))
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"written: {out}\n")
    width, height = Image.open(out).size
    result = run_clean(
        capsys, "3-eval_chat.py", *seeing, "--stage=vlm_sft", "--explain", *images, "What differs?", str(out)
    )
    assert result.returncode == 0, result.stderr
    assert Image.open(out).size[0] == width and Image.open(out).size[1] > 1.5 * height


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["{images}/none.png", "什么？", "{out}"], "--explain: there is no image"),
        (["{images}", "什么？", "{out}"], "--explain: there is no image"),
        (["{images}/0.png", "什么？"], "--explain wants an image or several, a question, and a PNG"),
        (["{images}/0.png", "{out}", "什么？"], "--explain wants an image or several, a question, and a PNG"),
        (["{images}/0.png", "什么？", "{images}/0.png/x.png"], "is no folder"),
        (["{images}/0.png", "什么？" * 300, "{out}"], "the model's context holds 256 with the answer"),
        (["data.json", "什么？", "{out}"], "cannot read image"),
        (["{images}/0.png", "什么？", "{out}", "--chat", "{images}/0.png"], "--explain and --chat are two"),
        (["{images}/0.png", "什么？", "{out}", "--multi"], "--explain and --multi are two"),
    ],
)
def test_bad_input_is_one_line(seeing, workplace, capsys, monkeypatch, flags, fragment):
    monkeypatch.chdir(workplace)
    out = workplace / "why.png"
    flags = [flag.format(images=workplace / "images", out=out) for flag in flags]
    check_refused(run_clean(capsys, "3-eval_chat.py", *seeing, "--explain", *flags), fragment)
    assert not out.exists()


def test_what_cannot_be_explained_says_so(chat):
    turns = [{"from": "human", "value": "什么？"}]
    with pytest.raises(ValueError, match="no image to explain"):
        explain_chat(chat, turns, [], ANSWERS[0])
    with pytest.raises(ValueError, match="the answer is empty"):
        explain(chat, "什么？", noise(0), "")
    with pytest.raises(ValueError, match="holds 0 image placeholder"):
        explain_chat(chat, turns, [noise(0)], ANSWERS[0])
    with pytest.raises(ValueError, match="context holds 256"):
        explain(chat, "什么？", noise(0), ANSWERS[0] * 100)


def test_an_encoder_of_other_patches(lively, config, tokenizer, tmp_path: Path):
    """Sixteen to a side: windows of four, two apart."""
    config.num_image_tokens = 257
    config.max_seq_len = 400
    torch.manual_seed(1)
    vision_model, processor = get_vision_model(save_clip(tmp_path, image_size=112, patch_size=7))
    chat = Chat(Decoder(Transformer(config)), tokenizer, vision_model, processor, LoadReport("none", 0))
    explanation = explain(chat, "什么？", noise(0), ANSWERS[0])
    assert explanation.total.shape == (16, 16) and math.isfinite(explanation.total.sum())
