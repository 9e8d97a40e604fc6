"""A browser for the tests of the page (Chromium), and what people do in it."""

import contextlib
from collections.abc import Callable, Iterator

from conftest import LONG


@contextlib.contextmanager
def open_page(browser, address: str, width: int = 1280, **options) -> Iterator:
    """The page in a window of its own, as another visitor. In the end: it was quiet, asked nobody else for
    anything, and nothing on it was wider than the screen."""
    context = browser.new_context(viewport={"width": width, "height": 860}, **options)
    page = context.new_page()
    page.set_default_timeout(1000 * LONG)
    trouble = []
    page.on("console", lambda message: message.type == "error" and trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    own = (address, "data:", "blob:")
    page.on("request", lambda request: request.url.startswith(own) or trouble.append(request.url))
    page.goto(address)
    page.locator("#chat .example").first.wait_for()
    page.locator("html[data-ready]").wait_for(state="attached")  # page.js listens
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
    assert not trouble


def ask(page, text: str) -> None:
    page.fill("#box textarea", text)
    wait_for_answer(page, lambda: page.press("#box textarea", "Enter"))


def wait_for_answer(page, act: Callable[[], None]) -> None:
    """Do what asks for one. What is seen is no sign of its end: a small model has answered before the stop
    button appears. The page asks for the answer, then says that it has ended."""
    asked = []

    def has_ended(response) -> bool:
        asked.append("/queue/join" in response.url)
        return any(asked) and "/run/predict" in response.url

    with page.expect_response(has_ended):
        act()
    page.locator('[data-testid="submit-button"]').wait_for()
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def draw(page, points: list[tuple[float, float]]) -> None:
    """A stroke through points of the sketch pad, 0..1 from its upper left corner."""
    frame = page.locator("#pad canvas").bounding_box()
    places = [(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=3)
    page.mouse.up()
