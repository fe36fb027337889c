package source

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/varve-io/varve/backup/libvirt"
	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/backup/qemu"
)

// begin takes the moment of the backup, and opens the disks as they were then.
func (m *libvirtMachine) begin(ctx context.Context) (err error) {
	dir := cmp.Or(m.opt.Scratch, DefaultScratch)
	if !m.uri.Remote() {
		if m.scratch, err = openScratch(m.opt.Scratch, keyOf(m.def.UUID), m.def.UID, m.def.GID); err != nil {
			return err
		}
		dir = m.scratch.dir
		m.socket = serverSocket(keyOf(m.def.UUID))
		if err := makeServerDir(keyOf(m.def.UUID), m.def.UID, m.def.GID); err != nil {
			return err
		}
	}
	if m.uri.Transport == "tls" {
		if err := m.openFolder(dir); err != nil {
			m.notes = append(m.notes, fmt.Sprintf("the room in the scratch directory %s is not watched: %v", dir, err))
		}
	}
	m.opt.step("directories")
	var frozen *freeze
	if m.opt.Freeze {
		if frozen, err = startFreeze(m.opt.Self, m.text); err != nil {
			return err
		}
		defer func() {
			if frozen != nil {
				err = errors.Join(err, frozen.thaw())
			}
		}()
		m.opt.step("frozen")
	}
	if err := m.beginJob(dir); err != nil {
		return err
	}
	m.opt.step("moment")
	if f := frozen; f != nil {
		frozen = nil
		if err := f.thaw(); err != nil {
			return err
		}
		m.frozen = f.lasted
		m.opt.step("thawed")
	}
	config, err := m.uri.TLS()
	if err != nil {
		return err
	}
	for _, d := range m.disks {
		uri := *m.server()
		uri.Export = d.Target
		o := nbddisk.Options{Describe: d.Target + " of " + m.def.Name, TLS: config}
		if d.old != "" {
			o.Bitmaps = []string{libvirt.BitmapOf(d.Target)}
		}
		if d.disk, err = nbddisk.Open(ctx, &uri, o); err != nil {
			return err
		}
	}
	m.watch()
	m.opt.step("open")
	return nil
}

// beginJob has libvirt begin, with a checkpoint of the same moment. Where a bitmap of an old one
// is broken, its disks are read whole.
func (m *libvirtMachine) beginJob(dir string) error {
	for try := 0; ; try++ {
		m.target = m.opt.newBitmapName() // never one that libvirt has seen
		job := libvirt.Backup{Socket: m.socket}
		if m.uri.Transport == "tls" {
			job = libvirt.Backup{Host: m.uri.Host, Port: m.uri.NBDPort}
		}
		var tracked, others []string
		for _, d := range m.def.Disks {
			i := slices.IndexFunc(m.disks, func(o *libvirtDisk) bool { return o.Target == d.Target })
			if i < 0 {
				job.Disks, others = append(job.Disks, libvirt.BackupDisk{Target: d.Target, Leave: true}), append(others, d.Target)
				continue
			}
			job.Disks = append(job.Disks, libvirt.BackupDisk{
				Target: d.Target, Incremental: m.disks[i].old, Scratch: filepath.Join(dir, m.target+"-"+d.Target),
			})
			if d.Tracked() {
				tracked = append(tracked, d.Target)
			} else {
				others = append(others, d.Target)
			}
		}
		text, err := job.XML()
		if err != nil {
			return err
		}
		checkpoint := ""
		if len(tracked) > 0 {
			if checkpoint, err = libvirt.CheckpointXML(m.target, tracked, others, 0, ""); err != nil {
				return err
			}
		}
		at := time.Now()
		err = m.conn.BackupBegin(m.domain, text, checkpoint)
		switch {
		case err == nil:
			m.begun, m.moment = true, at
			return nil
		case try > 0 || !libvirt.Refused(err) || !m.dropBases(err):
			return fmt.Errorf("libvirt does not begin the backup of %s: %w; no point was made", m.def.Name, err)
		}
	}
}

// dropBases gives up the old checkpoints, and reports whether there was one.
func (m *libvirtMachine) dropBases(why error) (any bool) {
	for _, d := range m.disks {
		if d.old != "" {
			d.old, d.why, any = "", fmt.Sprintf("libvirt cannot use the checkpoint %s: %v", d.old, why), true
		}
	}
	return any
}

// makeServerDir makes the directory for the socket of an NBD server of QEMU.
func makeServerDir(key string, uid, gid int) error {
	dir := serverDir(key)
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := ownDir(dir, 0o711); err != nil {
		return fmt.Errorf("a directory for QEMU's NBD server: %w", err)
	}
	within := filepath.Dir(serverSocket(key))
	if err := os.Mkdir(within, 0o700); err != nil {
		return err
	}
	return give(within, uid, gid)
}

