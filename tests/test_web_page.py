"""What people do on the page, in a browser: draw, drop, paste, retry, undo, and ask what mattered."""

import base64
import colorsys
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import LONG, ROOT
from PIL import Image
from web_browser import ask, draw, open_page, wait_for_answer
from web_pages import make_folder, serve_page

from dataset.demo_world import colours
from images.screenshots import STAR
from serving.look import COLOURS

QUESTION = "图形是什么颜色？"
DEMO = ROOT / "out" / "demo" / "128_vlm_sft.pth"
SAVE_SEEN = """
from model.chat import Chat
encode = Chat.encode
def save(self, images):
    images = list(images)
    for number, image in enumerate(images):
        image.save(f"{folder}/seen_{number}.png")
    return encode(self, images)
Chat.encode = save
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, tokenizer_path, clip_path):
    return make_folder(tmp_path_factory.mktemp("page"), tokenizer, tokenizer_path, clip_path)


@pytest.fixture(scope="module")
def server(folder):
    with serve_page(folder, change=f"folder = {str(folder)!r}\n{SAVE_SEEN}") as served:
        yield served.address


def show(page, path) -> None:
    page.set_input_files("#box input[type=file]", str(path))
    page.locator("#box img").wait_for()


def test_an_answer_says_how_it_was_made_and_can_be_had_again_or_taken_back(browser, server, folder):
    with open_page(browser, server) as page:
        show(page, folder / "first.png")
        ask(page, QUESTION)
        answer = page.locator('[data-testid="bot"]').inner_text()
        assert re.search(r"\d+ tokens, (\d+|–)/s, \d+\.\d s to the first", answer)
        page.wait_for_function("document.activeElement === document.querySelector('#box textarea')")
        wait_for_answer(page, lambda: page.click("button[title=Retry]"))
        (again,) = page.locator('[data-testid="bot"]').all_inner_texts()
        assert again.split("\n")[0] == answer.split("\n")[0]
        page.click("button[title=Undo]")
        page.locator("#box img").wait_for()
        assert page.input_value("#box textarea") == QUESTION
        page.locator("#chat .example").first.wait_for()  # the conversation is empty again


def test_a_question_without_an_image_waits_in_the_box(browser, server, folder):
    with open_page(browser, server) as page:
        ask(page, QUESTION)
        page.locator("#chat .notice").get_by_text("your question is kept").wait_for()
        assert page.input_value("#box textarea") == QUESTION
        show(page, folder / "first.png")
        page.press("#box textarea", "Enter")
        page.locator("#chat .why").wait_for()
        assert page.locator('[data-testid="user"]').get_by_text(QUESTION).count() == 1, "not there twice"


def test_that_a_question_has_come_is_seen_before_it_is_read(browser, server, folder):
    """However long the line: here the request that asks for the answer is held back."""
    held = []
    with open_page(browser, server) as page:
        show(page, folder / "first.png")
        page.route("**/queue/join*", lambda route: held.append(route))
        page.fill("#box textarea", QUESTION)
        page.press("#box textarea", "Enter")
        page.locator("#chat .notice").get_by_text("Looking").wait_for()
        page.locator(".stop-button").wait_for()
        held[0].continue_()
        page.locator("#chat .why").wait_for()
        assert page.locator("#chat .notice").count() == 0


def test_a_drawing_reaches_the_model_pixel_for_pixel(browser, server, folder):
    with open_page(browser, server) as page:
        page.click("[data-do=open]")
        page.click(f"#pad [data-colour='{COLOURS['green']}']")
        draw(page, STAR)
        page.click(f"#pad [data-colour='{COLOURS['red']}']")
        draw(page, [(0.1, 0.1), (0.9, 0.1)])
        page.click("#pad [data-do=undo]")
        address = page.evaluate("document.querySelector('#pad canvas').toDataURL('image/png')")
        page.click("#pad [data-do=use]")
        page.locator("#box img").wait_for()
        ask(page, QUESTION)
    drawn = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB")
    counts = {colour: count for count, colour in drawn.getcolors(1 << 20)}
    green = tuple(bytes.fromhex(COLOURS["green"][1:]))
    assert counts[green] > 1000 and counts[(255, 255, 255)] > 100_000
    assert tuple(bytes.fromhex(COLOURS["red"][1:])) not in counts, "the stroke was taken back"
    with Image.open(folder / "seen_0.png") as seen:
        reduced = drawn.resize(seen.size, Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(seen.convert("RGB")), np.asarray(reduced))


@pytest.mark.skipif(not DEMO.exists(), reason="no demo model: bash quickstart.sh")
def test_a_drawn_star_is_recognized(browser, folder):
    with serve_page(folder, "--load_from", str(DEMO)) as served, open_page(browser, served.address) as page:
        page.click("[data-do=open]")
        page.click(f"#pad [data-colour='{COLOURS['green']}']")
        draw(page, STAR)
        page.click("#pad [data-do=use]")
        page.locator("#box img").wait_for()
        ask(page, "Describe this picture.")
        answer = page.locator('[data-testid="bot"]').inner_text()
        assert "green star" in answer, answer


def test_the_screenshots_are_made_by_a_command(browser, folder, tmp_path):
    flags = ["--load_from", folder / "32_vlm_sft.pth", "--image_dir", folder / "examples", "--into", tmp_path]
    command = [sys.executable, "-m", "images.screenshots", "--max_new_tokens", "20", *map(str, flags)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=LONG)
    for name, size in (("page.png", (1000, 720)), ("page_phone.png", (390, 844))):
        with Image.open(tmp_path / name) as image:
            assert image.size == size and len(image.convert("RGB").getcolors(1 << 20)) > 20
        assert (ROOT / "images" / name).stat().st_size < 300_000


def test_the_pad_has_the_colours_of_the_demo_world():
    assert list(COLOURS) == list(colours.COLOURS)
    for name, code in COLOURS.items():
        hue, *rest = colorsys.rgb_to_hsv(*(value / 255 for value in bytes.fromhex(code[1:])))
        (low, high), *bounds = colours.COLOURS[name]
        assert low <= (360 * hue - low) % 360 + low <= high, name
        assert all(low <= value <= high for value, (low, high) in zip(rest, bounds, strict=True)), name


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_an_image_is_taken_anywhere_on_the_page(browser, server, folder, kind):
    """The browser used to leave the page for an image that was dropped beside the box."""
    data = base64.b64encode((folder / "first.png").read_bytes()).decode()
    with open_page(browser, server) as page:
        page.evaluate(
            """([kind, data]) => {
                const bytes = Uint8Array.from(atob(data), sign => sign.charCodeAt(0));
                const bag = new DataTransfer();
                bag.items.add(new File([bytes], "a.png", {type: "image/png"}));
                const options = {bubbles: true, cancelable: true, dataTransfer: bag, clipboardData: bag};
                const Kind = kind === "drop" ? DragEvent : ClipboardEvent;
                const place = document.querySelector("#head h1");
                if (place.dispatchEvent(new Kind(kind, options))) throw "the browser would take it";
            }""",
            [kind, data],
        )
        page.locator("#box img").wait_for()
        ask(page, QUESTION)
        assert page.locator("#chat .user img").count() == 1


def test_what_mattered_is_drawn_for_the_answer_and_for_a_word(browser, server, folder):
    with open_page(browser, server) as page:
        show(page, folder / "first.png")
        ask(page, QUESTION)
        page.click("#chat .why")
        page.locator("#why .images img").wait_for()
        whole = page.locator("#why .images img").get_attribute("src")
        assert page.locator("#why [data-word]").count() > 2
        page.click("#why [data-word='1']")
        page.locator("#why [data-word='1'][aria-pressed=true]").wait_for()
        assert page.locator("#why .images img").get_attribute("src") != whole
        page.click("#why form button")
        page.locator("#why dialog").wait_for(state="hidden")
        answer = page.locator('[data-testid="bot"]').inner_text()
        ask(page, "and now?")  # the conversation goes on
        assert page.locator('[data-testid="bot"]').first.inner_text() == answer


CONTRASTS = """selector => {
    const read = text => (text.match(/[\\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
    const paper = node => {
        for (; node; node = node.parentElement) {
            const colour = read(getComputedStyle(node).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    return [...document.querySelectorAll(selector)].filter(node => node.checkVisibility() && node.innerText)
        .map(node => {
            const colours = [read(getComputedStyle(node).color), paper(node)];
            const [low, high] = colours.map(light).sort((a, b) => a - b);
            return [node.innerText, (high + 0.05) / (low + 0.05)];
        });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_the_page_says_can_be_read_and_every_control_has_a_name(browser, server, folder, scheme):
    """WCAG 2, AA: a contrast of 4.5."""
    with open_page(browser, server, color_scheme=scheme) as page:
        ask(page, QUESTION)
        show(page, folder / "first.png")
        texts = dict(page.evaluate(CONTRASTS, "#head p, #head button, #chat .notice, #pad button"))
        wait_for_answer(page, lambda: page.press("#box textarea", "Enter"))
        page.click("#settings button")
        page.locator("#settings input").last.wait_for()
        texts |= dict(
            page.evaluate(CONTRASTS, "#chat .facts span, #chat .why, #settings span, #settings label")
        )
        assert len(texts) > 15
        assert not {text: contrast for text, contrast in texts.items() if contrast < 4.5}
        nameless = page.evaluate(
            """[...document.querySelectorAll("button, input:not([type=file]), textarea, select")]
            .filter(each => each.checkVisibility())
            .filter(each => !(each.innerText || each.ariaLabel || each.title || each.placeholder
                || each.labels?.length || each.querySelector("img")))
            .map(each => each.outerHTML.slice(0, 300))"""
        )
        assert not nameless


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_in_chinese_and_in_english(browser, server, folder, scheme):
    options = {"locale": "zh-CN", "color_scheme": scheme, "has_touch": True, "is_mobile": True}
    with open_page(browser, server, 390, **options) as page:
        show(page, folder / "first.png")
        ask(page, QUESTION)
        small = page.evaluate(
            """[...document.querySelectorAll("button, input, textarea")]
            .filter(each => each.checkVisibility())
            .map(each => [each.getBoundingClientRect(), each.outerHTML.slice(0, 200)])
            .filter(([frame]) => frame.width && Math.round(Math.min(frame.width, frame.height)) < 40)
            .map(([, text]) => text)"""
        )
        assert not small
        assert page.locator("#pad [data-do=open]").inner_text() == "✎ 画一张"
        assert page.get_attribute("#box textarea", "placeholder") == "提问"
        page.click("[data-do=language]")
        assert page.locator("#pad [data-do=open]").inner_text() == "✎ Draw one"
        assert page.get_attribute("#box textarea", "placeholder") == "Ask about an image"
        ours = page.locator("#tools").inner_text() + page.locator("#chat .facts").inner_text()
        assert not re.search("[\u3400-\u9fff]", ours), ours
        assert page.locator('[data-testid="user"]').last.inner_text() == QUESTION, "the conversation stays"
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", colour)[:3])) < 100) == (scheme == "dark")
