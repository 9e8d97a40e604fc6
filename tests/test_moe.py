"""Mixture of experts: the same function as plain loops, a balance loss that does not depend on how a batch is
cut or padded, and runs that go on, in one process or two."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, check_same, make_rows, run_inside, run_script, train, weights_of
from test_resume import PowerCut, cut_after

from dataset.demo_world.build import World
from model.checkpoint import config_of, load_weights, read_state_dict, save_weights
from model.data.batch import IGNORE_INDEX
from model.decode import Decoder
from model.fast import grouped
from model.LMConfig import LMConfig
from model.moe import MixtureOfExperts, Routing, one_by_one
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


def test_sizes_of_experts_are_checked_and_kept(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"num_experts_per_tok must be 1 to n_routed_experts \(4\), not 5; "
        "n_shared_experts must be 0 or 1, not 3",
    ):
        LMConfig(num_experts_per_tok=5, n_shared_experts=3)
    with pytest.raises(ValueError, match="aux_loss_alpha must be 0 or more, not -1"):
        LMConfig(aux_loss_alpha=-1)
    config = LMConfig(use_moe=True, n_routed_experts=6, aux_loss_alpha=0.1, norm_topk_prob=False)
    config.to_json(tmp_path / "config.json")
    assert LMConfig.from_json(tmp_path / "config.json") == config
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


def test_the_grouped_products_of_a_gpu_are_those_of_the_loop():
    """On a CPU PyTorch computes them too, in its own loop. One expert has no row."""
    config = LMConfig(dim=16, n_heads=2, n_kv_heads=1, use_moe=True)
    experts = loud(MixtureOfExperts(config, FeedForward)).to(torch.bfloat16).experts
    rows, counts = torch.randn(29, 16).bfloat16(), torch.tensor([13, 0, 1, 15])
    weight, results = torch.randn(29, 16).bfloat16(), []
    for compute in (one_by_one, grouped):
        x = rows.clone().requires_grad_()
        said = compute(experts, x, counts)
        gradients = torch.autograd.grad((said * weight).sum(), [x, *experts.parameters()])
        results.append([said, *gradients])
    for one, two in zip(*results, strict=True):
        assert one.abs().max() > 0 or not two.any()
        torch.testing.assert_close(two, one, rtol=0.05, atol=0.02 * one.abs().max().item())


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


def test_a_file_of_v1_with_experts_gives_the_logits_of_an_independent_forward(tmp_path):
    """Everything is read off its names and shapes; there is no description beside it."""
    config = LMConfig(dim=64, n_layers=3, vocab_size=600, use_moe=True, vision_dim=24, vision_proj_bias=True)
    state = loud(Transformer(config)).state_dict()
    old_names = {
        name.replace("vision_proj.", "vision_proj.vision_proj.0."): tensor for name, tensor in state.items()
    }
    torch.save({f"module.{name}": tensor for name, tensor in old_names.items()}, tmp_path / "64_moe.pth")
    found = config_of(tmp_path / "64_moe.pth", read_state_dict(tmp_path / "64_moe.pth"))
    assert found == config
    model = Transformer(found).eval()
    report = load_weights(model, tmp_path / "64_moe.pth")
    assert report.missing == report.ignored == []
    ids, features = [1, 7, *placeholder_ids(), 9, 300, 41, 2], torch.randn(50, 24)
    with torch.no_grad():
        expected = v1_forward(state, config, ids, features)
        logits = model(torch.tensor([ids]), features.unsqueeze(0))[0][0]
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ValueError, match="the file would fit --use_moe True$"):
        load_weights(
            Transformer(LMConfig.from_dict(config.to_dict() | {"use_moe": False})), tmp_path / "64_moe.pth"
        )


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


# ---- the balance loss --------------------------------------------------------------------------------------


def make_batch(vocab_size: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that end where their last label stands; what lies behind is random, and must not matter."""
    ids = torch.randint(3, vocab_size, (3, T), generator=torch.Generator().manual_seed(T))
    labels = torch.full((3, T), IGNORE_INDEX)
    generator = torch.Generator().manual_seed(0)
    for row, length in enumerate((31, 17, 5)):
        ids[row, :length] = torch.randint(3, vocab_size, (length,), generator=generator)
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
    return ids, labels


