"""Where files come from besides the Hub's repositories and this machine: addresses of other services, by their shapes.

Read `keys` (the secrets, and which service each is for), `offer` (a file behind an address, as its service describes
it), then the services: `web` (any https address, files of the Hub among them), `civitai`, `buckets`, `hub_buckets` and
`shares`; `service` tells them apart. `folders` makes a folder of what is in a bucket, or in a folder that Google Drive
shares (`drive_folders`). `files` brings a .safetensors file into the cache: first its header alone, so that the plan is
made and all is checked before gigabytes follow. `variables` does so for each variable that names an address.

All bytes come through the one client (`trainer.network`), whose bounds hold for each server.
"""
