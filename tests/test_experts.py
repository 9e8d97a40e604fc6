"""What is gathered of experts in training: a balance loss that does not depend on how a batch is cut or
padded, and the choices that each received."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, SIZES

from model.data.batch import IGNORE_INDEX
from model.LMConfig import LMConfig
from model.transformer import Transformer
from trainer.distributed import Run
from trainer.experts import Experts


@pytest.fixture
def config(tokenizer) -> LMConfig:
    return LMConfig(**SIZES, vocab_size=len(tokenizer), vision_dim=24, max_seq_len=256, use_moe=True)


def make_batch(vocab_size: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that end where their last label stands; what lies behind is random, and must not matter."""
    ids = torch.randint(3, vocab_size, (3, T), generator=torch.Generator().manual_seed(T))
    labels = torch.full((3, T), IGNORE_INDEX)
    generator = torch.Generator().manual_seed(0)
    for row, length in enumerate((31, 17, 5)):
        ids[row, :length] = torch.randint(3, vocab_size, (length,), generator=generator)
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
    return ids, labels


@dataclass
class Routed:
    """What Experts gathers of one forward pass: the balance loss, summed over rows and layers and before its
    weight, and the choices that each expert of each layer received."""

    loss: torch.Tensor
    balance: torch.Tensor
    load: torch.Tensor


def watch(model: Transformer) -> Callable[..., Routed]:
    """A function of ids and labels that lets the model predict and reports what its experts did."""
    experts = Experts(Run(0, 1, torch.device("cpu")), model)

    def route(ids: torch.Tensor, labels: torch.Tensor) -> Routed:
        loss = model(ids, labels=labels)[1]
        positions = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        batch = {"labels": labels, "target_positions": positions}
        balance = len(labels) * experts.balance_loss(batch, num_rows=len(labels))  # from a mean to a sum
        experts.end_step()
        load = experts.load
        experts.read()  # what is gathered from now on counts from 0
        return Routed(loss, balance / model.config.aux_loss_alpha, load)

    return route


