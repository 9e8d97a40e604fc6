"""Bad input, as a user meets it: one line with the cure, exit status 2, nothing lost."""

import json

import pytest
import torch
from conftest import check_refused, make_rows, run_clean, run_inside, run_script, save_clip, train, weights_of

from model.checkpoint import save_weights
from model.data.batch import collate
from model.data.dataset import VLMDataset
from model.data.spec import SFT_MULTI
from model.description import read_description
from model.LMConfig import LMConfig
from model.prompt import Renderer
from model.transformer import Transformer
from model.vision_utils import get_vision_model


def test_bad_samples_stop_or_are_counted(workplace):
    rows = make_rows(300)
    rows[17]["image"] = "gone.png"
    (workplace / "data.json").write_text(json.dumps(rows))
    flags = [f"@{workplace}/args", "--epochs=1", "--batch_size=32"]
    check_refused(
        run_script("1-pretrain_vlm.py", *flags, "--max_steps=0"),
        "row 18 (id 17)",
        "gone.png",
        "--on_bad_sample skip",
    )
    (workplace / "out" / "32_vlm_pretrain.resume").unlink(missing_ok=True)  # of the steps before
    result = run_script("1-pretrain_vlm.py", *flags, "--on_bad_sample=skip", "--num_workers=2", processes=2)
    assert result.returncode == 0 and "1 bad samples left out" in result.stdout + result.stderr, result.stderr
    for row in rows[:5]:
        row["image"] = "gone.png"
    (workplace / "data.json").write_text(json.dumps(rows))
    check_refused(
        run_script("1-pretrain_vlm.py", *flags, "--on_bad_sample=skip"),
        " of 300 rows could not be used, more than 1%",
    )


def test_rows_whose_errors_cancel_are_bad_samples_each(workplace, tokenizer, clip_path, capsys):
    """One row marks two images and names one, the next marks one and names two: three of each in the batch,
    so whoever compared totals would have shown the first row an image of the second."""
    rows = make_rows(4)
    rows[1]["conversations"][0]["value"] = "<image><image>\n描述这张图片。"
    rows[2]["image"] = ["2.png", "3.png"]
    (workplace / "data.json").write_text(json.dumps(rows))
    renderer, processor = Renderer(tokenizer, 50, 256), get_vision_model(clip_path)[1]
    data = VLMDataset(workplace / "data.json", SFT_MULTI, renderer, workplace / "images", processor)
    batch = collate([data[number] for number in range(4)])
    assert [reason.split("data.json, ")[1] for reason in batch["bad_samples"]] == [
        "row 2 (id 1): it has 2 <image> mark(s) for 1 image(s)",
        "row 3 (id 2): it has 1 <image> mark(s) for 2 image(s)",
    ]
    assert batch["num_rows"] == 2 and batch["num_images"].tolist() == [1, 1]
    check_refused(
        run_clean(capsys, "1-pretrain_vlm.py", f"@{workplace}/args", "--max_steps=1"),
        "data.json, row 2 (id 1)",
    )


def test_what_was_learned_before_an_error_is_kept(workplace):
    rows = make_rows(24)
    rows[3]["image"] = "gone.png"
    (workplace / "data.json").write_text(json.dumps(rows))
    seeds = (
        seed
        for seed in range(20)
        if 3 not in torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:12]
    )
    check_refused(
        run_script(
            "1-pretrain_vlm.py", f"@{workplace}/args", "--epochs=1", "--bucket=False", f"--seed={next(seeds)}"
        ),
        "gone.png",
    )
    step = read_description(workplace / "out" / "32_vlm_pretrain.pth")["step"]
    assert 3 <= step < 6 and weights_of(workplace)


def test_finished_weights_are_kept_when_another_run_writes_the_same_name(workplace):
    """A trial of two steps must not cost the result of a night."""
    train(workplace)
    finished = weights_of(workplace)
    result = train(workplace, "--max_steps=2", "--save_interval=1")
    assert "kept as 32_vlm_pretrain.previous.pth" in result.stdout
    kept = torch.load(workplace / "out" / "32_vlm_pretrain.previous.pth", weights_only=True)
    assert all(torch.equal(kept[name], finished[name]) for name in finished)
    assert read_description(workplace / "out" / "32_vlm_pretrain.pth")["step"] == 2


def test_a_bad_sample_of_one_process_is_reported_once(workplace):
    rows = make_rows(24)
    rows[3]["image"] = "gone.png"
    (workplace / "data.json").write_text(json.dumps(rows))
    result = run_script("1-pretrain_vlm.py", f"@{workplace}/args", "--epochs=1", processes=2)
    assert result.returncode != 0 and result.stderr.count("error: ") == 1 and "gone.png" in result.stderr
    assert "loop.py" not in result.stderr  # no traceback of the process that lost its partner


def damage_weights(workplace):
    (workplace / "out" / "32_llm.pth").write_text("version https://git-lfs.github.com/spec/v1\n")


