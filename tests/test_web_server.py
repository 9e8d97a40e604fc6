"""The web page, run as a process and asked by two programs (gradio_client) and by a browser (Chromium).

Gradio takes all chat text for HTML, even with render_markdown=False: `<b>` turned bold and a typed `<image>`
vanished. And v1's page shared one image among all its visitors.
"""

import base64
import itertools
import json
import re
import socket
from collections.abc import Iterator

import pytest
from conftest import LONG, ROOT, check_refused, run_script
from web_pages import Visitor, form_of, make_folder, send, serve_page, text_of

from model.chat import Round, load_chat
from model.generate import Sampling
from model.images import open_image

TYPED = "Describe <b>this</b> <s>image</s>.\n  <<< <image> &lt; <!-- x --> <img src=x onerror=alert(1)> \"'"
QUESTION = "图形是什么颜色？"


@pytest.fixture(scope="module")
def images(tmp_path_factory, tokenizer, tokenizer_path, clip_path):
    """Two images, a broken one, a folder of examples, and random weights that speak at length."""
    return make_folder(tmp_path_factory.mktemp("web"), tokenizer, tokenizer_path, clip_path)


@pytest.fixture(scope="module")
def server(images):
    """The address of a running web_server.py."""
    with serve_page(images) as page:
        yield page.address


@pytest.fixture
def visitor(server):
    """Opens the page as a program: every call is another visitor."""
    client = pytest.importorskip("gradio_client", reason="gradio_client is missing")
    return lambda: client.Client(server, verbose=False)


def put(client, text: str, *files) -> list[list[dict]]:
    """Ask as the page does; the conversations as they were shown while the answer grew."""
    from gradio_client import handle_file

    client.predict({"text": text, "files": [handle_file(str(path)) for path in files]}, api_name="/ask")
    job = client.submit(0, 0, 1, 1, 40, 0, api_name="/answer")
    job.result(timeout=LONG)
    return [output if isinstance(output[0], dict) else output[0] for output in job.outputs()]


def texts(messages: list[dict], role: str) -> list[str]:
    """What the browser is given to show, as it will be read: each message's text, unescaped."""
    return [
        text_of(part["text"])
        for message in messages
        if message["role"] == role
        for part in message["content"]
        if part["type"] == "text"
    ]


def test_an_answer_streams_and_every_visitor_has_an_image_of_their_own(visitor, images):
    first, second, third = visitor(), visitor(), visitor()
    shown = put(first, QUESTION, images / "second.png")
    answers = [texts(messages, "assistant")[-1] for messages in shown]
    assert len(answers) > 5 and len(set(answers)) > 5
    for earlier, later in itertools.pairwise(answers):
        assert later.startswith(earlier), (earlier, later)

    other = texts(put(second, QUESTION, images / "first.png")[-1], "assistant")
    assert other != answers[-1:], "the answer does not depend on the image"
    again = texts(put(first, QUESTION)[-1], "assistant")
    # Still the visitor's own image, not the latest one, and what was said about it.
    turns = [
        {"from": "human", "value": f"<image>\n{QUESTION}"},
        {"from": "gpt", "value": answers[-1]},
        {"from": "human", "value": QUESTION},
    ]
    remembered = load_chat(images / "32_vlm_sft.pth").stream(
        turns, [open_image(images / "second.png")], Sampling(max_new_tokens=40)
    )
    assert again == [answers[-1], "".join(remembered)]
    assert "Please add an image" in texts(put(third, QUESTION)[-1], "assistant")[0]  # and nobody else's


def test_what_is_missing_is_said_kindly(visitor, images):
    client = visitor()
    assert "Please add an image" in texts(put(client, QUESTION)[-1], "assistant")[-1]
    answer = texts(put(client, "", images / "broken.png")[-1], "assistant")[-1]
    assert "cannot be read as an image" in answer
    answer = texts(put(client, "long " * 2000, images / "first.png")[-1], "assistant")[-1]
    assert "Shorten the question" in answer and "tokens" in answer
    messages = put(client, "", images / "first.png")[-1]  # and the conversation goes on
    assert texts(messages, "user")[-1] == "这个图片描述的是什么内容？"
    assert texts(messages, "assistant")[-1]


