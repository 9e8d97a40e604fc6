"""Mixture of experts: the same function as plain loops, v1's files, and runs that go on, in one process or
two. Their balance loss: test_experts.py."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    SIZES,
    PowerCut,
    check_same,
    cut_after,
    make_rows,
    run_inside,
    run_script,
    train,
    weights_of,
)

from dataset.demo_world.build import MOE_STEPS, World
from dataset.demo_world.recipe import PRESETS
from model.checkpoint import config_of, load_weights, read_state_dict, save_weights
from model.decode import Decoder
from model.LMConfig import LMConfig
from model.moe import MixtureOfExperts
from model.names import weights_path
from model.transformer import FeedForward, Transformer
from model.vision_proj import placeholder_ids
from trainer.logger import read_metrics

SCRIPT = "1-pretrain_vlm.py"
STAGE = "moe_vlm_pretrain"


@pytest.fixture
def config(tokenizer) -> LMConfig:
    return LMConfig(**SIZES, vocab_size=len(tokenizer), vision_dim=24, max_seq_len=256, use_moe=True)


@pytest.fixture
def moe_workplace(workplace, tokenizer) -> Path:
    """The workplace with a language model that has experts, and a recipe that says so."""
    torch.manual_seed(2)
    llm = Transformer(
        LMConfig(**SIZES, vocab_size=len(tokenizer), vision_dim=0, max_seq_len=256, use_moe=True)
    )
    save_weights(llm, weights_path(workplace / "out", llm.config, "llm"))
    with open(workplace / "args", "a") as file:
        file.write("\n--use_moe=True")
    return workplace


def metrics_of(workplace: Path) -> list[dict]:
    return read_metrics(workplace / "out" / f"32_{STAGE}.metrics.jsonl")


# ---- sizes and names ---------------------------------------------------------------------------------------


def test_parameter_counts_and_names_are_those_of_v1():
    with torch.device("meta"):
        model = Transformer(LMConfig(dim=512, n_layers=8, use_moe=True, vision_proj_bias=True))
        assert model.num_parameters() == 96_494_592
        assert Transformer(LMConfig(use_moe=True)).num_parameters() == 96_494_592 - 512
        assert Transformer(LMConfig()).num_active_parameters() == 27_271_680
    idle = 8 * 2 * 3 * 512 * 1408
    assert model.num_active_parameters() == 96_494_592 - idle
    names = {
        re.sub(r"layers\.\d+\.feed_forward\.", "", name): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if ".feed_forward." in name
    }
    widths = {"w1": (1408, 512), "w2": (512, 1408), "w3": (1408, 512)}
    assert names == {
        "gate.weight": (4, 512),
        **{
            f"{expert}.{name}.weight": shape
            for name, shape in widths.items()
            for expert in ("shared_experts", *(f"experts.{number}" for number in range(4)))
        },
    }


def test_sizes_of_experts_are_checked_and_kept():
    with pytest.raises(
        ValueError,
        match=r"num_experts_per_tok must be 1 to n_routed_experts \(4\), not 5; "
        "n_shared_experts must be 0 or 1, not 3",
    ):
        LMConfig(num_experts_per_tok=5, n_shared_experts=3)
    with pytest.raises(ValueError, match="aux_loss_alpha must be 0 or more, not -1"):
        LMConfig(aux_loss_alpha=-1)
    config = LMConfig(use_moe=True, n_routed_experts=6, aux_loss_alpha=0.1, norm_topk_prob=False)
    assert LMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert not any("expert" in name or "moe" in name for name in LMConfig().to_dict())


# ---- the same function as plain loops ----------------------------------------------------------------------


def slow_experts(state: dict, x: torch.Tensor, config: LMConfig) -> torch.Tensor:
    """What a mixture says of one token x (D,), expert after expert."""

    def feed_forward(name: str) -> torch.Tensor:
        return state[f"{name}.w2.weight"] @ (
            F.silu(state[f"{name}.w1.weight"] @ x) * (state[f"{name}.w3.weight"] @ x)
        )

    scores = torch.softmax(state["gate.weight"] @ x, 0)
    best = sorted(range(len(scores)), key=lambda number: -scores[number].item())[: config.num_experts_per_tok]
    total = sum(scores[number] for number in best) if config.norm_topk_prob else 1
    said = sum(scores[number] / total * feed_forward(f"experts.{number}") for number in best)
    return said + feed_forward("shared_experts") if config.n_shared_experts else said


def loud(module: torch.nn.Module) -> torch.nn.Module:
    """With weights of 0.02 every expert would say almost nothing."""
    torch.manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize(
    "sizes",
    [{}, {"norm_topk_prob": False, "n_shared_experts": 0}, {"n_routed_experts": 5, "num_experts_per_tok": 3}],
)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_experts_equal_a_slow_loop_gradients_included(sizes, num_tokens):
    """With one token some experts have nothing to do: their gradient is zero, but there is one."""
    config = LMConfig(dim=16, n_heads=2, n_kv_heads=1, use_moe=True, **sizes)
    mixture = loud(MixtureOfExperts(config, FeedForward))
    x = torch.randn(1, num_tokens, 16, requires_grad=True)
    fast = mixture(x)
    state = dict(mixture.named_parameters())
    slow = torch.stack([slow_experts(state, token, config) for token in x[0]]).unsqueeze(0)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(x)
    names = ["x", *state]
    got = torch.autograd.grad((fast * weight).sum(), [x, *state.values()], allow_unused=True)
    expected = torch.autograd.grad((slow * weight).sum(), [x, *state.values()], allow_unused=True)
    for name, one, two in zip(names, got, expected, strict=True):
        assert one is not None, name
        torch.testing.assert_close(one, torch.zeros_like(one) if two is None else two, rtol=1e-3, atol=1e-3)
    assert num_tokens > 1 or any(gradient is None for gradient in expected)


def v1_forward(state: dict, config: LMConfig, ids: list[int], features: torch.Tensor) -> torch.Tensor:
    """MiniMind-V v1 as its documents describe it, one row and one head at a time: logits (T, V)."""
    T, E = len(ids), config.head_dim
    h = state["tok_embeddings.weight"][ids].clone()
    seen = features @ state["vision_proj.weight"].T + state["vision_proj.bias"]
    start = ids.index(placeholder_ids()[0])
    h[start : start + 50] = seen
    angles = torch.outer(torch.arange(T).double(), config.rope_theta ** (-torch.arange(0, E, 2).double() / E))
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * state[f"{name}.weight"]

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.reshape(T, E // 2, 2)) * turn).reshape(T, E)

    for number in range(config.n_layers):
        layer = f"layers.{number}"
        x = norm(h, f"{layer}.attention_norm")
        q, k, v = (x @ state[f"{layer}.attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
        heads = []
        for head in range(config.n_heads):
            shared = head // (config.n_heads // config.n_kv_heads)
            query, key = rotated(q[:, head * E :][:, :E]), rotated(k[:, shared * E :][:, :E])
            scores = (query @ key.T / E**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, shared * E :][:, :E])
        h = h + torch.cat(heads, 1) @ state[f"{layer}.attention.wo.weight"].T
        x = norm(h, f"{layer}.ffn_norm")
        own = {
            name.removeprefix(f"{layer}.feed_forward."): tensor
            for name, tensor in state.items()
            if name.startswith(f"{layer}.feed_forward.")
        }
        h = h + torch.stack([slow_experts(own, token, config) for token in x])
    return norm(h, "norm") @ state["output.weight"].T


def test_the_sizes_of_v1_with_experts_are_read_off_names_and_shapes(tmp_path):
    """v1's files have no description beside them."""
    config = LMConfig(use_moe=True, vision_proj_bias=True)
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    assert config_of(tmp_path / "512_moe_vlm_sft.pth", state) == config