// room checks the room in the scratch directory, as far as it is known.
func (m *libvirtMachine) room() func() error {
	if m.scratch != nil {
		return m.scratch.check
	}
	free, reserve := m.conn.Free, int64(-1)
	if m.folder != nil {
		free, reserve = m.folderRoom(), m.reserve
	}
	return func() error {
		free := free()
		if free < 0 {
			return nil
		}
		if reserve < 0 {
			reserve = min(scratchReserve, free/scratchPart)
		}
		return checkRoom(cmp.Or(m.opt.Scratch, DefaultScratch)+" of "+m.uri.Host, free, reserve)
	}
}

// openFolder has libvirt show the scratch directory, and asks how much room there is before the backup begins.
func (m *libvirtMachine) openFolder(dir string) error {
	folder, err := m.conn.OpenFolder(dir)
	if err != nil {
		return err
	}
	free, err := folder.Free()
	if err != nil {
		return errors.Join(err, folder.Close())
	}
	m.folder, m.reserve = folder, min(scratchReserve, free/scratchPart)
	return nil
}

// folderRoom asks libvirt for the room in the scratch directory, and no more often than it can look. It is below 0 if libvirt
// does not say.
func (m *libvirtMachine) folderRoom() func() int64 {
	var known int64
	var again time.Time
	return func() int64 {
		if now := time.Now(); now.After(again) {
			var err error
			if known, err = m.folder.Free(); err != nil {
				known = -1
			}
			again = time.Now().Add(max(watchRoom, 10*time.Since(now)))
		}
		return known
	}
}

// watch ends the backup before the scratch directory is full.
func (m *libvirtMachine) watch() {
	ctx, cancel := context.WithCancel(context.Background())
	m.end, m.ended = cancel, make(chan struct{})
	go func() {
		defer close(m.ended)
		watchMoment(ctx, m.room(), m.checkJob, func(err error) {
			m.failed.Store(&err)
			_ = m.conn.AbortJob(m.domain) // release sees to it too
		})
	}()
}

// release ends the session in libvirt, but for checkpoints. A second call does nothing.
func (m *libvirtMachine) release() error {
	if m.end != nil {
		m.end()
		<-m.ended
		m.end = nil
	}
	var errs []error
	for _, d := range m.disks {
		if d.disk != nil {
			errs = append(errs, d.disk.Close())
			d.disk = nil
		}
	}
	if m.begun {
		_, err := m.endJob(m.opt.bitmapPrefix())
		errs = append(errs, err)
	}
	if m.folder != nil {
		if err := m.folder.Close(); err != nil {
			m.opt.log().Warn("a storage pool that shows the scratch directory stays in libvirt until the next backup", "domain", m.def.Name, "error", err)
		}
		m.folder = nil
	}
	if m.scratch != nil && errors.Join(errs...) == nil {
		errs = append(errs, m.scratch.close(), os.RemoveAll(serverDir(keyOf(m.def.UUID))))
		m.scratch = nil
	}
	return errors.Join(errs...)
}

// endJob ends the job of a repository and volume whose names begin with prefix, if there is one. Its
// end is awaited. dirs are where it had its scratch images.
func (m *libvirtMachine) endJob(prefix string) (dirs []string, err error) {
	end := time.Now().Add(closing)
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		job, err := m.job()
		if err != nil || job == nil || !m.isOurs(job, prefix) {
			return dirs, err
		}
		for _, d := range job.Disks {
			if dir := filepath.Dir(d.Scratch); d.Scratch != "" && !slices.Contains(dirs, dir) {
				dirs = append(dirs, dir)
			}
		}
		if err := m.conn.AbortJob(m.domain); err != nil && !libvirt.Refused(err) {
			return dirs, err
		}
		if time.Now().After(end) {
			return dirs, fmt.Errorf("libvirt has not ended the backup job of %s for %s; end it with 'virsh domjobabort %[1]s'", m.def.Name, closing)
		}
		time.Sleep(wait)
	}
}

// forgetJob ends a job and removes the directories that a backup makes for it, which the next one
// else removes. Those of another machine are libvirt's to reach, not ours.
func (m *libvirtMachine) forgetJob(prefix string) error {
	dirs, err := m.endJob(prefix)
	if err != nil || m.uri.Remote() {
		return err
	}
	key := keyOf(m.def.UUID)
	var errs []error
	for _, dir := range dirs {
		if filepath.Base(dir) == "varve-"+key { // as openScratch calls it, wherever --scratch had it
			errs = append(errs, (&scratch{dir: dir}).close())
		}
	}
	if len(dirs) > 0 {
		errs = append(errs, os.RemoveAll(serverDir(key)))
	}
	return errors.Join(errs...)
}

