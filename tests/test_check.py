"""python -m trainer.check: reports everything that is wrong at once, before a run of hours."""

import json
import shutil
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import SIZES, make_rows, run_script, save_clip, save_image, weights_of
from conftest import train as train_stage

from model.checkpoint import save_weights
from model.data.batch import collate
from model.data.dataset import VLMDataset, tokenize
from model.data.spec import PRETRAIN
from model.fast import use_fast_kernels
from model.files import atomic_write
from model.LMConfig import LMConfig
from model.names import weights_path
from model.prompt import Renderer
from model.transformer import Transformer
from model.vision_utils import ImageProcessor
from trainer import check, inspection, memory
from trainer.logger import read_metrics
from trainer.samples import decode_sample
from trainer.saves import RESUME_FORMAT, save_sealed
from trainer.script import clean_exit


@pytest.fixture(scope="session")
def llm(tokenizer) -> Transformer:
    """A language model that knows the answers of conftest's rows, and nothing else."""
    return teach(
        [[turn["value"].replace("<image>", "") for turn in row["conversations"]] for row in make_rows(24)],
        tokenizer,
    )


def teach(pairs: list[list[str]], tokenizer) -> Transformer:
    """A small language model that has learned these questions and answers by heart."""
    torch.manual_seed(3)
    model = Transformer(LMConfig(**SIZES, vocab_size=len(tokenizer), vision_dim=0, max_seq_len=256))
    conversations = [
        [{"from": "human", "value": question}, {"from": "gpt", "value": answer}] for question, answer in pairs
    ]
    renderer, no_images = Renderer(tokenizer), {"pixel_values": torch.zeros(0, 3, 1, 1)}
    batch = collate([tokenize(turns, renderer) | no_images for turns in conversations])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(batch["input_ids"], labels=batch["labels"])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture
def good_place(workplace, llm):
    save_weights(llm, weights_path(workplace / "out", llm.config, "llm"))
    return workplace


@pytest.fixture
def look(capsys):
    """Check a place in this process: (exit status, report, problems)."""

    def look(place, *arguments, stage=("pretrain",)):
        status = 0
        try:
            clean_exit(lambda: check.main([*stage, f"@{place}/args", *arguments]))
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        problems = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in err and (status == 2) == bool(problems) == ("in place\n" not in out[-30:])
        return status, out, problems

    return look


def contents(place) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in place.rglob("*")}


def test_a_good_place_as_a_process(good_place):
    before = contents(good_place)
    result = run_script("-m", "trainer.check", f"@{good_place}/args", "--max_steps=6")
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert contents(good_place) == before  # it saves nothing, not even a folder
    for text in (
        "1-pretrain_vlm.py",
        "<s> is 1, </s> is 2, < is 30, > is 32",
        "50 x 24 features per image",
        "32_llm.pth: 21 tensors loaded; new, not in the file: vision_proj.weight",
        "24 rows",
        "24 of 24 rows loaded with their images",
        "6 files",
        "float32 on cpu, 1 threads",
        "6 steps",
        "the saves need",
        "32_vlm_pretrain.pth: starts from step 0",
        "free\n",
        "guessing has ln(581) = 6.36",
        "3 rows with their images",
        "\nrow 1 ",
        "everything is in place",
    ):
        assert text in result.stdout, f"{text!r} is not in: {result.stdout}"


def test_it_reports_the_losses_that_training_begins_with(good_place, look):
    """The loss that the check finds with images is that of a first step on the same rows."""
    (good_place / "data.json").write_text(json.dumps(make_rows(3)))
    status, report, _ = look(good_place)
    train_stage(good_place, "--max_steps=1")
    first = read_metrics(good_place / "out" / "32_vlm_pretrain.metrics.jsonl")[0]["loss"]
    assert status == 0 and number_after("sight       loss ", report) == pytest.approx(first, abs=0.006)
    assert number_after("ordinary answers, ", report) < 4 < 6.36 < number_after("language    loss ", report)


def number_after(text: str, report: str) -> float:
    return float(report.split(text)[1].split()[0])


def test_random_weights_are_reported(workplace, look):
    status, _, (problem,) = look(workplace)
    assert status == 2
    for text in ("weights of stage llm look random", "ln(581) = 6.36", "--tokenizer_path", "demo_world"):
        assert text in problem