def test_the_balance_loss_is_deepseeks_sequence_by_sequence(lively, config):
    """Counted row by row, expert by expert, over all its tokens up to the last target; in the last layer,
    which is computed at the targets alone, over these."""
    seen, route = [], watch(lively)
    ids, labels = make_batch(config.vocab_size, 40)
    routed = route(ids, labels)
    for layer in lively.layers:
        layer.ffn_norm.register_forward_hook(lambda module, inputs, x: seen.append(x))
    expected, load = 0.0, torch.zeros(2, 4, dtype=torch.long)
    for row, length in enumerate((31, 17, 5)):
        seen.clear()
        lively(ids[row : row + 1, :length])  # without labels every layer sees every token
        for number, x in enumerate(seen):
            counted = x[0] if number == 0 else x[0, length // 2 :]
            probabilities = (counted @ lively.layers[number].feed_forward.gate.weight.T).softmax(-1)  # (T, E)
            for expert in range(4):
                hits = sum(expert in token.argsort(descending=True)[:2] for token in probabilities)
                load[number, expert] += hits
                expected += hits / len(counted) * 4 / 2 * probabilities[:, expert].mean()
    torch.testing.assert_close(routed.balance, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(routed.load, load)
    assert load.sum(1).tolist() == [2 * (31 + 17 + 5), 2 * (16 + 9 + 3)]


def test_targets_may_stand_anywhere(lively, config):
    """Several answers in a row leave gaps between its targets: in the last layer, as if those were all."""
    ids, labels = make_batch(config.vocab_size, 40)
    labels[0, 20:25] = IGNORE_INDEX
    route = watch(lively)
    routed = route(ids, labels)
    assert routed.load.sum(1).tolist() == [2 * (31 + 17 + 5), 2 * (16 - 5 + 9 + 3)]
    alone = [route(ids[row : row + 1], labels[row : row + 1]) for row in range(3)]
    torch.testing.assert_close(routed.balance, sum(part.balance for part in alone))
    assert torch.equal(routed.load, sum(part.load for part in alone))


def test_watching_changes_no_loss_and_even_use_costs_one(lively, config):
    ids, labels = make_batch(config.vocab_size, 40)
    expected, route = lively(ids, labels=labels)[1], watch(lively)
    assert torch.equal(route(ids, labels).loss, expected)
    for layer in lively.layers:
        layer.feed_forward.gate.weight.zero_()
    assert route(ids, labels).balance.item() == pytest.approx(3 * config.n_layers)


def test_padding_changes_neither_the_balance_nor_a_gradient(model, config):
    results, route = [], watch(model)
    for T in (31, 64):
        model.zero_grad()
        routed = route(*make_batch(config.vocab_size, T))
        (routed.loss + routed.balance).backward()
        results.append(
            [
                routed.loss.detach(),
                routed.balance.detach(),
                routed.load,
                *(parameter.grad.clone() for parameter in model.layers.parameters()),
            ]
        )
    for short, long in zip(*results, strict=True):
        torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-6)


def test_the_balance_moves_the_gate_alone_towards_even_use(model, config):
    """How often an expert was chosen has no gradient; how probable it was has."""
    with torch.no_grad():
        for layer in model.layers:
            layer.feed_forward.gate.weight.mul_(50)
    route, batch = watch(model), make_batch(config.vocab_size, 40)
    before = route(*batch).balance
    before.backward()
    gates = [layer.feed_forward.gate.weight for layer in model.layers]
    experts = [layer.feed_forward.experts[0].w1.weight for layer in model.layers]
    assert all(gate.grad.any() for gate in gates) and experts[-1].grad is None
    with torch.no_grad():
        for gate in gates:
            gate -= 1e-2 * gate.grad / gate.grad.norm()
    assert route(*batch).balance < before


def test_a_batch_with_nothing_to_learn_is_harmless(model):
    routed = watch(model)(torch.ones(2, 4, dtype=torch.long), torch.full((2, 4), IGNORE_INDEX))
    (routed.loss + routed.balance).backward()
    assert routed.loss.item() == routed.balance.item() == 0 and not routed.load.any()
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in model.layers.parameters()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_has_a_finite_gradient_in_every_dtype(model, config, dtype):
    ids, labels = make_batch(config.vocab_size, 40)
    expected, route = model(ids, labels=labels)[1].item(), watch(model)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        routed = route(ids, labels)
    (routed.loss + routed.balance).backward()
    assert routed.balance.dtype == torch.float32
    assert routed.loss.item() == pytest.approx(expected, rel=1e-2)
    assert all(parameter.grad.isfinite().all() for parameter in model.layers.parameters())


def test_what_is_not_trained_on_is_not_gathered(model, config):
    """A validation pass between two steps once would have counted for the second."""
    route, batch = watch(model), make_batch(config.vocab_size, 40)
    expected = route(*batch)
    with torch.no_grad():
        model(batch[0], labels=batch[1])
        model(batch[0][:, :7])
    routed = route(*batch)
    assert torch.equal(routed.balance, expected.balance) and torch.equal(routed.load, expected.load)


def test_without_experts_nothing_is_gathered(tokenizer):
    dense = Transformer(LMConfig(**SIZES, vocab_size=len(tokenizer), vision_dim=24))
    experts = Experts(Run(0, 1, torch.device("cpu")), dense)
    ids, labels = make_batch(len(tokenizer), 40)
    dense(ids, labels=labels)
    assert experts.balance_loss({"labels": labels}, num_rows=3) == 0
    experts.end_step()
    assert experts.read() == {} and experts.summary() == ""


def test_the_model_knows_nothing_of_balance():
    """It is gathered by hooks on the gates: whoever reads the network reads nothing of it."""
    for name in ("transformer.py", "moe.py", "fast.py", "decode.py"):
        text = (ROOT / "model" / name).read_text()
        assert not re.search(r"\brouting\b|\bbalance|\baux_loss", text, re.IGNORECASE), name
