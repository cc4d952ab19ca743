"""Text and tables of the report on rollouts; the whole report is tested in tests/commands/test_rollout.py."""

from owl.rollout.report import at_horizons, headline, horizon_table, sound_section


def test_curves_are_reported_at_powers_of_two_as_far_as_they_go() -> None:
    metrics = at_horizons({"psnr": [30.0, 28, 27, 26, 25], "mel": [3.0, 4, 5, 6.5, 7]})
    assert metrics == {"psnr_1": 30, "psnr_2": 28, "psnr_4": 26, "mel_1": 3, "mel_2": 4, "mel_4": 6.5}
    table = horizon_table(metrics, "lpips").splitlines()
    assert table[0] == "| frames after the context | 1 | 2 | 4 |"
    assert table[2:] == [
        "| PSNR (dB), world model | 30 | 28 | 26 |",
        "| mel distance (dB), world model | 3 | 4 | 6.5 |",
    ]
    assert headline(metrics) == {"psnr_4": 26, "mel_4": 6.5}


def test_the_report_states_whether_a_shot_is_heard() -> None:
    heard = {"onset_agreement": 0.75, "onset_agreement_true": 0.9, "shots": 12.0}
    assert "(12 times)" in sound_section(heard, "audio")
    assert "0.75 for generated sound and 0.90 for true sound" in sound_section(heard, "audio")
    assert "the dataset's own sound" in sound_section(heard, "audio")
    assert "latents, decoded" in sound_section(heard, "audio_latent")
    assert "too few presses of ATTACK" in sound_section({}, "audio")
