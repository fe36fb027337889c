#!/usr/bin/env bash
# Makes what boots the guest of the tests: OUT/vmlinuz and OUT/initrd, with Debian's cloud kernel,
# busybox and the guest agent.
#
#	guest.sh CACHE OUT
set -euo pipefail
cache=$1 out=$2
"$(dirname "$0")/../nbd/kernel.sh" "$cache"
if [ ! -e "$cache/agent/ready" ]; then
	rm -rf "$cache/agent"
	mkdir -p "$cache/agent/dl"
	(cd "$cache/agent/dl" && apt-get -qq download qemu-guest-agent)
	dpkg -x "$cache"/agent/dl/*.deb "$cache/agent"
	touch "$cache/agent/ready"
fi
modules=$cache/root/lib/modules/$(ls "$cache/root/lib/modules")
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{bin,sbin,lib64,lib/x86_64-linux-gnu,dev,proc,sys,mnt,modules,etc,tmp,run,var/run}
cp "$cache/root/bin/busybox" "$root/bin/"
agent=$cache/agent/usr/sbin/qemu-ga
cp "$agent" "$root/sbin/"
ldd "$agent" | grep -o '/[^ ]*' | while read -r lib; do cp -L "$lib" "$root$(dirname "$lib" | sed 's,^/usr,,')/"; done

# needs prints a module's file after those it depends on; nothing if it is built in.
needs() {
	local line dep
	line=$(grep "^[^:]*/$1\.ko[^:]*:" "$modules/modules.dep" | head -n 1) || return 0
	for dep in ${line#*:}; do
		dep=$(basename "$dep")
		needs "${dep%%.ko*}"
	done
	echo "${line%%:*}"
}
for m in virtio_pci virtio_blk virtio_console crc32c_generic ext4; do needs $m; done | awk '!seen[$0]++' >"$root/list"
while read -r file; do
	cp "$modules/$file" "$root/modules/"
	basename "$file"
done <"$root/list" >"$root/modules/list"
rm "$root/list"

# The guest writes files to vda, each with a line in "sums" after it; then a number to vdb, and
# the same to vdc.
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r m; do insmod /modules/$m 2>/dev/null; done </modules/list
mount -t ext4 /dev/vda /mnt || echo "GUEST FAILED: no file system"
cd /mnt
touch sums
[ -e etc ] || { mkdir etc && echo shop >etc/hostname; }
echo "VERIFIED $(sha256sum -c sums 2>/dev/null | grep -c ': OK$') of $(wc -l <sums)"
for port in /dev/vport*p1; do qemu-ga -d -m virtio-serial -p $port; done
n=$(wc -l <sums)
while :; do
	n=$((n + 1))
	dd if=/dev/urandom of=f$n bs=$((n * 7919 % 200000 + 1)) count=1 conv=fsync 2>/dev/null
	sha256sum f$n >>sums
	sync
	for disk in vdb vdc; do printf '%-511d\n' $n | dd of=/dev/$disk bs=512 conv=fsync,notrunc 2>/dev/null; done
	echo "WROTE $n"
	usleep 100000
done
INIT
chmod +x "$root/init"
(cd "$root" && find . | "$cache/root/bin/busybox" cpio -o -H newc 2>/dev/null) >"$out/initrd" # not compressed: the guest is slow
cp "$cache"/root/boot/vmlinuz-* "$out/vmlinuz"
