"""Text and tables of the report on the rollouts of a world model."""

from collections.abc import Sequence

from owl.viz.numbers import format_number
from owl.viz.rollouts import HORIZONS

MEASURED = "measured.yaml"
"""Names the world model that the results in a folder are of; written last."""


def at_horizons(curves: dict[str, list[float]], horizons: Sequence[int] = HORIZONS) -> dict[str, float]:
    """Return the values of curves at the horizons that they reach, as ``<name>_<horizon>``."""
    return {f"{name}_{h}": values[h - 1] for name, values in curves.items() for h in horizons if h <= len(values)}


def headline(metrics: dict[str, float]) -> dict[str, float]:
    """Return the main metrics, for the terminal."""
    last = max(int(name.removeprefix("psnr_")) for name in metrics if name.startswith("psnr_"))
    names = [f"{prefix}{kind}_{last}" for kind in ("psnr", "lpips") for prefix in ("", "repeat_")]
    names += [f"mel_{last}", "onset_agreement", "action_accuracy_ratio", "drift", "flicker"]
    names += ["latency_total_p50", "latency_total_p95", "frames_per_second"]
    return {name: metrics[name] for name in names if name in metrics}


def horizon_table(metrics: dict[str, float], lpips_name: str) -> str:
    """Format the metrics at every horizon as a Markdown table."""
    horizons = [h for h in HORIZONS if f"psnr_{h}" in metrics]
    rows = {
        "PSNR (dB), world model": "psnr",
        "PSNR (dB), baseline": "repeat_psnr",
        "PSNR (dB), true latents decoded": "reconstruction_psnr",
        f"{lpips_name}, world model": "lpips",
        f"{lpips_name}, baseline": "repeat_lpips",
        f"{lpips_name}, true latents decoded": "reconstruction_lpips",
        "error of standardised audio latents": "audio_latent_mse",
        "mel distance (dB), world model": "mel",
        "mel distance (dB), true sound of another clip": "other_mel",
        "warp error along true flow, world model": "warp_error",
        "warp error along true flow, true frames": "true_warp_error",
        "end-point error of generated motion (px)": "motion_epe",
        "end-point error of no motion (px)": "zero_motion_epe",
    }
    lines = [f"| frames after the context | {' | '.join(map(str, horizons))} |", "| --- |" + " ---: |" * len(horizons)]
    for label, name in rows.items():
        if f"{name}_{horizons[0]}" in metrics:
            values = " | ".join(format_number(metrics[f"{name}_{h}"]) for h in horizons)
            lines.append(f"| {label} | {values} |")
    return "\n".join(lines)


def sound_section(metrics: dict[str, float], truth: str) -> str:
    """Describe the sound; ``truth`` is the modality that true sound is from."""
    source = "the dataset's own sound" if truth == "audio" else "the dataset's latents, decoded"
    if "onset_agreement" not in metrics:
        onsets = "The clips hold too few presses of ATTACK to measure whether a shot is heard."
    else:
        onsets = (
            f"The probability that sound starts more strongly after ATTACK is pressed ({metrics['shots']:.0f} times) "
            f"than at another time is {metrics['onset_agreement']:.2f} for generated sound and "
            f"{metrics['onset_agreement_true']:.2f} for true sound; 0.5 is chance."
        )
    return f"True sound is {source}. {onsets}"


def following_table(metrics: dict[str, float], reader: str | None) -> str:
    """Format the accuracy of predicted controls as a Markdown table."""
    if reader is None:
        return "Not measured. To measure it, give an inverse dynamics model with `--inverse_dynamics`."
    lines = ["| control | generated frames | true frames |", "| --- | ---: | ---: |"]
    for name, value in metrics.items():
        if name.startswith(("action_accuracy", "axis_accuracy", "button_accuracy")) and f"{name}_true" in metrics:
            lines.append(f"| {name} | {format_number(value)} | {format_number(metrics[f'{name}_true'])} |")
    ratios = [f"{name} {format_number(metrics[name])}" for name in metrics if name.endswith("accuracy_ratio")]
    explanation = (
        f"Share of frames for which {reader} predicts the given controls: for an axis its direction, for a button the "
        "mean over pressed and released frames. It also makes errors on true frames; generated divided by true: "
        f"{', '.join(ratios) or 'no control was used'}."
    )
    return "\n".join([explanation, "", *lines])


def value_table(metrics: dict[str, float]) -> str:
    """Format metrics by name as a Markdown table."""
    return "\n".join(
        ["| metric | value |", "| --- | ---: |", *(f"| {n} | {format_number(v)} |" for n, v in metrics.items())]
    )
