"""Jobs in this process that write down what reaches the denoiser, the optimiser and the files.

Nothing is replaced: `recorded` runs the whole job (`trainer.job.run.run`) and listens at the denoiser's and the
optimiser's own hooks, and at `Session.predict`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from entrypoint.system.hardware import Hardware
from tests.support.drawings import draw
from trainer.engine import adapters
from trainer.job import run as job
from trainer.training.stop_flag import StopFlag

CPU = Hardware("cpu", "x86_64", 8.0, 0, "", 8.0, 2)
SIDE = 32  # pixels of the images that a recorded job trains on


@dataclass
class Call:
    """One prediction: `phase` is rehearsal, train, validate, sample or export."""

    phase: str
    noisy: torch.Tensor
    t: torch.Tensor
    batch: Any
    output: torch.Tensor


@dataclass
class Update:
    """One step of the optimiser, and the micro-batches before it; vectors of all adapters, one after another."""

    calls: list[Call]
    groups: list[dict[str, Any]]  # the settings of each group, without its parameters
    grad: torch.Tensor  # after clipping
    before: torch.Tensor
    after: torch.Tensor


@dataclass
class Recording:
    """One job, from its variables to its files."""

    asked: dict[str, str]
    plan: Any
    folder: Path
    session: Any = None
    calls: list[Call] = field(default_factory=list)
    inputs: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # of the denoiser, by phase
    updates: list[Update] = field(default_factory=list)
    passes: list[str] = field(default_factory=list)  # the phase of each forward pass of a norm in the first block
    deterministic: set[bool] = field(default_factory=set)  # whether these had only deterministic kernels
    first: dict[str, torch.Tensor] = field(default_factory=dict)  # the adapters as they were made

    @property
    def state(self) -> Any:
        return self.session.training_state

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "out" / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows if "loss" in row]

    def of(self, phase: str) -> list[Call]:
        return [call for call in self.calls if call.phase == phase]

    def seen(self, phase: str, name: str) -> list[Any]:
        """One input of the denoiser, in each of its calls in this phase."""
        return [arguments[name] for where, arguments in self.inputs if where == phase]


def pictures(folder: Path) -> Path:
    """Three images with captions in `own`, one of regularisation in `reg`; 64 pixels a side."""
    for name, count in (("own", 3), ("reg", 1)):
        (folder / name).mkdir()
        for i in range(count):
            draw(64, 64, seed=10 * len(name) + i + count).save(folder / name / f"{name}{i}.png")
            (folder / name / f"{name}{i}.txt").write_text(f"a {name} {i}, red, blue, green")
    return folder


def described(folder: Path) -> str:
    """The dataset.json of `pictures`: one of the three images is held out."""
    subsets = [{"image_dir": str(folder / "own")}, {"image_dir": str(folder / "reg"), "is_reg": True}]
    dataset = {"resolution": SIDE, "validation_split": 0.3, "subsets": subsets}
    return json.dumps({"general": {"caption_extension": ".txt"}, "datasets": [dataset]})


def planned(
    folder: Path,
    family: str,
    config: str | None,
    prompts: str | None = None,
    *,
    hardware: Hardware = CPU,
    **variables: str,
) -> Any:
    """The plan of a job on a miniature, as if fetched; all of it below `folder`."""
    asked = {
        "BASE_MODEL": f"mini-{family}", "OUTPUT_PATH": str(folder / "out"), "CACHE_PATH": str(folder / "cache"),
        "OUTPUT_NAME": "x", "BACKEND": "cpu", "PARAMS_SAMPLE_EVERY_N_STEPS": "0", "PARAMS_SAVE_EVERY_N_STEPS": "0",
        "PARAMS_MAX_STEPS": "3",
    } | variables  # fmt: skip
    asked = {name: value for name, value in asked.items() if value}
    now = datetime(2026, 1, 2, tzinfo=UTC)
    plan = make_plan(read_settings(asked), read_manifest(config, prompts), hardware, now=now)
    plan = plan.map_sources(lambda source, _: dataclasses.replace(source, path=source.location))
    return dataclasses.replace(plan, model=dataclasses.replace(plan.model, path=plan.model.source))


def recorded(folder: Path, family: str, config: str, prompts: str | None = None, **variables: str) -> Recording:
    """Run the job with these variables, and return all that was seen."""
    recording = Recording(variables, planned(folder, family, config, prompts, **variables), folder)
    make_session = job.make_session

    def listening(*arguments: Any, **options: Any) -> Any:
        session = make_session(*arguments, **options)
        _listen(recording, session)
        return session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "make_session", listening)
        job.run(recording.plan, StopFlag())
    return recording


def samples(recording: Recording) -> dict[str, Image.Image]:
    """The images that the job has drawn, by their names."""
    return {path.name: Image.open(path) for path in sorted((recording.folder / "out" / "sample").glob("step-*.png"))}


def vector(tensors: Any) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def _listen(recording: Recording, session: Any) -> None:
    recording.session = session
    recording.plan = session.plan
    state = session.training_state
    recording.first = {name: tensor.clone() for name, tensor in adapters.state(state.denoiser).items()}
    phase = ["rehearsal"]
    pending: list[Call] = []
    predict = session.predict

    def at_prediction(noisy: torch.Tensor, t: torch.Tensor, batch: Any) -> torch.Tensor:
        output = predict(noisy, t, batch)
        call = Call(phase[0], noisy.detach().clone(), t.detach().clone(), batch, output.detach().clone())
        recording.calls.append(call)
        if phase[0] == "train":
            pending.append(call)
        return output

    def before_step(optimizer: Any, *_: Any) -> None:
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        grad = vector(p.grad for p in state.adapter_params)
        weights = vector(state.adapter_params)
        recording.updates.append(Update(list(pending), groups, grad, weights, weights))
        pending.clear()

    def after_step(*_: Any) -> None:
        recording.updates[-1].after = vector(state.adapter_params)

    def at_denoiser(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        positions = dict(zip(("hidden_states", "timestep"), arguments, strict=False))
        recording.inputs.append((phase[0], {**positions, **options}))

    def during(name: str) -> None:
        method = getattr(session, name)

        def marked(*arguments: Any, **options: Any) -> Any:
            before, phase[0] = phase[0], name
            try:
                return method(*arguments, **options)
            finally:
                phase[0] = before

        setattr(session, name, marked)

    norm = next(
        m for m in session.engine.regions[0].modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.GroupNorm))
    )

    def note(*_: object) -> None:
        recording.passes.append(phase[0])
        recording.deterministic.add(torch.are_deterministic_algorithms_enabled())

    norm.register_forward_pre_hook(note)
    session.predict = at_prediction
    state.optimizer.register_step_pre_hook(before_step)
    state.optimizer.register_step_post_hook(after_step)
    state.denoiser.register_forward_pre_hook(at_denoiser, with_kwargs=True)
    for name in ("train", "validate", "sample", "export"):
        during(name)
