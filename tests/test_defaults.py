"""Weights say what they learned, and every way of starting obeys: a demo model that had learned single rounds
was asked second questions, because only a recipe knew better."""

import json

import pytest
from conftest import check_refused, run_clean, run_inside, run_script
from test_structure import load_script

from dataset.demo_world.build import World
from model.chat import load_chat
from model.description import read_description
from model.names import find_weights

ABOUT = {"knows": "It knows six noisy squares.", "questions": ["图片里有什么？", "What is it?"]}


@pytest.fixture
def trained(workplace, capsys):
    """Weights of stage 1 that say what they know."""
    (workplace / "about.json").write_text(json.dumps(ABOUT | {"image_dir": f"{workplace}/images"}))
    run_inside("1-pretrain_vlm.py", f"@{workplace}/args", "--max_steps=1", f"--about={workplace}/about.json")
    capsys.readouterr()
    return workplace


def test_what_the_weights_say_takes_the_place_of_flags(trained, capsys):
    path = trained / "out" / "32_vlm_pretrain.pth"
    assert read_description(path)["about"] == ABOUT | {"image_dir": f"{trained}/images", "max_rounds": 1}
    assert load_chat(path).max_rounds == 1
    asked = ["3-eval_chat.py", f"--load_from={path}", "--device=cpu", "--max_new_tokens=1"]
    result = run_clean(capsys, *asked)
    assert result.returncode == 0 and ABOUT["knows"] in result.stdout
    assert result.stdout.count("0.png] 图片里有什么？") == 1 and result.stdout.count(".png]") == 6
    result = run_clean(capsys, *asked, "--prompt=What?", f"--image_dir={trained}/nowhere")
    check_refused(result, "nowhere")


def test_a_model_of_several_rounds_is_shown_several(workplace):
    rows = json.loads((workplace / "data.json").read_text(encoding="utf-8"))
    rows[0]["conversations"] += [
        {"from": "human", "value": "图片里有什么？"},
        {"from": "gpt", "value": "它是蓝色。"},
    ]
    (workplace / "data.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    run_inside("1-pretrain_vlm.py", f"@{workplace}/args", "--max_steps=1")
    run_inside("2-sft_vlm.py", f"@{workplace}/args", "--max_steps=1")  # takes the first round only, as v1
    for stage, rounds, shown in (("vlm_pretrain", 2, 0), ("vlm_sft", 1, 1)):
        path = workplace / "out" / f"32_{stage}.pth"
        assert read_description(path)["about"]["max_rounds"] == rounds
        assert load_chat(path).max_rounds == shown


def test_what_about_may_say_is_checked_before_anything_is_loaded(workplace, tmp_path):
    (tmp_path / "about.json").write_text('{"knows": "x", "colour": 1}')
    for path, words in (
        (tmp_path / "about.json", "colour is not among"),
        (tmp_path / "no", "there is no file"),
    ):
        result = run_script("1-pretrain_vlm.py", f"@{workplace}/args", f"--about={path}")
        check_refused(result, words)


def test_the_demo_world_says_what_its_models_know(tmp_path):
    world = World(tmp_path / "world", "tiny", 0)
    world.folder.mkdir()
    world.write_recipes(world.folder)
    about = json.loads((world.folder / "about.json").read_text(encoding="utf-8"))
    assert about["image_dir"] == f"{world.folder}/eval_images" and len(about["questions"]) == 4
    for name in ("pretrain", "sft", "sft_multi"):
        assert f"--about={world.folder}/about.json" in (world.folder / f"{name}.args").read_text()
    assert "max_rounds" not in (world.folder / "eval.args").read_text()


def test_a_bare_start_finds_the_demo_or_names_the_command(tmp_path, monkeypatch):
    """After a quickstart a bare web_server.py said 'train them' although out/demo was full."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \*_vlm_\*.pth in out: bash quickstart.sh trains a demo"):
        find_weights("out", ["vlm_sft"])
    (tmp_path / "out" / "demo").mkdir(parents=True)
    (tmp_path / "out" / "demo" / "128_vlm_sft.pth").touch()
    assert str(find_weights("out", ["vlm_sft_multi", "vlm_sft"])) == "out/demo/128_vlm_sft.pth"
    (tmp_path / "out" / "512_vlm_pretrain.pth").touch()  # one's own, even of an earlier stage, comes first
    assert str(find_weights("out", ["vlm_sft", "vlm_pretrain"])) == "out/512_vlm_pretrain.pth"
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileNotFoundError, match="no .* in mine"):
        find_weights("mine", ["vlm_sft"])


def test_weights_are_found_by_stage_width_and_kind(tmp_path):
    for name in ("32_vlm_pretrain", "32_vlm_sft", "64_moe_vlm_sft", "32_vlm_sft.previous", "x32_vlm_sft"):
        (tmp_path / f"{name}.pth").touch()
    stages = ("vlm_sft_multi", "vlm_sft", "vlm_pretrain")
    assert find_weights(tmp_path, stages, use_moe=True).name == "64_moe_vlm_sft.pth"
    assert find_weights(tmp_path, stages, use_moe=False).name == "32_vlm_sft.pth"
    assert find_weights(tmp_path, stages, 64).name == "64_moe_vlm_sft.pth"
    with pytest.raises(
        FileNotFoundError, match="32_moe_vlm_sft.* not found, but 32_vlm_pretrain.pth, 32_vlm"
    ):
        find_weights(tmp_path, stages, 32, True)


@pytest.mark.parametrize("script", ["3-eval_chat.py", "web_server.py"])
def test_terminal_and_page_search_by_the_same_flags(script):
    args = load_script(script).parse_args([])
    assert (args.dim, args.use_moe, args.max_rounds, args.image_dir) == (0, None, None, None)