def route_of(model, ids, labels) -> tuple[torch.Tensor, Routing]:
    routing = Routing()
    return model(ids, labels=labels, routing=routing)[1], routing


def test_the_balance_loss_is_deepseeks_sequence_by_sequence(lively, config):
    """Counted with hooks, row by row, over all its tokens, in the last layer too."""
    seen = []
    for layer in lively.layers:
        layer.ffn_norm.register_forward_hook(lambda module, inputs, x: seen.append(x))
    ids, labels = make_batch(config.vocab_size, 40)
    expected, load = 0.0, torch.zeros(2, 4, dtype=torch.long)
    for row, length in enumerate((31, 17, 5)):
        seen.clear()
        lively(ids[row : row + 1, :length])
        for number, x in enumerate(seen):
            probabilities = (x[0] @ lively.layers[number].feed_forward.gate.weight.T).softmax(-1)  # (T, E)
            for expert in range(4):
                hits = sum(expert in token.argsort(descending=True)[:2] for token in probabilities)
                load[number, expert] += hits
                expected += hits / length * 4 / 2 * probabilities[:, expert].mean()
    _, routing = route_of(lively, ids, labels)
    torch.testing.assert_close(routing.balance, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(routing.load, load) and load.sum() == 2 * 2 * (31 + 17 + 5)


def test_routing_changes_no_loss_and_even_use_costs_one(lively, config):
    ids, labels = make_batch(config.vocab_size, 40)
    loss, _ = route_of(lively, ids, labels)
    torch.testing.assert_close(loss, lively(ids, labels=labels)[1])
    for layer in lively.layers:
        layer.feed_forward.gate.weight.zero_()
    assert route_of(lively, ids, labels)[1].balance.item() == pytest.approx(3 * config.n_layers)


def test_padding_changes_neither_the_balance_nor_a_gradient(model, config):
    results = []
    for T in (31, 64):
        model.zero_grad()
        loss, routing = route_of(model, *make_batch(config.vocab_size, T))
        (loss + routing.balance).backward()
        results.append(
            [
                loss.detach(),
                routing.balance.detach(),
                routing.load,
                *(parameter.grad.clone() for parameter in model.layers.parameters()),
            ]
        )
    for short, long in zip(*results, strict=True):
        torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-6)


def test_a_batch_with_nothing_to_learn_is_harmless(model):
    loss, routing = route_of(model, torch.ones(2, 4, dtype=torch.long), torch.full((2, 4), IGNORE_INDEX))
    (loss + routing.balance).backward()
    assert loss.item() == routing.balance.item() == 0 and not routing.load.any()
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in model.layers.parameters()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_has_a_finite_gradient_in_every_dtype(model, config, dtype):
    ids, labels = make_batch(config.vocab_size, 40)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss, routing = route_of(model, ids, labels)
    (loss + routing.balance).backward()
    assert routing.balance.dtype == torch.float32
    assert loss.item() == pytest.approx(model(ids, labels=labels)[1].item(), rel=1e-2)
    assert all(parameter.grad.isfinite().all() for parameter in model.layers.parameters())


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
        match="32_vlm_sft.pth not found, but 32_moe_vlm_pretrain.pth, "
        "32_moe_vlm_sft.pth: choose by --dim, --use_moe and --stage",
    ):
        run_inside("3-eval_chat.py", *flags)


def test_the_recipes_of_a_demo_world_with_experts_say_so(tmp_path):
    for use_moe in (False, True):
        world = World(tmp_path / f"world{use_moe}", "tiny", 0, use_moe)
        world.folder.mkdir()
        world.write_recipes(world.folder)
        recipes = list(world.folder.glob("*.args"))
        assert len(recipes) >= 4
        assert all(("--use_moe=True" in path.read_text()) == use_moe for path in recipes)
        assert world.identity.get("use_moe", False) == use_moe
        assert f"--max_steps={240 if use_moe else 160}" in (world.folder / "sft.args").read_text()
