#!/usr/bin/env bash
# Builds the images. Exit codes: 64 wrong command line, 69 no build engine or base, 74 not enough disk, else the engine's.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'TEXT'
usage: ./build.sh [cuda|rocm|cpu|all] [--push|--push-by-digest] [--tag NAME[:TAG]] [--platform OS/ARCH]

  cpu          Dockerfile.cuda with torch for the CPU, for tests
  all          cuda and rocm
  --tag        the image's name; the target is appended: kiln:0.1.0 gives kiln:0.1.0-cuda
  --push       push the image after building it
  --push-by-digest   docker: push it without a tag, so that nobody pulls it before it is scanned and signed
  --platform   for example linux/amd64; by default the engine's own

environment:
  BASE_IMAGE           the base image, by tag or digest
  PYTHON_IMAGE         rocm: the image that installs the libraries; needs the base's minor version of Python
  ROCM_ROOM_GIB        rocm: disk space that the build needs, 80 by default
  BAKE_MODEL           cuda, cpu: the model whose weights go into the image: flux, sdxl, sd3 or another BASE_MODEL; or tokenizers
  HF_TOKEN_FILE        file with the Hub token for these weights; it is available only during the build
  HF_ENDPOINT          a mirror of the Hub to download them from
  TORCH_INDEX          cuda, cpu: package index of a build of torch other than the one in torch.lock
  PIP_CONF_SECRET      a pip.conf that is available only during the build
  CA_BUNDLE_SECRET     certificates that are available only during the build, at /run/secrets/cabundle
  BUILD_OPTIONS        more options for the engine's build command, separated by spaces
TEXT
}

fail() {
  printf 'build.sh: %s\n' "$2" >&2
  exit "$1"
}

targets=(cuda) push='' platform='' version=0.1.0
tag="kiln:$version"
while [ $# -gt 0 ]; do
  case "$1" in
    cuda | rocm | cpu) targets=("$1") ;;
    all) targets=(cuda rocm) ;;
    --push) push=yes ;;
    --push-by-digest) push=digest ;;
    --tag | --platform)
      [ $# -ge 2 ] || fail 64 "$1 needs a value."
      if [ "$1" = --tag ]; then tag=$2; else platform=$2; fi
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      usage >&2
      fail 64 "'$1' is not known."
      ;;
  esac
  shift
done
case "${tag##*/}" in *:*) ;; *) tag="$tag:$version" ;; esac

if docker buildx version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then
  engine=docker
elif command -v buildah >/dev/null; then
  engine=buildah
elif command -v podman >/dev/null; then
  engine=podman
else
  fail 69 'No engine: install buildah, podman, or docker with buildx and start its daemon.'
fi
[ "$push" != digest ] || [ "$engine" = docker ] || fail 69 '--push-by-digest needs docker with buildx.'

store() {
  case "$engine" in
    docker) docker info --format '{{.DockerRootDir}}' ;;
    buildah) buildah info --format '{{.store.GraphRoot}}' ;;
    podman) podman info --format '{{.Store.GraphRoot}}' ;;
  esac
}

size() {
  case "$engine" in
    docker) docker image inspect --format '{{.Size}}' "$1" | awk '{printf "%.2f GB\n", $1 / 1e9}' ;;
    *) "$engine" images --format '{{.Size}}' "$1" | head -n 1 ;;
  esac
}

# Without this check, a base that cannot be pulled looks like a build error. docker reports it itself, and at once.
need_base() { # TARGET
  local base
  [ "$engine" != docker ] || return 0
  base=$(image "$1" BASE_IMAGE)
  "$engine" inspect --type image "$base" >/dev/null 2>&1 || "$engine" pull --quiet "$base" >/dev/null \
    || fail 69 "The base image $base cannot be pulled: set BASE_IMAGE to one that can."
}

# The default of a build argument that names an image, or what the environment has for it.
image() { # TARGET ARGUMENT
  local file=Dockerfile.$1
  [ "$1" != cpu ] || file=Dockerfile.cuda
  printf '%s' "${!2:-$(sed -n "s/^ARG $2=//p" "$file")}"
}

# A tag may lead to another image tomorrow. What is pushed is built on a digest, which its label has.
by_digest() { # IMAGE
  local digest
  case "$1" in *@sha256:*) printf '%s' "$1" && return ;; esac
  if digest=$(docker buildx imagetools inspect "$1" --format '{{ .Manifest.Digest }}') && [[ $digest == sha256:* ]]; then
    printf '%s' "$1@$digest"
  else
    fail 69 "The registry does not tell the digest of $1, and what is pushed is built on a digest."
  fi
}

# docker passes the base's layers on to a registry without unpacking them: see Dockerfile.rocm.
streams() { # TARGET
  [ "$1" = rocm ] && [ "$engine" = docker ] && [ -n "$push" ]
}

