"""The real sizes end to end: CLIP ViT-B/32 as in the folder of 2021, a v1-style 512_llm.pth, 6400 tokens.

The weights are random (nothing can be downloaded in a test), so what is tested is that files of the real
formats and sizes go through both stages and the evaluation.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_rows, run_script, save_image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from model.LMConfig import LMConfig
from model.transformer import Transformer


def save_openai_clip(folder: Path) -> None:
    """config.json, preprocessor_config.json and pytorch_model.bin as openai/clip-vit-base-patch32 has them.

    Its vision tower is exact; the text tower, which is skipped in loading, has one layer instead of twelve.
    """
    config = CLIPConfig(text_config={"num_hidden_layers": 1})
    assert config.vision_config.hidden_size == 768 and config.vision_config.patch_size == 32
    model = CLIPModel(config)
    state = model.state_dict() | {
        "vision_model.embeddings.position_ids": torch.arange(50)[None],
        "text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    folder.mkdir(parents=True)
    torch.save(state, folder / "pytorch_model.bin")
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": 224,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "resample": 3,
                "size": 224,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            }
        )
    )


def save_minimind_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 6400 tokens, in which, as in MiniMind's, nothing keeps "<" apart."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("aeioubcdfgklmnprst"), 8)) for _ in range(6000)]
    corpus = words + [" <", " <<<"] * 50
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=6400,
            special_tokens=["<unk>", "<s>", "</s>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def real_place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("real")
    save_openai_clip(place / "clip")
    save_minimind_tokenizer(place / "tokenizer")
    (place / "out").mkdir()
    llm = Transformer(LMConfig(vision_dim=0)).state_dict()
    torch.save(llm | {"pos_cis": torch.zeros(512, 16, dtype=torch.complex64)}, place / "out" / "512_llm.pth")
    (place / "images").mkdir()
    for number in range(6):
        save_image(place / "images" / f"{number}.png", number)
    (place / "data.json").write_text(json.dumps(make_rows(12), ensure_ascii=False))
    return place


def test_both_stages_and_evaluation_at_the_real_sizes(real_place):
    common = [
        f"--clip_path={real_place}/clip",
        f"--tokenizer_path={real_place}/tokenizer",
        f"--out_dir={real_place}/out",
        "--device=cpu",
    ]
    data = [
        f"--data_path={real_place}/data.json",
        f"--image_dir={real_place}/images",
        "--max_steps=2",
        "--batch_size=2",
        "--num_workers=0",
    ]
    first = run_script("1-pretrain_vlm.py", *common, *data)
    assert first.returncode == 0, first.stderr
    assert "27.27 M parameters, 0.39 M of them the projection; frozen: 87.46 M" in first.stdout
    second = run_script("2-sft_vlm.py", *common, *data)
    assert second.returncode == 0, second.stderr
    described = run_script(
        "3-eval_chat.py", *common, f"--image_dir={real_place}/images", "--max_new_tokens=5"
    )
    assert described.returncode == 0, described.stderr
    assert described.stdout.count("这个图片描述的是什么内容？") == 6