def test_weights_that_know_the_language_but_not_the_data_are_no_problem(workplace, tokenizer, look):
    """A French data set for a Chinese model: then the ordinary sentences speak for it."""
    model = teach(inspection.ORDINARY, tokenizer)
    save_weights(model, weights_path(workplace / "out", model.config, "llm"))
    status, report, _ = look(workplace)
    assert status == 0
    assert number_after("language    loss ", report) < 4 and number_after("ordinary answers, ", report) > 5


def break_tokenizer(place):
    shutil.copytree(read_flag(place, "tokenizer_path"), place / "tokenizer")
    config = json.loads((place / "tokenizer" / "tokenizer.json").read_text())
    words = config["model"]["vocab"]
    words["<"], words["="] = words["="], words["<"]
    (place / "tokenizer" / "tokenizer.json").write_text(json.dumps(config))
    return [f"--tokenizer_path={place}/tokenizer"]


def read_flag(place, name: str) -> str:
    return next(
        line.split("=", 1)[1]
        for line in (place / "args").read_text().splitlines()
        if line.startswith(f"--{name}=")
    )


def remove_image(place):
    (place / "images" / "2.png").unlink()


def break_image(place):
    path = place / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:300])


def break_row(place):
    rows = make_rows(24)
    rows[6]["conversations"] = []
    (place / "data.json").write_text(json.dumps(rows))


def make_pointer(place):
    (place / "out" / "32_llm.pth").write_text("version https://git-lfs.github.com/spec/v1\n")


def break_clip(place):
    (save_clip(place / "clip") / "model.safetensors").write_bytes(b"\0" * 1000)
    return [f"--clip_path={place}/clip"]


@pytest.mark.parametrize(
    ("prepare", "flags", "fragments"),
    [
        (remove_image, [], ["row 3 (id 2)", "image not found", "2.png", "--on_bad_sample skip"]),
        (break_image, [], ["row 3 (id 2)", "cannot read image", "2.png"]),
        (break_row, [], ["row 7 (id 6)", 'no "conversations"']),
        (lambda w: None, ["--max_seq_len=40"], ["max_seq_len 40 cannot hold 1 image(s)"]),
        (break_tokenizer, [], ['gives "<" and ">" the ids', "--tokenizer_path"]),
        (lambda w: None, ["--tokenizer_path=nowhere"], ["no tokenizer at nowhere", "--tokenizer_path"]),
        (
            lambda w: None,
            ["--clip_path=nowhere"],
            ["no CLIP folder at nowhere", "python -m model.download clip"],
        ),
        (break_clip, [], ["cannot read the CLIP", "python -m model.download clip"]),
        (
            lambda w: (w / "out" / "32_llm.pth").unlink(),
            [],
            ["32_llm.pth not found", "python -m model.download --list"],
        ),
        (make_pointer, [], ["32_llm.pth is a git-lfs pointer"]),
        (lambda w: None, ["--n_layers=3"], ["does not fit the model", "--n_layers 2"]),
        (lambda w: None, ["--vocab_size=400"], ["the tokenizer has 581 tokens but"]),
        (lambda w: None, ["--n_heads=5"], ["dim 32 is not a multiple of n_heads 5"]),
        (lambda w: None, ["--image_dir=nowhere"], ["image folder not found: nowhere", "--image_dir"]),
        (lambda w: (w / "data.json").unlink(), [], ["data file not found", "--data_path"]),
        (lambda w: (w / "data.json").write_text("[}"), [], ["data.json is not valid JSON"]),
        (lambda w: None, ["--val_fraction=0.001"], ["--val_fraction 0.001 of 24 rows"]),
        (lambda w: None, ["--val_data_path=nowhere.json"], ["data file not found: nowhere.json"]),
        (lambda w: None, ["--device=cuda:7"], ["--device cuda", "--device cpu"]),
        (lambda w: None, ["--resume", "--resume_weights_only"], ["give one of them"]),
        (lambda w: None, ["--resume_weights_only"], ["32_vlm_pretrain.pth not found", "leave out"]),
    ],
)
def test_each_problem_is_one_line_with_its_cure(good_place, look, prepare, flags, fragments):
    made = prepare(good_place)
    flags = made if isinstance(made, list) else flags
    status, _, problems = look(good_place, *flags)
    assert status == 2
    assert any(all(text in problem for text in fragments) for problem in problems), problems


