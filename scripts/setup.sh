#!/usr/bin/env bash
# setup.sh [PACKAGE...]
# Installs Debian packages, by default those that the tests use. Nothing is done
# where all of them are there already, so it is quick to run again.
set -euo pipefail
packages=("$@")
[ $# -gt 0 ] || packages=(e2fsprogs xfsprogs fuse3 util-linux fdisk gdisk lvm2 dosfstools mtools attr acl qemu-utils libnbd-bin python3-libnbd nbdkit fio sqlite3 postgresql jq)
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
# Another installation, as at a machine's first start, holds a lock for a while.
apt-get -o DPkg::Lock::Timeout=300 update -qq
apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
