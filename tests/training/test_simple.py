"""The book's training functions, compared with its loop as the oracles write it out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import lively_model
from MyGPT import (
    CharTokenizer,
    GPTConfig,
    GPTModel,
    calc_loss_batch,
    calc_loss_loader,
    create_dataloader,
    evaluate_model,
    generate_and_print_sample,
    train_model_simple,
)
from oracles_model import ForeignGPT, greedy_by_hand, train_by_hand

V, T = 29, 6
Batches = list[tuple[Tensor, Tensor]]


def random_batches(n: int, B: int = 3) -> Batches:
    return [(torch.randint(V, (B, T)), torch.randint(V, (B, T))) for _ in range(n)]


def our_model() -> nn.Module:
    config = {"vocab_size": V, "context_length": 8, "emb_dim": 12, "n_heads": 2, "n_layers": 2, "drop_rate": 0.2}
    return GPTModel(config).double()


def foreign_model() -> nn.Module:
    return ForeignGPT(V, dropout=0.2).double()


both_models = pytest.mark.parametrize("make_model", [our_model, foreign_model])


def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Return the mean loss over all tokens of batches of equal size, without dropout."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        losses = [F.cross_entropy(twin(x).flatten(0, 1), y.flatten()).item() for x, y in batches]
    return sum(losses) / len(losses)


@both_models
def test_every_step_gives_the_weights_of_the_books_loop(make_model: Callable[[], nn.Module]) -> None:
    """Both loops draw the same dropout masks only if the evaluations in between draw nothing."""
    model, train, val = make_model(), random_batches(3), random_batches(2)
    twin = copy.deepcopy(model)
    torch.manual_seed(5)
    _, expected = train_by_hand(twin, train, torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1), epochs=2)

    walked: list[dict[str, Tensor]] = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    optimizer.register_step_post_hook(
        lambda *_: walked.append({name: p.detach().clone() for name, p in model.named_parameters()})
    )
    torch.manual_seed(5)
    train_model_simple(model, train, val, optimizer, "cpu", num_epochs=2, eval_freq=1, eval_iter=2)
    assert len(walked) == len(expected) == 6
    for ours, theirs in zip(walked, expected, strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-10)


@both_models
def test_returned_losses_and_tokens_are_those_after_each_evaluated_step(make_model: Callable[[], nn.Module]) -> None:
    model, train, val = make_model(), random_batches(5), random_batches(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected_train, expected_val = [], []

    def evaluate(*_: Any) -> None:
        expected_train.append(mean_loss(model, train[:3]))
        expected_val.append(mean_loss(model, val[:3]))

    optimizer.register_step_post_hook(evaluate)
    train_losses, val_losses, tokens_seen = train_model_simple(
        model, train, val, optimizer, "cpu", num_epochs=2, eval_freq=4, eval_iter=3
    )
    steps = [0, 4, 8]
    assert train_losses == pytest.approx([expected_train[step] for step in steps], abs=1e-12)
    assert val_losses == pytest.approx([expected_val[step] for step in steps], abs=1e-12)
    assert tokens_seen == [(step + 1) * 3 * T for step in steps]


def test_without_a_validation_loader_there_are_no_validation_losses(capsys: pytest.CaptureFixture[str]) -> None:
    model = our_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_losses, val_losses, tokens_seen = train_model_simple(
        model, random_batches(4), None, optimizer, "cpu", num_epochs=1, eval_freq=2
    )
    assert len(train_losses) == len(tokens_seen) == 2 and val_losses == []
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"Ep 1 (Step {step:06d}): Train loss {loss:.3f}" for step, loss in zip((0, 2), train_losses, strict=True)
    ]


def test_progress_is_printed_as_in_the_book(capsys: pytest.CaptureFixture[str]) -> None:
    model = our_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train, val, _ = train_model_simple(
        model, random_batches(2), random_batches(2), optimizer, "cpu", num_epochs=2, eval_freq=3
    )
    assert capsys.readouterr().out.splitlines() == [
        f"Ep 1 (Step 000000): Train loss {train[0]:.3f}, Val loss {val[0]:.3f}",
        f"Ep 2 (Step 000003): Train loss {train[1]:.3f}, Val loss {val[1]:.3f}",
    ]


def test_no_epochs_train_nothing() -> None:
    model = our_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert train_model_simple(model, random_batches(2), None, optimizer, "cpu", num_epochs=0) == ([], [], [])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_loader_without_a_batch_is_refused() -> None:
    model = our_model()
    with pytest.raises(ValueError, match="no batch"):
        train_model_simple(model, [], None, torch.optim.SGD(model.parameters()), "cpu", num_epochs=1)


class GoesWrong(nn.Module):
    """A model that spoils its logits from the third call on."""

    def __init__(self, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.spoil, self.calls = foreign_model(), spoil, 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.spoil(self.inner(ids)) if self.calls > 2 else self.inner(ids)


@pytest.mark.parametrize(
    ("spoil", "loss"),
    [
        (lambda logits: logits * math.nan, "nan"),
        (lambda logits: logits.index_fill(2, torch.arange(1, V), -math.inf), "inf"),
    ],
    ids=["nan", "inf"],
)
def test_a_loss_that_is_not_finite_stops_before_it_touches_the_weights(
    spoil: Callable[[Tensor], Tensor], loss: str
) -> None:
    model = GoesWrong(spoil)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    after: list[dict[str, Tensor]] = []
    optimizer.register_step_post_hook(lambda *_: after.append(copy.deepcopy(model.state_dict())))
    with pytest.raises(FloatingPointError, match=f"the loss is {loss} at step 2"):
        train_model_simple(model, random_batches(4), None, optimizer, "cpu", 1, eval_freq=100, eval_iter=0)
    assert len(after) == 2
    assert all(torch.equal(after[-1][name], tensor) for name, tensor in model.state_dict().items())


@both_models
def test_the_loss_of_a_batch_is_its_cross_entropy_with_gradients(make_model: Callable[[], nn.Module]) -> None:
    model = make_model().eval()
    ((inputs, targets),) = random_batches(1)
    targets[0, :4] = -100
    loss = calc_loss_batch(inputs, targets, model, "cpu")
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@both_models
def test_the_loss_of_a_loader_is_the_mean_over_its_tokens(make_model: Callable[[], nn.Module]) -> None:
    """The mean of the batches' means would differ: the last batch is smaller, and much of it is ignored."""
    model = make_model().eval()
    batches = [*random_batches(2, B=4), *random_batches(1, B=1)]
    batches[2][1][0, 2:] = -100
    with torch.no_grad():
        logits = torch.cat([model(inputs).flatten(0, 1) for inputs, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets in batches])
    expected = F.cross_entropy(logits, targets).item()
    for num_batches in (None, 3, 99):
        assert calc_loss_loader(batches, model, "cpu", num_batches) == pytest.approx(expected, abs=1e-12)
    first = F.cross_entropy(logits[: 4 * T], targets[: 4 * T]).item()
    assert calc_loss_loader(batches, model, "cpu", 1) == pytest.approx(first, abs=1e-12)


