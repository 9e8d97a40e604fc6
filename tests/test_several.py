"""Several images and videos in evaluation: sets, videos, question files with their controls; v1's data
sets."""

import io
import json
from functools import partial

import pytest
import torch
from conftest import run_inside, run_script, save_image, save_video

from model.chat import load_chat
from model.checkpoint import save_weights
from model.data.batch import BadSample
from model.data.dataset import VLMDataset
from model.data.spec import SFT_MULTI
from model.data.video import Frame, find_frames, open_images
from model.generate import Sampling
from model.printable import printable
from model.vision_utils import ImageProcessor
from trainer.controls import ImageFeatures, find_stand_ins, resample, show, successors
from trainer.distributed import Run
from trainer.question_files import open_question_file
from trainer.questions import Question, read_questions
from trainer.samples import decode_sample
from trainer.scoring import ask_all, ask_exact

# As the documents show them: image edits and bird comparisons.
EDITS = {
    "id": "000000000000",
    "image": "0.jpg, 1.jpg",
    "conversations": [
        {
            "from": "human",
            "value": "context: Source Image: <image> Target Image: <image> Instruction: What is "
            "the correct image edit instruction that can transfrom the source image to "
            "target image?",
        },
        {"from": "gpt", "value": "take the people out of the back in the photo."},
    ],
}
BIRDS = {
    "id": "000000013633",
    "image": "27266.jpg, 27267.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\n<image>\nName all the differences between these two birds."},
        {"from": "gpt", "value": "animal1 has a brown head. animal2 has a black head."},
    ],
}


@pytest.mark.parametrize("documented", [EDITS, BIRDS])
@pytest.mark.parametrize("form", [", ", ",", None])
def test_both_multi_image_data_sets_are_read_as_documented(tmp_path, renderer, documented, form):
    names = documented["image"].split(", ")
    for number, name in enumerate(names):
        save_image((tmp_path / name).with_suffix(".png"), number)
        (tmp_path / name).with_suffix(".png").rename(tmp_path / name)
    row = documented | {"image": form.join(names) if form else names}
    (tmp_path / "output.json").write_text(json.dumps([row]))
    dataset = VLMDataset(tmp_path / "output.json", SFT_MULTI, renderer, tmp_path, ImageProcessor())
    dataset.check_rows()
    sample = dataset[0]
    assert not isinstance(sample, BadSample) and len(sample["pixel_values"]) == 2
    question, answer = (turn["value"] for turn in documented["conversations"])
    expected = f"<s>user\n{question}</s>\n<s>assistant\n[[{answer}</s>]]".replace("\n", "\\n")
    assert decode_sample(sample, renderer.tokenizer) == expected.replace("<image>", "<image x50>")


# ---- controls ----


def question(*parts: list) -> Question:
    return Question({}, list(parts), [])


def video(path: str, count: int = 4) -> list[Frame]:
    return [Frame(path, number) for number in range(count)]


def test_every_control_shows_what_it_says():
    one, two, three = question(["a"]), question(["a"], ["b"]), question(["c"], video("x"))
    four = question(video("y", 3))
    stand_ins = find_stand_ins([one, two, three, four], seed=0)
    for asked in (one, two, three, four):
        flat = [image for part in asked.parts for image in part]
        assert show(asked, "real", stand_ins, 0) == show(asked, "blank", stand_ins, 0) == flat
        other = show(asked, "shuffled", stand_ins, 0)
        assert len(other) == len(flat)
        for old, new in zip(flat, other, strict=True):
            assert isinstance(old, Frame) == isinstance(new, Frame)
            assert old != new and (not isinstance(old, Frame) or old.video != new.video)
    assert [show(asked, "swapped", stand_ins, 0) for asked in (one, two, three, four)] == [
        None,
        ["b", "a"],
        None,
        None,
    ]
    assert show(one, "shuffled_frames", stand_ins, 0) is show(two, "shuffled_frames", stand_ins, 0) is None
    assert show(question(video("x", 1)), "shuffled_frames", stand_ins, 0) is None
    for seed in range(20):
        kept, *frames = show(three, "shuffled_frames", stand_ins, seed)
        assert kept == "c" and sorted(frame.moment for frame in frames) == [0, 1, 2, 3]
        assert all(frame.moment != place for place, frame in enumerate(frames))


