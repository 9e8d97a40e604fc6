"""The engine: many at once are answered as if each were alone, in the order in which they came, and whoever
leaves frees the model."""

import asyncio
import contextlib
import re
import shutil
import threading
import weakref

import pytest
import torch
from conftest import LONG, ROOT, SIZES, save_image, save_video, wait_until
from PIL import Image

from model.chat import Chat, load_chat
from model.checkpoint import save_weights
from model.generate import Sampling, StopWords
from model.LMConfig import LMConfig
from model.transformer import Transformer
from serving import answer as answers
from serving import engine as engines
from serving.answer import AlreadyWaiting, LineFull
from serving.engine import Engine, choose_together


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    for number in range(4):
        save_image(folder / f"{number}.png", number)
    save_video(folder / "v.mp4", [20, 90, 160, 240])
    return folder


@pytest.fixture(scope="module")
def chat(folder, tokenizer, tokenizer_path, clip_path) -> Chat:
    """Loud random weights, whose answers depend on the image and are of many lengths."""
    torch.manual_seed(3)
    model = Transformer(LMConfig(**SIZES, vocab_size=len(tokenizer), vision_dim=24, max_seq_len=256))
    for name, weight in model.named_parameters():
        if "vision_proj" in name or name.endswith(("wo.weight", "w2.weight")):
            weight.data *= 60
    about = {"knows": "noise and nothing else", "questions": ["What is this?"]}
    paths = {"tokenizer_path": str(tokenizer_path), "clip_path": str(clip_path)}
    save_weights(model, folder / "32_vlm_sft.pth", stage="vlm_sft", about=about, **paths)
    return load_chat(folder / "32_vlm_sft.pth")


def turns_of(text: str, num_images: int = 1) -> list[dict]:
    return [{"from": "human", "value": "<image>\n" * num_images + text}]


def requests_of(folder, number: int = 14) -> list[tuple[list[dict], list, Sampling]]:
    """Questions of several lengths, with no, one or two images, greedy and sampled, short and long."""
    kinds = (
        {},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 1},
        {"repetition_penalty": 1.3},
    )
    found = []
    for at in range(number):
        images = [folder / f"{(at + n) % 4}.png" for n in range(at % 3)]
        sampling = Sampling(max_new_tokens=(70, 3, 25, 1, 110)[at % 5], **kinds[at % 4])
        found.append((turns_of("图片里有什么？" * (1 + at % 4), len(images)), images, sampling))
    return found


