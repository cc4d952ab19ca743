"""Learned perceptual distance between images (LPIPS), as a loss and as a metric.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", eq. 1, and its
shift-tolerant variant: Ghildyal and Liu 2022, "Shift-tolerant Perceptual Similarity Metric".
"""

import io
import warnings
from contextlib import redirect_stdout
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

    def __init__(self, net: Literal["st_alex", "alex", "vgg"] = "st_alex", weights: str | None = None) -> None:
        super().__init__()
        self.name = f"lpips_{net}"
        trunk: nn.Module
        if net == "st_alex":
            if weights is not None:
                raise OwlError(
                    f"LPIPS got weights {weights!r} for net 'st_alex', whose weights come with the package "
                    "stlpips-pytorch: leave `weights` out, or set `net` to 'alex' or 'vgg'."
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
            float[B], 0 for equal images; below 0.1 differences are hard to see.
        """
        distance = x.new_zeros(len(x))
        for head, a, b in zip(self.heads, self._features(x), self._features(y), strict=True):
            difference = F.normalize(a, eps=1e-10) - F.normalize(b, eps=1e-10)
            distance = distance + F.conv2d(difference.square(), head).mean(dim=(1, 2, 3))
        return distance

    def _features(self, image: Tensor) -> list[Tensor]:
        return list(self.trunk((image - self.shift) / self.scale))


class ShiftTolerantAlexNet(nn.Module):
    """AlexNet's convolutions at stride 1, each reduction done by a blur before every second value is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 11, padding=2)
        self.conv2 = nn.Conv2d(64, 192, 5, padding=2)
        self.conv3 = nn.Conv2d(192, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of a normalised image float[B, 3, H, W]: five maps with 64, 192, 384, 256, 256 channels."""
        first = F.relu(blur_down(self.conv1(image)))
        second = F.relu(self.conv2(blur_down(F.max_pool2d(first, 3, stride=1))))
        third = F.relu(self.conv3(blur_down(F.max_pool2d(second, 3, stride=1))))
        fourth = F.relu(self.conv4(third))
        return [first, second, third, fourth, F.relu(self.conv5(fourth))]


def blur_down(x: Tensor) -> Tensor:
    """Blur with [1 2 1]/4 in both directions and keep every second value, with two reflected values at each side.

    Args:
        x: float[B, C, H, W].

    Returns:
        float[B, C, (H + 1) // 2 + 1, (W + 1) // 2 + 1].
    """
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = torch.outer(kernel, kernel).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def _shift_tolerant_alexnet() -> tuple[ShiftTolerantAlexNet, list[Tensor]]:
    """The network and its five heads float[1, C, 1, 1] from the wheel stlpips-pytorch."""
    # files() of a package imports it; this one's __init__ is empty, its other modules need IPython.
    path = files("stlpips_pytorch") / "weights" / "vST0.0" / "alex_shift_tolerant.pth"
    with path.open("rb") as file:
        state = torch.load(file, map_location="cpu", weights_only=True)
    places = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")
    trunk = ShiftTolerantAlexNet()
    trunk.load_state_dict(
        {
            f"conv{number}.{kind}": state[f"net.{place}.{kind}"]
            for number, place in enumerate(places, 1)
            for kind in ("weight", "bias")
        }
    )
    return trunk, [state[f"lin{number}.model.1.weight"] for number in range(5)]


def _original(net: str, weights: str | None) -> tuple[nn.Module, list[Tensor]]:
    """Trunk and heads of the lpips package: its heads, and a trunk file in torchvision's naming."""
    import lpips

    state = _trunk_state(net, weights)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
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
            f"LPIPS weights {weights!r} have no fitting {unlike[0]!r}; expected torchvision's state dict of "
            f"{'alexnet' if net == 'alex' else 'vgg16'}: check `weights` and `net`."
        )
    network.net.load_state_dict({name: state[source] for name, source in renamed.items()})
    return network.net, [head.model[-1].weight for head in network.lins]


def _trunk_state(net: str, weights: str | None) -> dict[str, Tensor]:
    if weights is not None:
        if not Path(weights).is_file():
            raise OwlError(
                f"LPIPS weights {weights!r} do not exist; expected a torchvision {net} file: "
                "correct `weights`, or use net 'st_alex', which works offline."
            )
        return torch.load(weights, map_location="cpu", weights_only=True)
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    source = AlexNet_Weights.IMAGENET1K_V1 if net == "alex" else VGG16_Weights.IMAGENET1K_V1
    try:
        return dict(source.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except OSError as error:
        raise OwlError(
            f"LPIPS net {net!r} needs {source.url}, which could not be downloaded ({error}): set `weights` to a "
            "local copy of that file, or use net 'st_alex', which works offline."
        ) from error