def test_a_control_that_changes_nothing_leaves_a_question_out():
    alone = question(["a"])
    assert show(alone, "shuffled", find_stand_ins([alone, alone], seed=0), 0) is None


def test_no_place_follows_itself_and_videos_of_other_lengths_stand_in():
    for count in range(2, 9):
        for seed in range(10):
            after = successors(count, seed)
            assert sorted(after) == list(range(count)) and all(a != b for a, b in enumerate(after))
    assert resample([0, 1, 2, 3, 4, 5], 3) == [1, 3, 5] and resample([0, 1], 4) == [0, 0, 1, 1]
    assert resample([0, 1, 2], 3) == [0, 1, 2]


# ---- the script ----


@pytest.fixture
def place(workplace, lively, tokenizer_path, clip_path):
    """Weights that answer, sets of images, videos and questions; the flags of 3-eval_chat.py for them."""
    save_weights(lively, workplace / "out" / "32_vlm_sft_multi.pth")
    for number, videos in enumerate(([10, 90, 170, 250], [250, 10, 250], [60, 120])):
        save_video(workplace / "images" / f"{number}.mp4", videos)
    for name, members in (("b", (3, 1)), ("a", (0, 1, 2))):
        (workplace / "sets" / name).mkdir(parents=True)
        for number in members:
            save_image(workplace / "sets" / name / f"{number}.png", number)
    rows = [
        {
            "image": f"images/{n}.png, images/{n + 1}.png",
            "question": "<image> 和 <image> 不同？",
            "answer": "甲",
            "swapped_answer": "乙",
            "kind": "two",
        }
        for n in range(5)
    ]
    rows += [
        {"image": f"images/{n}.png", "question": "什么？", "answer": "甲", "kind": "one"} for n in range(3)
    ]
    rows += [
        {"video": f"images/{n}.mp4", "question": "它往哪里去？", "answer": "甲", "kind": "video"}
        for n in range(3)
    ]
    (workplace / "questions_x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return [
        f"--out_dir={workplace}/out",
        "--dim=32",
        "--device=cpu",
        "--max_new_tokens=6",
        "--batch_size=4",
        f"--tokenizer_path={tokenizer_path}",
        f"--clip_path={clip_path}",
    ]


@pytest.fixture
def chat(place, workplace, tokenizer_path, clip_path):
    return load_chat(workplace / "out" / "32_vlm_sft_multi.pth", tokenizer_path, clip_path)


CONTROLS = ["--control", "real", "blank", "shuffled", "swapped", "shuffled_frames"]