need_room() { # TARGET
  local needed folder free
  case "$1" in cpu) needed=6 ;; cuda) needed=25 ;; rocm) needed=${ROCM_ROOM_GIB:-80} ;; esac
  if [ "$1" = cuda ] && [ -n "${BAKE_MODEL:-}" ]; then needed=125; fi
  if streams "$1"; then needed=15; fi
  folder=$(store)
  [ -d "$folder" ] || return 0 # the daemon is on another machine, whose disk is not visible here
  free=$(df -Pk "$folder" | awk 'NR == 2 {print int($4 / 1024 / 1024)}')
  [ "$free" -ge "$needed" ] || fail 74 "$1 needs $needed GiB in $folder; $free GiB are free."
}

engine_build() {
  case "$engine" in
    docker) docker buildx build "$@" . ;;
    buildah) buildah bud --layers --format docker "$@" . ;;
    podman) podman build --layers --format docker "$@" . ;;
  esac
}

build() { # TARGET
  local file=Dockerfile.$1 name=$tag-$1 index=${TORCH_INDEX:-}
  local options=()
  if [ "$1" = cpu ]; then
    file=Dockerfile.cuda
    index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
    options+=(--build-arg COMPILER=)
  fi
  if [ "$1" = rocm ]; then index=''; fi
  if [ "$1" = rocm ] && [ "$engine" != docker ]; then
    # Older versions of these engines reject --link, which only affects how layers are made.
    file=$(mktemp)
    trap 'rm -f "$file"' RETURN
    sed 's/^COPY --link/COPY/' Dockerfile.rocm > "$file"
  fi
  options+=(--file "$file" --build-arg "VERSION=$version")
  # Not as a build argument: buildah takes a label from its cache even if a build argument in it has changed.
  options+=(--label "org.opencontainers.image.revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
  if [ "$1" = cpu ] || [ -n "$index" ]; then
    options+=(--build-arg "TORCH=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' torch.lock)" --build-arg "TORCH_INDEX=$index")
  fi
  local argument named
  for argument in BASE_IMAGE PYTHON_IMAGE; do
    named=$(image "$1" "$argument")
    [ -n "$named" ] || continue # the image for CUDA has one base alone
    if [ -n "$push" ] && [ "$engine" = docker ]; then
      named=$(by_digest "$named")
    elif [ -z "${!argument:-}" ]; then
      continue
    fi
    options+=(--build-arg "$argument=$named")
  done
  if [ "$1" != rocm ] && [ -n "${BAKE_MODEL:-}" ]; then
    name=$name-$BAKE_MODEL
    options+=(--build-arg "BAKE_MODEL=$BAKE_MODEL")
    [ -z "${HF_ENDPOINT:-}" ] || options+=(--build-arg "HF_ENDPOINT=$HF_ENDPOINT")
    [ -z "${HF_TOKEN_FILE:-}" ] || options+=(--secret "id=hf_token,src=$HF_TOKEN_FILE")
  fi
  [ -z "$platform" ] || options+=(--platform "$platform")
  [ -z "${PIP_CONF_SECRET:-}" ] || options+=(--secret "id=pipconf,src=$PIP_CONF_SECRET")
  [ -z "${CA_BUNDLE_SECRET:-}" ] || options+=(--secret "id=cabundle,src=$CA_BUNDLE_SECRET")
  # shellcheck disable=SC2206 # a list of options, separated by spaces
  options+=(${BUILD_OPTIONS:-})

  printf 'Building %s from %s with %s.\n' "$name" "$file" "$engine"
  local started=$SECONDS
  if [ "$1" = rocm ] && ! streams rocm; then engine_build "${options[@]}" --target proof; fi
  # zstd is smaller than gzip and unpacks faster. The base's layers keep their compression.
  local compressed=compression=zstd,oci-mediatypes=true
  case "$engine-$push" in
    docker-) options+=(--tag "$name" --load) ;;
    docker-yes) options+=(--tag "$name" --output "type=registry,$compressed") ;;
    docker-digest) options+=(--output "type=image,name=${tag%:*},push-by-digest=true,name-canonical=true,push=true,$compressed") ;;
    *) options+=(--tag "$name") ;;
  esac
  engine_build "${options[@]}"
  if [ -n "$push" ] && [ "$engine" != docker ]; then "$engine" push "$name"; fi
  printf 'Built %s in %d s' "$name" $((SECONDS - started))
  if [ -n "$push" ] && [ "$engine" = docker ]; then
    printf ' and pushed it.\n'
  else
    printf ': %s unpacked.\n' "$(size "$name")"
  fi
}

for target in "${targets[@]}"; do need_room "$target"; done
for target in "${targets[@]}"; do need_base "$target"; done
for target in "${targets[@]}"; do build "$target"; done
