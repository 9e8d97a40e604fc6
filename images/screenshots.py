"""The screenshots in the README: the page is served and used in a browser: a star is drawn, and asked about.

reads    the weights of the demo world, or those that the flags name (they are web_server.py's)
writes   images/page.png and images/page_phone.png; needs Chromium and playwright

    python -m images.screenshots
    python -m images.screenshots --load_from out/768_vlm_sft.pth
"""

import argparse
import io
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from serving.look import COLOURS

HERE = Path(__file__).parent
DEMO = ["@dataset/demo/eval.args", "--load_from", "out/demo/128_vlm_sft.pth"]
NUM_COLOURS = 128  # of the PNG: half the size, and no difference to be seen
STAR = [
    (0.5 + radius * math.sin(math.pi * k / 5), 0.5 - radius * math.cos(math.pi * k / 5))
    for k in range(11)
    for radius in [0.08 if k % 2 else 0.18]
]


def main(argv: list[str] | None = None) -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, default=HERE, help="folder of the PNGs (default: images)")
    args, flags = parser.parse_known_args(argv)
    command = [sys.executable, "web_server.py", *(flags or DEMO), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent) as server:
        try:
            address = find_address(server)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=shutil.which("chromium"), args=["--no-sandbox"]
                )
                save(ask_about_a_star(open_page(browser, address, 1000, 720)), args.into / "page.png")
                phone = open_page(browser, address, 390, 844, color_scheme="dark", locale="en")
                save(what_mattered(phone), args.into / "page_phone.png")
                browser.close()
        finally:
            server.terminate()


def find_address(server: subprocess.Popen) -> str:
    """That the server prints. Raises ValueError if it ends instead; it has said why."""
    for line in server.stdout:
        if match := re.match(r"http://\S+", line):
            return match.group()
    raise ValueError("web_server.py did not start")


def open_page(browser, address: str, width: int, height: int, **options):
    page = browser.new_page(viewport={"width": width, "height": height}, **options)
    page.goto(address)
    page.locator("#chat .example").first.wait_for()
    return page


def ask_about_a_star(page):
    page.click("[data-do=open]")
    page.click(f"#pad [data-colour='{COLOURS['green']}']")
    frame = page.locator("#pad canvas").bounding_box()
    for number, (x, y) in enumerate(STAR):
        page.mouse.move(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"])
        if not number:
            page.mouse.down()
    page.mouse.up()
    page.click("#pad [data-do=use]")
    page.locator("#box img").wait_for()
    page.fill("#box textarea", "Describe this picture.")
    page.press("#box textarea", "Enter")
    page.locator("#chat .why").wait_for()
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # until nothing moves any more
    return page


def what_mattered(page):
    """In the answer to an example."""
    examples = page.locator("#chat .example")
    examples.nth(min(1, examples.count() - 1)).click()
    page.click("#chat .why")
    page.locator("#why .images img").wait_for()
    page.wait_for_timeout(500)
    return page


def save(page, path: Path) -> None:
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
