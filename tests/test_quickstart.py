"""quickstart.sh itself, with the tiny demo world: it learns to see, and a second call repeats nothing."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import LONG, ROOT, check_refused, run_script
from PIL import Image

from benchmarks.explain import measure_kind, open_world
from benchmarks.llava import to_llava, to_llava_ids
from model.chat import load_chat
from model.checkpoint import load_weights
from model.generate import Sampling, generate
from model.images import open_image
from model.transformer import Transformer
from model.vision_utils import get_img_process, get_vision_model


def quickstart(place: Path, *arguments: str) -> subprocess.CompletedProcess:
    world = {"WORLD": f"{place}/demo", "OUT": f"{place}/out", "PRESET": "tiny", "SEED": "3"}
    return subprocess.run(
        ["bash", "quickstart.sh", *arguments],
        cwd=ROOT,
        env=os.environ | world,
        timeout=6 * LONG,
        capture_output=True,
        text=True,
    )


def times_of(folder: Path) -> dict[str, int]:
    """When each file of a folder was last written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("quickstart.sh would set up .venv first: run the suite with bash tests/run.sh")
    folder = tmp_path_factory.mktemp("quickstart")
    result = quickstart(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "stdout").write_text(result.stdout)
    return folder


def test_the_model_sees_what_it_was_never_shown_and_the_controls_do_not(place):
    report = json.loads((place / "out" / "report.json").read_text())
    assert {"world", "pretrain", "sft", "multi", "evaluation", "evaluation_multi"} <= set(report["seconds"])
    for split in ("known", "unseen", "unseen_pairs"):
        assert set(report[split]) == {"colour", "shape", "position", "size", "description"}
    for split in ("several_known", "several_unseen"):
        assert set(report[split]) == {
            *("count", "colour_of", "shape_of", "where", "presence", "left_of"),
            *("description_of_two", "description_of_three"),
        }
        assert 0 <= report["said_yes"][split]["real"] <= 1
    for kind in ("colour", "shape"):  # four of each: guessing gives .25
        assert report["unseen"][kind]["real"] >= 0.8, report
        assert report["unseen"][kind]["blank"] <= 0.45 and report["unseen"][kind]["shuffled"] <= 0.45, report
    assert Image.open(place / "out" / "answers.png").size[0] > 800
    text = (place / "stdout").read_text()
    assert "What was learnt" in text and f"{place}/out/96_vlm_sft.pth" in text and "web_server.py" in text


