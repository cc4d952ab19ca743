"""A world as a Gymnasium environment, for agents and planners."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from owl.errors import OwlError
from owl.play.world import World

Action = dict[str, np.ndarray]


class WorldEnv(gymnasium.Env[np.ndarray, Any]):
    """An environment whose step is a frame of a world: of a world model, or of the game that it imitates.

    Observations are pictures, uint8[H, W, 3]. An action has "buttons", int8[number of buttons], 1 where one is down,
    and "axes", float32[number of axes], the movement in the unit of each axis, up to that of a fully deflected stick. A
    world without buttons or axes has no such entry. Episodes do not end: `gymnasium.wrappers.TimeLimit` truncates them.

    Args:
        world: The world, such as `owl.play.learned.load_world` returns; it is closed with the environment.
        reward: Called with the picture that a step leads to; returns the step's reward. None: the reward is 0.
        render_mode: "rgb_array", for which `render` returns the last picture, or None.

    Raises:
        OwlError: The render mode is another one.
    """

    def __init__(
        self, world: World, reward: Callable[[np.ndarray], float] | None = None, render_mode: str | None = None
    ) -> None:
        description = world.description
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": description.fps}
        if render_mode not in (None, "rgb_array"):
            raise OwlError("play.render", f'render_mode is "{render_mode}", expected "rgb_array" or None; correct it')
        self.world, self.reward, self.render_mode = world, reward, render_mode
        self.observation_space = spaces.Box(0, 255, (*description.size, 3), np.uint8)
        full = np.array(list(description.axes.values()), np.float32)
        parts: dict[str, spaces.Space[Any]] = {}
        if description.buttons:
            parts["buttons"] = spaces.MultiBinary(len(description.buttons))
        if description.axes:
            parts["axes"] = spaces.Box(-full, full, dtype=np.float32)
        self.action_space = spaces.Dict(parts)
        self._idle = {
            "buttons": np.zeros(len(description.buttons), bool),
            "axes": np.zeros(len(description.axes), np.float32),
        }
        self._picture: np.ndarray | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start at a start scene.

        Args:
            seed: Seed of the choice of the scene and of all noise; None: continue with the generator of the last one.
            options: "start", the number of the start scene; without it one is drawn.

        Returns:
            The last picture of the scene, and its "start" and the "seed" of the noise.

        Raises:
            OwlError: There is no such start scene.
        """
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(max(1, len(self.world.description.starts))))
        start, noise = (options or {}).get("start", drawn), int(self.np_random.integers(2**31))
        self._picture = self.world.reset(start, noise).rgb
        return self._picture, {"start": start, "seed": noise}

    def step(self, action: Action) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Make the frame that an action leads to.

        Args:
            action: "buttons" and "axes"; a missing entry is idle.

        Returns:
            The picture, the reward, False and False (an episode neither ends nor is truncated), and no information.
        """
        held, moved = ({**self._idle, **action}[name] for name in ("buttons", "axes"))
        self._picture = self.world.step(np.asarray(held, bool), np.asarray(moved, np.float32)).rgb
        return self._picture, float(self.reward(self._picture)) if self.reward else 0.0, False, False, {}

    def render(self) -> np.ndarray | None:
        """Return the last picture, None without a render mode."""
        return self._picture if self.render_mode else None

    def close(self) -> None:
        """Free what the world holds."""
        self.world.close()
