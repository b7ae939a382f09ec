"""What the kernels of `vit/layer_kernels.py` compute, beside PyTorch in fp64.

Run on the CPU, interpreted (TRITON_INTERPRET=1), by tests/unit/test_layer_kernels.py; on GPUs by
tests/distributed/gpu_cases.py.
"""

import sys

import torch
import torch.nn.functional as F


def check_all(device: str) -> None:
    """Raise AssertionError with the name of a result that is wrong."""
    torch.manual_seed(0)
    with torch.device(device):
        check_gelu(rows=70, channels=200)
        check_gelu(rows=3, channels=128)
        for hidden_type in (torch.float32, torch.float16):
            for drops in (False, True):
                check_norm(3, 13, 96, hidden_type, drops)
        check_norm(1, 16, 256, torch.float16, drops=False)
        if device == "cuda":  # where programs have more rows
            check_gelu(rows=20_001, channels=3072)
            check_norm(103, 197, 768, torch.float32, drops=False)
            check_norm(3, 6000, 768, torch.float16, drops=True)


def nan_like(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [torch.full_like(tensor, torch.nan) for tensor in tensors]


def compare(**found_and_expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for name, (found, expected) in found_and_expected.items():
        assert (found.double() - expected.double()).norm() <= 1e-3 * expected.double().norm(), name


def check_gelu(rows: int, channels: int) -> None:
    """Compare results in tensors that were NaN before with PyTorch's of fp64."""
    from vit import layer_kernels as kernels

    product, gradient = 2 * torch.randn(rows, channels).half(), torch.randn(rows, channels).half()
    bias = torch.randn(channels)
    z = (product.double() + bias.double()).requires_grad_()
    expected = F.gelu(z)
    (of_product,) = torch.autograd.grad(expected, z, gradient.double())
    (result,) = nan_like(product)
    kernels.launch_gelu(product, bias, result)
    gradients, sums = nan_like(*kernels._empty_gelu_gradients(product, bias, gradient))
    kernels.launch_gelu_backward(product, bias, gradient, gradients, sums)
    compare(result=(result, expected), product=(gradients, of_product), bias=(sums.sum(0), of_product.sum(0)))
    parts = [product.requires_grad_(), bias.requires_grad_()]
    found = torch.autograd.grad(kernels.gelu(*parts), parts, gradient)
    compare(of_product=(found[0], of_product), of_bias=(found[1], of_product.sum(0)))


def check_norm(images: int, tokens: int, width: int, hidden_type: torch.dtype, drops: bool) -> None:
    from vit import layer_kernels as kernels

    shape = (images, tokens, width)
    hidden, of_total = torch.randn(2, *shape).to(hidden_type)
    product, of_normed = torch.randn(2, *shape).half()
    bias, weight, shift = torch.randn(3, width)
    factors = torch.tensor([0.0, 1.25, 1.25]) if drops else None
    inputs = [tensor.double().requires_grad_() for tensor in (hidden, product, bias, weight, shift)]
    scale = 1.0 if factors is None else factors.double()[:, None, None]
    total = inputs[0] + (inputs[1] + inputs[2]) * scale
    normed = F.layer_norm(total, (width,), *inputs[3:], 1e-6)
    outputs, of_outputs = [total, normed], [of_total.double(), of_normed.double()]
    expected = torch.autograd.grad(outputs, inputs, of_outputs)

    given = (hidden, product, bias, factors, weight, shift)
    results = nan_like(*kernels._empty_norm_results(*given, 1e-6))
    kernels.launch_norm(*given, *results, 1e-6)
    compare(total=(results[0], total), normed=(results[1], normed))
    given = (results[0], results[2], factors, weight, of_total, of_normed)
    of_hidden, of_product, sums = nan_like(*kernels._empty_norm_gradients(*given))
    kernels.launch_norm_backward(*given, of_hidden, of_product, sums)
    assert of_product.numel() or (hidden_type == torch.float16 and not drops)
    of_product = of_product if of_product.numel() else of_hidden
    compare(hidden=(of_hidden, expected[0]), product=(of_product, expected[1]))
    names = ("hidden", "product", "bias", "weight", "shift")
    for name, found, was in zip(names[2:], sums.sum(0), expected[2:], strict=True):
        compare(**{name: (found, was)})
    parts = [tensor.requires_grad_() for tensor in (hidden, product, bias, weight, shift)]
    total, normed, _ = kernels.add_norm(*parts[:3], factors, *parts[3:], 1e-6)
    gradients = torch.autograd.grad([total, normed], parts, [of_total, of_normed])
    for name, found, was in zip(names, gradients, expected, strict=True):
        compare(**{f"of {name}": (found, was)})


if __name__ == "__main__":
    check_all(*sys.argv[1:])