def test_what_the_page_says_is_no_answer_of_the_model():
    from serving import conversation as page

    messages = []
    for text, files, answer in (
        ("b", ["1.png"], page.say("a cat")),
        ("c", ["2.png"], None),
        ("", [], page.notice(page.NO_ANSWER)),
        ("a", ["3.png"], page.notice(page.BAD_IMAGE, puts_back="text")),
        ("d", [], page.say(page.NO_IMAGE)),  # a model may say what it likes
    ):
        messages = [*page.ask(text, files, messages), *([answer] if answer else [])]
    assert page.rounds_of(messages) == [
        Round("b", ["1.png"], "a cat"),
        Round("c", ["2.png"]),
        Round(page.DEFAULT_QUESTION),
        Round("d", [], page.NO_IMAGE),
    ]


def test_a_question_without_an_answer_goes_back_into_the_box():
    """It had to be typed again."""
    from serving import conversation as page

    answered = [*page.ask("a", ["1.png"], []), page.say("a cat", is_growing=True)]
    assert page.settle(answered) == ([answered[0], page.say("a cat")], None)
    asked = page.ask("b", ["2.png"], answered)
    assert page.settle(asked) == (answered, {"text": "b", "files": ["2.png"]})
    for kept, files in (("all", ["2.png"]), ("text", [])):
        refused = [*asked, page.notice(page.GONE, puts_back=kept)]
        assert page.settle(refused) == (refused, {"text": "b", "files": files})
        assert page.ask("b", [], refused) == page.ask("b", [], answered), "not there twice"


def test_html_arrives_as_typed(visitor, images):
    messages = put(visitor(), TYPED, images / "first.png")[-1]
    assert texts(messages, "user") == [TYPED]
    sent = [part["text"] for part in messages[0]["content"] if part["type"] == "text"]
    assert not re.search("[<>\"']", "".join(sent)), "the Chatbot was given something that could be HTML"


def test_a_wrong_start_is_one_line(images):
    check_refused(run_script("web_server.py", "--load", str(images / "none.pth")), "none.pth")
    weights = str(images / "32_vlm_sft.pth")
    wrong = run_script("web_server.py", "--load", weights, "--allow_host", "http://chat.example.org")
    check_refused(wrong, "--allow_host", "NAME:PORT")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        check_refused(run_script("web_server.py", "--load", weights, "--port", port), "--port", port)
    assert "0.0.0.0" not in (ROOT / "web_server.py").read_text(), "people copy what they see"


def test_the_page_in_a_browser(browser, server, images):
    context = browser.new_context(
        viewport={"width": 1280, "height": 860}, permissions=["clipboard-read", "clipboard-write"]
    )
    page = context.new_page()
    page.set_default_timeout(1000 * LONG)
    trouble = []
    page.on("console", lambda message: message.type == "error" and trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", lambda dialog: (trouble.append("a script ran: " + dialog.message), dialog.dismiss()))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((server, "data:", "blob:"))
            else trouble.append("request to " + request.url)
        ),
    )
    page.goto(server)
    page.locator("#head").get_by_text("32_vlm_sft.pth · ").wait_for()
    page.locator("#chat .example").wait_for()
    page.set_input_files("input[type=file]", str(images / "first.png"))
    page.locator("#box img").wait_for()

    page.fill("textarea", QUESTION)
    page.press("textarea", "Enter")
    page.locator('[data-testid="bot"]').wait_for()
    page.locator('[data-testid="submit-button"]').wait_for()  # the stop button is gone: answered
    assert page.input_value("textarea") == ""
    page.fill("textarea", TYPED)
    page.press("textarea", "Enter")
    page.locator('[data-testid="bot"]').nth(1).wait_for()
    page.locator('[data-testid="submit-button"]').wait_for()
    # Once it stayed: Gradio emptied the very first question of a server's life only.
    assert page.input_value("textarea") == ""
    assert page.locator('[data-testid="user"]').last.inner_text() == TYPED
    assert page.locator("#chat .message").locator("b, s, image").count() == 0
    page.locator("#chat").get_by_label("Copy message").nth(-2).click()
    assert page.evaluate("navigator.clipboard.readText()") == TYPED
    answers = page.locator('[data-testid="bot"]').all_inner_texts()
    assert len(answers) == 2 and all(answers)
    assert page.get_by_label("Share").locator("visible=true").count() == 0  # it would upload the image
    context.close()
    assert not trouble


