"""Modalities of datasets, one file each."""

from owl.data.modalities.audio import Audio
from owl.data.modalities.base import Modality
from owl.data.modalities.camera import Camera
from owl.data.modalities.controls import Controls
from owl.data.modalities.depth import Depth
from owl.data.modalities.flow import Flow
from owl.data.modalities.labels import Labels
from owl.data.modalities.latents import (
    AudioLatent,
    ConditioningLatent,
    DepthLatent,
    Latent,
    MotionLatent,
    Trajectory,
)
from owl.data.modalities.pose import Pose
from owl.data.modalities.rgb import Rgb

MODALITIES: dict[str, type[Modality]] = {
    "rgb": Rgb,
    "depth": Depth,
    "flow": Flow,
    "audio": Audio,
    "pose": Pose,
    "labels": Labels,
    "camera": Camera,
    "controls": Controls,
    "latent": Latent,
    "depth_latent": DepthLatent,
    "motion_latent": MotionLatent,
    "conditioning_latent": ConditioningLatent,
    "audio_latent": AudioLatent,
    "trajectory": Trajectory,
}
"""Class of each modality, by its name in dataset.json; recordings store their members in this order."""