def test_questions_are_scored_under_every_control_by_one_process_as_by_two(place, workplace, capsys):
    flags = [*place, "--stage=vlm_sft_multi", f"--questions={workplace}/questions_x.jsonl", *CONTROLS]
    # For some, let what the model says under the control be the right answer.
    run_inside("3-eval_chat.py", *flags, f"--report={workplace}/first.json")
    first = [json.loads(line) for line in (workplace / "first.answers.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (workplace / "questions_x.jsonl").read_text().splitlines()]
    given = {
        control: [record["given"] for record in first if record["control"] == control]
        for control in CONTROLS[1:]
    }
    for number, row in enumerate(rows):
        row["answer"] = given["real"][number] or "甲"
        if row["kind"] == "two" and number < 4:
            row["swapped_answer"] = given["swapped"][number] or "乙"
    (workplace / "questions_x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run_inside("3-eval_chat.py", *flags, f"--report={workplace}/report.json")
    alone = [(workplace / f"report{suffix}").read_text() for suffix in (".json", ".answers.jsonl")]
    assert "nan" not in capsys.readouterr().out.lower()
    both = run_script("3-eval_chat.py", *flags, f"--report={workplace}/report.json", processes=2)
    assert both.returncode == 0, both.stderr
    assert alone == [(workplace / f"report{suffix}").read_text() for suffix in (".json", ".answers.jsonl")]
    report = json.loads(alone[0])["x"]
    assert set(report["two"]) == {"real", "blank", "shuffled", "swapped", "swapped_follows"}
    assert set(report["one"]) == {"real", "blank", "shuffled"}
    assert set(report["video"]) == {"real", "blank", "shuffled", "shuffled_frames"}
    records = [json.loads(line) for line in alone[1].splitlines()]
    for kind, number in (("two", 5), ("one", 3), ("video", 3)):
        for control in report[kind]:
            of = [
                record
                for record in records
                if record["kind"] == kind and record["control"] == control.removesuffix("_follows")
            ]
            right = [record["follows" if control.endswith("follows") else "right"] for record in of]
            assert len(of) == number and report[kind][control] == round(sum(right) / number, 4)
    assert [record["video"] for record in records if record["kind"] == "video"][:3] == [
        [f"{workplace}/images/{n}.mp4"] for n in range(3)
    ]
    assert report["two"]["swapped_follows"] >= 0.8


def test_what_the_model_sees_under_a_control(place, workplace, chat, monkeypatch):
    """The features that reach the model, compared with those of the files encoded here."""
    questions = read_questions(open_question_file(workplace / "questions_x.jsonl"), chat, max_frames=8)
    seen = {}

    def answer_batch(conversations, image_features, sampling):
        seen[control] += image_features
        return ["" for _ in conversations]

    monkeypatch.setattr(chat, "answer_batch", answer_batch)
    run = Run(0, 1, torch.device("cpu"))
    features = ImageFeatures(chat, [image for asked in questions for part in asked.parts for image in part])
    ask = partial(ask_exact, chat, lambda number: Sampling())
    for control in ("real", "blank", "swapped", "shuffled_frames"):
        seen[control] = []
        asked = [(one, given) for one in questions if (given := show(one, control, {}, 0))]
        ask_all(run, 4, asked, features, control, ask)
        seen[control] = torch.cat(seen[control])
    images = [workplace / "images" / f"{n}.png" for n in range(6)]
    videos = [find_frames(workplace / "images" / f"{n}.mp4") for n in range(3)]
    pairs = [images[n + place] for n in range(5) for place in (0, 1)]
    expected = chat.encode(list(open_images([*pairs, *images[:3], *sum(videos, [])])))
    torch.testing.assert_close(seen["real"], expected, rtol=1e-5, atol=1e-6)
    assert not seen["blank"].any() and seen["blank"].shape == expected.shape
    swapped = expected[:10].unflatten(0, (5, 2)).flip(1).flatten(0, 1)
    torch.testing.assert_close(seen["swapped"], swapped, rtol=1e-5, atol=1e-6)
    frames = expected[13:]
    shuffled = seen["shuffled_frames"]
    assert len(shuffled) == len(frames) == 4 + 3 + 2
    assert (shuffled[:4] - frames[:4]).abs().amax((1, 2)).min() > 1e-4  # none at its own place
    torch.testing.assert_close(shuffled[:4].sum(0), frames[:4].sum(0), rtol=1e-4, atol=1e-4)


def test_a_file_of_one_image_says_nothing_about_swapping(place, workplace, capsys):
    (workplace / "questions_x.jsonl").write_text(
        json.dumps({"image": "images/0.png", "question": "什么？", "answer": "甲", "kind": "one"})
    )
    run_inside(
        "3-eval_chat.py",
        *place,
        "--stage=vlm_sft_multi",
        f"--questions={workplace}/questions_x.jsonl",
        "--control",
        "real",
        "swapped",
        f"--report={workplace}/report.json",
    )
    assert "the control swapped says nothing about its questions" in capsys.readouterr().out
    assert set(json.loads((workplace / "report.json").read_text())["x"]["one"]) == {"real"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "q", "answer": "a", "kind": "k"}, "row 1: it has no image"),
        ({"video": "images/0.mp4", "answer": "a", "kind": "k"}, "row 1: it has no question"),
        ({"video": "gone.mp4", "question": "q", "answer": "a", "kind": "k"}, "video not found"),
        (
            {"video": "images/0.png.mp4", "question": "q", "answer": "a", "kind": "k"},
            "row 1: cannot read video",
        ),
        (
            {"video": "images/0.mp4", "question": "<video><video>", "answer": "a", "kind": "k"},
            r"row 1: the question marks 2 video\(s\) but 1 were given",
        ),
        (7, "row 1: it has no image, question, answer, kind"),
    ],
)
def test_bad_question_rows_are_named(place, workplace, chat, bad, message):
    (workplace / "images" / "0.png.mp4").write_bytes(b"no video")
    (workplace / "bad.jsonl").write_text(json.dumps(bad))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_questions(open_question_file(workplace / "bad.jsonl"), chat, 8)


