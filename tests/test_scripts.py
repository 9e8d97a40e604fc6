"""The numbered scripts, each run as a process: the chain of stages, torchrun, same seed same bits, and bad
input."""
import json
import os

import pytest
import torch
from conftest import ROOT, check_refused, make_rows, run_script, save_clip

from model.checkpoint import read_description, save_weights
from model.LMConfig import LMConfig
from model.model import Transformer
from trainer.logger import read_metrics


def weights_of(folder, stage="vlm_pretrain") -> dict[str, torch.Tensor]:
    return torch.load(folder / "out" / f"32_{stage}.pth", weights_only=True)


def train(workplace, *flags: str, script="1-pretrain_vlm.py", processes=1):
    result = run_script(script, f"@{workplace}/args", "--max_steps=6", *flags, processes=processes)
    assert result.returncode == 0, result.stderr
    return result


def test_the_chain_of_stages(workplace):
    """llm -> vlm_pretrain -> vlm_sft -> vlm_sft_multi, each from the one before, each with its record."""
    train(workplace)
    train(workplace, script="2-sft_vlm.py")
    rows = [row | {"image": "0.png, 1.png"} for row in make_rows(12)]
    for row in rows:
        row["conversations"][0]["value"] += "<image>"
    (workplace / "multi.json").write_text(json.dumps(rows))
    train(workplace, f"--data_path={workplace}/multi.json", "--multi", "True", script="2-sft_vlm.py")
    before = torch.load(workplace / "out" / "32_llm.pth", weights_only=True)
    for stage in ("vlm_pretrain", "vlm_sft", "vlm_sft_multi"):
        now = weights_of(workplace, stage)
        assert not torch.equal(before["norm.weight"], now["norm.weight"])
        assert not any("vision_model" in name for name in now)        # CLIP is in no checkpoint
        path = workplace / "out" / f"32_{stage}.pth"
        assert read_description(path)["stage"] == stage and read_description(path)["step"] == 6
        records = read_metrics(path.with_suffix(".metrics.jsonl"))
        assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
        assert {"loss", "learning_rate", "tokens_per_s", "grad_norm"} <= set(records[0])
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        before = now


def test_the_same_seed_gives_the_same_bits_and_workers_change_nothing(workplace):
    runs = []
    for flags in (["--seed=5"], ["--seed=5", "--num_workers=2"], ["--seed=6"]):
        train(workplace, *flags)
        runs.append(weights_of(workplace))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["norm.weight"], runs[2]["norm.weight"])


@pytest.mark.parametrize(("flags", "processes"), [
    (["--batch_size=4"], 2), (["--batch_size=2", "--accumulation_steps=4"], 1),
    (["--batch_size=2", "--accumulation_steps=2"], 2)])
