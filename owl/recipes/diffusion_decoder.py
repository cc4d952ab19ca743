"""Stage 2: a diffusion transformer trained to decode the latents of a frozen encoder by a rectified flow."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from owl.distributed.reduction import mean_over_processes
from owl.distributed.sharding import shard
from owl.errors import OwlError, at_least
from owl.flow_matching import add_noise, shortcut_target, to_interval
from owl.latents import check_encoder, described, load_latent_stats
from owl.losses.lpips import LPIPS
from owl.losses.reconstruction import ReconstructionLoss, ReconstructionWeights, weighted_sum
from owl.metrics.perceptual import PerceptualDistance
from owl.models.diffusion_autoencoder import DiffusionAutoencoder
from owl.models.diffusion_decoder import DiTDecoder
from owl.models.discriminators import Discriminator
from owl.models.image_decoder import ImageDecoder
from owl.nn.frozen import freeze
from owl.optim.stepping import manual_step
from owl.recipes.adversarial import TrainsAgainstDiscriminator, adversarial_loss, ramped, refuse_penalties
from owl.recipes.arguments import any_weight, fractions, not_negative, store_arguments
from owl.recipes.compilation import compile_for_training
from owl.recipes.decoders import DecoderMetrics, clips, few, latents, load_autoencoder, with_noise
from owl.recipes.denoising import Chances, Denoised, Draws, trajectory
from owl.recipes.hooks import ChecksEncoder, SeedsByWindow
from owl.recipes.images import images
from owl.recipes.logging import log_losses
from owl.recipes.post_training import consistency_loss, copy_weights, sampled, teacher_of
from owl.viz.pictures import comparison_grid

CLAMPED_LEVEL = 0.05
"""Below this noise level the loss of a "clean" prediction grows no further (Li and He 2025)."""
MEASURED_STEPS = (1, 4, 32)
"""Steps at which validation also measures the LPIPS of shortcut models, on its first batch."""
SMALLEST_STD = 1e-3


@dataclass
class Weights(ReconstructionWeights):
    """Weights of the flow's loss, and of reconstruction terms of the predicted x0 (epsilon-VAE, Zhao et al. 2025).

    A perfect sampler of the posterior has twice the squared error of its mean: the reconstruction terms choose between
    PSNR and detail.

    Args:
        flow: Mean squared error of the velocity.
        sample_lpips: LPIPS of samples, with gradients through all steps of the sampler: mode-seeking post-training
            (FlowMo, Sargent et al. 2025).
        consistency: Mean squared error of x0 against a target on the flow of the decoder at ``start``: consistency
            distillation (Song et al. 2023).
        adversarial: Relativistic loss of x0 against the ``discriminator``, after its ramp; 0.5 in epsilon-VAE.
    """

    flow: float = 1.0
    l1: float = 0.0
    lpips: float = 0.5
    sample_lpips: float = 0.0
    consistency: float = 0.0
    adversarial: float = 0.0


class DiffusionDecoder(ChecksEncoder, SeedsByWindow, TrainsAgainstDiscriminator):
    """Train a diffusion transformer to decode latents; the encoder is frozen.

    loss = sum of weight * term over `Weights`. Noise levels are t = sigmoid(N(logit_mean, logit_std)). A shortcut model
    learns step sizes by bootstrapping: a part of the frames learns, for a step of size d, the mean velocity of the
    network's own two steps of size d / 2, computed from the current weights without gradients.

    With a ``discriminator``, ``global_step`` counts steps of network and discriminator together, and ``clip`` replaces
    ``trainer.gradient_clip_val``.

    Needs frames and their latents: from `owl.callbacks.frozen_encoder.FrozenEncoder`, or from a dataset that
    `data encode --keep rgb` wrote. Validation decodes with the network's ``steps``.

    Args:
        autoencoder: Checkpoint or export of the image autoencoder whose latents are decoded.
        network: The decoder without its geometry, which is that of the autoencoder.
        residual: Whether the flow generates the residual to what the autoencoder's own decoder makes of the latent; a
            frozen copy of that becomes part of the network.
        train_encoder: Trains encoder and decoder end to end, and exports them as one network. Both start with random
            weights, the encoder with the architecture of the autoencoder's. With ``weights.lpips`` 0 this is DiTo (Chen
            et al. 2025), with 0.5 and a ``discriminator`` epsilon-VAE (Zhao et al. 2025). Batches need frames only.
        noise_sync: Probability that a frame's latent gets noise of a level s ~ U(0, 1), and the target noise of at
            least that level (noise synchronisation of DiTo).
        start: Checkpoint or export of a decoder with the same ``network``, from whose weights training starts:
            post-training. None: from random weights.
        weights: Weight of every term.
        lpips: The perceptual distance, as a loss and as a metric.
        lpips_crop: Side in pixels of random squares on which LPIPS is estimated in training, at a lower cost. None:
            whole frames.
        lpips_samples: With ``lpips_crop``: number of frames of a batch that are cropped. None: all.
        discriminator: Distinguishes x0 from the network's one-step estimate, given x_t and t, and gets its number of
            channels from the recipe; see `owl.recipes.denoising.trajectory`. Needs ``weights.adversarial``. None: no
            adversarial term.
        adversarial_ramp: Steps in which the adversarial term grows linearly to its weight.
        gamma: Weight of the discriminator's gradient penalties R1 and R2 (`owl.losses.adversarial`); 0 disables them,
            as FSDP2 requires.
        penalty_every: The penalties are computed at every n-th step, n times as strong.
        clip: With a discriminator, maximum norm of the network's gradients. None: no clipping.
        logit_mean: Mean of the logits of noise levels.
        logit_std: Their standard deviation.
        sample_steps: Steps of the samples for ``sample_lpips``, randomly spaced; shortcut models take their own
            ``steps``. Set the network's ``checkpoint``, or the memory of activations is that of all steps.
        intervals: Noise levels of consistency distillation.
        bootstrap: Probability that a frame learns a shortcut, in networks with ``shortcut``.
        latent_dropout: Probability that a frame's latent is replaced by the null embedding, for guidance.
        noise: Noise augmentation: latents get noise of up to this many of their standard deviations in training, so
            that the decoder tolerates the errors of generated latents.
        optimizer: Called with the network's parameters.
        discriminator_optimizer: Called with those of the discriminator.
        warmup_steps: Steps of linear warm-up of the learning rates; a cosine follows until training ends.
        final_lr: Learning rates at the end, as a fraction of their peaks.
        compile: Whether to compile the blocks with ``torch.compile``; on CPUs this requires a C++ compiler.

    Raises:
        OwlError: An argument is out of range, or ``autoencoder`` is none.
    """

    exports = ("network",)  # neither averages nor exports the discriminator

    def __init__(
        self,
        autoencoder: str,
        network: Callable[[int, tuple[int, int], tuple[int, int], int], DiTDecoder] = DiTDecoder,
        residual: bool = False,
        train_encoder: bool = False,
        noise_sync: float = 0.0,
        start: str | None = None,
        weights: Weights = Weights(),  # noqa: B008 (a dataclass of floats, never changed)
        lpips: LPIPS | None = None,
        lpips_crop: int | None = None,
        lpips_samples: int | None = None,
        discriminator: Callable[[int], Discriminator] | None = None,
        adversarial_ramp: int = 1000,
        gamma: float = 1.0,
        penalty_every: int = 4,
        clip: float | None = 1.0,
        logit_mean: float = -0.4,
        logit_std: float = 1.0,
        sample_steps: int = 8,
        intervals: int = 16,
        bootstrap: float = 0.125,
        latent_dropout: float = 0.0,
        noise: float = 0.0,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=3e-4, weight_decay=0.01),
        discriminator_optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=2e-4, weight_decay=0.0),
        warmup_steps: int = 100,
        final_lr: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        fractions(bootstrap=bootstrap, latent_dropout=latent_dropout, noise_sync=noise_sync)
        any_weight(weights)
        at_least(1, sample_steps=sample_steps, intervals=intervals, penalty_every=penalty_every)
        at_least(0, adversarial_ramp=adversarial_ramp)
        not_negative(gamma=gamma, noise=noise)
        if (discriminator is None) != (weights.adversarial == 0):
            raise OwlError(
                "recipe.arguments",
                f"weights.adversarial is {weights.adversarial} and discriminator is "
                f"{'not set' if discriminator is None else 'set'}, expected both or neither; correct "
                "model.init_args.weights.adversarial",
            )
        store_arguments(self, logger=False)
        source = load_autoencoder(autoencoder)
        self.network = network(source.channels, source.size, source.latent_size, source.latent_channels)
        if train_encoder:
            if residual:
                raise OwlError(
                    "recipe.arguments",
                    "train_encoder is set together with residual, expected one of them: the autoencoder's decoder does "
                    "not decode the latents of another encoder; leave out model.init_args.residual",
                )
            self.network = DiffusionAutoencoder.of(self.network, source)
        self.discriminator = None if discriminator is None else discriminator(2 * self.network.target[0] + 1)
        self.automatic_optimization = discriminator is None
        self.adversarial_ramp, self.gamma, self.penalty_every, self.clip = adversarial_ramp, gamma, penalty_every, clip
        self.train_encoder = train_encoder
        self.original = freeze(ImageDecoder.of(source))
        if residual:
            self.network.add_base(ImageDecoder.of(source))
        self.start = start
        if start is not None:
            copy_weights(start, self.network)
        self.teacher = teacher_of(self.network, start) if weights.consistency else None
        self.weights = weights
        lpips = lpips or LPIPS()
        self.reconstruction_loss = ReconstructionLoss(weights, lpips, lpips_crop, lpips_samples)
        self.reconstructs = any(getattr(weights, field.name) for field in fields(ReconstructionWeights))
        self.sample_steps, self.intervals = sample_steps, intervals
        bootstrap = bootstrap if self.network.shortcut else 0.0
        self.chances = Chances(logit_mean, logit_std, bootstrap, latent_dropout, noise_sync)
        self.noise = noise
        self.optimizer, self.discriminator_optimizer = optimizer, discriminator_optimizer
        self.warmup_steps = warmup_steps
        self.final_lr = final_lr
        self.compile_network = compile
        self.metrics = DecoderMetrics(lpips)
        self.by_steps = {steps: PerceptualDistance(lpips) for steps in MEASURED_STEPS if self.network.shortcut}
        self.steps_metrics = nn.ModuleList(self.by_steps.values())  # registered, so that they move to the device

    def configure_model(self) -> None:
        """Compile each block, which keeps the parameter names in checkpoints; spread the weights under FSDP2.

        Raises:
            OwlError: FSDP2 is used with penalties of the discriminator.
        """
        # the proxy apart from the network, which calls it by its methods
        parts = (self.network.proxy, self.network, self.original, self.teacher, self.discriminator)
        networks = [part for part in parts if part is not None]
        for network in networks:
            network.to(memory_format=torch.channels_last)
        if self.compile_network:
            compile_for_training(self, *self.network.blocks)
        if self.device_mesh is not None:
            if self.discriminator is not None:
                refuse_penalties(self.gamma, "model.init_args.gamma")
            for network in networks:
                shard(network, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Read the latents' statistics, which the network stores, and check that they come from the autoencoder."""
        if self.train_encoder:
            return
        self._described = described(self.trainer.datamodule)  # type: ignore[attr-defined]
        if self.start is not None:
            check_encoder(self.network, *self._described)
        load_latent_stats(self.network, *self._described)
        check_encoder(self.original, *self._described)

    def check_latents_of_network(self) -> None:
        """Check the network unless it has an encoder of its own."""
        if not self.train_encoder:
            super().check_latents_of_network()

    def latents(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the latents of a batch, float[B * T, c, h, w]; with ``train_encoder`` those of the trained encoder."""
        if isinstance(self.network, DiffusionAutoencoder):
            return self.network.encode(images(batch)).mean
        return latents(batch)

    @torch.no_grad()
    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure mean and standard deviation of the target on the first batch of a run; checkpoints store them."""
        if self.global_step or batch_idx or self.start is not None:
            return
        target = self.network.to_target(images(batch), self.network.estimate(self.latents(batch)))
        moments = torch.stack([target.mean((0, 2, 3)), target.square().mean((0, 2, 3))])
        mean, square = mean_over_processes(moments)
        self.network.target_mean.copy_(mean)
        self.network.target_std.copy_((square - mean.square()).clamp(min=SMALLEST_STD**2).sqrt())

    def losses(self, image: Tensor, latent: Tensor, draws: Draws) -> tuple[dict[str, Tensor], Tensor, Denoised]:
        """Compute the terms of the loss apart from the adversarial one.

        Args:
            image: float[N, 3, H, W] in [-1, 1].
            latent: float[N, c, h, w], not standardised.
            draws: Random choices.

        Returns:
            A scalar for each term, unweighted, the loss of the flow for each frame, float[N], and the predictions.
        """
        network, t = self.network, draws.noise_level
        if self.teacher is not None:
            t = to_interval(t, self.intervals)
        base = network.estimate(latent)
        clean = network.to_target(image, base)
        x = add_noise(clean, draws.noise, t)
        target = draws.noise - clean
        rows = len(draws.bootstrapped)
        if self.chances.bootstrap:  # also in a process without such frames: all processes must gather FSDP2's weights
            target = target.index_copy(0, draws.bootstrapped, self.bootstrap_target(x, latent, base, draws)[:rows])
        velocity = network(x, t, latent, base, draws.step_size, draws.known)
        error = (velocity - target).square().flatten(1).mean(1)
        if network.prediction == "clean":
            error = error * (t / t.clamp(min=CLAMPED_LEVEL)).square()
        terms = {"flow": error.mean()}
        predicted = x - t[:, None, None, None] * velocity
        if self.teacher is not None:
            terms["consistency"] = consistency_loss(
                network, self.teacher, predicted, x, t, latent, base, self.intervals
            )
        if self.weights.sample_lpips:
            sample = sampled(network, latent, base, draws.noise, self.sample_steps, self.global_step)
            terms["sample_lpips"] = self.reconstruction_loss.perceptual(sample, image)
        # the mean velocity of a shortcut does not lead to x0; decoding a proxy's latent is not for free
        if self.reconstructs:
            kept = draws.estimated
            decoded = network.to_image(predicted[kept], None if base is None else base[kept])
            compared = self.reconstruction_loss(decoded, image[kept])
            terms |= {name: term * (rows < len(x)) for name, term in compared.items()}
        return terms, error.detach(), Denoised(clean, predicted, x, t)

    @torch.no_grad()
    def bootstrap_target(self, x: Tensor, latent: Tensor, base: Tensor | None, draws: Draws) -> Tensor:
        """Compute the mean velocity of two steps of half the size for the frames that learn a shortcut.

        Without such frames it is computed for another one.
        """
        rows = draws.bootstrapped if len(draws.bootstrapped) else draws.flow[:1]
        own_latent, own_base, known = latent[rows], None if base is None else base[rows], draws.known[rows]

        def velocity(x: Tensor, t: Tensor, d: Tensor) -> Tensor:
            predicted: Tensor = self.network(x, t, own_latent, own_base, d, known)
            return predicted

        return shortcut_target(velocity, x[rows], draws.noise_level[rows], draws.step_size[rows])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of a step, and log each term unweighted; with a discriminator, step both networks."""
        image, latent = images(batch), with_noise(self.latents(batch), self.network.latent_std, self.noise)
        draws = self.chances.draw(batch, self.global_step, self.network.target, self.device)
        latent, draws = self.chances.synchronise(batch, latent, draws, self.global_step)
        terms, error, denoised = self.losses(image, latent, draws)
        logged = {"shortcut": error[draws.bootstrapped].mean()} if len(draws.bootstrapped) else {}
        if self.discriminator is None:
            loss = weighted_sum(terms, self.weights)
        else:
            loss, judged = self.step_both(terms, denoised, draws)
            logged |= judged
        log_losses(self, loss, terms | logged)
        return loss

    def step_both(self, terms: dict[str, Tensor], denoised: Denoised, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Step the discriminator and the network.

        Args:
            terms: From `losses`.
            denoised: Likewise.
            draws: Random choices.

        Returns:
            The loss of the network, and scalars to log.
        """
        clean, estimate, noisy, t = (part[draws.estimated] for part in denoised)
        true, estimated = (trajectory(x0, noisy, t) for x0 in (clean, estimate))
        with manual_step(self) as step:
            real, _, judged = self.step_discriminator(step, true, estimated, self.gamma, self.penalty_every)
            adversarial = adversarial_loss(self.discriminator, true, estimated, real) * (len(draws.flow) > 0)
            weight = self.weights.adversarial * ramped(step.number, 0, self.adversarial_ramp)
            loss = weighted_sum(terms | {"adversarial": adversarial}, replace(self.weights, adversarial=weight))
            step(self.trainer.optimizers[0], loss, self.clip)
        return loss, judged | {"adversarial": adversarial}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure decoded frames."""
        self.measure(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure decoded frames."""
        self.measure(batch, batch_idx, "test")

    def measure(self, batch: dict[str, Tensor], batch_idx: int, split: str) -> None:
        """Update and log every metric; of shortcut models, on the first batch, also LPIPS by the number of steps."""
        image, latent = images(batch), self.latents(batch)
        self.metrics.update(self.network.decode(latent), image, batch.get("flow"))
        named = self.metrics.named(split)
        if batch_idx == 0:
            for steps, metric in self.by_steps.items():
                metric.update(self.network.decode(latent, steps=steps).float().clamp(-1, 1), image)
                named[f"{split}/{metric.name}_{steps}_steps"] = metric
        self.log_dict(named, on_epoch=True, batch_size=len(image))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the decoded frames, float[B * T, 3, H, W] in [-1, 1]."""
        return {"reconstruction": self.network.decode(self.latents(batch)).clamp(-1, 1)}

    @torch.no_grad()
    def media(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Draw original frames, those of stage 1 and generated ones; of long windows also a clip."""
        image, latent, length = images(batch), self.latents(batch), batch["rgb"].shape[1]
        shown, first = few(latent), latent[:length]
        rows, films = {"original": few(image)}, {"original": image}
        if not self.train_encoder:
            rows["stage 1"], films["stage 1"] = self.original.decode(shown), self.original.decode(first)
        steps = sorted({self.network.steps, *self.by_steps})
        rows |= {f"steps: {count}": self.network.decode(shown, steps=count) for count in steps}
        films["generated"] = self.network.decode(first)
        return {"decoders": comparison_grid(rows)} | clips(films, length)
