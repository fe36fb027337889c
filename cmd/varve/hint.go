package main

import (
	"crypto/x509"
	"errors"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

// hints are the next steps after errors of the system, which only say what failed. The first
// row that matches by errors.Is decides.
var hints = []struct {
	is   error
	hint string
}{
	{syscall.ECONNREFUSED, "nothing listens there; check the address, and that the server runs"},
	{syscall.EHOSTUNREACH, "check the address, the route and the firewalls between"},
	{syscall.ENETUNREACH, "check the address, the route and the firewalls between"},
	{syscall.ETIMEDOUT, "check the address, and that the server answers"},
	{syscall.ECONNRESET, "the server closed the connection; its log may say why"},
	{syscall.EPIPE, "the server closed the connection; its log may say why"},
	{syscall.EADDRINUSE, "another process listens there; stop it, or choose another address"},
	{syscall.EADDRNOTAVAIL, "this machine does not have that address; choose one that it has"},
	{syscall.ENOENT, "check the path; it, or the directory it is in, is not there"},
	{syscall.ENOTDIR, "check the path; a part of it is not a directory"},
	{syscall.EISDIR, "name a file; this is a directory"},
	{syscall.EEXIST, "choose another name, or move the existing one"},
	{syscall.ENOTEMPTY, "choose another directory, or empty this one"},
	{syscall.EACCES, "run this as a user with permission, or change the permissions"},
	{syscall.EPERM, "run this as a user with permission, such as root"},
	{syscall.ENOSPC, "the disk is full; free space on it, or choose another, and run this again"},
	{syscall.EDQUOT, "the user's quota is used up; free space, or choose another disk, and run this again"},
	{syscall.EFBIG, "the file would be larger than its file system or 'ulimit -f' allows; choose another place"},
	{syscall.EROFS, "the file system is read-only; choose another place, or mount it for writing"},
	{syscall.EBUSY, "another program uses it; stop that program, or choose another"},
	{syscall.EIO, "the disk is failing; save its data; the kernel's log (dmesg) has more"},
	{syscall.EMFILE, "too many open files; raise 'ulimit -n'"},
	{syscall.ENFILE, "the machine has too many files open; raise fs.file-max, or end some programs"},
	{syscall.ENOMEM, "the machine is out of memory; end some programs"},
	{syscall.ENXIO, "the device is gone or has no medium; check it with lsblk"},
	{syscall.ENODEV, "the device is gone; check it with lsblk"},
	{syscall.ENAMETOOLONG, "choose a shorter name"},
	{os.ErrDeadlineExceeded, "check the address, and that the server answers"},
	{fs.ErrNotExist, "list what exists with 'varve ls' or 'varve find'"}, // inside a recovery point: the system's is ENOENT
}

// hint returns what to do after an error whose text does not say so. It is empty if the text
// continues after the system's words, since its author knew more, and if there is no advice.
func hint(err error) string {
	text := strings.TrimSpace(err.Error())
	for _, row := range hints {
		if !errors.Is(err, row.is) {
			continue
		}
		if strings.HasSuffix(text, row.is.Error()) {
			return row.hint
		}
		return ""
	}
	var (
		dns       *net.DNSError
		authority x509.UnknownAuthorityError
		host      x509.HostnameError
		invalid   x509.CertificateInvalidError
		refused   *nbdclient.RefusedError
		request   *nbdclient.RequestError
	)
	switch {
	case errors.Is(err, diskfs.ErrNotRecognised):
		return "the disk itself is available with 'varve restore', 'varve serve', or as disk.img of 'varve mount'"
	case errors.As(err, &dns):
		return "check the spelling of the host's name, and the name server"
	case errors.As(err, &authority):
		return "name the certificate of the authority that signed the server's"
	case errors.As(err, &host), errors.As(err, &invalid):
		return "the server needs another certificate, or must be addressed by the name in this one"
	case errors.As(err, &refused) && refused.Reply == proto.RepErrUnknown:
		return "list what exists with 'varve nbd list'"
	case errors.As(err, &refused) && refused.Reply == proto.RepErrTLSRequired:
		return "use nbds:// or nbds+unix://"
	case errors.As(err, &refused), errors.As(err, &request):
		return "the server's log may say more"
	default:
		return ""
	}
}
