package points

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/internal/process"
)

// somePoint is the ID of a point for leases in these tests; it need not exist.
var somePoint = strings.Repeat("5e", 16)

// openRepository opens a repository for a test.
func openRepository(t *testing.T, opt repository.OpenOptions) *repository.Repository {
	t.Helper()
	r, err := repository.Open(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return r
}

// A lease is over with its process, not with another one that has its PID.
func TestLeaseIsOver(t *testing.T) {
	t.Parallel()
	host, _ := os.Hostname()
	now := time.Now()
	self, began := os.Getpid(), process.Start(os.Getpid())
	if began == "" {
		t.Fatal("this process has no start")
	}
	for _, tc := range []struct {
		name    string
		lease   LeaseInfo
		expired time.Duration
		over    bool
	}{
		{"held", LeaseInfo{Host: host, Boot: process.BootID(), PID: self, Started: began}, -time.Minute, false},
		{"held by a process that stood still", LeaseInfo{Host: host, Boot: process.BootID(), PID: self, Started: began}, 100 * time.Hour, false},
		{"of a process that ended", LeaseInfo{Host: host, Boot: process.BootID(), PID: deadPID(t)}, -time.Minute, true},
		{"of an earlier process of the PID", LeaseInfo{Host: host, Boot: process.BootID(), PID: self, Started: "1"}, -time.Minute, true},
		{"of another boot", LeaseInfo{Host: host, Boot: "another", PID: self, Started: began}, time.Hour, false},
		{"of another boot, long ago", LeaseInfo{Host: host, Boot: "another", PID: self, Started: began}, leaseSkew + time.Hour, true},
		{"of another host", LeaseInfo{Host: "another", Boot: process.BootID(), PID: deadPID(t)}, time.Hour, false},
	} {
		tc.lease.Expires = now.Add(-tc.expired)
		if got := tc.lease.over(now); got != tc.over {
			t.Errorf("%s: over is %v", tc.name, got)
		}
	}
}

// deadPID returns the PID of a process that has ended.
func deadPID(t *testing.T) int {
	t.Helper()
	c := exec.CommandContext(t.Context(), "true")
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	return c.Process.Pid
}

// TestLeaseOfAClockThatIsBehind: a reader whose clock is two days behind also holds the point
// by the clocks of others.
func TestLeaseOfAClockThatIsBehind(t *testing.T) {
	conf, _ := repotest.New(t).ConnectFaulty(t)
	r := openRepository(t, repository.OpenOptions{ConfigFile: conf, Password: repotest.Password})
	behind := openRepository(t, repository.OpenOptions{
		ConfigFile: conf, Password: repotest.Password, Now: func() time.Time { return time.Now().Add(-48 * time.Hour) },
	})
	lease, err := acquire(t.Context(), behind, somePoint, "a test")
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Close(t.Context())
	if ahead := behind.StorageAhead(); ahead < 47*time.Hour || ahead > 49*time.Hour {
		t.Errorf("the storage's clock is ahead by %v", ahead)
	}
	if r.StorageAhead() != 0 {
		t.Errorf("a right clock is %v behind", r.StorageAhead())
	}
	if err := r.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	held, err := leasesOn(t.Context(), r, somePoint)
	if err != nil || len(held) != 1 {
		t.Fatalf("%d leases, %v", len(held), err)
	}
	held[0].Host = "another" // for which only time decides
	if left := time.Until(held[0].Expires); left < leaseTime/2 || held[0].over(time.Now()) {
		t.Errorf("the lease expires in %v", left)
	}
}

// TestLeaseAndAClockThatIsAhead: a machine whose clock is days ahead does not take the leases of others for expired, once
// it has written and so knows the storage's time.
func TestLeaseAndAClockThatIsAhead(t *testing.T) {
	conf, _ := repotest.New(t).ConnectFaulty(t)
	r := openRepository(t, repository.OpenOptions{ConfigFile: conf, Password: repotest.Password})
	lease := newLease(r, somePoint, "a test")
	lease.info.Host = "another" // for which only time decides
	if err := lease.write(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	ahead := openRepository(t, repository.OpenOptions{
		ConfigFile: conf, Password: repotest.Password, Now: func() time.Time { return time.Now().Add(48 * time.Hour) },
	})
	own, err := acquire(t.Context(), ahead, "another point", "a test")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close(t.Context())
	if held, err := leasesOn(t.Context(), ahead, somePoint); err != nil || len(held) != 1 {
		t.Errorf("%d leases, %v", len(held), err)
	}
	if n, err := DropExpiredLeases(t.Context(), ahead); err != nil || n != 0 {
		t.Errorf("%d leases dropped, %v", n, err)
	}
}

// TestLeaseIsGivenUp: storage that does not answer does not stop a process from ending; the
// lease expires.
func TestLeaseIsGivenUp(t *testing.T) {
	conf, f := repotest.New(t).ConnectFaulty(t)
	open := func() *repository.Repository {
		return openRepository(t, repository.OpenOptions{ConfigFile: conf, Password: repotest.Password, Grace: 10 * time.Millisecond})
	}
	r := open()
	l, err := acquire(t.Context(), r, somePoint, "restore")
	if err != nil {
		t.Fatal(err)
	}
	f.Add(repotest.Fault{Op: repotest.Put, Hold: make(chan struct{})})
	ended, cancel := context.WithCancel(t.Context()) // as after Ctrl-C
	cancel()
	if err := l.release(ended, l.repo, 10*time.Millisecond); err == nil {
		t.Error("a lease on storage that hangs was given back")
	}
	f.Clear()
	if held, err := Leases(t.Context(), open()); err != nil || len(held[somePoint]) != 1 {
		t.Errorf("leases %v, %v", held, err)
	}
	if err := l.Close(ended); err != nil {
		t.Errorf("once the storage is back: %v", err)
	}
	if held, err := Leases(t.Context(), open()); err != nil || len(held) != 0 {
		t.Errorf("leases %v, %v", held, err)
	}
}