def test_all_problems_are_reported_at_once(workplace, look, monkeypatch):
    (workplace / "out" / "32_llm.pth").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    status, _, problems = look(
        workplace, "--clip_path=nowhere", "--device=cuda", "--image_dir=gone", "--val_data_path=nowhere.json"
    )
    for number, text in enumerate(
        [
            "--device cuda",
            "no CLIP folder at nowhere",
            "32_llm.pth not found",
            "image folder not found: gone",
            "data file not found: nowhere.json",
            "0 MB free, but the saves of this run need",
        ]
    ):
        assert text in problems[number]
    assert len(problems) == 6


def test_missing_parts_do_not_hide_random_weights(workplace, look):
    status, _, problems = look(workplace, "--clip_path=nowhere")
    assert len(problems) == 2 and "no CLIP folder" in problems[0] and "look random" in problems[1]


def test_too_little_memory(good_place, look, monkeypatch):
    monkeypatch.setattr(inspection, "held_memory", lambda: 400_000_000)
    monkeypatch.setattr(inspection, "available_memory", lambda device: 402_000_000)
    status, report, (problem,) = look(good_place)
    assert status == 2 and "(held now 400 MB, loading 2.41 MB, gradients 201 kB" in report
    assert "of memory on cpu, but 402 MB is available: halve --batch_size" in problem
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    both = look(good_place)[2][0]
    assert number_after("about ", both) == pytest.approx(2 * number_after("about ", problem), abs=1)
    monkeypatch.setattr(inspection, "available_memory", lambda device: None)
    assert look(good_place)[0] == 0


def test_images_are_looked_at_all_over_the_file_or_all_of_them(good_place, look):
    rows = make_rows(1000)
    rows[777]["image"] = "gone.png"
    (good_place / "data.json").write_text(json.dumps(rows))
    status, report, _ = look(good_place)
    assert status == 0 and "200 of 200 rows loaded" in report
    status, report, problems = look(good_place, "--all_images", "--num_workers=2")
    assert "999 of 1000 rows loaded" in report and len(problems) == 1 and "row 778 (id 777)" in problems[0]
    status, report, _ = look(good_place, "--all_images", "--on_bad_sample=skip")
    assert status == 0 and "leaves out 1 of 1000 rows, first: " in report and "gone.png" in report
    for row in rows[:20]:
        row["image"] = "gone.png"
    (good_place / "data.json").write_text(json.dumps(rows))
    status, _, problems = look(good_place, "--all_images", "--on_bad_sample=skip")
    assert "21 of 1000 rows looked at (data) cannot be used" in problems[-1]


def test_many_bad_rows_are_counted(good_place, look):
    rows = make_rows(24)
    for row in rows:
        row["image"] = "gone.png"
    (good_place / "data.json").write_text(json.dumps(rows))
    _, _, problems = look(good_place)
    assert len(problems) == 4 and "24 of 24 rows" in problems[3] and "--image_dir" in problems[3]


def test_what_becomes_of_the_files_of_an_earlier_run(good_place, look):
    """The check foresees what the run does: begin anew, keep, go on, refuse."""
    train_stage(good_place)
    status, report, _ = look(good_place, "--max_steps=6")
    assert (
        status == 0
        and "starts from step 0; the present file is kept as 32_vlm_pretrain.previous.pth" in report
    )
    assert "finished; there is nothing to do" in look(good_place, "--max_steps=6", "--resume")[1]
    assert "learning_rate" in look(good_place, "--max_steps=6", "--resume", "--learning_rate=0.1")[2][0]
    weights = weights_of(good_place)
    path = good_place / "out" / "32_vlm_pretrain.json"
    path.write_text(path.read_text().replace('"total_steps": 6', '"total_steps": 9'))
    settings = json.loads(path.read_text())["settings"] | {"total_steps": 9}
    state = {"format": RESUME_FORMAT, "step": 6, "settings": settings, "model": weights}
    atomic_write(path.with_suffix(".resume"), lambda file: save_sealed(state, file))
    before = contents(good_place)
    assert "resumes from step 6 of 9" in look(good_place, "--max_steps=9", "--resume")[1]
    assert "is an unfinished run" in look(good_place, "--max_steps=9")[2][0]
    assert "a new schedule" in look(good_place, "--max_steps=9", "--resume_weights_only")[1]
    assert contents(good_place) == before


