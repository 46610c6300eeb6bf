"""What the denoiser is trained to predict: noisy latents, the target, and the weight of each image, in fp32.

Letters: B images, C latent channels, H and W rows and columns of the latents, T steps of a discrete schedule; 1 where a
tensor is broadcast.

`FlowMatching` and `Denoising` are the objectives that a family may have (`Facts.objective`). Both have `add_noise`
(random times and noise), `at` (given times and noise) and `prediction`. Times run from 0 (clean) to 1 (pure noise).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from trainer.base_model import loading
from trainer.spec.errors import SettingsError
from trainer.spec.family import Facts
from trainer.spec.plan import TrainPlan


class ShiftLine(NamedTuple):
    """How a shift grows with the tokens of an image: by exp(mu), where mu lies on a line through two points."""

    few: int  # tokens
    at_few: float
    many: int
    at_many: float

    def shift(self, tokens: int) -> float:
        slope = (self.at_many - self.at_few) / (self.many - self.few)
        return math.exp(self.at_few + (tokens - self.few) * slope)


# As the models' own schedules are shifted: diffusers' `calculate_shift`, with the numbers of the schedulers' configs.
SHIFT_LINES = {"flux_shift": ShiftLine(256, 0.5, 4096, 1.15), "qwen_shift": ShiftLine(256, 0.5, 8192, 0.9)}
SHIFT_LINES |= {"krea2_shift": ShiftLine(256, 0.5, 6400, 1.15)}


@dataclass(frozen=True)
class NoisedBatch:
    """One micro-batch, ready for the denoiser; all in fp32."""

    noisy_BCHW: torch.Tensor
    target_BCHW: torch.Tensor
    t_B: torch.Tensor  # 0: clean, 1: pure noise
    weight_B: torch.Tensor  # of the loss, by time

    def part(self, rows: slice) -> NoisedBatch:
        """The images `rows` of it."""
        return NoisedBatch(self.noisy_BCHW[rows], self.target_BCHW[rows], self.t_B[rows], self.weight_B[rows])


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow as Flux.1 and SD3 are trained (Esser et al. 2024, arXiv:2403.03206).

    noisy = (1 - t) latents + t noise;  target = noise - latents.
    """

    sampling: str = "sigmoid"
    shift: float = 3.1582
    weighting: str = "none"
    noise_offset: float = 0.0
    prediction: ClassVar[str] = "flow"

    def add_noise(self, latents_BCHW: torch.Tensor, generator: torch.Generator) -> NoisedBatch:
        """Random times and noise for `latents_BCHW`, from `generator` (on the same device)."""
        b, _, h, w = latents_BCHW.shape
        t_B = self.times(b, tokens=h * w // 4, generator=generator)
        noise_BCHW = noise(latents_BCHW, offset=self.noise_offset, generator=generator)
        return self.at(latents_BCHW, t_B, noise_BCHW)

    def at(self, latents_BCHW: torch.Tensor, t_B: torch.Tensor, noise_BCHW: torch.Tensor) -> NoisedBatch:
        """The same at given times with given noise."""
        clean_BCHW = latents_BCHW.float()
        t_B = t_B.float()
        t_B111 = t_B[:, None, None, None]
        noisy_BCHW = (1 - t_B111) * clean_BCHW + t_B111 * noise_BCHW
        return NoisedBatch(noisy_BCHW, noise_BCHW - clean_BCHW, t_B, self.weight(t_B))

    def times(self, count: int, *, tokens: int, generator: torch.Generator) -> torch.Tensor:
        """`count` times in (0, 1). `tokens`: of one image after 2×2 patches; used by SHIFT_LINES only.

        uniform; sigmoid and logit_normal: sigmoid of a standard normal; shift: that, moved towards noise by
        s·t / (1 + (s - 1)·t); flux_shift, qwen_shift, krea2_shift: the same with an s that grows with the image.
        """
        device = generator.device
        if self.sampling == "uniform":
            return torch.rand(count, generator=generator, device=device)
        t_B = torch.sigmoid(torch.randn(count, generator=generator, device=device))
        if self.sampling in ("sigmoid", "logit_normal"):
            return t_B
        if self.sampling == "shift":
            return shifted(t_B, self.shift)
        if self.sampling in SHIFT_LINES:
            return shifted(t_B, SHIFT_LINES[self.sampling].shift(tokens))
        raise ValueError(f"unknown timestep sampling {self.sampling}")

    def weight(self, t_B: torch.Tensor) -> torch.Tensor:
        """Loss weights (B,) by time: none, sigma_sqrt (t^-2), cosmap (as in diffusers' SD3 training)."""
        if self.weighting == "none":
            return torch.ones_like(t_B)
        if self.weighting == "sigma_sqrt":
            return t_B.clamp(min=1e-4) ** -2.0
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * t_B + 2 * t_B**2))
        raise ValueError(f"unknown loss weighting {self.weighting}")