// noOtherJob returns ErrMachineBusy if libvirt runs a job that is not of this repository and volume. One that
// is ending, such as that of a backup that was killed, is awaited: libvirt calls it a job then, and
// describes none.
func (m *libvirtMachine) noOtherJob() error {
	const ending = 2 * time.Second
	end := time.Now().Add(ending)
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		running, err := m.conn.JobRuns(m.domain)
		if err != nil {
			return err
		}
		job, err := m.job()
		if err != nil {
			return err
		}
		if job != nil && m.isOurs(job, m.opt.bitmapPrefix()) || job == nil && !running {
			return nil
		}
		if job != nil || time.Now().After(end) {
			return fmt.Errorf("%w: libvirt runs a job on %s that is not of this repository and volume; wait for it, or end it with 'virsh domjobabort %[2]s'", ErrMachineBusy, m.def.Name)
		}
		time.Sleep(wait)
	}
}

// sweep removes what an earlier backup of this repository and volume left: all but the
// checkpoints that a point may build on.
func (m *libvirtMachine) sweep(ctx context.Context) error {
	if err := m.noOtherJob(); err != nil {
		return err
	}
	if m.opt.Freeze {
		if err := thawLeft(m.opt.Self, m.text); err != nil {
			return err
		}
	}
	if _, err := m.endJob(m.opt.bitmapPrefix()); err != nil {
		return err
	}
	if m.opt.Base == nil {
		return nil
	}
	bases := map[string]bool{}
	for _, d := range m.disks {
		bases[d.base] = true
	}
	if err := m.deleteCheckpoints(m.opt.bitmapPrefix(), func(name string) bool { return !bases[name] }); err != nil {
		if !libvirt.Refused(err) {
			return err
		}
		m.opt.log().WarnContext(ctx, "a checkpoint of an earlier backup stays in libvirt", "domain", m.def.Name, "error", err)
	}
	return nil
}

// deleteCheckpoints deletes checkpoints with their bitmaps. Where a bitmap is broken or gone, what
// libvirt knows of the checkpoint goes alone.
func (m *libvirtMachine) deleteCheckpoints(prefix string, which func(name string) bool) error {
	list, err := m.checkpoints(prefix)
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range list {
		if !which(c.Name) {
			continue
		}
		err := m.conn.CheckpointDelete(c, 0)
		if libvirt.Refused(err) {
			err = m.conn.CheckpointDelete(c, golibvirt.DomainCheckpointDeleteMetadataOnly)
		}
		if err != nil && !libvirt.Is(err, golibvirt.ErrNoDomainCheckpoint) {
			errs = append(errs, fmt.Errorf("checkpoint %s: %w", c.Name, err))
		}
	}
	return errors.Join(errs...)
}

// forgetLibvirt removes all of ours from a domain.
func forgetLibvirt(ctx context.Context, text string, opt Options) (removed []string, err error) {
	uri, err := libvirt.ParseURI(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrURI, err)
	}
	m := &libvirtMachine{uri: uri, text: text, opt: opt}
	running, err := m.connect(ctx)
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if m.lock, err = lockMachine(keyOf(m.def.UUID)); err != nil {
		return nil, fmt.Errorf("%s: %w", text, err)
	}
	prefix := opt.forgetPrefix()
	list, err := m.checkpoints(prefix)
	if err != nil {
		return nil, err
	}
	if err := m.removeOldMark(); err != nil {
		return nil, err
	}
	if why := m.unreadable(); running {
		if err := m.adoptPaused(); err != nil {
			return nil, err
		}
	} else if why != "" && len(list) > 0 { // QEMU deletes their bitmaps
		if err := m.startPaused(why); err != nil {
			opt.log().WarnContext(ctx, "bitmaps in the images may be left", "domain", m.def.Name, "error", err)
		} else {
			running = true
		}
	}
	if running {
		if err := m.forgetJob(prefix); err != nil {
			return nil, err
		}
	}
	if err := m.deleteCheckpoints(prefix, func(string) bool { return true }); err != nil {
		return nil, err
	}
	for _, c := range list {
		removed = append(removed, "checkpoint "+c.Name)
	}
	if uri.Transport == "tls" {
		pools, err := m.conn.ForgetFolders()
		for _, name := range pools {
			removed = append(removed, "storage pool "+name)
		}
		if err != nil {
			return removed, err
		}
	}
	if running && m.started != nil {
		if err := m.stopPaused(); err != nil {
			return removed, err
		}
		running = false
	}
	host := qemu.Host{}
	if uri.Remote() {
		host = sshHost{uri}.qemu()
	}
	if running || uri.Remote() && uri.Transport != "ssh" {
		return removed, nil
	}
	var errs []error
	for _, d := range m.def.Disks { // bitmaps of which libvirt does not know
		if d.Tracked() && d.Path != "" {
			names, err := forgetImage(ctx, host, d.Path, d.Format, opt)
			for _, n := range names {
				removed = append(removed, d.Target+": "+n)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("bitmaps of %s may be left: %w", d.Target, err))
			}
		}
	}
	return removed, errors.Join(errs...)
}