def test_the_second_stage_with_two_processes(good_place):
    train_stage(good_place)
    result = run_script("-m", "trainer.check", "sft", f"@{good_place}/args", processes=2)
    assert result.returncode == 0, result.stderr
    assert "2-sft_vlm.py" in result.stdout and "32_vlm_pretrain.pth: 22 tensors loaded" in result.stdout
    assert "2 process(es) x batch 4" in result.stdout and result.stdout.count("everything is in place") == 1


def test_the_stage_is_named_by_the_first_argument(good_place, look):
    status, report, problems = look(good_place, stage=["sft"])
    assert "2-sft_vlm.py" in report and any(
        "32_vlm_pretrain.pth not found: run 1-pretrain" in text for text in problems
    )
    assert look(good_place, stage=["nothing"])[2] == ["no stage nothing: name pretrain or sft, or a script"]


def test_a_decoded_sample_marks_its_targets_and_nothing_else(renderer, tmp_path):
    rows = [
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "What is it?<image>"},
                {"from": "gpt", "value": "It is red."},
                {"from": "human", "value": "And this?"},
                {"from": "gpt", "value": "Green."},
            ],
        }
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    save_image(tmp_path / "a.png", 0)
    sample = VLMDataset(tmp_path / "rows.json", PRETRAIN, renderer, tmp_path, ImageProcessor())[0]
    assert decode_sample(sample, renderer.tokenizer) == (
        "<s>user\\nWhat is it?<image x50></s>\\n<s>assistant\\n[[It is red.</s>]]\\n"
        "<s>user\\nAnd this?</s>\\n<s>assistant\\n[[Green.</s>]]"
    )
    sample["input_ids"][sample["image_slots"][0, 7]] = 99
    with pytest.raises(ValueError, match="other ids stand where"):
        decode_sample(sample, renderer.tokenizer)


@pytest.mark.parametrize("use_moe", [False, True])
def test_the_estimate_counts_what_is_kept_for_the_backward_pass(use_moe):
    """Against what autograd really saves in the training forms, at a width where no constant matters."""
    torch.manual_seed(0)
    config = LMConfig(
        dim=128, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=600, vision_dim=0, use_moe=use_moe
    )
    model, kept = Transformer(config), {}
    use_fast_kernels(model, torch.device("cpu"), torch.float32)

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 600, (4, 96))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(ids, labels=torch.where(torch.arange(96) < 90, -100, ids))[1]
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    parts = memory.estimate_step(model, ids.device, ids.numel(), 4 * 6)
    assert parts["gradients"] == 4 * model.num_parameters() == parts["moments"] / 2
    assert 0.8 < sum(kept.values()) / (parts["activations"] / 1.2) < 1.2
    on_gpu = memory.estimate_step(model, torch.device("cuda"), ids.numel(), 4 * 6)
    assert (on_gpu["activations"] > parts["activations"]) == use_moe
    loss.backward()
    assert np.isfinite(loss.item())


def test_free_memory_is_what_the_container_leaves(tmp_path, monkeypatch):
    def free() -> int | None:
        available = memory.available_memory(torch.device("cpu"), tmp_path)
        return available and available - 50

    monkeypatch.setattr(memory, "held_memory", lambda: 50)
    assert free() is None  # a system without these files
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:   70 kB\n")
    assert free() == 70 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("30000\n")
    (group / "memory.stat").write_text("anon 25000\ninactive_file 5000\n")
    (group / "memory.max").write_text("max\n")
    assert free() == 70 * 1024
    (group / "memory.max").write_text("40000\n")
    assert free() == 40000 - 30000 + 5000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process holds")
def test_memory_that_is_held():
    before = memory.held_memory()
    block = torch.ones(100 << 18)
    assert 90 << 20 < memory.held_memory() - before < 200 << 20
    assert memory.available_memory(torch.device("cpu")) > memory.held_memory() and block.sum() > 0
