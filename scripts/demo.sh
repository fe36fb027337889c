#!/usr/bin/env bash
# demo.sh VARVE: the tour of the README on a real ext4 disk: a full backup, three
# increments while files change, the chain, a file out of an old recovery point,
# an old recovery point restored byte-identical, and what each step cost.
# Needs root, to mount.
set -euo pipefail
varve=$(realpath "$1")
dir=$(mktemp -d "${TMPDIR:-/var/tmp}/varve-demo.XXXXXX")
cleanup() {
	mountpoint -q "$dir/mnt" && umount "$dir/mnt"
	rm -rf "$dir"
}
trap cleanup EXIT
cd "$dir"
export HOME=$dir VARVE_CONFIG=$dir/repository.config VARVE_PASSWORD='a password for the demo'
# unmount takes the file system away and waits for its loop device, which the kernel may
# detach a moment later.
unmount() {
	umount "$1"
	for _ in $(seq 100); do
		losetup -j "$dir/disk.img" | grep -q . || return 0
		sleep 0.1
	done
	echo "the loop device of $dir/disk.img is still attached after 10 s" >&2
	return 1
}
bold() { printf '\n\033[1m%s\033[0m\n' "$*"; }
# step COMMAND...: shows a command, runs it, and says what it cost.
step() {
	printf '$ %s\n' "${*/#$varve/varve}"
	local start end
	start=$(date +%s%N)
	"$@"
	end=$(date +%s%N)
	printf '  \033[2m[%d ms, repository %s]\033[0m\n' $(((end - start) / 1000000)) "$(du -sh "$dir/repo" 2>/dev/null | cut -f1)"
}

bold "A disk with an ext4 file system and real files"
truncate -s 2G disk.img
mkfs.ext4 -q disk.img
mkdir mnt
mount -o loop disk.img mnt
cp -a /usr/share/doc mnt/documents
cp -aL /usr/bin mnt/programs 2>/dev/null || true
echo "the first version of the notes" >mnt/notes.txt
unmount mnt
du -h --apparent-size disk.img | sed 's/^/  /'
du -h disk.img | sed 's/^/  on disk /'

bold "A repository"
step "$varve" repo create filesystem --path "$dir/repo"

bold "A full backup"
step "$varve" backup disk.img --volume shop/db
sum0=$(sha256sum <disk.img)

for i in 1 2 3; do
	bold "Files change, and increment $i"
	mount -o loop disk.img mnt
	echo "version $((i + 1)) of the notes" >mnt/notes.txt
	head -c $((i * 700000)) /dev/urandom >"mnt/new-$i.bin"
	rm -rf "mnt/documents/$(find mnt/documents -mindepth 1 -maxdepth 1 -printf '%f\n' | sort | sed -n "$((i * 10))p")"
	unmount mnt
	step "$varve" backup disk.img --volume shop/db
done

bold "The chain"
step "$varve" list --volume shop/db

bold "What changed between two points"
echo "$ varve diff shop/db@latest~1 shop/db@latest | tail -n 5"
"$varve" diff shop/db@latest~1 shop/db@latest | tail -n 5

bold "A file out of the oldest recovery point, without restoring or mounting anything"
step "$varve" cat shop/db@latest~3:/notes.txt
[ "$("$varve" cat shop/db@latest~3:/notes.txt)" = "the first version of the notes" ]

bold "The oldest recovery point, restored"
step "$varve" restore shop/db@latest~3 back.img --verify
sum1=$(sha256sum <back.img)
[ "$sum0" = "$sum1" ] && echo "  byte-identical to the disk as it was: ${sum1%% *}"

bold "The restored disk, turned into the newest point by writing what differs"
step "$varve" restore shop/db@latest back.img --delta --base shop/db@latest~3
cmp disk.img back.img && echo "  byte-identical to the disk as it is"

bold "Everything that is stored, checked"
step "$varve" verify --read 100%
bold "Done"
