#!/bin/sh
# Makes a folder with Debian trixie and its Nix (2.26.3), so that tests can run that client.
#
# Usage: tests/clients/trixie.sh [FOLDER]
#
# FOLDER is LARDER_TRIXIE or /var/tmp/larder-trixie if it is not given. Needs root and the network:
# packages come from deb.debian.org, and are checked by debootstrap with Debian's keys. What is
# there already stays as it is. Without root or network it says why it does nothing, and fails.
set -eu

folder=${1:-${LARDER_TRIXIE:-/var/tmp/larder-trixie}}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

# What is installed; the program itself needs a /proc to say so.
version() { dpkg-query --admindir="$folder/var/lib/dpkg" --show --showformat '${Version}' nix-bin; }

say() { printf '%s\n' "trixie: $*"; }

if [ -x "$folder/usr/bin/nix-store" ]; then
    say "'$folder' is there: nix-bin $(version)"
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    say "only root can make '$folder'"
    exit 1
fi
if ! command -v debootstrap >/dev/null; then
    say "installing debootstrap"
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends debootstrap >/dev/null
fi
# Under another name until it is whole. libdbi-perl is what stands behind a virtual package that
# debootstrap does not see through.
new="$folder.new.$$"
trap 'rm -rf "$new"' EXIT INT TERM
say "filling '$folder' from $mirror"
if ! debootstrap --variant=minbase --include=nix-bin,libdbi-perl,ca-certificates trixie "$new" "$mirror" >"$new.log" 2>&1; then
    tail -20 "$new.log" >&2
    rm -f "$new.log"
    say "debootstrap failed; is '$mirror' within reach?"
    exit 1
fi
rm -f "$new.log"
rm -rf "$new"/var/cache/apt/archives/*.deb "$new"/var/lib/apt/lists/*
mv "$new" "$folder"
trap - EXIT INT TERM
say "'$folder' has nix-bin $(version)"