def test_sets_of_images_are_described_together(place, workplace, chat, capsys):
    run_inside("3-eval_chat.py", *place, "--multi", f"--image_dir={workplace}/sets")
    printed = capsys.readouterr().out
    text = printed[printed.index("\n[") :]
    names = [workplace / "sets" / name for name in "ab"]
    assert text.count("\n[") == 2 and text.index(str(names[0])) < text.index(str(names[1]))
    for name in names:
        files = sorted(name.iterdir())
        turns = [
            {
                "from": "human",
                "value": "<image>\n" * len(files) + "Name all the differences between these pictures.",
            }
        ]
        answer = "".join(chat.stream(turns, list(open_images(files)), Sampling(max_new_tokens=6)))
        assert f"[{name}] Name all the differences between these pictures.\n{printable(answer)}\n" in text


def test_a_video_is_described_and_asked_about(place, workplace, chat, capsys, monkeypatch):
    video = workplace / "images" / "0.mp4"
    run_inside("3-eval_chat.py", *place, f"--video={video}", "--prompt=它往哪里去？", "--max_frames=3")
    frames = list(open_images(find_frames(video, 3)))
    turns = [{"from": "human", "value": "<image>" * 3 + "\n它往哪里去？"}]
    answer = "".join(chat.stream(turns, frames, Sampling(max_new_tokens=6)))
    assert (
        capsys.readouterr().out.endswith(f"[{video}] 它往哪里去？\n{printable(answer)}\n")
        and len(frames) == 3
    )
    for flags in ([f"--video={video}", "--chat"], ["--chat", str(video)]):
        monkeypatch.setattr("sys.stdin", io.StringIO("它往哪里去？\nwhat colour?\n"))
        run_inside("3-eval_chat.py", *place, *flags, "--max_frames=3")
        first, second = capsys.readouterr().out.splitlines()
        assert first == printable(answer)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--multi", "--image_dir={}/images"], ["no folders in", "--image_dir"]),
        (["--multi", "--image_dir={}/gone"], ["image folder not found", "--image_dir"]),
        (
            ["--multi", "--image_dir={}/many"],
            ["holds 6 images of 50 tokens each", "holds 256", "at most 4 images fit"],
        ),
        (["--video={}/gone.mp4"], ["--video: there is no file", "gone.mp4"]),
        (["--chat={}/gone.png"], ["--chat: there is no file", "gone.png"]),
        (["--video={}/args"], ["cannot read video"]),
        (["--chat", "{}/images/0.png", "{}/gone.mp4"], ["--chat: there is no file", "gone.mp4"]),
        (["--max_frames=0"], ["--max_frames must be at least 1"]),
    ],
)
def test_what_cannot_be_shown_is_reported_in_one_line(place, workplace, flags, fragments):
    (workplace / "many" / "set").mkdir(parents=True)
    for number in range(6):
        save_image(workplace / "many" / "set" / f"{number}.png", number)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run_inside("3-eval_chat.py", *place, *[flag.format(workplace) for flag in flags])
    assert "\n" not in str(error.value) and all(fragment in str(error.value) for fragment in fragments)


def test_numbers_of_images_and_frames_belong_to_the_stage_of_several(workplace):
    for flag in ("--max_images=2", "--max_frames=3"):
        with pytest.raises(ValueError, match="--max_images and --max_frames need --multi"):
            run_inside("2-sft_vlm.py", f"@{workplace}/args", flag)
