#!/bin/sh
# Runs libvirtd in a mount namespace with empty directories, so that it finds and leaves nothing of
# the machine's. Its socket is DIR/libvirt-sock. Security drivers, control groups and namespaces of
# its own would need a system that systemd started. Needs root. With DIR/tls, certificates as QEMU
# names them, it listens for TLS on the loopback interface, at the port in DIR/tls/port. DIR/small is a
# file system of 32 MiB, which only this namespace has.
#
#	unshare -m --propagation slave libvirtd.sh DIR
set -e
# What others unmount is unmounted here, too: a copy would keep their devices busy.
mount --make-rslave /
for d in /run/libvirt /var/lib/libvirt /etc/libvirt /var/log/libvirt; do
	mkdir -p $d
	mount -t tmpfs none $d
done
mkdir -p "$1/small"
mount -t tmpfs -o size=32m none "$1/small"
cat >/etc/libvirt/qemu.conf <<END
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
remember_owner = 0
END
cat >"$1/libvirtd.conf" <<END
unix_sock_dir = "$1"
auth_unix_rw = "none"
auth_unix_ro = "none"
END
listen=
if [ -d "$1/tls" ]; then
	listen=--listen
	cat >>"$1/libvirtd.conf" <<-END
		listen_tcp = 0
		listen_addr = "127.0.0.1"
		tls_port = "$(cat "$1/tls/port")"
		auth_tls = "none"
		key_file = "$1/tls/server-key.pem"
		cert_file = "$1/tls/server-cert.pem"
		ca_file = "$1/tls/ca-cert.pem"
	END
	echo "backup_tls_x509_cert_dir = \"$1/tls\"" >>/etc/libvirt/qemu.conf
fi
exec libvirtd --config "$1/libvirtd.conf" --pid-file "$1/pid" $listen
