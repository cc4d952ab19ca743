"""SnakeBeta: its equation, its gradients, and what it does at reduced precision."""

import pytest
import torch

from owl.nn.snake import SnakeBeta


def test_the_equation() -> None:
    snake = SnakeBeta(3).double()
    with torch.no_grad():
        snake.log_frequency.copy_(torch.tensor([0.0, 0.5, -1.0]))
        snake.log_damping.copy_(torch.tensor([0.0, -0.7, 0.3]))
    x = torch.randn(2, 3, 50, dtype=torch.float64)
    a, b = snake.log_frequency.exp()[:, None], snake.log_damping.exp()[:, None]
    torch.testing.assert_close(snake(x), x + torch.sin(a * x) ** 2 / b)
    assert torch.equal(SnakeBeta(3)(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_first_and_second_derivatives() -> None:
    snake = SnakeBeta(2).double()
    parameters = [parameter.data.uniform_(-1, 1).requires_grad_() for parameter in snake.parameters()]
    x = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)

    def evaluate(x: torch.Tensor, frequency: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
        values = {"log_frequency": frequency, "log_damping": damping}
        return torch.func.functional_call(snake, values, (x,))

    assert torch.autograd.gradcheck(evaluate, (x, *parameters))
    assert torch.autograd.gradgradcheck(evaluate, (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_keeps_the_dtype_of_activations_and_gives_gradients_to_float32_parameters(dtype: torch.dtype) -> None:
    snake = SnakeBeta(2)
    x = torch.randn(1, 2, 100)
    y = snake(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), snake(x), rtol=0.02, atol=0.02)
    y.sum().backward()
    assert snake.log_damping.grad is not None
    assert snake.log_damping.grad.dtype == torch.float32