def test_a_file_of_v1_with_experts_gives_the_logits_of_an_independent_forward(tmp_path):
    config = LMConfig(dim=64, n_layers=3, vocab_size=600, use_moe=True, vision_dim=24, vision_proj_bias=True)
    state, path = loud(Transformer(config)).state_dict(), tmp_path / "64_moe.pth"
    old_names = {
        name.replace("vision_proj.", "vision_proj.vision_proj.0."): tensor for name, tensor in state.items()
    }
    torch.save({f"module.{name}": tensor for name, tensor in old_names.items()}, path)
    path.with_suffix(".json").write_text(json.dumps({"config": config.to_dict()}))
    assert config_of(path, read_state_dict(path)) == config
    model = Transformer(config).eval()
    report = load_weights(model, path)
    assert report.missing == report.ignored == []
    ids, features = [1, 7, *placeholder_ids(), 9, 300, 41, 2], torch.randn(50, 24)
    with torch.no_grad():
        expected = v1_forward(state, config, ids, features)
        logits = model(torch.tensor([ids]), features.unsqueeze(0))[0][0]
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ValueError, match="the file would fit --use_moe True$"):
        load_weights(Transformer(LMConfig.from_dict(config.to_dict() | {"use_moe": False})), path)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_cached_logits_are_those_of_the_whole(lively, config, batch_size):
    """What is trained is what answers."""
    ids = torch.randint(3, config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([30, 17, 5])
    full, _ = lively(ids)
    decoder = Decoder(copy.deepcopy(lively), batch_size)
    logits, cache = decoder.prefill(ids[:, :30], lengths, 10)
    for step in range(10):
        torch.testing.assert_close(logits, full[range(3), lengths + step - 1], rtol=1e-4, atol=1e-4)
        logits = decoder.step(ids[range(3), lengths + step], cache)


# ---- runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_learns_starves_no_expert_and_tells_the_load(moe_workplace, capsys, dtype):
    run_inside(
        SCRIPT,
        f"@{moe_workplace}/args",
        "--max_steps=40",
        "--log_interval=10",
        f"--dtype={dtype}",
        "--learning_rate=4e-3",
    )
    output, records = capsys.readouterr().out, metrics_of(moe_workplace)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    for record in records:
        assert sum(record["expert_load"]) == pytest.approx(1, abs=1e-3) and len(record["expert_load"]) == 4
        assert 0.05 < record["expert_load_least"] <= record["expert_load_most"] < 0.5
        assert 0.02 <= record["balance_loss"] < 0.03  # 0.01 per layer, at even use
    assert re.search(r"of a layer's choices an expert received \d+% to \d+%; metrics", output)
    assert re.search(r"parameters \(0\.\d\d M of all active per token\)", output)


def test_one_process_accumulation_and_two_processes_train_the_same_model(moe_workplace):
    """The balance weighs as much as the loss here, and rows differ in length: a mean per batch would show."""

    def weights(name: str, *flags: str, processes: int = 1) -> dict[str, torch.Tensor]:
        folder = moe_workplace / name
        folder.mkdir()
        for path in (moe_workplace / "out").glob("32_moe_llm.*"):
            (folder / path.name).write_bytes(path.read_bytes())
        flags = (
            f"@{moe_workplace}/args",
            f"--out_dir={folder}",
            "--max_steps=3",
            "--bucket=False",
            "--grad_clip=0",
            *flags,
        )
        if processes == 1:
            run_inside(SCRIPT, *flags)
        else:
            train(moe_workplace, *flags, processes=processes)
        records = [record["expert_load"] for record in read_metrics(folder / f"32_{STAGE}.metrics.jsonl")]
        assert all(
            load == first for load, first in zip(records, loads.setdefault("first", records), strict=True)
        )
        return weights_of(moe_workplace, STAGE, name)

    loads: dict = {}
    whole = weights("whole", "--batch_size=8", "--aux_loss_alpha=1")
    cut = {
        "accumulated": weights(
            "accumulated", "--batch_size=2", "--accumulation_steps=4", "--aux_loss_alpha=1"
        ),
        "shared": weights("shared", "--batch_size=4", "--aux_loss_alpha=1", processes=2),
    }
    moved = torch.load(moe_workplace / "out" / "32_moe_llm.pth", weights_only=True)
    for name in moved:
        size = (whole[name] - moved[name]).abs().max()
        for result in cut.values():
            assert (result[name] - whole[name]).abs().max() < 0.05 * size, name


def test_a_resumed_run_ends_in_the_same_bits_and_the_same_record(moe_workplace, monkeypatch):
    (moe_workplace / "data.json").write_text(json.dumps(make_rows(23)))
    flags = [
        f"@{moe_workplace}/args",
        "--max_steps=8",
        "--save_interval=3",
        "--log_interval=4",
        "--batch_size=2",
        "--accumulation_steps=2",
    ]

    def records() -> list[dict]:
        return [
            {name: value for name, value in record.items() if name not in ("seconds", "tokens_per_s")}
            for record in metrics_of(moe_workplace)
        ]

    run_inside(SCRIPT, *flags)
    expected, record = weights_of(moe_workplace, STAGE), records()
    for path in (moe_workplace / "out").glob(f"32_{STAGE}.*"):
        path.unlink()
    for steps in (5, 2):
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            cut_after(patch, steps)
            run_inside(SCRIPT, *flags, "--resume")
    run_inside(SCRIPT, *flags, "--resume")
    check_same(weights_of(moe_workplace, STAGE), expected)
    assert records() == record and len(record) == 2


def test_validation_leaves_no_trace_in_the_record(moe_workplace):
    """Neither in the load and the balance loss, nor in the weights."""
    (moe_workplace / "val.json").write_text(json.dumps(make_rows(5)))
    records, weights = [], []
    for flags in ([], [f"--val_data_path={moe_workplace}/val.json", "--save_interval=1"]):
        run_inside(SCRIPT, f"@{moe_workplace}/args", "--max_steps=3", *flags)
        weights.append(weights_of(moe_workplace, STAGE))
        records.append(
            [
                {name: value for name, value in record.items() if "expert" in name or "balance" in name}
                for record in metrics_of(moe_workplace)
                if "val_loss" not in record
            ]
        )
    check_same(*weights)
    assert records[0] == records[1] and len(records[0]) == 3


def test_the_feature_cache_changes_no_bit(moe_workplace):
    flags = [f"@{moe_workplace}/args", "--max_steps=3"]
    run_inside(SCRIPT, *flags)
    expected = weights_of(moe_workplace, STAGE)
    run_inside(SCRIPT, *flags, f"--feature_cache={moe_workplace}/cache", "--feature_dtype=float32")
    check_same(weights_of(moe_workplace, STAGE), expected)


def test_every_script_finds_the_files_of_experts(moe_workplace, capsys):
    """Each beside a dense model of the same name."""
    result = run_script("-m", "trainer.check", "pretrain", f"@{moe_workplace}/args")
    assert "32_moe_llm.pth: " in result.stdout and "active per token" in result.stdout
    run_inside(SCRIPT, f"@{moe_workplace}/args", "--max_steps=1")
    run_inside("2-sft_vlm.py", f"@{moe_workplace}/args", "--max_steps=1")
    flags = [
        f"--{name}={value}"
        for name, value in {
            "out_dir": moe_workplace / "out",
            "image_dir": moe_workplace / "images",
            "dim": 32,
            "max_new_tokens": 2,
            "device": "cpu",
        }.items()
    ]
    capsys.readouterr()
    run_inside("3-eval_chat.py", *flags, "--use_moe")
    output = capsys.readouterr().out
    assert "32_moe_vlm_sft.pth: " in output and output.count("0.png]") == 1
    with pytest.raises(
        FileNotFoundError,
        match="32_vlm_sft.*pth not found, but 32_moe_vlm_pretrain.pth, "
        "32_moe_vlm_sft.pth: choose by --dim, --use_moe and --stage",
    ):
        run_inside("3-eval_chat.py", *flags, "--use_moe=False")


def test_the_recipes_of_a_demo_world_with_experts_say_so(tmp_path):
    for use_moe in (False, True):
        world = World(tmp_path / f"world{use_moe}", "tiny", 0, use_moe)
        world.folder.mkdir()
        world.write_recipes(world.folder)
        recipes = list(world.folder.glob("*.args"))
        assert len(recipes) >= 4
        assert all(("--use_moe=True" in path.read_text()) == use_moe for path in recipes)
        assert world.identity.get("use_moe", False) == use_moe
        steps = PRESETS["tiny"].sft.steps
        steps = round(MOE_STEPS * steps) if use_moe else steps
        assert f"--max_steps={steps}\n" in (world.folder / "sft.args").read_text()
    assert MOE_STEPS > 1
