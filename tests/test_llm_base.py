"""Another language model as the base (--llm): its folder, written by transformers, computes the same here;
all stages train on it; and it goes back to transformers as it came."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import check_refused, check_same, run_clean, weights_of
from safetensors.torch import load_file
from test_export import run_export
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from model.chat import load_chat
from model.checkpoint import config_of, load_weights, read_state_dict
from model.decode import Decoder
from model.export.folder import export, load_source
from model.prompt import Renderer, choose_placeholder, load_tokenizer
from model.transformer import Transformer
from model.vision_proj import PLACEHOLDER, find_image_slots, placeholder_ids
from trainer.check import main as check

FEW = {"num_hidden_layers": 2, "vocab_size": 420, "max_position_embeddings": 512}
# Widths, heads and rotations of the published models; layers and vocabulary are few, so that it is quick.
BASES = {
    "smollm2": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        **FEW,
    ),
    "minimind2": LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_attention_heads=8,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        **FEW,
    ),
    "tinyllama": LlamaConfig(  # much narrower; its output matrix is its own
        hidden_size=64,
        intermediate_size=176,
        num_attention_heads=8,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        **FEW,
    ),
    "minimind3": Qwen3Config(
        hidden_size=768,
        intermediate_size=2432,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=96,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        **FEW,
    ),
    "tinyqwen3": Qwen3Config(
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        **FEW,
    ),
    "qwen3": Qwen3Config(  # 0.6B: its heads are wider than hidden_size / num_attention_heads
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        **FEW,
    ),
}
CORPUS = [
    "图片里有一个红色圆形。它是蓝色。" * 3,
    "A large green star <<<<<< at the >>>>>> top left. <image>\n",
] * 20


def save_tokenizer(folder: Path, specials: list[str], merged: bool = True, **named) -> Path:
    """A byte-level BPE as SmolLM2 and Qwen have it, whose "<" and ">" have ids of their own and, `merged`,
    become "<<" and ">>"."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    steps = [] if merged else [pre_tokenizers.Split(tokenizers.Regex("[<>]"), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def save_base(folder: Path, name: str) -> Path:
    """A folder as such a model is published in, with loud random weights."""
    if name in ("smollm2", "tinyllama"):
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"]
        named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
        save_tokenizer(folder, specials, **named)
    else:
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
        save_tokenizer(folder, specials, merged=name == "minimind2", bos_token=None, eos_token="<|im_end|>")
    torch.manual_seed(7)
    config = BASES[name]
    model = (Qwen3ForCausalLM if config.model_type == "qwen3" else LlamaForCausalLM)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=BASES)
def base(request, tmp_path) -> Path:
    return save_base(tmp_path / "base", request.param)