def test_one_global_batch_however_it_is_split(workplace, flags, processes):
    """1 x 8, 2 x 4 and 2 x 2 x 2 accumulated end in the same weights, though answers differ much in length:
    the loss is normalised by the learnt tokens of the whole global batch. 7 samples are left for an epoch's
    last step."""
    (workplace / "data.json").write_text(json.dumps(make_rows(23)))
    train(workplace, "--batch_size=8")
    expected, losses = (
        weights_of(workplace), read_metrics(workplace / "out" / "32_vlm_pretrain.metrics.jsonl"))
    train(workplace, *flags, processes=processes)
    for name, tensor in weights_of(workplace).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-5,
                                   msg=lambda text, name=name: f"{name}: {text}")
    split = read_metrics(workplace / "out" / "32_vlm_pretrain.metrics.jsonl")
    for one, other in zip(losses, split, strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-4 and one["step"] == other["step"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_stays_close_to_float32(workplace, dtype):
    losses = []
    for flag in ("--dtype=float32", f"--dtype={dtype}"):
        train(workplace, flag)
        losses.append([record["loss"]
                       for record in read_metrics(workplace / "out" / "32_vlm_pretrain.metrics.jsonl")])
    assert losses[0] != losses[1]       # it really decides
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.05


def test_evaluation_describes_and_scores_the_same_with_two_processes(workplace):
    train(workplace)
    train(workplace, script="2-sft_vlm.py")
    questions = [{"image": f"images/{n % 6}.png", "question": "什么颜色？", "answer": "它是蓝色。",
                  "kind": "colour"} for n in range(11)]
    (workplace / "questions_x.jsonl").write_text("\n".join(json.dumps(row) for row in questions))
    outputs, reports = [], []
    for processes in (1, 2):
        common = [f"--out_dir={workplace}/out", "--dim=32", "--device=cpu", "--max_new_tokens=8",
                  "--batch_size=4"]
        described = run_script("3-eval_chat.py", *common, f"--image_dir={workplace}/images",
                               "--temperature=0.9", processes=processes)
        assert described.returncode == 0, described.stderr
        outputs.append(described.stdout[described.stdout.index("["):])
        scored = run_script("3-eval_chat.py", *common, f"--questions={workplace}/questions_x.jsonl",
                            "--control", "real", "blank", "shuffled", f"--report={workplace}/report.json",
                            processes=processes)
        assert scored.returncode == 0, scored.stderr
        reports.append(((workplace / "report.json").read_text(),
                        (workplace / "report.answers.jsonl").read_text()))
    assert outputs[0] == outputs[1] and outputs[0].count("这个图片描述的是什么内容？") == 6
    assert reports[0] == reports[1]
    assert set(json.loads(reports[0][0])["x"]["colour"]) == {"real", "blank", "shuffled"}
    assert len(reports[0][1].splitlines()) == 33


def test_chat_in_the_terminal(workplace):
    train(workplace)
    import subprocess
    import sys
    result = subprocess.run([sys.executable, "3-eval_chat.py", f"--out_dir={workplace}/out", "--dim=32",
                             "--stage=vlm_pretrain", f"--chat={workplace}/images/0.png",
                             "--max_new_tokens=5", "--device=cpu"], cwd=ROOT, timeout=120,
                            input="什么颜色？\nand the shape?\n\n", capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0 and result.stdout.count("> ") == 3, result.stderr


def test_bad_samples_stop_or_are_counted(workplace):
    rows = make_rows(300)
    rows[17]["image"] = "gone.png"
    (workplace / "data.json").write_text(json.dumps(rows))
    flags = [f"@{workplace}/args", "--epochs=1", "--batch_size=32"]
    check_refused(run_script("1-pretrain_vlm.py", *flags, "--max_steps=0"),
                  "row 18 (id 17)", "gone.png", "--on_bad_sample skip")
    result = run_script("1-pretrain_vlm.py", *flags, "--on_bad_sample=skip", "--num_workers=2", processes=2)
    assert result.returncode == 0 and "1 bad samples left out" in result.stdout + result.stderr, result.stderr
    for row in rows[:5]:
        row["image"] = "gone.png"
    (workplace / "data.json").write_text(json.dumps(rows))
    check_refused(run_script("1-pretrain_vlm.py", *flags, "--on_bad_sample=skip"),
                  " of 300 rows could not be used, more than 1 %")


def test_what_was_learnt_before_an_error_is_kept(workplace):
    rows = make_rows(24)
    rows[3]["image"] = "gone.png"
    (workplace / "data.json").write_text(json.dumps(rows))
    seeds = (seed for seed in range(20)
             if 3 not in torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:12])
    check_refused(run_script("1-pretrain_vlm.py", f"@{workplace}/args", "--epochs=1",
                             f"--seed={next(seeds)}"), "gone.png")
    step = read_description(workplace / "out" / "32_vlm_pretrain.pth")["step"]
    assert 3 <= step < 6 and weights_of(workplace)


def damage_weights(workplace):
    (workplace / "out" / "32_llm.pth").write_text("version https://git-lfs.github.com/spec/v1\n")


def other_size(workplace):
    config = LMConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=581, vision_dim=0)
    save_weights(Transformer(config), workplace / "out" / "32_llm.pth")


def wrong_rows(workplace, text):
    (workplace / "data.json").write_text(text)


@pytest.mark.parametrize(("prepare", "flags", "fragments"), [
    (lambda w: (w / "data.json").unlink(), [], ["data file not found", "data.json", "--data_path"]),
    (lambda w: wrong_rows(w, ""), [], ["data.json is not valid JSON: line 1"]),
    (lambda w: wrong_rows(w, "[]"), [], ["data.json holds no rows"]),
    (lambda w: wrong_rows(w, '[{"image": "0.png"},\n oops]'), [], ["data.json is not valid JSON: line 2"]),
    (lambda w: wrong_rows(w, '[{"image": "0.png"}]'), [], ["row 1", 'no "conversations"']),
    (lambda w: None, ["--image_dir=nowhere"], ["picture folder not found: nowhere", "--image_dir"]),
    (lambda w: None, ["--clip_path=nowhere"],
     ["no CLIP folder at nowhere", "hf download openai/clip-vit-base-patch32"]),
    (lambda w: None, ["--tokenizer_path=nowhere"], ["no tokenizer at nowhere", "--tokenizer_path"]),
    (lambda w: None, ["--max_seq_len=64"], ["row", "max_seq_len 64"]),
    (lambda w: None, ["--max_seq_len=40"], ["row", "would be cut at max_seq_len 40"]),
    (damage_weights, [], ["32_llm.pth is a git-lfs pointer"]),
    (other_size, [], ["tok_embeddings.weight (581, 64) in the file", "--dim 64", "--n_layers 3"]),
    (lambda w: (w / "out" / "32_llm.pth").unlink(), [], ["32_llm.pth not found", "README"]),
    (lambda w: None, ["--batch_size=0", "--epochs=-1", "--learning_rate=-2", "--device=gpu"],
     ["--batch_size must be at least 1", "--epochs", "--learning_rate", "--device must be"]),
    (lambda w: None, ["--no_such_flag"], ["--no_such_flag"]),
    (lambda w: None, ["--dtype=int8"], ["--dtype"]),
    (lambda w: None, ["--n_heads=5"], ["dim 32 is not a multiple of n_heads 5"]),
    (lambda w: None, ["@nowhere.args"], ["nowhere.args"]),
    (lambda w: None, ["--device=cuda"], ["no CUDA device is available", "--device cpu"]),
])
def test_bad_input_is_one_line_with_the_cure(workplace, prepare, flags, fragments):
    prepare(workplace)
    check_refused(run_script("1-pretrain_vlm.py", f"@{workplace}/args", "--max_steps=1", *flags), *fragments)


@pytest.mark.parametrize(("flags", "fragments"), [
    (["--dim=32"], ["32_vlm_sft.pth not found", "README"]),
    (["--stage=vlm_pretrain", "--image_dir=nowhere"], ["no pictures in nowhere", "--image_dir"]),
    (["--stage=vlm_pretrain", "--chat=nowhere.png"], ["nowhere.png"]),
    (["--stage=vlm_pretrain", "--top_p=3", "--temperature=-1"], ["top_p must be", "temperature must be"]),
    (["--stage=vlm_pretrain", "--load=README.md"], ["README.md is not a readable weight file"]),
])
def test_bad_input_to_evaluation(workplace, flags, fragments):
    train(workplace, "--max_steps=1")
    check_refused(run_script("3-eval_chat.py", f"--out_dir={workplace}/out", "--dim=32", "--device=cpu",
                             *flags), *fragments)


def test_another_clip_is_told_before_the_first_answer(workplace, tmp_path):
    train(workplace, "--max_steps=1")
    other = save_clip(tmp_path / "wide", hidden_size=32)
    check_refused(run_script("3-eval_chat.py", f"--out_dir={workplace}/out", "--dim=32",
                             "--stage=vlm_pretrain", f"--clip_path={other}", "--device=cpu"),
                  "image features of 50 x 24", "gives 50 x 32", "--clip_path")


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_records_and_never_stops_a_run(workplace, mode, monkeypatch):
    """Online, but without a key and a network: one line, and the record goes on offline."""
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(workplace))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    result = train(workplace, "--use_wandb", "--wandb_project=tests", "--wandb_run_name=one")
    assert list((workplace / "out" / "wandb").glob("offline-run-*/run-*.wandb")), result.stderr
    assert ("recording offline" in result.stdout + result.stderr) == (mode == "online")
    assert len(read_metrics(workplace / "out" / "32_vlm_pretrain.metrics.jsonl")) == 6


def test_multi_false_means_false(workplace):
    """bool("False") is True: `--multi False` once trained on several images."""
    train(workplace)
    result = train(workplace, "--multi", "False", script="2-sft_vlm.py")
    assert (workplace / "out" / "32_vlm_sft.pth").is_file() and "32_vlm_sft_multi" not in result.stdout
    check_refused(run_script("2-sft_vlm.py", "--multi", "perhaps"), "--multi", "True or False")
