#!/usr/bin/env bash
# Compose v2 for a Debian whose own is older: the plugin out of a later Debian's package, where this machine's packages
# come from. Does nothing where `docker compose` is there already. Needs root and `apt-get update` done.
set -euo pipefail

suite=trixie
plugins=/usr/local/lib/docker/cli-plugins

docker compose version >/dev/null 2>&1 && exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$plugins"
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Label: Debian' | head -n 1)
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$work/sources.list"
apt() {
    apt-get -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root "$@"
}
apt update --quiet=2
(cd "$work" && apt download --quiet=2 docker-compose && dpkg -x docker-compose_*.deb out)
install -m 755 "$work/out/usr/libexec/docker/cli-plugins/docker-compose" "$plugins/docker-compose"
docker compose version
