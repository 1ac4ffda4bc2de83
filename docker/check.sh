#!/usr/bin/env bash
# Builds the CPU image and holds it to what docs/containers.md says of it, with docker where an engine answers, else with
# buildah as root: the image's own service answers a photo over HTTP, offline, as a user that is not root, on a root file
# system that cannot be written.
#   docker/check.sh [--photo FILE] [--pip-conf FILE] [--pip-cert FILE]
# BASE_IMAGE  another base (the Dockerfile's own is the default). Where it cannot be pulled and buildah builds, a Debian
#             base is made with debootstrap: DEBIAN_SUITE (bookworm) from DEBIAN_MIRROR (its own default).
# --pip-conf, --pip-cert   a pip.conf and a file of authorities for the build alone, for a package index of your own; the
#             defaults are $PIP_CONFIG_FILE, $PIP_CERT and what $PIP_INDEX_URL, $PIP_EXTRA_INDEX_URL say. Not in the image.
# It leaves the image limner-cpu:check, and with buildah the base limner-base, so that the next run is quick.
set -euo pipefail

MAX_BYTES=800000000
IMAGE=limner-cpu:check
READY_SECONDS=180

# Runs in the container, on its Python: the photo is standard input.
PROBE='
import json, os, sys, time, urllib.error, urllib.request
url, end = "http://127.0.0.1:" + os.environ["LIMNER_PORT"], time.monotonic() + float(sys.argv[1])
while True:
    try:
        urllib.request.urlopen(url + "/readyz", timeout=5).read()
        break
    except OSError as error:
        if time.monotonic() > end:
            sys.exit(f"not ready after {sys.argv[1]} s: {error}")
        time.sleep(0.2)
answer = json.load(urllib.request.urlopen(urllib.request.Request(url + "/detect", sys.stdin.buffer.read()), timeout=60))
for found in answer["detections"][:3]:
    box = ", ".join(format(side, ".1f") for side in found["box"])
    parts = ", ".join(part for part in ("mask", "keypoints") if found.get(part))
    print(found["label"], format(found["score"], ".3f"), f"[{box}]", parts)
sys.exit(0 if answer["detections"] else "the service answered, and found nothing in the photo")
'
# Tries what must not work; says what did.
HELD='
import importlib.util, os, socket, sys
wrong = [] if os.getuid() and os.getgid() else ["it runs as root"]
for path in ("/touched", "/opt/limner/touched", "/bundles/touched", "/var/tmp/touched"):
    try:
        open(path, "w").close()
        wrong.append(f"{path} could be written")
    except OSError:
        pass
open("/tmp/touched", "w").close()
try:
    socket.create_connection(("192.0.2.1", 80), timeout=2)
    wrong.append("it reaches a network")
except TimeoutError:
    wrong.append("it has a route to a network")
except OSError:
    pass
wrong += [f"{name} is in it" for name in ("torch", "pip") if importlib.util.find_spec(name)]
if wrong:
    sys.exit("; ".join(wrong))
print(f"uid {os.getuid()}, gid {os.getgid()}, read-only, offline, no torch, no pip")
'

say() { printf '%s\n' "== $*" >&2; }
stop() { printf '%s\n' "docker/check.sh: $*" >&2; exit 1; }

main() {
    photo=tests/pictures/astronaut.jpg pip_conf=${PIP_CONFIG_FILE:-} pip_cert=${PIP_CERT:-}
    while [ $# -gt 0 ]; do
        case $1 in
            --photo | --pip-conf | --pip-cert)
                [ $# -gt 1 ] && [ -r "$2" ] || stop "$1 wants a file that can be read"
                case $1 in
                    --photo) photo=$(realpath "$2") ;;
                    --pip-conf) pip_conf=$(realpath "$2") ;;
                    --pip-cert) pip_cert=$(realpath "$2") ;;
                esac
                shift 2
                ;;
            -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
            *) stop "unknown option $1: see --help" ;;
        esac
    done
    cd "$(dirname "$0")/.."
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    gather_build_flags
    if command -v docker >/dev/null && docker info >/dev/null 2>&1; then
        with_docker
    elif command -v buildah >/dev/null; then
        with_buildah
    else
        stop "no docker engine answers and buildah is not installed: start docker, or apt-get install buildah debootstrap"
    fi
    say "all is well"
}

gather_build_flags() {
    build_flags=(-f docker/service-cpu.Dockerfile --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
    if [ -z "$pip_conf" ] && [ -n "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_TRUSTED_HOST:-}" ]; then
        pip_conf=$scratch/pip.conf
        {
            echo "[global]"
            [ -z "${PIP_INDEX_URL:-}" ] || echo "index-url = $PIP_INDEX_URL"
            [ -z "${PIP_EXTRA_INDEX_URL:-}" ] || echo "extra-index-url = $PIP_EXTRA_INDEX_URL"
            [ -z "${PIP_TRUSTED_HOST:-}" ] || echo "trusted-host = $PIP_TRUSTED_HOST"
        } >"$pip_conf"
    fi
    [ -z "$pip_conf" ] || build_flags+=(--secret "id=pip-conf,src=$pip_conf")
    [ -z "$pip_cert" ] || build_flags+=(--secret "id=pip-cert,src=$pip_cert")
}

check_size() { # BYTES
    say "image: $(($1 / 1000000)) MB"
    [ "$1" -lt $MAX_BYTES ] || stop "the image is larger than $((MAX_BYTES / 1000000)) MB"
}

with_docker() {
    [ -z "${BASE_IMAGE:-}" ] || build_flags+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
    say "docker build"
    DOCKER_BUILDKIT=1 docker build "${build_flags[@]}" -t $IMAGE .
    check_size "$(docker image inspect --format '{{.Size}}' $IMAGE)"
    container=$(docker run --detach --read-only --tmpfs /tmp --network none --cap-drop ALL \
        --security-opt no-new-privileges --memory 4g --pids-limit 1024 $IMAGE)
    trap 'docker rm --force "$container" >/dev/null; rm -rf "$scratch"' EXIT
    say "the photo"
    docker exec -i "$container" python3 -c "$PROBE" $READY_SECONDS <"$photo" || { docker logs "$container" >&2; exit 1; }
    docker exec "$container" python3 -c "$HELD"
    say "the health check"
    for _ in $(seq 60); do
        state=$(docker inspect --format '{{.State.Health.Status}}' "$container")
        [ "$state" != healthy ] || break
        sleep 1
    done
    [ "$state" = healthy ] || stop "the health check says $state"
    say "SIGTERM"
    docker stop --time 30 "$container" >/dev/null
    code=$(docker inspect --format '{{.State.ExitCode}}' "$container")
    check_exit "$code"
}

check_exit() { # CODE; the server ends itself by the signal once it has drained
    case $1 in 0 | 143) ;; *) stop "it ended with $1 after SIGTERM, not in order" ;; esac
}