def test_a_password_a_short_line_and_small_uploads(images):
    """A byte too many is said kindly; without the password nothing is answered, page and programs alike."""
    large = (images / "first.png").read_bytes() + bytes(1 << 20)
    flags = ("--auth", "ann:se:cret é", "--max_upload_mb", "1", "--max_queue", "3")
    with serve_page(images, *flags) as served:

        def status(path: str, **headers: str) -> int:
            return send(served.address, "GET", path, None, headers)[0]

        basic = "Basic " + base64.b64encode("ann:se:cret é".encode()).decode()
        for path in ("/", "/config", "/v1/models", "/nothing"):
            status_, answered, _ = send(served.address, "GET", path)
            assert status_ == 401 and answered["www-authenticate"].startswith("Basic ")
        for wrong in ("Basic " + base64.b64encode(b"ann:").decode(), "Basic ?", "Bearer x", "Basic"):
            assert status("/config", Authorization=wrong) == 401
        assert status("/config", Authorization=basic) == status("/v1/models", Authorization=basic) == 200
        body, headers = form_of(("a.png", large))
        headers["Authorization"] = basic
        assert send(served.address, "POST", "/gradio_api/upload", body, headers)[0] == 200
        config = json.loads(send(served.address, "GET", "/config", None, {"Authorization": basic})[2])
        assert config["max_file_size"] == 1 << 20
    check_refused(run_script("web_server.py", "--auth", "ann"), "--auth", "USER:PASSWORD")


SLOW_AND_SHORT = """
import time
from serving import engine
engine.STARTED, engine.choose_together = 1, lambda decoder: 1
hand = engine.Engine.hand_over
engine.Engine.hand_over = lambda self, to, text, end: (text and time.sleep(1), hand(self, to, text, end))
"""


def test_a_full_line_and_an_error_leave_the_page_usable(browser, images):
    """After "please try again" the box stayed disabled for ever. Here two may wait, and a word takes a
    second."""
    page = browser.new_page()
    page.set_default_timeout(1000 * LONG)

    def ask(notice: str) -> None:
        page.fill("textarea", "and now?")
        page.press("textarea", "Enter")
        page.locator("#chat").get_by_text(notice).last.wait_for()

    def check_usable() -> None:
        page.locator('[data-testid="submit-button"]').wait_for()
        page.wait_for_function("!document.querySelector('textarea').disabled")

    with serve_page(images, "--max_queue", "2", change=SLOW_AND_SHORT) as served:
        image = (images / "first.png").read_bytes()

        def join() -> None:
            """Another visitor, whose answer takes minutes."""
            visitor = Visitor(served.address, [0, 0, 1, 1, 400, 0])
            assert visitor.put("hello", image)
            others.append(visitor.listen())
            next(others[-1])

        others: list[Iterator[str]] = []
        join()
        page.goto(served.address)
        page.locator("#chat .example").wait_for()
        page.set_input_files("input[type=file]", str(images / "first.png"))
        page.locator("#box img").wait_for()
        ask("You are number 1")
        page.locator(".stop-button").click()
        check_usable()
        page.locator("#chat").get_by_text("You are number").wait_for(state="hidden")
        assert page.input_value("textarea") == "and now?", "its question comes back"
        join()
        ask("You are number 2")
        page.locator(".stop-button").click()
        check_usable()
        join()
        ask("Many people are asking")
        check_usable()
        page.route("**/queue/join*", lambda route: route.fulfill(status=503, json={"detail": "full"}))
        ask("and now?")
        page.get_by_text("Please try again").wait_for()
        check_usable()
        page.unroute("**/queue/join*")
        ask("Many people are asking")
        check_usable()
        page.close()