def other_size(workplace):
    config = LMConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=581, vision_dim=0)
    save_weights(Transformer(config), workplace / "out" / "32_llm.pth")


def wrong_rows(workplace, text):
    (workplace / "data.json").write_text(text)


@pytest.mark.parametrize(
    ("prepare", "flags", "fragments"),
    [
        (lambda w: (w / "data.json").unlink(), [], ["data file not found", "data.json", "--data_path"]),
        (lambda w: wrong_rows(w, ""), [], ["data.json is not valid JSON: line 1"]),
        (lambda w: wrong_rows(w, "[]"), [], ["data.json holds no rows"]),
        (
            lambda w: wrong_rows(w, '[{"image": "0.png"},\n oops]'),
            [],
            ["data.json is not valid JSON: line 2"],
        ),
        (lambda w: wrong_rows(w, '[{"image": "0.png"}]'), [], ["row 1", 'no "conversations"']),
        (lambda w: None, ["--image_dir=nowhere"], ["image folder not found: nowhere", "--image_dir"]),
        (
            lambda w: None,
            ["--clip_path=nowhere"],
            ["no CLIP folder at nowhere", "python -m model.download clip, or name yours with --clip_path"],
        ),
        (lambda w: None, ["--tokenizer_path=nowhere"], ["no tokenizer at nowhere", "--tokenizer_path"]),
        (lambda w: None, ["--max_seq_len=64"], ["row", "max_seq_len 64"]),
        (lambda w: None, ["--max_seq_len=40"], ["max_seq_len 40 cannot hold 1 image(s) of 50 tokens each"]),
        (damage_weights, [], ["32_llm.pth is a git-lfs pointer"]),
        (other_size, [], ["tok_embeddings.weight (581, 64) in the file", "--dim 64", "--n_layers 3"]),
        (
            lambda w: (w / "out" / "32_llm.pth").unlink(),
            [],
            ["32_llm.pth not found", "python -m model.download --list"],
        ),
        (lambda w: None, ["--use_moe"], ["32_moe_llm.pth not found", "--out dataset/demo_moe --use_moe"]),
        (
            lambda w: None,
            ["--log_interval=0", "--epochs=-1", "--learning_rate=-2", "--device=gpu"],
            ["--log_interval must be at least 1", "--epochs", "--learning_rate", "--device must be"],
        ),
        (lambda w: None, ["--no_such_flag"], ["--no_such_flag"]),
        (lambda w: None, ["--dtype=int8"], ["--dtype"]),
        (lambda w: None, ["--n_heads=5"], ["dim 32 is not a multiple of n_heads 5"]),
        (lambda w: None, ["@nowhere.args"], ["nowhere.args"]),
        (lambda w: None, ["--device=cuda"], ["no CUDA device is available", "--device cpu"]),
    ],
)
def test_bad_input_is_one_line_with_the_cure(workplace, capsys, prepare, flags, fragments):
    prepare(workplace)
    check_refused(
        run_clean(capsys, "1-pretrain_vlm.py", f"@{workplace}/args", "--max_steps=1", *flags), *fragments
    )


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--dim=32"], ["32_vlm_sft.pth not found, but 32_vlm_pretrain.pth", "--stage", "--load"]),
        (["--out_dir=nowhere"], ["no *_vlm_*.pth in nowhere", "bash quickstart.sh", "README"]),
        (["--stage=vlm_pretrain", "--image_dir=nowhere"], ["image folder not found: nowhere", "--image_dir"]),
        (["--stage=vlm_pretrain", "--chat=nowhere.png"], ["nowhere.png"]),
        (["--stage=vlm_pretrain", "--questions=nowhere.jsonl"], ["question file not found: nowhere.jsonl"]),
        (["--stage=vlm_pretrain", "--top_p=3", "--temperature=-1"], ["top_p must be", "temperature must be"]),
        (["--stage=vlm_pretrain", "--load=README.md"], ["README.md is not a readable weight file"]),
    ],
)
def test_bad_input_to_evaluation(workplace, capsys, flags, fragments):
    run_inside("1-pretrain_vlm.py", f"@{workplace}/args", "--max_steps=1")
    check_refused(
        run_clean(capsys, "3-eval_chat.py", f"--out_dir={workplace}/out", "--dim=32", "--device=cpu", *flags),
        *fragments,
    )


def test_another_clip_is_reported_before_the_first_answer(workplace, tmp_path):
    train(workplace, "--max_steps=1")
    other = save_clip(tmp_path / "wide", hidden_size=32)
    check_refused(
        run_script(
            "3-eval_chat.py",
            f"--out_dir={workplace}/out",
            "--dim=32",
            "--stage=vlm_pretrain",
            f"--clip_path={other}",
            "--device=cpu",
        ),
        "image features of 50 x 24",
        "gives 50 x 32",
        "--clip_path",
    )