with_buildah() {
    [ "$(id -u)" = 0 ] || stop "buildah is used as root here (sudo docker/check.sh), or start docker"
    # What works without kernel overlays and user namespaces; set them for what is faster where you are.
    export STORAGE_DRIVER=${STORAGE_DRIVER:-vfs} BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}
    base=${BASE_IMAGE:-$(sed -n 's/^ARG BASE_IMAGE=//p' docker/service-cpu.Dockerfile)}
    if ! buildah inspect --type image "$base" >/dev/null 2>&1 && ! timeout 120 buildah pull --quiet "$base" >/dev/null 2>&1; then
        say "$base cannot be pulled: a Debian base instead"
        make_debian_base
    fi
    say "buildah build on $base"
    buildah build --format docker --layers "${build_flags[@]}" --build-arg "BASE_IMAGE=$base" -t $IMAGE .
    container=$(buildah from --pull-never $IMAGE)
    trap 'buildah rm "$container" >/dev/null; rm -rf "$scratch"' EXIT
    root=$(buildah mount "$container")
    check_size "$(du -s --block-size=1 "$root" | cut -f1)"
    config() { buildah inspect --type image --format "{{range $1}}{{println .}}{{end}}" $IMAGE | sed '/^$/d'; }
    config .Docker.Config.Env >"$scratch/env"
    { config .Docker.Config.Entrypoint; config .Docker.Config.Cmd; } >"$scratch/command"
    config .Docker.Config.Healthcheck.Test >"$scratch/health"
    buildah inspect --type image --format '{{.Docker.Config.User}}' $IMAGE >"$scratch/user"
    export -f say stop check_exit serve_isolated
    export PROBE HELD READY_SECONDS
    # A network of its own with nothing but loopback, mounts and processes of its own: what an engine would give it.
    unshare --mount --net --pid --fork --kill-child bash -euo pipefail -c 'serve_isolated "$@"' - "$root" "$scratch" "$photo" \
        || stop "the container did not pass"
    buildah umount "$container" >/dev/null
}

make_debian_base() { # sets base
    suite=${DEBIAN_SUITE:-bookworm} base=localhost/limner-base:${DEBIAN_SUITE:-bookworm}
    ! buildah inspect --type image "$base" >/dev/null 2>&1 || return 0
    command -v debootstrap >/dev/null || stop "debootstrap is not installed: apt-get install debootstrap, or set BASE_IMAGE"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$scratch/debian" \
        ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$scratch/debootstrap.log" 2>&1 \
        || { tail -20 "$scratch/debootstrap.log" >&2; stop "debootstrap failed"; }
    rm -rf "$scratch"/debian/var/{cache/apt,lib/apt/lists}/* "$scratch"/debian/usr/share/{doc,man,locale}/*
    blank=$(buildah from scratch)
    buildah add --quiet "$blank" "$scratch/debian" / >/dev/null
    buildah config --cmd python3 "$blank"
    buildah commit --quiet --rm "$blank" "$base" >/dev/null
    rm -rf "$scratch/debian"
}

serve_isolated() { # ROOT SCRATCH PHOTO; inside the namespaces
    root=$1 scratch=$2 photo=$3
    ip link set lo up
    mount --make-rprivate /
    mount --bind "$root" "$root"
    mount --rbind /dev "$root/dev"
    mount -t proc proc "$root/proc"
    mount -t tmpfs -o nosuid,nodev,noexec tmpfs "$root/tmp"
    mount -o remount,bind,ro "$root"
    mapfile -t environment <"$scratch/env"
    mapfile -t command <"$scratch/command"
    mapfile -t health <"$scratch/health"
    user=$(<"$scratch/user")
    uid=${user%%:*} gid=${user##*:}
    inside=(chroot "$root" setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs --bounding-set=-all
        env -i -C /tmp "${environment[@]}")
    "${inside[@]}" "${command[@]}" 2>"$scratch/log" &
    server=$!
    say "the photo"
    "${inside[@]}" python3 -c "$PROBE" "$READY_SECONDS" <"$photo" || { cat "$scratch/log" >&2; exit 1; }
    "${inside[@]}" python3 -c "$HELD"
    say "the health check"
    [ "${health[0]:-}" = CMD ] || stop "the image has no health check"
    "${inside[@]}" "${health[@]:1}" || stop "the health check fails while the service answers"
    say "SIGTERM"
    kill -TERM $server
    code=0
    wait $server || code=$?
    check_exit $code
    ! "${inside[@]}" "${health[@]:1}" 2>/dev/null || stop "the health check passes while nothing runs"
}

main "$@"
