#!/usr/bin/env bash
# tests/container/sizes.sh IMAGE: prints the megabytes of each layer, unpacked and as zstd -3, topmost first. Needs podman.
set -euo pipefail
shopt -s nullglob
layers=$(podman image inspect "$1" --format '{{.GraphDriver.Data.UpperDir}}:{{.GraphDriver.Data.LowerDir}}')
total=0 packed=0
printf '%10s %10s  %s\n' unpacked zstd 'first files'
for layer in ${layers//:/ }; do
  [ -d "$layer" ] || continue
  bytes=$(du -sb --apparent-size "$layer" | cut -f 1)
  small=$(tar -C "$layer" --numeric-owner -c . | zstd -3 -q -c | wc -c)
  total=$((total + bytes)) packed=$((packed + small))
  first=$(cd "$layer"/opt/venv/lib/python3*/site-packages 2>/dev/null || cd "$layer" && printf '%s ' * | cut -c 1-40)
  printf '%10.1f %10.1f  %s\n' "$(awk "BEGIN {print $bytes / 1e6}")" "$(awk "BEGIN {print $small / 1e6}")" "$first"
done
printf '%10.1f %10.1f  all\n' "$(awk "BEGIN {print $total / 1e6}")" "$(awk "BEGIN {print $packed / 1e6}")"
