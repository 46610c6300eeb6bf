"""Settings, dataset and hardware become a `Plan`, and it is checked before anything is downloaded.

Read `plan`, `engine_choice` (memory and speed), `starting_point` (what PARAMS_RESUME_FROM names), `text_encoders`,
`single_files`, then `preflight`.

Imports everything to the left of it: settings, system, dataset_config, fetch.
"""
