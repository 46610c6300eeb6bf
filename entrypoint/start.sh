#!/bin/sh
# Runs the Python whose torch is built for HIP with the arguments given: where that Python lies has changed between
# releases of the base image. Nothing may stand before its torch: the first one that is found decides, and is not imported.
for python in python3 /opt/venv/bin/python3 /opt/conda/envs/*/bin/python3; do
  command -v "$python" >/dev/null || continue
  if "$python" -c '
import importlib.util, pathlib, runpy, sys
spec = importlib.util.find_spec("torch")
sys.exit(not (spec and spec.origin and runpy.run_path(str(pathlib.Path(spec.origin).with_name("version.py"))).get("hip")))
'; then
    exec "$python" "$@"
  fi
done
echo "No Python here has a torch that is built for HIP: the image was not built on the base it needs [exit 78]" >&2
exit 78
