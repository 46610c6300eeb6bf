"""What happens to results and machine at the end, and what ends a job early."""

from __future__ import annotations

from dataclasses import dataclass

# ruff: noqa: RUF009 (`row` only makes a dataclasses.field)
from entrypoint.settings.row import Secret, row

TRACKERS = ("wandb", "mlflow", "trackio")  # what LOG_WITH may name
ACTIONS = ("exit", "stop", "terminate", "idle", "wait")  # what ON_FINISH may ask for


@dataclass(frozen=True, kw_only=True)
class FinishSettings:
    """Where results go at the end, what becomes of the machine, and what ends a job early. None: not set."""

    push_to_hub: str | None = row(
        "PUSH_TO_HUB",
        "repo",
        meaning="Hub model repository that saves, samples and the LoRA are uploaded to; made private if it is new",
    )
    hf_write_token: Secret | None = row(
        "HF_WRITE_TOKEN", "secret", meaning="token that may write to PUSH_TO_HUB", if_unset="HF_TOKEN"
    )
    upload_to: str | None = row(
        "UPLOAD_TO",
        "text",
        meaning="folder of a bucket (s3, gs, az) that the same files are uploaded to; or an https address signed for "
        "PUT, which takes the LoRA alone",
    )
    webhook_url: tuple[Secret, ...] = row(
        "WEBHOOK_URL",
        "addresses",
        meaning="told of starts, samples, saves and ends: Discord, Slack, ntfy, or any address, which gets signed JSON",
    )
    webhook_secret: Secret | None = row(
        "WEBHOOK_SECRET", "key", meaning="key of the signature (Standard Webhooks)", if_unset="not signed"
    )
    log_with: str | None = row(
        "LOG_WITH",
        "choice",
        meaning="a tracker that gets numbers, samples and the plan, beside TensorBoard",
        choices=lambda: TRACKERS,
        if_unset="none",
    )
    monitor_port: int = row(
        "MONITOR_PORT",
        "integer",
        default="8675",
        meaning="where the monitor page of the job is served while it runs; 0: off",
        low=0,
        high=65535,
    )
    monitor_token: Secret | None = row(
        "MONITOR_TOKEN",
        "key",
        meaning="what opens the monitor page, 16 characters or more",
        if_unset="a new one, which the log shows in the page's address",
    )
    on_finish: str | None = row(
        "ON_FINISH",
        "choice",
        meaning="at the end: exit; stop or terminate the rented machine; idle: keep it; wait: half an hour, then stop",
        choices=lambda: ACTIONS,
        if_unset="stop on a RunPod pod, else exit",
    )
    max_runtime: float | None = row(
        "MAX_RUNTIME", "number", meaning="hours after which the job saves and ends", above=0, high=1e5, if_unset="none"
    )
    max_cost: float | None = row(
        "MAX_COST", "number", meaning="the same in money, by PRICE_PER_HOUR", above=0, high=1e6, if_unset="none"
    )
    price_per_hour: float | None = row(
        "PRICE_PER_HOUR", "number", meaning="of this machine, in the money of MAX_COST", above=0, high=1e5
    )
