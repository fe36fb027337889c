package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// What a soak consists of.
const (
	soakLatency = 30 * time.Millisecond // of a request to the store
	soakRound   = time.Minute           // of load between two readings of memory
	soakOutage  = 90 * time.Second      // of the store, once, in the middle
	soakTail    = time.Minute           // after it, in which what was waiting still fails
	soakDisk    = 1 << 30               // bytes of each disk, none of which compresses
	soakWritten = 64 << 20              // bytes that one client writes to again and again
	soakCache   = "128M"                // of blocks, in memory and on the host's disk each: most reads reach the store
	soakGrowth  = 1.1                   // of the resident set from the second sixth of the time to the last, at most
)

// soakWork is the volume that is written to.
const soakWork = "bench/work"

// soakJobs are the clients of each round: random and sequential reads, and writes to a disk of their own.
var soakJobs = []struct {
	name, export string
	args         []string
}{
	{"random reads", latest, []string{"--rw=randread", "--bs=4k", "--iodepth=16", "--norandommap", "--randrepeat=0"}},
	{"sequential reads", latest, []string{"--rw=read", "--bs=256k", "--iodepth=4"}},
	{"reads and writes", soakWork + "@latest", []string{"--rw=randrw", "--rwmixread=70", "--bs=16k", "--iodepth=8", fmt.Sprintf("--size=%d", soakWritten)}},
}

// soakMinute is what one round showed.
type soakMinute struct {
	rss    int64
	outage bool     // it, or what was waiting for it, was part of the round
	failed []string // clients with errors
	ios    int64
	moved  traffic
}

// soak loads a server of a far object store, which fails once, and draws the server's resident set in the report. It
// is an error if memory grows, if a request fails while the store answers, or if a disk reads back different in the end.
func (b *bench) soak(length time.Duration, report string) error {
	if length < 12*soakRound {
		return fmt.Errorf("a soak takes at least %v", 12*soakRound)
	}
	f, err := b.startFar()
	if err != nil {
		return err
	}
	minutes, err := b.soakOn(f, length)
	if err := errors.Join(err, f.stop()); err != nil {
		return err
	}
	c := curve{
		id: "soak", title: "Memory of a server under load", over: "minutes",
		note: fmt.Sprintf("Three clients of varve serve on S3 at %v a request for %v, by \"make soak\"; the store failed for %v in the middle. Caches of %s in memory and on disk.", soakLatency, length, soakOutage, soakCache),
	}
	values := make([]float64, len(minutes))
	for i, m := range minutes {
		c.steps, values[i] = append(c.steps, fmt.Sprint(i+1)), float64(m.rss)
	}
	c.add("varve serve", bytesOf, values)
	fmt.Fprint(os.Stderr, c.text())
	if report != "" {
		if err := writeCurves(report, "", []curve{c}); err != nil {
			return err
		}
	}
	return judge(minutes)
}

func (b *bench) soakOn(f *far, length time.Duration) ([]soakMinute, error) {
	s, err := b.newFarSiteOf(f, soakDisk, "--content-cache-size", soakCache)
	if err != nil {
		return nil, err
	}
	defer s.remove()
	if _, err := b.varve(s.conf, "backup", s.image, "--volume", soakWork); err != nil {
		return nil, err
	}
	f.delay.Store(int64(soakLatency))
	c := &chain{site: s.site}
	n, err := c.serve(volume, soakWork, "--writable", "--cache-size", soakCache)
	if err != nil {
		return nil, err
	}
	minutes, err := s.rounds(n, length)
	return minutes, errors.Join(err, n.stop())
}

