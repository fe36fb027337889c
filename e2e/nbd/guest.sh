#!/usr/bin/env bash
# Boots Debian's cloud kernel in QEMU without hardware virtualization, with
# busybox, nbd-client and a varve binary, and runs a script in it. The host's
# loopback is 10.0.2.2 there. Kernel and busybox are downloaded as Debian
# packages and unpacked, never installed. DIR, if it is given, is /data there.
#
#	guest.sh CACHE VARVE SCRIPT [DIR]
set -euo pipefail
cache=$1 varve=$2 script=$3 data=${4:-}
"$(dirname "$0")/kernel.sh" "$cache"
version=$(ls "$cache/root/lib/modules")
modules=$cache/root/lib/modules/$version
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"/{bin,sbin,lib64,lib/x86_64-linux-gnu,dev,proc,sys,mnt,modules,etc,tmp,run}
cp "$cache/root/bin/busybox" "$root/bin/"
cp "$varve" "$root/bin/varve"
cp "$script" "$root/guest"
[ -z "$data" ] || cp -a --sparse=always "$data" "$root/data"
client=$(command -v nbd-client || echo /usr/sbin/nbd-client)
cp "$client" "$root/sbin/"
ldd "$client" | grep -o '/[^ ]*' | while read -r lib; do cp -L "$lib" "$root$(dirname "$lib" | sed 's,^/usr,,')/"; done

# needs prints a module's file after those it depends on; nothing if it is built in.
needs() {
	local line
	line=$(grep "^[^:]*/$1\.ko[^:]*:" "$modules/modules.dep" | head -n 1) || return 0
	local dep
	for dep in ${line#*:}; do
		dep=$(basename "$dep")
		needs "${dep%%.ko*}"
	done
	echo "${line%%:*}"
}
for m in virtio_pci virtio_net nbd crc32c_generic ext4 xfs; do needs $m; done | awk '!seen[$0]++' >"$work/list"
while read -r file; do
	cp "$modules/$file" "$root/modules/"
	basename "$file"
done <"$work/list" >"$root/modules/list"

cat >"$root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/sbin:/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r m; do insmod /modules/$m 2>/dev/null; done </modules/list
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
sh -eu /guest && echo "GUEST DONE" || { echo "GUEST FAILED"; dmesg | tail -n 20; }
sync
poweroff -f
INIT
chmod +x "$root/init"
(cd "$root" && find . | "$cache/root/bin/busybox" cpio -o -H newc 2>/dev/null) >"$work/initrd" # not compressed: the guest is slow
timeout -k 5 "${GUEST_TIMEOUT:-300}" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -M q35 -m 768 -smp 2 \
	-nodefaults -no-user-config -display none -serial stdio -monitor none -no-reboot \
	-netdev user,id=n0,net=10.0.2.0/24,host=10.0.2.2 -device virtio-net-pci,netdev=n0,romfile= \
	-kernel "$cache"/root/boot/vmlinuz-* -initrd "$work/initrd" \
	-append "console=ttyS0 quiet panic=-1 random.trust_cpu=on no_timer_check mitigations=off" </dev/null
