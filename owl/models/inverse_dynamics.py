"""Inverse dynamics model: predicts buttons and axes from frames."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl.errors import OwlError
from owl.nn.convolution import ACTIVATION_GAIN, ResidualBlock, convolution, leaky_relu
from owl.nn.resampling import Down
from owl.nn.symlog import symexp

PATCH = 2  # pixels: side of the patch of one position
SIDE = 8  # pixels: each side of the picture is a multiple; frames are compared on cells of half of it
SHARPNESS = 4.0  # scales similarities in [-1, 1] to about the scale of the other inputs
PAIRS = 3  # (t-2, t-1), (t-1, t) and (t, t+1)
BEFORE, AFTER = 2, 1  # frames before and after one from which its controls are predicted


class InverseDynamicsModel(nn.Module):
    """Predict the controls of every frame from the two frames before it, itself and the one after.

    The controls of frame t are those that lead from frame t-1 to frame t. Every frame is encoded once, to a vector for
    each cell of 4x4 pixels. Cells of neighbouring frames are compared with all cells within ``reach`` (a cost volume,
    as in PWC-Net, Sun et al. 2018), so that motion is an explicit input; a small convolutional network processes three
    such comparisons and the vectors of three frames. At the ends of a clip the first and the last frame are repeated.
    The first frame's own controls cannot be seen: skip its prediction.

    Args:
        buttons: Names of the buttons, as the dataset has them.
        axes: Names of the axes.
        size: (height, width) of the input in pixels, multiples of 8; other sizes are rescaled.
        width: Channels of a cell's vector, a multiple of 16.
        reach: Cells up and down, and left and right, that a cell is compared with; (1, 5) follows a picture that moves
            by 4 rows and 20 columns a frame.
        hidden: Width of the last layer.

    Attributes:
        config: The arguments above as plain values; building from them gives a network of the same shape.

    Raises:
        OwlError: The arguments do not describe a possible network.
    """

    def __init__(
        self,
        buttons: list[str] = ["ATTACK", "MOVE_FORWARD", "MOVE_BACKWARD", "MOVE_LEFT", "MOVE_RIGHT"],  # noqa: B006
        axes: list[str] = ["mouse_x"],  # noqa: B006  (never changed; a list is what YAML gives)
        size: tuple[int, int] = (48, 80),
        width: int = 64,
        reach: tuple[int, int] = (1, 5),
        hidden: int = 256,
    ) -> None:
        super().__init__()
        _check(buttons, axes, size, width, reach, hidden)
        self.config: dict[str, Any] = {
            "buttons": list(buttons),
            "axes": list(axes),
            "size": list(size),
            "width": width,
            "reach": list(reach),
            "hidden": hidden,
        }
        self.buttons, self.axes = list(buttons), list(axes)
        self.size = (size[0], size[1])
        self.reach = (reach[0], reach[1])
        shifts = (2 * reach[0] + 1) * (2 * reach[1] + 1)
        self.encoder = nn.Sequential(
            convolution(3 * PATCH**2, width // 2, 3),
            ResidualBlock(width // 2, 3, None, weight_norm=True),
            Down(width // 2, width, weight_norm=True),
            ResidualBlock(width, 3, None, weight_norm=True),
            ResidualBlock(width, 3, None, weight_norm=True),
        )
        self.reduce = convolution(width, width // 2, 1)
        self.fuse = convolution(PAIRS * (shifts + width // 2), 2 * width, 1, gain=ACTIVATION_GAIN)
        self.reader = nn.Sequential(
            ResidualBlock(2 * width, 2, width, weight_norm=True),
            Down(2 * width, 2 * width, weight_norm=True),
            ResidualBlock(2 * width, 2, None, weight_norm=True),
            convolution(2 * width, width // 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),  # the position of motion distinguishes walking from turning
            nn.Linear(width // 2 * (size[0] // SIDE) * (size[1] // SIDE), hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, len(buttons) + len(axes)),
        )

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the controls of every frame.

        Args:
            video: float[B, T, 3, H, W] in [-1, 1].

        Returns:
            Logits of the buttons, float[B, T, len(buttons)], and the axes on the scale of
            `owl.nn.symlog.symlog`, float[B, T, len(axes)].

        Raises:
            OwlError: The video has another shape.
        """
        if video.ndim != 5 or video.shape[2] != 3:
            raise OwlError(
                "network.input",
                f"the video is {list(video.shape)}, expected [batch, time, 3, height, width]; reshape it",
            )
        batch, time = video.shape[:2]
        frames = resized(video.flatten(0, 1), self.size).contiguous(memory_format=torch.channels_last)
        cells = self.encoder(F.pixel_unshuffle(frames, PATCH))
        # repeat the first and the last frame, so that every frame has neighbours
        seen = cells.unflatten(0, (batch, time))
        seen = torch.cat([seen[:, :1], seen, seen[:, -1:]], 1)
        motion = similarity(seen[:, :-1].flatten(0, 1), seen[:, 1:].flatten(0, 1), self.reach)
        motion = motion.unflatten(0, (batch, time + 1))  # of frames t-1 and t, for t from 0 to T
        motion = torch.cat([motion[:, :1], motion], 1)
        looks = self.reduce(seen.flatten(0, 1)).unflatten(0, (batch, time + 2))
        known = [part[:, k : k + time] for part in (motion, looks) for k in range(PAIRS)]
        x = torch.cat(known, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        answer = self.reader(leaky_relu(self.fuse(x))).float().unflatten(0, (batch, time))
        return answer[..., : len(self.buttons)], answer[..., len(self.buttons) :]

    @torch.no_grad()
    def label(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Predict controls in the format of datasets.

        Args:
            video: float[B, T, 3, H, W] in [-1, 1].

        Returns:
            Buttons, float[B, T, len(buttons)], 0 or 1, and axes, float[B, T, len(axes)] in the unit of each axis. Those
            of frame 0 are 0, since they cannot be inferred.
        """
        logits, axes = self(video)
        buttons, axes = (logits > 0).float(), symexp(axes)
        buttons[:, 0], axes[:, 0] = 0, 0
        return buttons, axes


def resized(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale float[B, 3, H, W] to ``size``: area average when shrinking, bilinear when enlarging, as in data loading."""
    if frames.shape[-2:] == size:
        return frames
    shrinking = size[0] <= frames.shape[-2] and size[1] <= frames.shape[-1]
    return F.interpolate(frames, size, mode="area" if shrinking else "bilinear")


def similarity(before: Tensor, now: Tensor, reach: tuple[int, int]) -> Tensor:
    """Compare each cell of one frame with the cells around the same position in the previous frame.

    Args:
        before: float[B, C, h, w].
        now: The same shape.
        reach: (rows, columns) to each side.

    Returns:
        float[B, (2 rows + 1) * (2 columns + 1), h, w]: cosine of the two vectors times a constant, row by row of shifts
        from (-rows, -columns); 0 if the other cell is outside.
    """
    rows, columns = reach
    height, width = now.shape[-2:]
    before, now = (F.normalize(x, dim=1).permute(0, 2, 3, 1) for x in (before, now))  # [B, h, w, C]
    before = F.pad(before, (0, 0, columns, columns, rows, rows))
    shift = torch.arange(2 * columns + 1, device=now.device)
    column = torch.arange(width, device=now.device)[:, None] + shift  # [w, shifts]: of the padded row
    found = []
    for row in range(2 * rows + 1):
        # all pairs of a row in one product, of which the diagonals are used: several times faster than one shift at a
        # time
        products = now @ before[:, row : row + height].transpose(-1, -2)  # [B, h, w, w + 2 columns]
        found.append(products.gather(-1, column.expand(*products.shape[:2], -1, -1)))
    return SHARPNESS * torch.cat(found, -1).permute(0, 3, 1, 2)


def _check(
    buttons: list[str], axes: list[str], size: tuple[int, int], width: int, reach: tuple[int, int], hidden: int
) -> None:
    """Check the arguments; the error names the invalid value."""
    if not [*buttons, *axes] or len({*buttons, *axes}) < len(buttons) + len(axes):
        raise OwlError(
            "network.arguments",
            f"buttons are {list(buttons)} and axes {list(axes)}, expected at least one control and no name twice; "
            "use the names in dataset.json",
        )
    if len(size) != 2 or min(size) < SIDE or any(side % SIDE for side in size):
        raise OwlError(
            "network.arguments", f"size is {list(size)}, expected height and width as multiples of {SIDE}; change size"
        )
    if width < 16 or width % 16:
        raise OwlError("network.arguments", f"width is {width}, expected a multiple of 16; change width")
    if len(reach) != 2 or min(reach) < 0 or hidden < 1:
        raise OwlError(
            "network.arguments",
            f"reach is {list(reach)} and hidden {hidden}, expected two numbers of at least 0 and one above; "
            "change them",
        )