def test_the_trained_model_answers_as_transformers_llava_does(place):
    """Forty held-out questions: ours as one batch, theirs one by one, token for token."""
    chat = load_chat(place / "out" / "96_vlm_sft.pth", batch_size=40)
    model = Transformer(chat.decoder.config)
    load_weights(model, place / "out" / "96_vlm_sft.pth")
    llava = to_llava(model, get_vision_model(place / "demo" / "clip")[0])
    rows = [json.loads(line) for line in (place / "demo" / "questions_unseen.jsonl").read_text().splitlines()]
    rows = rows[:: max(1, len(rows) // 40)][:40]
    images = [open_image(place / "demo" / row["image"]) for row in rows]
    prompts = [chat.render([{"from": "human", "value": row["question"]}]) for row in rows]
    features = list(chat.encode(images).split(1))  # one image for each prompt
    steps = list(generate(chat.decoder, prompts, 2, Sampling(max_new_tokens=30), features))
    ours = [[token for token in answer if token is not None] for answer in zip(*steps, strict=True)]
    for prompt, image, answer in zip(prompts, images, ours, strict=True):
        ids = to_llava_ids(torch.tensor([prompt.input_ids]), torch.tensor(prompt.image_slots))
        theirs = llava.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            pixel_values=get_img_process(image, chat.image_processor)[None],
            do_sample=False,
            eos_token_id=2,
        )[0, ids.shape[1] :].tolist()
        assert answer == [token for token in theirs if token != 2]
    assert len({tuple(answer) for answer in ours}) > 5


def test_hiding_the_thing_costs_the_answer_and_hiding_paper_does_not(place):
    """Of a thing that covers a fifth of the image; chance would put a fifth of what is lost there."""
    world, chat = open_world(place / "demo"), load_chat(place / "out" / "96_vlm_sft.pth")
    found = [measure_kind(chat, world, "unseen", kind, 16) for kind in ("colour", "shape")]
    assert max(one["area"] for one in found) < 0.3
    assert sum(one["peak"] for one in found) / 2 >= 0.7 and sum(one["share"] for one in found) / 2 >= 0.6, (
        found
    )


def test_a_second_call_repeats_nothing(place):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*.pth")}
    result = quickstart(place)
    assert result.returncode == 0 and result.stdout.count("done before") == 6, result.stderr
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*.pth")} == before and len(before) == 5


def test_building_again_keeps_where_the_weights_go(place):
    before = (place / "demo" / "eval.args").read_text()
    result = run_script("-m", "dataset.demo_world", f"--out={place}/demo", "--preset=tiny", "--seed=3")
    assert result.returncode == 0, result.stderr
    assert (place / "demo" / "eval.args").read_text() == before and f"--out_dir={place}/out" in before


def test_a_failure_names_the_command_and_the_cure(place):
    weights, mark = place / "out" / "96_vlm_pretrain.pth", place / "out" / ".sft.seconds"
    mark.rename(mark.with_suffix(".away"))
    weights.rename(weights.with_suffix(".away"))
    result = quickstart(place)
    mark.with_suffix(".away").rename(mark)
    weights.with_suffix(".away").rename(weights)
    assert result.returncode == 1 and "96_vlm_pretrain.pth not found" in result.stderr
    assert "this command failed (exit status 2): .venv/bin/python 2-sft_vlm.py" in result.stderr
    assert "cure: " in result.stderr
    result = quickstart(place, "--nonsense")
    assert result.returncode == 1 and "unknown argument: --nonsense" in result.stderr


def test_the_recipes_run_all_scripts_and_later_flags_win(place, tmp_path):
    shutil.copy(place / "out" / "96_llm.pth", tmp_path)
    scripts = {"pretrain": "1-pretrain_vlm.py", "sft": "2-sft_vlm.py", "sft_multi": "2-sft_vlm.py"}
    for recipe, script in scripts.items():
        result = run_script(script, f"@{place}/demo/{recipe}.args", f"--out_dir={tmp_path}", "--max_steps=2")
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "96_vlm_sft_multi.pth").is_file()
    result = run_script("3-eval_chat.py", f"@{place}/demo/eval.args", "--max_new_tokens=20")
    assert result.returncode == 0 and result.stdout.count("unseen_") == 8, result.stderr


def test_pairs_and_videos_are_scored_with_their_controls(place):
    """What fifty steps teach is not promised; the scores of the full world are in README."""
    report = json.loads((place / "out" / "report.json").read_text())
    assert set(report["two_images"]) == {"zh", "en", "colour", "shape"}
    assert all({"real", "blank", "shuffled", "swapped"} <= set(row) for row in report["two_images"].values())
    assert all("swapped_follows" in report["two_images"][language] for language in ("zh", "en"))
    assert set(report["videos"]) == {"movement", "colour_change"}
    assert all(
        {"real", "blank", "shuffled", "shuffled_frames"} <= set(row) for row in report["videos"].values()
    )


def test_a_world_is_never_mixed_with_another(place):
    check_refused(
        run_script("-m", "dataset.demo_world", f"--out={place}/demo", "--preset=tiny", "--seed=4"),
        "holds another demo world",
        "choose another --out",
    )


def test_an_interrupted_build_goes_on_and_leaves_no_half_world(place, tmp_path):
    """Stop the build within a part: no world yet; the next call finishes, and it is the same world."""
    hurry = (
        "from dataclasses import replace; from dataset.demo_world import __main__ as command, recipe; "
        "tiny = recipe.PRESETS['tiny']; few = replace(tiny.llm, steps=4); "
        "recipe.PRESETS['tiny'] = replace(tiny, llm=few); command.main()"
    )
    build = ["-c", hurry, f"--out={tmp_path}/demo", "--preset=tiny", "--seed=3"]
    python = ROOT / ".venv/bin/python"
    process = subprocess.Popen(
        [python, *build],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    shown = ""
    while "videos" not in shown:  # the images are there, and the next part has begun
        assert (letter := process.stderr.read(1)), shown
        shown += letter
    process.kill()
    process.wait()
    process.stderr.close()
    assert not (tmp_path / "demo").exists() and (tmp_path / "demo.building").exists()
    images = times_of(tmp_path / "demo.building" / "images")
    result = run_script(*build)
    assert result.returncode == 0, result.stderr
    assert times_of(tmp_path / "demo" / "images") == images
    for name in ("sft.json", "questions_unseen.jsonl", "tokenizer/tokenizer.json"):
        assert (tmp_path / "demo" / name).read_bytes() == (place / "demo" / name).read_bytes()
