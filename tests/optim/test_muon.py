import io
import math
import re
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from owl.optim import muon
from owl.optim.configuration import parameter_groups
from owl.optim.muon import NEWTON_SCHULZ, MuonAdamW, by_matrix_shape, is_matrix, orthogonalise
from owl.optim.schedule import WarmupCosine
from tests.helpers.latents import lively


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), weight_norm(nn.Conv2d(8, 4, 3)))


def train(net: nn.Module, optimizer: MuonAdamW, schedule, steps: range) -> None:
    for step in steps:
        image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(image).square().mean().backward()
        optimizer.step()
        schedule.step()


def test_matrices_go_to_muon_and_everything_else_to_adamw():
    net = network()
    muon, adamw = MuonAdamW(net.parameters()).param_groups
    assert {id(p) for p in muon["params"]} == {id(net[0].weight), id(net[3].parametrizations.weight.original1)}
    assert len(muon["params"]) + len(adamw["params"]) == len(list(net.parameters()))
    assert not is_matrix(net[3].parametrizations.weight.original0)  # the gains, float[4, 1, 1, 1]
    assert (muon["algorithm"], adamw["algorithm"]) == ("muon", "adamw")


@pytest.mark.parametrize("shape", [(16, 16), (8, 72), (72, 8)])
def test_orthogonalise(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, singular, vt = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix)
    values = torch.linalg.svdvals(result)
    significant = singular > 0.01 * singular.norm()
    assert (values[significant] > 0.65).all()
    assert (values < 1.25).all()
    # The same singular vectors: in their basis the result is diagonal.
    core = u.T @ result @ vt.T
    assert (core - core.diag().diag()).abs().max() < 0.03
    exact = in_double(matrix)
    assert (result - exact).norm() < 0.02 * exact.norm()  # bfloat16 has eight bits


def in_double(matrix: torch.Tensor) -> torch.Tensor:
    a, b, c = NEWTON_SCHULZ
    x = (matrix / matrix.norm()).double()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.float()


@pytest.mark.parametrize("shape", [(5, 16, 16), (5, 8, 72), (5, 72, 8)])
def test_a_batch_is_orthogonalised_like_each_matrix_alone(shape):
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(5).view(5, 1, 1)
    assert torch.equal(orthogonalise(batch), torch.stack([orthogonalise(matrix) for matrix in batch]))


def test_matrices_of_one_shape_are_multiplied_together_up_to_a_size(monkeypatch):
    monkeypatch.setattr(muon, "TOGETHER", 100)
    weights = [torch.zeros(4, 2, 3, 3), torch.zeros(6, 8), torch.zeros(4, 18), torch.zeros(6, 8), torch.zeros(6, 8)]
    assert [[id(w) for w in batch] for batch in by_matrix_shape(weights)] == [
        [id(weights[0])],
        [id(weights[2])],
        [id(weights[1]), id(weights[3])],
        [id(weights[4])],
    ]


def test_orthogonalise_nothing():
    assert torch.equal(orthogonalise(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_first_muon_step():
    weight = nn.Parameter(torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    weight.grad = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    MuonAdamW([weight], lr=0.1, muon_ratio=0.5, weight_decay=0.2).step()
    update = orthogonalise(weight.grad.flatten(1)).view_as(weight)
    torch.testing.assert_close(weight.detach(), before * (1 - 0.05 * 0.2) - 0.05 * 0.2 * math.sqrt(18) * update)


def test_second_muon_step_looks_ahead_along_the_momentum():
    first, second = (torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer = MuonAdamW([weight], lr=0.1, momentum=0.9)
    weight.grad = first
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = second
    optimizer.step()
    momentum = 0.9 * (0.1 * first) + 0.1 * second
    update = orthogonalise(0.1 * second + 0.9 * momentum)
    torch.testing.assert_close(weight.detach(), before - 0.1 * 0.2 * math.sqrt(6) * update)


def test_first_adamw_step_is_the_sign_of_the_gradient():
    bias = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    bias.grad = torch.tensor([0.5, -0.01, 7.0])
    MuonAdamW([bias], lr=0.1, weight_decay=0.5).step()  # biases are not decayed
    torch.testing.assert_close(bias.detach(), torch.tensor([0.9, -1.9, 2.9]))


def test_adamw_part_equals_torch():
    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    a = MuonAdamW([ours], lr=0.01, betas=(0.8, 0.9))
    b = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.9), weight_decay=0.0)
    for step in range(4):
        ours.grad = theirs.grad = torch.randn(5, generator=torch.Generator().manual_seed(step))
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)


def test_outer_layers_are_updated_as_by_torch():
    """Inputs, outputs and modulations of a network, as one group; hidden matrices and their biases are another."""
    network = lively()
    inner, outer = parameter_groups(network)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    kinds = {re.sub(r"blocks\.\d+\.", "", names[id(p)]) for p in inner["params"] if p.ndim == 2}
    assert kinds == {"qkv.weight", "out.weight", "up.weight", "down.weight"}
    assert len(inner["params"]) + len(outer["params"]) == len(names)
    twin = deepcopy(outer["params"])
    optimizer = MuonAdamW([inner, outer], lr=0.01, weight_decay=0.5)
    reference = torch.optim.AdamW(twin, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        for ours, theirs in zip(outer["params"], twin, strict=True):
            ours.grad = theirs.grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        reference.step()
    torch.testing.assert_close(outer["params"], twin)
    assert [group["algorithm"] for group in optimizer.param_groups] == ["muon", "adamw", "adamw"]


def test_resumed_run_is_the_uninterrupted_run_bit_for_bit():
    def start():
        net = network()
        optimizer = MuonAdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        return net, optimizer, WarmupCosine(optimizer, 2, 8)

    whole, *rest = start()
    train(whole, *rest, range(6))

    net, optimizer, schedule = start()
    train(net, optimizer, schedule, range(3))
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    net, optimizer, schedule = start()
    for part, state in zip((net, optimizer, schedule), states, strict=True):
        part.load_state_dict(state)
    train(net, optimizer, schedule, range(3, 6))
    for (name, a), b in zip(whole.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_learns():
    net = network()
    optimizer = MuonAdamW(net.parameters(), lr=3e-3)
    image = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(image) - 0.5 * image.mean(1, keepdim=True)[..., 2:-2, 2:-2]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