def test_the_base_computes_what_it_computes_in_transformers(base):
    """In the plain form, and as answering computes it."""
    theirs = AutoModelForCausalLM.from_pretrained(base).eval()
    config = config_of(base, read_state_dict(base))
    config.vision_dim = 0
    ours = Transformer(config).eval()
    load_weights(ours, base)
    ids = torch.randint(420, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = theirs(ids).logits, ours(ids)[0]
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    decoder = Decoder(ours)
    first, cache = decoder.prefill(ids[:, :39], torch.tensor([39, 39]), 1)
    for answer, position in ((first, 38), (decoder.step(ids[:, 39], cache), 39)):
        assert (answer - expected[:, position]).abs().max() < 1e-4 * expected.abs().max()


def test_the_base_goes_back_as_it_came(base, tmp_path):
    folder = run_export(base, "llama", tmp_path / "again")
    tensors = load_file(base / "model.safetensors")
    check_same(load_file(folder / "model.safetensors"), tensors)
    _, problems = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(problems.values()), problems


@pytest.mark.parametrize("base", ["minimind2", "tinyllama", "tinyqwen3"], indirect=True)
def test_all_stages_train_on_it(base, workplace, capsys, tmp_path):
    """Two steps of each, which the wide ones take minutes for; what they leave needs no flag to answer, and
    opens as LLaVA."""
    recipe = [line for line in (workplace / "args").read_text().splitlines() if "tokenizer_path" not in line]
    recipe = [
        line
        for line in recipe
        if line.split("=")[0] not in ("--dim", "--n_layers", "--n_heads", "--n_kv_heads")
    ]
    (workplace / "base.args").write_text("\n".join(recipe))
    flags = (f"@{workplace}/base.args", f"--llm={base}", "--max_steps=2")
    stages = [("1-pretrain_vlm.py",), ("2-sft_vlm.py",), ("2-sft_vlm.py", "--multi")]
    for script, *more in stages:
        result = run_clean(capsys, script, *flags, *more)
        assert result.returncode == 0, result.stderr
    dim = json.loads((base / "config.json").read_text())["hidden_size"]
    weights = workplace / "out" / f"{dim}_vlm_sft.pth"
    assert weights.is_file() and (workplace / "out" / f"{dim}_vlm_sft_multi.pth").is_file()
    trained = torch.load(weights, weights_only=True)
    assert not torch.equal(trained["norm.weight"], read_state_dict(base)["norm.weight"])
    chat = load_chat(weights)
    source = load_source(weights, "llava")
    export(source, "llava", tmp_path / "llava")
    check_same(read_state_dict(tmp_path / "llava"), trained)
    again = load_chat(tmp_path / "llava")
    turns = [{"from": "human", "value": "What <|im_end|> is it?"}]
    assert chat.render(turns) == again.render(turns)
    assert chat.decoder.config == again.decoder.config
    assert list(chat.stream(turns, [])) == list(again.stream(turns, []))


def test_the_check_before_a_run_knows_the_base(workplace, tmp_path, capsys):
    """Random weights are the one thing that it finds wrong; placeholders are where it expects them."""
    base = save_base(tmp_path / "base", "tinyqwen3")
    own = ("--tokenizer_path=", "--dim=", "--n_")
    flags = [line for line in (workplace / "args").read_text().splitlines() if not line.startswith(own)]
    with pytest.raises(SystemExit) as end:
        check([*flags, f"--llm={base}"])
    said = capsys.readouterr()
    problems = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(problems) == 1 and "look random" in problems[0], said.err
    assert "<image x50>" in said.out and f"{base}: 25 tensors loaded" in said.out, said.out


def test_weights_of_the_usual_kind_say_nothing_of_other_fields(workplace, capsys):
    """Descriptions, and resume files that compare them, stay as they were."""
    result = run_clean(capsys, "1-pretrain_vlm.py", f"@{workplace}/args", "--max_steps=1")
    assert result.returncode == 0, result.stderr
    described = json.loads((workplace / "out" / "32_vlm_pretrain.json").read_text())
    others = {"head_dim", "qk_norm", "tied", "open_id", "close_id"}
    assert not others & described["config"].keys()
    assert not {f"model.{name}" for name in others} & described["settings"].keys()
    assert "layers.0.attention.q_norm.weight" not in weights_of(workplace)


# ---- the placeholder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [True, False])
def test_text_never_makes_the_placeholder(tmp_path, merged):
    """It is made of "<" and ">" where they merge; else of two special tokens, which a typed name is not."""
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<a>", "<b>"]
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, specials, merged, **named), None)
    ids = choose_placeholder(tokenizer)
    marks = tuple(tokenizer.convert_tokens_to_ids([*"<>"]))
    assert ids == (marks if merged else (3, 4)) and ids != PLACEHOLDER
    renderer = Renderer(tokenizer, placeholder=ids)
    typed = ["<" * 25 + ">" * 25, "<a>" * 25 + "<b>" * 25, "x" + "<" * 60 + ">" * 60]
    prompt = renderer.render([{"from": "human", "value": "<image>".join(typed)}])
    slots = find_image_slots(torch.tensor([prompt.input_ids]), 50, ids)
    assert slots.tolist() == prompt.image_slots and len(slots) == 2
    assert [prompt.input_ids[slot] for slot in prompt.image_slots[0]] == placeholder_ids(50, ids)


def test_a_tokenizer_without_ids_to_spare_is_refused(tmp_path):
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, ["<s>", "</s>"], False, **named), None)
    with pytest.raises(ValueError, match="no two special tokens to spare"):
        choose_placeholder(tokenizer)


def test_minimind_keeps_its_placeholder(tokenizer):
    assert choose_placeholder(tokenizer) == PLACEHOLDER


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"model_type": "mistral"}, (), "a language model of type llama or qwen3 can be the base"),
        ({"model_type": ["llama"]}, (), "a language model of type llama or qwen3 can be the base"),
        ({"hidden_size": "wide"}, (), "dim must be a whole number, not 'wide'"),
        ({"max_position_embeddings": "long"}, (), "max_seq_len must be a whole number"),
        ({"attention_bias": True}, (), "attention_bias True, not False"),
        ({"hidden_act": "gelu"}, (), "hidden_act 'gelu', not silu"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, (), "rotations of type 'llama3'"),
        ({}, ("--dim=64",), "--dim 64 is not what --llm"),
        ({}, ("--max_seq_len=600",), "--max_seq_len 600 is more than"),
    ],
)
def test_a_base_that_computes_something_else_is_refused(tmp_path, workplace, capsys, change, flags, message):
    base = save_base(tmp_path / "base", "minimind2")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    places = [f"--clip_path={tmp_path}", f"--data_path={workplace}/data.json", f"--image_dir={workplace}"]
    check_refused(
        run_clean(capsys, "1-pretrain_vlm.py", f"--llm={base}", "--max_seq_len=256", *places, *flags), message
    )


def test_a_folder_that_is_none_is_refused(tmp_path, capsys):
    check_refused(run_clean(capsys, "1-pretrain_vlm.py", f"--llm={tmp_path}"), "holds no config.json")
