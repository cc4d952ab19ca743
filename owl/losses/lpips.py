"""Learned perceptual distance between images (LPIPS), as a loss and as a metric.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", eq. 1, and its
shift-tolerant variant: Ghildyal and Liu 2022, "Shift-tolerant Perceptual Similarity Metric".
"""

import pickle
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl.errors import OwlError
from owl.nn.frozen import freeze

# ImageNet normalisation for images in [-1, 1]: constants of the reference implementation.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
SMALLEST = 32  # pixels: with fewer, the last feature map of some nets would be empty


class LPIPS(nn.Module):
    """Distance of two images in the feature space of a frozen classifier.

    Args:
        net: Feature network. ``st_alex`` (default): shift-tolerant AlexNet, whose weights are included in the installed
            packages, so it works offline. ``alex`` or ``vgg``: the trunks of the original LPIPS.
        weights: Only for ``alex`` and ``vgg``: path of torchvision's ``alexnet`` or ``vgg16`` weights file.
            Without it the file is taken from torchvision's download cache, or downloaded.

    Attributes:
        name: Name of the metric, e.g. ``lpips_st_alex``: values of different nets are not comparable.

    Raises:
        OwlError: The weights can be neither found nor downloaded, or the file contains another network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: Literal["st_alex", "alex", "vgg"] = "st_alex", weights: str | None = None) -> None:
        super().__init__()
        self.name = f"lpips_{net}"
        trunk: nn.Module
        if net == "st_alex":
            if weights is not None:
                raise OwlError(
                    "lpips.weights",
                    f"LPIPS got weights {weights!r} for net 'st_alex', whose weights are included in the package "
                    "stlpips-pytorch; omit `weights`, or set `net` to 'alex' or 'vgg'",
                )
            trunk, heads = _shift_tolerant_alexnet()
        else:
            trunk, heads = _original(net, weights)
        self.trunk = freeze(trunk)
        self.heads = freeze(nn.ParameterList(heads))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the distance of each pair.

        Args:
            x: Images, float[B, 3, H, W] in [-1, 1], H and W at least 32.
            y: Images to compare with, of the same shape.

        Returns:
            float[B], 0 for equal images; below 0.1 differences are hard to see. Under bfloat16 autocast, gradients are
            accurate (cosine > 0.98 with those in float32), but small distances increase by up to a sixth: report
            float32 values.

        Raises:
            OwlError: The images are too small.
        """
        if min(x.shape[-2:]) < SMALLEST:
            raise OwlError(
                "lpips.size",
                f"LPIPS got images of {x.shape[-2]}x{x.shape[-1]} pixels, expected at least {SMALLEST} in both "
                "directions; use larger images or crops, or set its weight to 0",
            )
        distance = x.new_zeros(len(x))
        for head, a, b in zip(self.heads, self._features(x), self._features(y), strict=True):
            difference = F.normalize(a, eps=1e-10) - F.normalize(b, eps=1e-10)
            distance = distance + F.conv2d(difference.square(), head).mean(dim=(1, 2, 3))
        return distance

    def _features(self, image: Tensor) -> list[Tensor]:
        return list(self.trunk((image - self.shift) / self.scale))


