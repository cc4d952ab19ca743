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
SMALLEST = 32  # pixels: below, some net's last feature map would vanish


class LPIPS(nn.Module):
    """Distance of two images in the feature space of a frozen classifier.

    Args:
        net: Which features. ``st_alex`` (default): shift-tolerant AlexNet, whose weights come with the
            installed packages, so it works offline. ``alex`` or ``vgg``: the trunks of the original LPIPS.
        weights: Only for ``alex`` and ``vgg``: path of torchvision's ``alexnet`` or ``vgg16`` weights file.
            Without it the file is taken from torchvision's download cache, or downloaded.

    Attributes:
        name: The name to report the distance under, e.g. ``lpips_st_alex``: numbers of different nets do not compare.

    Raises:
        OwlError: The weights are neither here nor downloadable, or the file holds another network.
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
                    f"LPIPS got weights {weights!r} for net 'st_alex', whose weights come with the package "
                    "stlpips-pytorch; leave `weights` out, or set `net` to 'alex' or 'vgg'",
                )
            trunk, heads = _shift_tolerant_alexnet()
        else:
            trunk, heads = _original(net, weights)
        self.trunk = freeze(trunk)
        self.heads = freeze(nn.ParameterList(heads))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each pair.

        Args:
            x: Images, float[B, 3, H, W] in [-1, 1], H and W at least 32.
            y: Images to compare with, of the same shape.

        Returns:
            float[B], 0 for equal images; below 0.1 differences are hard to see. Under bfloat16 autocast good for
            gradients (cosine > 0.98 with the float32 ones), not for reporting: small distances grow by up to a sixth.

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
    """Square crops at random places of random samples, the same for both images: an estimate of LPIPS at less cost.

    Args:
        x: Images, float[B, C, H, W].
        y: Images of the same shape.
        size: Side of the crops in pixels; a shorter side of the images is kept whole.
        count: Number of samples to draw, without repetition; all of the batch by default.
        generator: Source of the randomness, on the CPU whatever the device of the images (so nothing waits for it).

    Returns:
        Two tensors float[min(count, B), C, min(size, H), min(size, W)].
    """
    batch, _, height, width = x.shape
    high, wide = min(size, height), min(size, width)
    samples = torch.randperm(batch, generator=generator)[:count].tolist()
    tops = torch.randint(height - high + 1, (len(samples),), generator=generator).tolist()
    lefts = torch.randint(width - wide + 1, (len(samples),), generator=generator).tolist()

    def crop(images: Tensor) -> Tensor:
        singles = images.unbind()  # so that the gradient of each slice fills one image, not the whole batch
        return torch.stack(
            [
                singles[sample][:, top : top + high, left : left + wide]
                for sample, top, left in zip(samples, tops, lefts, strict=True)
            ]
        )

    return crop(x), crop(y)


class ShiftTolerantAlexNet(nn.Module):
    """AlexNet's convolutions at stride 1, each reduction done by a blur before every second value is taken.

    Equal to the plain form ``relu(blur_down(conv1(image)))`` ..., at about a quarter of its time on a CPU:
    the blur is moved before the first convolution (both are linear), which is then evaluated at the kept
    positions only, as a 6x6 convolution of 2x2 pixel blocks; and everything is computed channels-last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 11, padding=2)
        self.conv2 = nn.Conv2d(64, 192, 5, padding=2)
        self.conv3 = nn.Conv2d(192, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of a normalised image float[B, 3, H, W]: five maps with 64, 192, 384, 256, 256 channels."""
        first = F.relu(self._first_blurred(image))
        second = F.relu(self.conv2(blur_down(F.max_pool2d(first, 3, stride=1))))
        third = F.relu(self.conv3(blur_down(F.max_pool2d(second, 3, stride=1))))
        fourth = F.relu(self.conv4(third))
        return [first, second, third, fourth, F.relu(self.conv5(fourth))]

    def _first_blurred(self, image: Tensor) -> Tensor:
        """``blur_down(conv1(image))`` without computing conv1 where it is not needed.

        Along each axis let c[0..L-1] be the output of conv1. Value i of the blur is (c[2i-2] + 2c[2i-1] + c[2i])/4
        with reflection at the ends. So value 0 repeats value 1; for odd L the last one repeats its neighbour; for
        even L the last one is (c[L-2] + c[L-1])/2 and needs its own strip. All others are conv1 at stride 2 of the
        blurred image.
        """
        image = F.pad(image, (2, 2, 2, 2))  # conv1's own zero padding
        weight = F.pixel_unshuffle(F.pad(self.conv1.weight, (0, 1, 0, 1)), 2)

        def conv(blurred: Tensor) -> Tensor:
            blurred = F.pad(blurred, (0, blurred.shape[3] % 2, 0, blurred.shape[2] % 2))  # meets a weight of zero
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
    """[1 2 1]/4 along one axis, two values shorter."""
    n = x.shape[dim] - 2
    return (x.narrow(dim, 0, n) + x.narrow(dim, 2, n)) * 0.25 + x.narrow(dim, 1, n) * 0.5


def _blur_last(x: Tensor, dim: int) -> Tensor:
    """[1 1]/2 along one axis, of the last 12 values: what the last output of the 11-wide conv1 sees."""
    n = x.shape[dim]
    return (x.narrow(dim, n - 12, 11) + x.narrow(dim, n - 11, 11)) * 0.5


def blur_down(x: Tensor) -> Tensor:
    """Blur with [1 2 1]/4 in both directions and keep every second value, with two reflected values at each side.

    Args:
        x: float[B, C, H, W].

    Returns:
        float[B, C, (H + 1) // 2 + 1, (W + 1) // 2 + 1].
    """
    # [1 2 1]/4 = [1 1]/2 after [1 1]/2: two mean filters, faster than a convolution by channel in bfloat16.
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    return F.avg_pool2d(F.avg_pool2d(padded, 2, stride=1), 2, stride=2)


def _shift_tolerant_alexnet() -> tuple[ShiftTolerantAlexNet, list[Tensor]]:
    """The network and its five heads float[1, C, 1, 1] from the wheel stlpips-pytorch."""
    # files() of a package imports it; this one's __init__ is empty, its other modules need IPython.
    path = files("stlpips_pytorch") / "weights" / "vST0.0" / "alex_shift_tolerant.pth"
    with path.open("rb") as file:
        state = torch.load(file, map_location="cpu", weights_only=True)
    places = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")
    with torch.device("meta"):  # no random initial values: building a loss must not move the random state
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
    """Trunk and heads of the lpips package: its heads, and a trunk file in torchvision's naming."""
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
