package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const chainDepth = 16

// chain is one history of the disk, as recovery points and as a chain of qcow2
// files compressed with zstd.
type chain struct {
	*site
	raw string // content of the newest of both
	top string // the newest qcow2 file
}

// newChain makes the disk and 15 increments of 300 scattered pages each.
func (b *bench) newChain() (*chain, error) {
	s, err := b.newSite()
	if err != nil {
		return nil, err
	}
	c := &chain{site: s, raw: filepath.Join(s.dir, "now.img")}
	if err := sh("cp", "--sparse=always", b.disk, c.raw); err != nil {
		return c, err
	}
	rng := rand.New(rand.NewPCG(16, 4096))
	for n := range chainDepth {
		changed := map[int64]bool{} // offsets of clusters
		if n > 0 {
			for range 300 {
				off := rng.Int64N(diskBytes/pageBytes) * pageBytes
				if err := poke(c.raw, off); err != nil {
					return c, err
				}
				changed[off/clusterBytes*clusterBytes] = true
			}
		}
		if _, err := s.save(c.raw); err != nil {
			return c, err
		}
		if err := c.addLayer(n, changed); err != nil {
			return c, err
		}
	}
	return c, nil
}

// clusterBytes is qcow2's unit.
const clusterBytes = 64 << 10

