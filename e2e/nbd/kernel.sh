#!/usr/bin/env bash
# Unpacks Debian's cloud kernel and busybox, downloaded as packages and never installed, into a
# directory that is kept.
#
#	kernel.sh CACHE
set -euo pipefail
cache=$1
[ ! -e "$cache/ready" ] || exit 0
rm -rf "$cache/root" "$cache/dl"
mkdir -p "$cache/root" "$cache/dl"
package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
(cd "$cache/dl" && apt-get -qq download "$package" busybox-static)
for deb in "$cache"/dl/*.deb; do dpkg -x "$deb" "$cache/root"; done
rm -rf "$cache/dl"
"$cache/root/bin/busybox" depmod -b "$cache/root" "$(ls "$cache/root/lib/modules")" # the package has no modules.dep
touch "$cache/ready"
