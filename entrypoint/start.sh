#!/bin/sh
# Runs the Python whose torch is built for HIP, with the given arguments: its location has changed between releases of the
# base image. No other torch may come before that one on its path: the first torch found decides, without being imported.
# Nothing in the current folder, or in the home of whoever runs it, may be imported: both may be on a shared volume.
export PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1
unset PYTHONSTARTUP PYTHONHOME
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
echo "No Python here has a torch that is built for HIP: the image was built on the wrong base [exit 78]" >&2
exit 78