// addLayer adds a qcow2 file with the changed clusters to the chain, the first one with
// all.
func (c *chain) addLayer(n int, changed map[int64]bool) error {
	next := filepath.Join(c.dir, fmt.Sprintf("layer-%d.qcow2", n))
	if n == 0 {
		c.top = next
		return sh("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", c.raw, next)
	}
	if err := sh("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", "-b", c.top, "-F", "qcow2", next); err != nil {
		return err
	}
	c.top = next
	dir, err := os.MkdirTemp(c.dir, "clusters-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	raw, err := os.Open(c.raw)
	if err != nil {
		return err
	}
	defer raw.Close()
	args := []string{"-f", "qcow2"}
	p := make([]byte, clusterBytes)
	for off := range changed {
		if _, err := raw.ReadAt(p, off); err != nil {
			return err
		}
		file := filepath.Join(dir, fmt.Sprint(off))
		if err := os.WriteFile(file, p, 0o600); err != nil {
			return err
		}
		args = append(args, "-c", fmt.Sprintf("write -q -c -s %s %d %d", file, off, clusterBytes))
	}
	return sh("qemu-io", append(args, next)...)
}

// nbdServer is a running server and the URI of the disk.
type nbdServer struct {
	cmd *exec.Cmd
	uri string
}

func (n *nbdServer) stop() error {
	_ = n.cmd.Process.Signal(syscall.SIGTERM)
	err := n.cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && !exit.Exited() { // qemu-nbd may end by the signal
		return nil
	}
	return err
}

func (c *chain) serveVarve(args ...string) (*nbdServer, error) {
	return c.serve(append([]string{latest}, args...)...)
}

// serve starts a server of points.
func (c *chain) serve(args ...string) (*nbdServer, error) {
	socket := filepath.Join(c.dir, "varve.sock")
	cmd := exec.Command(c.b.cfg.varve, append([]string{"--config", c.conf, "serve", "-o", "json", "--listen", "unix:" + socket}, args...)...)
	cmd.Env = c.b.env()
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	var ready any
	if err := json.NewDecoder(out).Decode(&ready); err != nil {
		return nil, fmt.Errorf("varve serve: %w", errors.Join(err, cmd.Wait()))
	}
	return &nbdServer{cmd, "nbd+unix:///?socket=" + socket}, nil
}

// exportURI is the URI of one of several exports.
func exportURI(uri, export string) string {
	return strings.Replace(uri, "nbd+unix:///?", "nbd+unix:///"+export+"?", 1)
}

// servePeer starts a server that writes its process ID once it listens.
func (c *chain) servePeer(name string, args ...string) (*nbdServer, error) {
	socket, pid := filepath.Join(c.dir, name+".sock"), filepath.Join(c.dir, name+".pid")
	_ = os.Remove(socket)
	_ = os.Remove(pid)
	for i, a := range args {
		switch a {
		case "SOCKET":
			args[i] = socket
		case "PID":
			args[i] = pid
		}
	}
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	for {
		if st, err := os.Stat(pid); err == nil && st.Size() > 0 {
			return &nbdServer{cmd, "nbd+unix:///?socket=" + socket}, nil
		}
		if err := syscall.Kill(cmd.Process.Pid, 0); err != nil {
			return nil, fmt.Errorf("%s: %w", name, cmd.Wait())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (c *chain) serveNbdkit() (*nbdServer, error) {
	return c.servePeer("nbdkit", "-f", "-r", "-U", "SOCKET", "-P", "PID", "file", c.raw)
}

func (c *chain) serveQemu() (*nbdServer, error) {
	return c.servePeer("qemu-nbd", "-r", "-t", "-e", "64", "-f", "qcow2", "-k", "SOCKET", "--pid-file", "PID", c.top)
}

func copyToNull(uri string) (time.Duration, error) {
	start := time.Now()
	err := sh("nbdcopy", "--connections=4", uri, "null:")
	return time.Since(start), err
}

// randomReads returns the rate of 4 KiB reads at depth 16.
func randomReads(uri string, args ...string) (float64, error) {
	out, err := exec.Command("fio", append([]string{"--name=r", "--ioengine=nbd", "--uri=" + uri, "--rw=randread", "--bs=4k",
		"--iodepth=16", "--output-format=json"}, args...)...).Output()
	if err != nil {
		return 0, fmt.Errorf("fio: %w", err)
	}
	var doc struct {
		Jobs []struct {
			Read struct {
				IOPS float64 `json:"iops"`
			} `json:"read"`
		} `json:"jobs"`
	}
	// fio may print something before its answer.
	if err := json.Unmarshal(out[max(bytes.IndexByte(out, '{'), 0):], &doc); err != nil || len(doc.Jobs) != 1 {
		return 0, fmt.Errorf("fio's answer: %d jobs, %w", len(doc.Jobs), err)
	}
	return doc.Jobs[0].Read.IOPS, nil
}

// readSet makes a server read and cache the measured set.
func readSet(uri string, set []string) error {
	return sh("fio", append([]string{"--name=w", "--ioengine=nbd", "--uri=" + uri, "--rw=read", "--bs=1M", "--iodepth=4", "--output=/dev/null"}, set...)...)
}

// fresh measures on a server started for each run.
func fresh[T any](start func() (*nbdServer, error), measure func(uri string) (T, error)) func() (T, error) {
	return func() (v T, err error) {
		settle()
		n, err := start()
		if err != nil {
			return v, err
		}
		v, err = measure(n.uri)
		return v, errors.Join(err, n.stop())
	}
}

func nbdRows(b *bench) ([]result, error) {
	c, err := b.newChain()
	if c != nil {
		defer c.remove()
	}
	if err != nil {
		return nil, err
	}
	const chainName = "qemu-nbd over a 16-deep qcow2 chain, zstd"
	cold := func() (*nbdServer, error) { return c.serveVarve() }
	warm := func() (*nbdServer, error) { return c.serveVarve("--cache-size", "4G") }
	var out []result

	a, p, err := b.pair(fresh(cold, walled(copyToNull)), fresh(c.serveQemu, walled(copyToNull)))
	if err != nil {
		return nil, err
	}
	out = append(out, times("NBD sequential read of a whole point, nothing cached (nbdcopy, 4 connections)", chainName, atMost(0.5, "<= 0.5 x its time"),
		"the server's time is decoding, on all CPUs, which the client wants too: of its cycles a fifth is S2's decoder, a quarter copying blocks out of Kopia's buffers into fresh memory (page faults above all), an eighth opening and reading packs, a seventh the socket, a twentieth decryption", a, p))

	second := func(uri string) (time.Duration, error) {
		if _, err := copyToNull(uri); err != nil {
			return 0, err
		}
		return copyToNull(uri)
	}
	if a, p, err = b.pair(fresh(warm, walled(second)), fresh(c.serveNbdkit, walled(second))); err != nil {
		return nil, err
	}
	out = append(out, times("the same, second pass", "nbdkit file on the raw image", atMost(1.3, "<= 1.3 x its time"),
		"both sides copy the disk through the socket once; ours sends block by block from the cache, which needs more, smaller writes", a, p))

	rate := func(args ...string) func(uri string) (float64, error) {
		return func(uri string) (float64, error) { return randomReads(uri, args...) }
	}
	set := []string{"--size=256M", "--offset=64M"}
	cached := func(uri string) (float64, error) {
		if err := readSet(uri, set); err != nil {
			return 0, err
		}
		return randomReads(uri, append(set, "--time_based", "--runtime=5")...)
	}
	r, err := b.rates(fresh(warm, cached), fresh(c.serveNbdkit, cached))
	if err != nil {
		return nil, err
	}
	r.work, r.peerName, r.goal = "NBD random reads of 4 KiB, depth 16, cached working set of 256 MiB", "nbdkit file on the raw image", atLeast(1, ">= 1.0 x")
	out = append(out, r)

	few := rate("--size=4G", "--number_ios=30000", "--norandommap", "--randrepeat=1")
	if r, err = b.rates(fresh(warm, few), fresh(c.serveQemu, few)); err != nil {
		return nil, err
	}
	r.work, r.peerName, r.goal = "the same over the whole disk, nothing decoded yet, 30,000 reads", chainName, atLeast(1, ">= 1.0 x")
	r.why = "a read of 4 KiB costs decoding a block of 128 KiB, where qemu decodes a cluster of 64 KiB; the profile is that of the sequential read: S2's decoder a fifth, copies into fresh memory and their page faults a quarter, opening and reading packs an eighth; the cache keeps what was decoded, so the rate rises with every read"
	return append(out, r), nil
}

// walled makes a sample of a measured time; the client's CPU time says nothing about the
// servers.
func walled(f func(uri string) (time.Duration, error)) func(uri string) (sample, error) {
	return func(uri string) (sample, error) {
		d, err := f(uri)
		return sample{wall: d}, err
	}
}

// times makes a row of our time as a fraction of the peer's.
func times(work, peerName string, g goal, why string, ours, peer []sample) result {
	r := slower(work, peerName, g, why, ours, peer)
	r.cpu = "-"
	return r
}

// rates runs both in turn and compares the medians of their rates.
func (b *bench) rates(ours, peer func() (float64, error)) (result, error) {
	var a, p []float64
	for range b.cfg.runs {
		x, err := ours()
		if err != nil {
			return result{}, err
		}
		y, err := peer()
		if err != nil {
			return result{}, err
		}
		a, p = append(a, x), append(p, y)
	}
	mid := func(s []float64) float64 { s = slices.Clone(s); slices.Sort(s); return s[len(s)/2] }
	r := result{
		varve: fmt.Sprintf("%.0f /s", mid(a)), peer: fmt.Sprintf("%.0f /s", mid(p)), ratio: fmt.Sprintf("%.2f x", mid(a)/mid(p)),
		cpu: "-", reached: mid(a) >= mid(p),
	}
	var odd, even []float64
	for i, v := range p {
		if i%2 == 0 {
			even = append(even, v)
		} else {
			odd = append(odd, v)
		}
	}
	if len(odd) > 0 {
		if x, y := mid(odd), mid(even); max(x, y) > 1.1*min(x, y) {
			r.note = fmt.Sprintf("noisy: the peer against itself %.2f x", max(x, y)/min(x, y))
		}
	}
	return r, nil
}

// poke writes one page of data that differs by its place.
func poke(path string, off int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	p := make([]byte, pageBytes)
	for i := range p {
		p[i] = byte(int64(i)*7 + off>>12)
	}
	_, err = f.WriteAt(p, off)
	return errors.Join(err, f.Close())
}