@pytest.mark.parametrize("together", [1, 3, 16])
def test_together_equals_alone(chat, folder, together):
    """Token for token, greedy and sampled: whoever else is in the batch, whoever joins and leaves meanwhile,
    also where answers take turns in it."""
    asked = requests_of(folder)
    expected = ["".join(chat.stream(*one)) for one in asked]
    assert len(set(expected)) > 10
    with Engine(chat, together) as engine:
        for order in (range(len(asked)), reversed(range(len(asked)))):
            given = {at: engine.submit(*asked[at]) for at in order}
            assert [("".join(given[at])) for at in range(len(asked))] == expected
        assert engine.num_under_way == 0


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Nothing is read before it is set."""
    gate, read = threading.Event(), engines.Row.read
    monkeypatch.setattr(engines.Row, "read", lambda row: (gate.wait(LONG), read(row))[1])
    yield gate
    gate.set()


def speak(number: int, **settings) -> Sampling:
    return Sampling(max_new_tokens=number, temperature=2, **settings)  # so hot that hardly one ends early


def test_answers_take_turns_so_that_nobody_waits_for_a_long_one(chat, folder, gate, monkeypatch):
    """One row at a time: a short answer that was asked for later ends before the long one."""
    monkeypatch.setattr(engines, "TURN", 4)
    with Engine(chat, together=1) as engine:
        long = engine.submit(turns_of("a"), [folder / "0.png"], speak(120))
        short = engine.submit(turns_of("b"), [folder / "1.png"], speak(9))
        gate.set()
        for answer in (short, long):
            assert "".join(answer) and answer.finish_reason in ("length", "stop")
    assert long.num_tokens > 50 and short.last < long.last


def test_the_line_tells_places_in_the_order_of_arrival(chat, gate, monkeypatch):
    """Whoever leaves makes room; too many, and a second question of one visitor, are refused."""
    monkeypatch.setattr(answers, "FIRST_PLACE", 0)
    monkeypatch.setattr(answers, "LOOK", 0.01)
    monkeypatch.setattr(engines, "STARTED", 1)

    async def visit(answer, is_here=lambda: True) -> list[int | str]:
        return [event async for event in answer.events(is_here)]

    async def all_visit(engine: Engine) -> list[list]:
        given = [engine.submit(turns_of("a", 0), owner="a")]
        wait_until(lambda: engine.reading)
        given += [engine.submit(turns_of(name, 0), owner=name) for name in "bcd"]
        assert [answer.place for answer in given] == [0, 1, 2, 3]
        with pytest.raises(AlreadyWaiting):
            engine.submit(turns_of("c", 0), owner="c")
        with pytest.raises(LineFull):
            engine.submit(turns_of("e", 0), owner="e")
        left = asyncio.Event()
        tasks = [
            asyncio.create_task(visit(given[at], lambda at=at: at != 1 or not left.is_set()))
            for at in range(4)
        ]
        await asyncio.sleep(0.1)
        left.set()  # b closes the page
        await asyncio.wait_for(tasks[1], LONG)
        assert [answer.place for answer in given] == [0, 0, 1, 2] and given[1].finish_reason == "stopped"
        gate.set()
        return await asyncio.gather(*tasks)

    with Engine(chat, together=1, most_waiting=3) as engine:
        try:
            events = asyncio.run(all_visit(engine))
        finally:
            gate.set()
    places = [[event for event in got if isinstance(event, int)] for got in events]
    assert places[:2] == [[], [1]] and places[2][:2] == [2, 1] and places[3][:2] == [3, 2]
    expected = ["".join(chat.stream(turns_of(name, 0))) for name in "abcd"]
    texts = ["".join(event for event in got if isinstance(event, str)) for got in events]
    assert texts == [expected[0], "", *expected[2:]]


def test_whoever_leaves_frees_the_model_at_once(chat, folder):
    with Engine(chat, together=2) as engine:
        answer = engine.submit(turns_of("a"), [folder / "0.png"], speak(150))
        for number, _ in enumerate(answer):
            if number == 3:
                break
        assert answer.finish_reason == "stopped" and answer.num_tokens < 150
        assert engine.num_under_way == 0

        async def leave() -> None:
            async with contextlib.aclosing(
                engine.submit(turns_of("b", 0), [], speak(150)).events()
            ) as events:
                async for _ in events:
                    break

        asyncio.run(leave())
        assert engine.num_under_way == 0
        stopped = engine.submit(turns_of("c", 0), [], speak(150))
        next(iter(stopped))
        expected = "".join(chat.stream(turns_of("d", 0)))
        assert "".join(engine.submit(turns_of("d", 0))) == expected


def test_what_goes_wrong_ends_one_answer_alone(chat, folder, monkeypatch):
    with Engine(chat) as engine:
        with pytest.raises(FileNotFoundError, match=r"none\.png"):
            list(engine.submit(turns_of("a"), [folder / "none.png"]))
        with pytest.raises(ValueError, match="context holds 256"):
            engine.submit(turns_of("long " * 999, 0))
        with pytest.raises(ValueError, match=r"1 image placeholder\(s\) but 2"):
            engine.submit(turns_of("a"), [folder / "0.png"] * 2)
        with monkeypatch.context() as patch:
            patch.setattr(chat.decoder, "step", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                list(engine.submit(turns_of("a"), [folder / "0.png"], speak(9)))
        assert "".join(engine.submit(turns_of("a"), [folder / "0.png"])) == "".join(
            chat.stream(turns_of("a"), [folder / "0.png"])
        )
    with pytest.raises(LineFull):
        engine.submit(turns_of("a", 0))


def test_nothing_of_an_answer_stays(chat, folder, monkeypatch):
    """Neither what was asked nor its cache: memory is that of the answers under way."""
    caches, gather = [], engines.KVCache.gather

    def note(*given):
        cache = gather(*given)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(engines.KVCache, "gather", note)
    with Engine(chat, together=2) as engine:
        given = [engine.submit(*one) for one in requests_of(folder)]
        kept = [weakref.ref(answer) for answer in given]
        for answer in given:
            list(answer)
        del given, answer
        wait_until(lambda: not any(ref() for ref in (*kept, *caches)))
        assert len(caches) > 5


def test_an_answer_says_how_long_it_took_and_why_it_ended(chat, folder):
    with Engine(chat, together=1) as engine:
        answer = engine.submit(turns_of("a"), [folder / "0.png"], speak(12))
        text = "".join(answer)
        assert answer.finish_reason == "length" and answer.num_tokens == 12 and answer.text == text
        assert answer.seconds_to_first > 0 and answer.tokens_per_second > 0
        assert "length" in repr(answer) and "12 tokens" in repr(answer) and "Chat(" in repr(engine)
        assert answer.num_prompt_tokens == len(chat.render(turns_of("a")).input_ids)
        word = text[len(text) // 2 :][:3]
        cut = engine.submit(turns_of("a"), [folder / "0.png"], speak(12), stop=("never said", word))
        assert "".join(cut) == text[: text.index(word)]
        assert cut.finish_reason == "stop" and cut.num_tokens <= 12 and engine.num_under_way == 0


@pytest.mark.parametrize("size", [1, 2, 3, 99])
def test_stop_words_come_out_in_no_part(size):
    text = "one two </stop three </stop> four"
    words = StopWords(("</stop>", "never"))
    shown = "".join(words.push(text[at : at + size]) for at in range(0, len(text), size) if not words.found)
    assert shown == "one two </stop three " and words.found
    words = StopWords(("</stop>",))
    assert words.push("a </st") == "a " and words.finish() == "</st"


def test_the_size_of_a_batch_is_what_is_fastest_here(chat, monkeypatch):
    assert choose_together(chat.decoder) in (1, 2, 4, 8, 16)
    for seconds, expected in (
        (lambda rows: rows, 1),
        (lambda rows: 1 + rows / 100, 16),
        (lambda rows: max(4, rows), 4),
    ):
        monkeypatch.setattr(
            engines, "seconds_per_step", lambda decoder, cache, rows, seconds=seconds: seconds(rows)
        )
        assert choose_together(chat.decoder) == expected


# ---- three lines of Python ---------------------------------------------------------------------------------


def test_a_question_in_python(chat, folder):
    path = folder / "1.png"
    expected = "".join(chat.stream(turns_of("What is this?"), [Image.open(path)])).strip()
    for given in (path, str(path), Image.open(path), [path], (Image.open(path),)):
        assert chat.ask("What is this?", given) == expected
    assert "".join(chat.stream("What is this?", path)).strip() == expected
    assert chat.ask("What is this?", path, max_new_tokens=3) == chat.ask(
        "What is this?", path, Sampling(max_new_tokens=3)
    )
    both = [folder / "0.png", path]
    assert chat.ask("Which?", both) == chat.ask(turns_of("Which?", 2), both)
    assert chat.ask("Who are you?") == chat.ask(turns_of("Who are you?", 0))
    frames = chat.compose("Where?", videos=[folder / "v.mp4"])
    assert frames.images and frames.question == "<image>" * len(frames.images) + "\nWhere?"
    assert chat.ask("Where?", folder / "v.mp4") == chat.ask(
        turns_of("", 0)[:0] + [{"from": "human", "value": frames.question}], frames.images
    )


def test_the_three_lines_of_the_readme(chat, folder, monkeypatch, capsys):
    block = re.search(r"```python\n(.*?)```", (ROOT / "serving/README.md").read_text(), re.DOTALL)[1]
    assert len([line for line in block.splitlines() if line]) == 3
    shutil.copy(folder / "0.png", folder / "a.jpg")
    monkeypatch.chdir(folder)
    exec(block.replace("out/demo/128_vlm_sft.pth", "32_vlm_sft.pth"), {})
    assert capsys.readouterr().out == chat.ask("What is this?", "a.jpg") + "\n"


def test_python_says_what_is_wrong_and_what_the_model_knows(chat, folder):
    for given, match in (
        ({"images": folder / "none.png"}, "none.png"),
        ({"temperature": -1}, "temperature must be"),
        ({"sampling": Sampling(), "temperature": 1}, "not both"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            chat.ask("a", **given)
    with pytest.raises(TypeError, match="temprature"):
        chat.ask("a", temprature=1)
    assert chat.knows == "noise and nothing else" and chat.questions == ["What is this?"]
    assert "32_vlm_sft.pth" in repr(chat) and chat.knows in repr(chat) and "cpu float32" in repr(chat)
