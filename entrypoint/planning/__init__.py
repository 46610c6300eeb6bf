"""From settings, dataset.json and hardware to a `Plan`, and its check before anything is downloaded.

`plan.make_plan` is the way in. A plan is complete: the trainer decides nothing, and plan.json alone runs the job again.
Each `auto`, and each default that depends on something else, is decided in one place; `Plan.reasons` says why, and
`Plan.warnings` what can be done but is probably not meant (`Notes.warn`):

| decision | where |
| --- | --- |
| where the base model comes from; optimiser, schedule, noise levels; output | `plan` |
| which file each part of the model comes from | `single_files` |
| rank, targets and q/k/v of a LoRA file to start from; whether a state can be resumed | `starting_point` |
| which layers get adapters | `targets` |
| which model captions images that have no caption, and what a check says of it | `captions.captioner` |
| which text encoders train, and how fast | `text_encoders` |
| device, precision, memory mode, batch size, compilation, attention | `engine_choice` |
| whether a batch fits in any memory mode, and the largest that does | `memory_refusal` |
| how long a step takes on this card, and a caption by a model, predicted | `step_time`, `captions.caption_time` |
| which settings make no sense or have no effect, for a warning | `sanity` |

Five checks stop a job before any download, each with all its problems in one message, in this order: the variables
(`settings.read`); dataset.json and prompts.txt (`dataset_config.manifest`); what cannot be done (`make_plan`); a state
that does not fit (`starting_point.check_state`); access, free space and images (`preflight`, which asks the network
only for what no cache has).

Read in the order of the table, then `preflight`, `summary`, which reads the images that are here and says what the job
will do with them, and `check_report`, which says all of it to programs. Apart: `offers`, the table of GPUs to rent.
Imports settings, system, dataset_config and fetch; of the trainer, what needs no torch.
"""
