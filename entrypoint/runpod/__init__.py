"""RunPod: `python -m entrypoint.runpod` makes templates and pods through the API."""