def random_crops(
    x: Tensor, y: Tensor, size: int, count: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Crop random squares of random samples, the same for both images, to estimate LPIPS at a lower cost.

    Args:
        x: Images, float[B, C, H, W].
        y: Images of the same shape.
        size: Side of the crops in pixels; a shorter side of the images is not cropped.
        count: Number of samples to draw, without replacement; default: the whole batch.
        generator: Generator on the CPU, for images on any device, to avoid synchronisation.

    Returns:
        Two tensors float[min(count, B), C, min(size, H), min(size, W)].
    """
    batch, _, height, width = x.shape
    high, wide = min(size, height), min(size, width)
    samples = torch.randperm(batch, generator=generator)[:count].tolist()
    tops = torch.randint(height - high + 1, (len(samples),), generator=generator).tolist()
    lefts = torch.randint(width - wide + 1, (len(samples),), generator=generator).tolist()

    def crop(images: Tensor) -> Tensor:
        singles = images.unbind()  # so that the gradient of each slice has the size of one image, not of the batch
        return torch.stack(
            [
                singles[sample][:, top : top + high, left : left + wide]
                for sample, top, left in zip(samples, tops, lefts, strict=True)
            ]
        )

    return crop(x), crop(y)


class ShiftTolerantAlexNet(nn.Module):
    """AlexNet's convolutions at stride 1, with a blur before each subsampling.

    Equal to ``relu(blur_down(conv1(image)))`` ..., in about a quarter of the time on a CPU: the blur is moved before
    the first convolution (both are linear), which is then evaluated only at the sampled positions, as a 6x6 convolution
    of 2x2 pixel blocks. The memory format is channels-last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 11, padding=2)
        self.conv2 = nn.Conv2d(64, 192, 5, padding=2)
        self.conv3 = nn.Conv2d(192, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute features of a normalised image float[B, 3, H, W]: five maps with 64, 192, 384, 256, 256 channels."""
        first = F.relu(self._first_blurred(image))
        second = F.relu(self.conv2(blur_down(F.max_pool2d(first, 3, stride=1))))
        third = F.relu(self.conv3(blur_down(F.max_pool2d(second, 3, stride=1))))
        fourth = F.relu(self.conv4(third))
        return [first, second, third, fourth, F.relu(self.conv5(fourth))]

    def _first_blurred(self, image: Tensor) -> Tensor:
        """Compute ``blur_down(conv1(image))`` without evaluating conv1 at unused positions.

        Along each axis let c[0..L-1] be the output of conv1. Value i of the blur is (c[2i-2] + 2c[2i-1] + c[2i])/4
        with reflection at the ends. Value 0 therefore repeats value 1; for odd L the last one repeats its neighbour;
        for even L the last one is (c[L-2] + c[L-1])/2 and is computed from a separate strip. All others are conv1 at
        stride 2 of the blurred image.
        """
        image = F.pad(image, (2, 2, 2, 2))  # zero padding of conv1
        weight = F.pixel_unshuffle(F.pad(self.conv1.weight, (0, 1, 0, 1)), 2)

        def conv(blurred: Tensor) -> Tensor:
            blurred = F.pad(blurred, (0, blurred.shape[3] % 2, 0, blurred.shape[2] % 2))  # multiplied by a zero weight
            blocks = F.pixel_unshuffle(blurred, 2).contiguous(memory_format=torch.channels_last)
            return F.conv2d(blocks, weight, self.conv1.bias)

        def row(blurred: Tensor) -> Tensor:
            inner = conv(_blur_inner(blurred, 3))
            last = inner[..., -1:] if blurred.shape[3] % 2 else conv(_blur_last(blurred, 3))
            return torch.cat([inner[..., :1], inner, last], dim=3)

        inner = row(_blur_inner(image, 2))
        last = inner[:, :, -1:] if image.shape[2] % 2 else row(_blur_last(image, 2))
        return torch.cat([inner[:, :, :1], inner, last], dim=2)


def _blur_inner(x: Tensor, dim: int) -> Tensor:
    """Blur with [1 2 1]/4 along one axis; the result is two values shorter."""
    n = x.shape[dim] - 2
    return (x.narrow(dim, 0, n) + x.narrow(dim, 2, n)) * 0.25 + x.narrow(dim, 1, n) * 0.5


def _blur_last(x: Tensor, dim: int) -> Tensor:
    """Blur the last 12 values along one axis with [1 1]/2: the input of the last output of the 11-wide conv1."""
    n = x.shape[dim]
    return (x.narrow(dim, n - 12, 11) + x.narrow(dim, n - 11, 11)) * 0.5


def blur_down(x: Tensor) -> Tensor:
    """Blur with [1 2 1]/4 in both directions and keep every second value, with two reflected values at each side.

    Args:
        x: float[B, C, H, W].

    Returns:
        float[B, C, (H + 1) // 2 + 1, (W + 1) // 2 + 1].
    """
    # [1 2 1]/4 = [1 1]/2 after [1 1]/2: two mean filters, faster than a depthwise convolution in bfloat16.
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    return F.avg_pool2d(F.avg_pool2d(padded, 2, stride=1), 2, stride=2)


def _shift_tolerant_alexnet() -> tuple[ShiftTolerantAlexNet, list[Tensor]]:
    """Load the network and its five heads float[1, C, 1, 1] from the wheel stlpips-pytorch."""
    # files() imports the package; its __init__ is empty, its other modules need IPython.
    path = files("stlpips_pytorch") / "weights" / "vST0.0" / "alex_shift_tolerant.pth"
    with path.open("rb") as file:
        state = torch.load(file, map_location="cpu", weights_only=True)
    places = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")
    with torch.device("meta"):  # no random initialisation: building a loss must not change the generator state
        trunk = ShiftTolerantAlexNet()
    trunk.load_state_dict(
        {
            f"conv{number}.{kind}": state[f"net.{place}.{kind}"]
            for number, place in enumerate(places, 1)
            for kind in ("weight", "bias")
        },
        assign=True,
    )
    return trunk.to(memory_format=torch.channels_last), [state[f"lin{number}.model.1.weight"] for number in range(5)]


def _original(net: str, weights: str | None) -> tuple[nn.Module, list[Tensor]]:
    """Load the heads of the lpips package, and a trunk file with torchvision's names."""
    import lpips

    state = _trunk_state(net, weights)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # lpips passes torchvision arguments that are deprecated
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    # "slice2.3.weight" in lpips is "features.3.weight" in torchvision.
    renamed = {name: "features." + name.split(".", 1)[1] for name in network.net.state_dict()}
    unlike = [
        source
        for name, source in renamed.items()
        if source not in state or state[source].shape != network.net.state_dict()[name].shape
    ]
    if unlike:
        raise OwlError(
            "lpips.other-weights",
            f"LPIPS weights {weights!r} have no fitting {unlike[0]!r}, expected torchvision's state dict of "
            f"{'alexnet' if net == 'alex' else 'vgg16'}; correct `weights` or `net`",
        )
    network.net.load_state_dict({name: state[source] for name, source in renamed.items()})
    return network.net, [head.model[-1].weight for head in network.lins]


def _trunk_state(net: str, weights: str | None) -> dict[str, Tensor]:
    if weights is not None:
        if not Path(weights).is_file():
            raise OwlError(
                "lpips.missing-weights",
                f"LPIPS weights {weights!r} do not exist, expected a torchvision {net} file; "
                "correct `weights`, or use net 'st_alex', which works offline",
            )
        try:
            return torch.load(weights, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise OwlError(
                "lpips.unreadable-weights",
                f"LPIPS weights {weights!r} are not a readable state dict ({str(error).splitlines()[0]}), "
                f"expected a torchvision {net} file; correct `weights`",
            ) from error
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    source = AlexNet_Weights.IMAGENET1K_V1 if net == "alex" else VGG16_Weights.IMAGENET1K_V1
    try:
        return dict(source.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except OSError as error:
        raise OwlError(
            "lpips.download",
            f"LPIPS net {net!r} needs {source.url}, which could not be downloaded ({error}); set `weights` to a "
            "local copy of that file, or use net 'st_alex', which works offline",
        ) from error
