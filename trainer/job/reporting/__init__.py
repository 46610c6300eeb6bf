"""What people see of a job: numbers while it runs, images, and the last lines.

Read `status` (status.json), `metrics` (metrics.jsonl, TensorBoard, the log's lines of steps), `contact_sheet` (all
samples in one image), `dataset_view` (how each image is trained) and `closing` (where the LoRA is, and how to use it).

Imports nothing of the rest of `trainer.job`.
"""