@dataclass(frozen=True, eq=False)
class Denoising:
    """Diffusion in discrete steps as SDXL is trained (DDPM, arXiv:2006.11239; v-prediction, arXiv:2202.00512).

    With s = signal_T[step]: noisy = √s latents + √(1 - s) noise;  target = noise (epsilon), or √s noise - √(1 - s)
    latents (v_prediction). A time t is step / T.
    """

    signal_T: torch.Tensor  # cumulative product of 1 - beta: the share of the latents in the variance of the noisy ones
    prediction: str = "epsilon"
    min_snr_gamma: float = 0.0  # 0: every step of the schedule has the same weight
    noise_offset: float = 0.0

    def add_noise(self, latents_BCHW: torch.Tensor, generator: torch.Generator) -> NoisedBatch:
        """Uniformly random steps, and noise for `latents_BCHW`, from `generator` (on the same device)."""
        count = len(self.signal_T)
        step_B = torch.randint(count, latents_BCHW.shape[:1], generator=generator, device=generator.device)
        noise_BCHW = noise(latents_BCHW, offset=self.noise_offset, generator=generator)
        return self.at(latents_BCHW, step_B / count, noise_BCHW)

    def at(self, latents_BCHW: torch.Tensor, t_B: torch.Tensor, noise_BCHW: torch.Tensor) -> NoisedBatch:
        """The same at given times, rounded to steps, with given noise."""
        clean_BCHW = latents_BCHW.float()
        count = len(self.signal_T)
        step_B = (t_B * count).round().long().clamp(0, count - 1)
        signal_B = self.signal_T.to(clean_BCHW.device)[step_B]
        signal_root_B111 = signal_B[:, None, None, None].sqrt()
        noise_root_B111 = (1 - signal_B)[:, None, None, None].sqrt()
        noisy_BCHW = signal_root_B111 * clean_BCHW + noise_root_B111 * noise_BCHW
        target_BCHW = noise_BCHW
        if self.prediction == "v_prediction":
            target_BCHW = signal_root_B111 * noise_BCHW - noise_root_B111 * clean_BCHW
        return NoisedBatch(noisy_BCHW, target_BCHW, step_B / count, self.weight(signal_B))

    def weight(self, signal_B: torch.Tensor) -> torch.Tensor:
        """Min-SNR-gamma (arXiv:2303.09556): min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v."""
        if not self.min_snr_gamma:
            return torch.ones_like(signal_B)
        snr_B = signal_B / (1 - signal_B)
        if self.prediction == "v_prediction":
            return snr_B.clamp(max=self.min_snr_gamma) / (snr_B + 1)
        return (self.min_snr_gamma / snr_B).clamp(max=1)


Objective = FlowMatching | Denoising


def make_objective(facts: Facts, train: TrainPlan, *, scheduler: Path, device: str) -> Objective:
    """The objective of a family (`Facts.objective`: flow or denoising) under this plan.

    `scheduler`: the folder with the config of the model's scheduler. Raises SettingsError if it does not fit the plan.
    """
    if facts.objective == "flow":
        return FlowMatching(
            train.timestep_sampling, train.discrete_flow_shift, train.loss_weighting, noise_offset=train.noise_offset
        )
    from diffusers import DDPMScheduler

    # Whatever class of scheduler the model ships with, its config names the betas of training.
    schedule = loading.load_scheduler(DDPMScheduler, scheduler, facts.kinds["scheduler"], scheduler_changes(train))
    prediction = schedule.config.prediction_type
    signal_T = schedule.alphas_cumprod.to(device)
    if prediction not in ("epsilon", "v_prediction"):
        raise SettingsError(
            f"PARAMS_PREDICTION_TYPE=auto: the model's scheduler says {prediction}. Allowed: epsilon, v_prediction."
        )
    if prediction == "epsilon" and signal_T[-1] == 0:
        raise SettingsError(
            "PARAMS_ZERO_TERMINAL_SNR: the last step has no signal, and this model predicts the noise (epsilon), which "
            "is then all that it sees. Fix: PARAMS_ZERO_TERMINAL_SNR=false, or PARAMS_PREDICTION_TYPE=v_prediction."
        )
    return Denoising(signal_T, prediction, train.min_snr_gamma, noise_offset=train.noise_offset)


def scheduler_changes(train: TrainPlan) -> dict[str, Any]:
    """The plan's changes of the config of the model's scheduler, for training and for samples (diffusers' keys)."""
    changes: dict[str, Any] = {}
    if train.prediction_type != "auto":
        changes["prediction_type"] = train.prediction_type
    if train.zero_terminal_snr is not None:
        changes["rescale_betas_zero_snr"] = train.zero_terminal_snr
    if train.zero_terminal_snr:  # the last step must be one of those that sampling takes (arXiv:2305.08891)
        changes["timestep_spacing"] = "trailing"
    return changes


def shifted(t_B: torch.Tensor, shift: float) -> torch.Tensor:
    """Times (B,) moved towards noise, as SD3 does for large images (arXiv:2403.03206); 1 changes nothing."""
    return shift * t_B / (1 + (shift - 1) * t_B)


def noise(latents_BCHW: torch.Tensor, *, offset: float, generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise, plus `offset` times one normal number for each image and channel.

    The latter lets the model learn the brightness of whole images (Guttenberg 2023, "Diffusion with Offset Noise").
    """
    shape = latents_BCHW.shape
    device = generator.device
    noise_BCHW = torch.randn(shape, generator=generator, device=device)
    if offset:
        noise_BCHW += offset * torch.randn(*shape[:2], 1, 1, generator=generator, device=device)
    return noise_BCHW


def loss(
    predicted_BCHW: torch.Tensor, noised: NoisedBatch, *, mask_B1HW: torch.Tensor | None, weight_B: torch.Tensor
) -> torch.Tensor:
    """Weighted mean squared error (B,) of each image.

    `mask_B1HW`: weights of the latents' pixels. `weight_B`: of the images, besides those by time in `noised`.
    """
    error_BCHW = F.mse_loss(predicted_BCHW.float(), noised.target_BCHW, reduction="none")
    if mask_B1HW is not None:
        error_BCHW = error_BCHW * mask_B1HW
    return error_BCHW.mean(dim=(1, 2, 3)) * noised.weight_B * weight_B
