#!/usr/bin/env bash
# Installs the Debian packages that the tests and the demo use. Nothing is done
# where all of them are there already, so it is quick to run again.
set -euo pipefail
packages=(e2fsprogs xfsprogs fuse3 util-linux fdisk gdisk lvm2 dosfstools mtools attr acl qemu-utils libnbd-bin python3-libnbd nbdkit fio sqlite3 postgresql jq)
missing=()
for p in "${packages[@]}"; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ]; then
	echo "setup: these packages are missing, install them as root: ${missing[*]}" >&2
	exit 1
fi
echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