def test_the_loss_of_nothing_is_nan() -> None:
    model, batches = our_model(), random_batches(1)
    assert math.isnan(calc_loss_loader([], model, "cpu"))
    assert math.isnan(calc_loss_loader(batches, model, "cpu", num_batches=0))
    assert math.isnan(calc_loss_loader([(batches[0][0], torch.full((3, T), -100))], model, "cpu"))


def test_the_loss_of_a_loader_leaves_no_graph_behind() -> None:
    assert isinstance(calc_loss_loader(random_batches(1), our_model(), "cpu"), float)
    assert torch.is_grad_enabled()


@both_models
def test_evaluation_is_without_dropout_and_leaves_every_module_in_its_mode(make_model: Callable[[], nn.Module]) -> None:
    model, train, val = make_model().train(), random_batches(3), random_batches(3)
    next(module for module in model.modules() if isinstance(module, nn.LayerNorm)).eval()
    before = [module.training for module in model.modules()]
    losses = evaluate_model(model, train, val, "cpu", eval_iter=2)
    assert losses == pytest.approx((mean_loss(model, train[:2]), mean_loss(model, val[:2])), abs=1e-12)
    assert [module.training for module in model.modules()] == before


def test_evaluation_of_no_loader_is_nan() -> None:
    train_loss, val_loss = evaluate_model(our_model(), random_batches(1), None, "cpu", eval_iter=1)
    assert math.isfinite(train_loss) and math.isnan(val_loss)


TEXT = "the cat sat by the fire,\nand the cat left. "


@pytest.fixture
def chars() -> CharTokenizer:
    return CharTokenizer.from_text(TEXT)


def test_a_sample_is_fifty_greedy_tokens_on_one_line(chars: CharTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    config = GPTConfig(chars.n_vocab, context_length=8, emb_dim=12, n_heads=2, n_layers=2)
    model = lively_model(config).double()
    for one in (model, ForeignGPT(chars.n_vocab).eval()):
        generate_and_print_sample(one, chars, "cpu", "the cat")
        ids = greedy_by_hand(one, torch.tensor([chars.encode("the cat")]), 50, 8)
        assert capsys.readouterr().out == chars.decode(ids[0].tolist()).replace("\n", " ") + "\n"


def test_after_every_epoch_a_sample_is_printed_in_the_books_place(
    chars: CharTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ForeignGPT(chars.n_vocab)
    batches = [(x % chars.n_vocab, y % chars.n_vocab) for x, y in random_batches(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_model_simple(model, batches, None, optimizer, "cpu", 2, eval_freq=2, start_context="the", tokenizer=chars)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in lines] == ["Ep ", "the", "Ep ", "the"]


def test_a_tokenizer_that_looks_empty_is_used(chars: CharTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """Its length is 0, so its truth value is False."""

    class EmptyLooking(CharTokenizer):
        def __len__(self) -> int:
            return 0

    empty = EmptyLooking.from_text(TEXT)
    batches = [(x % chars.n_vocab, y % chars.n_vocab) for x, y in random_batches(1)]
    for tokenizer in (empty, chars):
        torch.manual_seed(1)
        model = ForeignGPT(chars.n_vocab)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_model_simple(model, batches, None, optimizer, "cpu", 1, start_context="the", tokenizer=tokenizer)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == printed[2:]


@pytest.mark.slow
def test_training_on_a_text_learns_it(chars: CharTokenizer) -> None:
    """The text repeats one sentence, so its entropy is nearly 0; a uniform guess costs 2.9 nats per token."""
    loader = create_dataloader(TEXT * 20, batch_size=4, max_length=16, tokenizer=chars, seed=0)
    model = GPTModel(GPTConfig(chars.n_vocab, context_length=16, emb_dim=32, n_heads=2, n_layers=2, drop_rate=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, _, _ = train_model_simple(model, loader, None, optimizer, "cpu", num_epochs=8, eval_freq=10)
    assert losses[0] > 2 and losses[-1] < 0.5
