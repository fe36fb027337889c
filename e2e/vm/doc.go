// Package vm tests backups of a real virtual machine: a Linux guest that writes all the time, under
// a separate libvirt, without hardware virtualization. Its tests boot it, so only "make e2e-vm"
// runs them.
package vm
