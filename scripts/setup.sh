#!/usr/bin/env bash
# setup.sh [PACKAGE...]
# Installs Debian packages, by default those that the tests use. Nothing is done
# where all of them are there already, so it is quick to run again.
set -euo pipefail
# The tools of rare formats, which internal/probe is tested with. No Debian release has all.
rare=()
packages=("$@")
if [ $# -eq 0 ]; then
	packages=(e2fsprogs xfsprogs fuse3 util-linux fdisk gdisk lvm2 dosfstools mtools ntfs-3g attr acl
		qemu-utils qemu-system-x86 libvirt-daemon-system libvirt-clients openssh-server libnbd-bin python3-libnbd nbdkit fio sqlite3 postgresql mariadb-server redis-server busybox-static jq cryptsetup-bin squashfs-tools xorriso
		ceph-mon ceph-osd ceph-common qemu-block-extra)
	rare=(util-linux-extra btrfs-progs exfatprogs f2fs-tools nilfs-tools jfsutils reiserfsprogs reiser4progs gfs2-utils
		ocfs2-tools hfsutils erofs-utils udftools bcache-tools bcachefs-tools)
fi
installed() { [ "$(dpkg-query -W -f '${Status}' "$1" 2>/dev/null)" = 'install ok installed' ]; }
# known PACKAGE... prints those of the packages, each with a colon, that apt can install.
known() { apt-cache policy "$@" | awk '/^[^ ]/ { name = $1 } /Candidate: [^(]/ { print name }'; }
missing=()
for p in "${packages[@]}"; do
	installed "$p" || missing+=("$p")
done
absent=()
for p in "${rare[@]}"; do
	installed "$p" || absent+=("$p")
done
[ ${#missing[@]} -gt 0 ] || [ ${#absent[@]} -gt 0 ] || exit 0
if [ "$(id -u)" -ne 0 ]; then
	[ ${#absent[@]} -eq 0 ] || echo "setup: tests of rare formats will be skipped without: ${absent[*]}" >&2
	[ ${#missing[@]} -eq 0 ] && exit 0
	echo "setup: these packages are missing, install them as root: ${missing[*]}" >&2
	exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# Another installation, as at a machine's first start, holds the locks for a while. apt-get waits
# for dpkg's by itself, but not for that of the lists.
update() {
	local out try
	for try in $(seq 100); do
		if out=$(apt-get -o DPkg::Lock::Timeout=300 update -qq 2>&1); then
			break
		elif [ "$try" -eq 100 ] || [[ $out != *"Could not get lock"* ]]; then
			printf '%s\n' "$out" >&2
			exit 1
		fi
		sleep 3
	done
}
# Without the lists of apt nothing says which of the rare packages this release has.
have=$(known e2fsprogs "${absent[@]}")
if [ ${#missing[@]} -gt 0 ] || [[ $have != *e2fsprogs:* ]]; then
	update
	have=$(known "${absent[@]}")
fi
for p in "${absent[@]}"; do
	if grep -qx "$p:" <<<"$have"; then
		missing+=("$p")
	else
		echo "setup: this release has no package $p; tests that need it are skipped"
	fi
done
[ ${#missing[@]} -gt 0 ] || exit 0
echo "setup: installing ${missing[*]}"
apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
