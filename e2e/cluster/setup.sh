#!/usr/bin/env bash
# Installs the Debian packages that the test cluster is made of. Nothing is done where
# all of them are there already.
set -euo pipefail
packages=(
	runc containernetworking-plugins nftables conntrack iproute2 # containers and their network
	e2fsprogs xfsprogs util-linux mount                          # the CSI driver's volumes
	busybox-static                                               # the image that test pods run
	curl                                                         # health checks and S3
)
missing=()
for p in "${packages[@]}"; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ]; then
	echo "e2e-setup: these packages are missing, install them as root: ${missing[*]}" >&2
	exit 1
fi
echo "e2e-setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
