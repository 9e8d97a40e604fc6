"""Folders of images: hidden, broken and empty files among them."""

import pytest
import torch
from conftest import SIZES, check_refused, run_clean, run_script, save_image

from model.checkpoint import save_weights
from model.LMConfig import LMConfig
from model.names import weights_path
from model.transformer import Transformer
from serving.page import find_examples


@pytest.fixture
def place(workplace, tokenizer, tokenizer_path, clip_path) -> list[str]:
    """Flags for weights that describe something, and a folder with sound, broken and hidden images."""
    torch.manual_seed(2)
    config = LMConfig(**SIZES, vocab_size=len(tokenizer), vision_dim=24, max_seq_len=256)
    save_weights(Transformer(config), weights_path(workplace / "out", config, "vlm_sft"))
    folder = workplace / "images"
    (folder / "._0.png").write_bytes(b"\0\5\x16\7")
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / "2.png").write_bytes(b"no image")
    (folder / "3.png").write_bytes((folder / "4.png").read_bytes()[:999])
    (folder / "folder.png").mkdir()
    return [
        f"--out_dir={workplace}/out",
        f"--tokenizer_path={tokenizer_path}",
        f"--clip_path={clip_path}",
        f"--image_dir={folder}",
        "--device=cpu",
        "--max_new_tokens=4",
    ]


def test_broken_and_hidden_files_do_not_end_the_description_of_a_folder(place, workplace, capsys):
    """The first of them did, and the images after it were never described."""
    result = run_clean(capsys, "3-eval_chat.py", *place)
    check_refused(result, "2 of 6 could not be described", "above")
    described = result.stdout[result.stdout.index("\n[") :]
    names = [line.partition("]")[0].rpartition("/")[2] for line in described.splitlines() if line[:1] == "["]
    assert names == [f"{number}.png" for number in range(6)]
    passed_over = [line for line in described.splitlines() if "passed over: cannot read image" in line]
    assert len(passed_over) == 2 and "2.png" in passed_over[0] and "3.png" in passed_over[1]
    together = run_script("3-eval_chat.py", *place, processes=2)
    assert together.returncode and together.stderr.count("error: 2 of 6 could not be described") == 1
    assert together.stdout[together.stdout.index("\n[") :] == described


def test_a_set_with_a_broken_image_is_passed_over(place, workplace, capsys):
    for name in ("a", "b", "c", "empty", ".hidden"):
        (workplace / "sets" / name).mkdir(parents=True)
    for name in ("a", "b", "c"):
        save_image(workplace / "sets" / name / "0.png", 0)
        (workplace / "sets" / name / "._0.png").write_bytes(b"\0\5\x16\7")
    (workplace / "sets" / "b" / "1.png").write_bytes(b"no image")
    flags = [*place, "--multi", "--stage=vlm_sft", f"--image_dir={workplace}/sets"]
    result = run_clean(capsys, "3-eval_chat.py", *flags)
    check_refused(result, "2 of 4 could not be described")
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert ["passed over" in line for line in lines] == [False, True, False, True]
    assert "1.png" in lines[1] and "it holds no images" in lines[3]


def test_the_page_shows_no_hidden_file_as_an_example(tmp_path):
    for name in ("a.png", "._a.png", ".b.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert [example["files"] for example in find_examples(tmp_path, several=False)] == [
        [str(tmp_path / "a.png")]
    ]