// rounds loads a server until the time is over, then reads a disk back.
func (s *farSite) rounds(n *nbdServer, length time.Duration) ([]soakMinute, error) {
	var minutes []soakMinute
	start := time.Now()
	failing := length / 2 // when the outage begins, since the start
	timer := time.AfterFunc(failing, func() {
		s.f.down.Store(true)
		time.AfterFunc(soakOutage, func() { s.f.down.Store(false) })
	})
	defer timer.Stop()
	for time.Since(start) < length {
		from := time.Since(start)
		var m soakMinute
		var err error
		m.moved, err = s.f.count(func() error { m.ios, m.failed, err = clients(n.uri); return err })
		if err != nil {
			return minutes, err
		}
		if m.rss, err = memoryNow(n.cmd.Process.Pid); err != nil {
			return minutes, err
		}
		m.outage = time.Since(start) > failing && from < failing+soakOutage+soakTail
		minutes = append(minutes, m)
		fmt.Fprintf(os.Stderr, "minute %d: %s resident, %d requests of clients, %v, failed: %q, outage: %v\n",
			len(minutes), megabytes(m.rss), m.ios, m.moved, m.failed, m.outage)
	}
	back := filepath.Join(s.dir, "back.img")
	if err := sh("nbdcopy", exportURI(n.uri, latest), back); err != nil {
		return minutes, err
	}
	return minutes, sh("cmp", s.image, back)
}

// clients runs all jobs for a round side by side, and returns how many requests they made, and which had errors.
func clients(uri string) (ios int64, failed []string, err error) {
	var mu sync.Mutex
	var all sync.WaitGroup
	for _, job := range soakJobs {
		all.Go(func() {
			cmd := exec.Command("fio", append([]string{"--name=soak", "--ioengine=nbd", "--uri=" + exportURI(uri, job.export), "--time_based",
				fmt.Sprintf("--runtime=%d", int(soakRound.Seconds())), "--continue_on_error=all", "--output-format=json"}, job.args...)...)
			out, runErr := cmd.Output()
			var doc struct {
				Jobs []struct {
					Read, Write struct {
						TotalIOs int64 `json:"total_ios"`
					}
					TotalErr   int64 `json:"total_err"`
					FirstError int   `json:"first_error"`
				} `json:"jobs"`
			}
			mu.Lock()
			defer mu.Unlock()
			if jsonErr := json.Unmarshal(out[max(bytes.IndexByte(out, '{'), 0):], &doc); jsonErr != nil || len(doc.Jobs) != 1 {
				err = errors.Join(err, fmt.Errorf("fio's answer for %s: %d jobs: %w", job.name, len(doc.Jobs), errors.Join(jsonErr, runErr)))
				return
			}
			j := doc.Jobs[0]
			ios += j.Read.TotalIOs + j.Write.TotalIOs
			if j.TotalErr > 0 || runErr != nil {
				failed = append(failed, fmt.Sprintf("%s: %d requests, the first with error %d", job.name, j.TotalErr, j.FirstError))
			}
		})
	}
	all.Wait()
	return ios, failed, err
}

// judge compares the memory of the second sixth of the time with that of the last, and finds errors out of place.
func judge(minutes []soakMinute) error {
	var err error
	for i, m := range minutes {
		if len(m.failed) > 0 && !m.outage {
			err = errors.Join(err, fmt.Errorf("in minute %d, with the store answering, requests failed: %s", i+1, strings.Join(m.failed, "; ")))
		}
	}
	sixth := len(minutes) / 6
	mean := func(part []soakMinute) (sum float64) {
		for _, m := range part {
			sum += float64(m.rss) / float64(len(part))
		}
		return sum
	}
	early, late := mean(minutes[sixth:2*sixth]), mean(minutes[len(minutes)-sixth:])
	fmt.Fprintf(os.Stderr, "resident: %s in minutes %d to %d, %s in the last %d\n", bytesOf(early), sixth+1, 2*sixth, bytesOf(late), sixth)
	if late > soakGrowth*early {
		err = errors.Join(err, fmt.Errorf("the resident set grew from %s to %s", bytesOf(early), bytesOf(late)))
	}
	return err
}
