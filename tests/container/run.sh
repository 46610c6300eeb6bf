#!/usr/bin/env bash
# `make container`: tests the images with a build engine, a base image and a CPU build of torch that this machine has or, as
# root on Debian, can install. Otherwise every test is skipped with the reason. Arguments are passed on to pytest. With
# KILN_QUICK=yes, one image is built, in 7 minutes or not at all, and only the tests that train in seconds are run.
set -euo pipefail
cd "$(dirname "$0")/../.."
place=${KILN_CONTAINERS:-/var/tmp/kiln-containers} # images and layers: the next run rebuilds only what changed

run_tests() {
  exec .venv/bin/pytest -rs -m "container${KILN_QUICK:+ and not slow}" tests/container "$@"
}

skip() {
  printf '\nSKIPPED: NO CONTAINER IS TESTED: %s\n\n' "$1" >&2
  KILN_NO_CONTAINER=$1 run_tests "${options[@]}"
}

can_install() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}

install() { # PACKAGE...
  export DEBIAN_FRONTEND=noninteractive
  timeout 120 apt-get -qq update >/dev/null && timeout 240 apt-get -qq install -y --no-install-recommends "$@" >/dev/null
}

# Without systemd, as in a container, the engine's defaults for cgroups, limits and the event log do not work.
configure() {
  mkdir -p "$place/tmp"
  printf '[storage]\ndriver = "overlay"\ngraphroot = "%s/store"\nrunroot = "%s/run"\n' "$place" "$place" > "$place/storage.conf"
  printf '[containers]\ndefault_ulimits = ["nofile=%s:%s", "nproc=32768:32768"]\n' "$(ulimit -Hn)" "$(ulimit -Hn)" > "$place/containers.conf"
  printf '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n' >> "$place/containers.conf"
  export CONTAINERS_STORAGE_CONF=$place/storage.conf CONTAINERS_CONF=$place/containers.conf TMPDIR=$place/tmp
  export BUILDAH_ISOLATION=chroot
}

# Makes a base like the default one from this machine's Debian.
bootstrap() { # NAME
  local root=$place/root suite
  suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
  command -v debootstrap >/dev/null || { can_install && install debootstrap; } || return 1
  rm -rf "$root"
  timeout 300 debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates "$suite" "$root" \
    > "$place/debootstrap.log" 2>&1 || return 1
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  : > "$root/etc/resolv.conf"
  tar -C "$root" --numeric-owner -c . \
    | podman import -q --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - "$1" >/dev/null
  rm -rf "$root"
}

# Uses torch's own CPU index, or the CPU build that this machine's pip can download.
find_torch() { # MINOR VERSION OF PYTHON
  .venv/bin/python -c 'import urllib.request as r; r.urlopen("https://download.pytorch.org/whl/cpu/", timeout=10)' \
    2>/dev/null && return
  rm -rf "$place/wheels"
  .venv/bin/pip download -q --no-deps --only-binary :all: --python-version "$1" --dest "$place/wheels" \
    "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' torch.lock)" || return 1
  compgen -G "$place/wheels/torch-*+cpu-*.whl" >/dev/null || return 1
  export TORCH_INDEX=''
  printf 'find-links = /wheels\n' >> "$PIP_CONF_SECRET"
  BUILD_OPTIONS="$BUILD_OPTIONS --volume $place/wheels:/wheels:ro"
}

options=("$@")
if [ -n "${KILN_IMAGE:-}" ] || docker info >/dev/null 2>&1; then run_tests "$@"; fi
if ! command -v podman >/dev/null; then
  can_install || skip 'this machine has neither a docker daemon nor podman, and apt-get cannot install one.'
  echo 'Installing podman, buildah and runc.'
  install podman buildah runc debootstrap || skip 'this machine has no build engine, and apt-get could not install one.'
fi
mkdir -p "$place"
if [ "$(id -u)" = 0 ] && [ ! -d /run/systemd/system ]; then configure; fi

usual=$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile.cuda) own=localhost/kiln-base:debian
if [ -z "${BASE_IMAGE:-}" ]; then
  if podman image exists "$own"; then
    BASE_IMAGE=$own
  elif timeout 120 podman pull -q "$usual" >/dev/null 2>&1; then
    BASE_IMAGE=$usual
  else
    echo "$usual cannot be pulled: making a base from this machine's Debian."
    bootstrap "$own" || skip "the base $usual cannot be pulled, and debootstrap cannot make another."
    BASE_IMAGE=$own
  fi
fi
export BASE_IMAGE
minor=$(podman run --rm --no-healthcheck --network none "$BASE_IMAGE" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])') \
  || skip 'podman cannot run a container here.'

if [ -z "${PIP_CONF_SECRET:-}" ]; then
  export PIP_CONF_SECRET=$place/pip.conf BUILD_OPTIONS="--network host ${BUILD_OPTIONS:-}"
  printf '[global]\n' > "$PIP_CONF_SECRET"
  if index=$(.venv/bin/pip config get global.index-url 2>/dev/null); then printf 'index-url = %s\n' "$index" >> "$PIP_CONF_SECRET"; fi
  if [ -z "${CA_BUNDLE_SECRET:-}" ] && [ -s /etc/ssl/certs/ca-certificates.crt ]; then
    export CA_BUNDLE_SECRET=/etc/ssl/certs/ca-certificates.crt
    printf 'cert = /run/secrets/cabundle\n' >> "$PIP_CONF_SECRET"
  fi
  find_torch "$minor" || skip 'no CPU build of torch can be downloaded.'
  export BUILD_OPTIONS
fi
if [ -n "${KILN_QUICK:-}" ]; then # the tests build it again, from the cached layers
  code=0
  timeout $((SECONDS < 400 ? 420 - SECONDS : 20)) ./build.sh cpu > "$place/build.log" 2>&1 || code=$?
  [ "$code" != 124 ] || skip 'this machine did not build the image in 7 minutes; the next run reuses the layers that it built.'
fi
run_tests "$@"
