package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// restartPause keeps a process that cannot start from using a whole core.
const restartPause = time.Second

// Server starts and reaps the processes of a node.
type Server struct {
	log   *slog.Logger
	mu    sync.Mutex
	procs map[string]*proc
	byPID map[int]*proc
}

type proc struct {
	Status
	stopped bool
	gone    chan struct{} // closed when it does not run
}

// Serve answers on the socket and reaps until the process is killed; as PID 1 of its
// namespace it has no other end.
func Serve(socket string, log *slog.Logger) error {
	s := &Server{log: log, procs: map[string]*proc{}, byPID: map[int]*proc{}}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	go s.reap()
	mux := http.NewServeMux()
	handle(mux, "start", func(_ context.Context, p Process) (any, error) { return nil, s.start(p) })
	handle(mux, "signal", func(_ context.Context, r signalRequest) (any, error) {
		return nil, s.signal(r.Name, syscall.Signal(r.Signal))
	})
	handle(mux, "stop", func(ctx context.Context, r signalRequest) (any, error) {
		return nil, s.stop(ctx, r.Name, syscall.Signal(r.Signal))
	})
	handle(mux, "status", func(context.Context, struct{}) (any, error) { return s.status(), nil })
	hs := http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	return hs.Serve(l)
}

func handle[T any](mux *http.ServeMux, what string, fn func(context.Context, T) (any, error)) {
	mux.HandleFunc("/"+what, func(w http.ResponseWriter, r *http.Request) {
		var in T
		err := json.NewDecoder(r.Body).Decode(&in)
		var out any
		if err == nil {
			out, err = fn(r.Context(), in)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_ = json.NewEncoder(w).Encode(out)
	})
}

func (s *Server) start(p Process) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(p.Argv) == 0 {
		return errors.New("nothing to run")
	}
	old := s.procs[p.Name]
	if old != nil && old.PID != 0 {
		return fmt.Errorf("%s runs already", p.Name)
	}
	pr := &proc{Status: Status{Process: p}}
	if old != nil {
		pr.Exits, pr.Last = old.Exits, old.Last
	}
	s.procs[p.Name] = pr
	return s.launch(pr)
}

// launch is called with the lock held, so that the reaper finds the new process.
func (s *Server) launch(pr *proc) error {
	path, err := exec.LookPath(pr.Argv[0])
	if err != nil {
		return err
	}
	log, err := os.OpenFile(pr.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer func() { _ = null.Close() }()
	pid, err := syscall.ForkExec(path, pr.Argv, &syscall.ProcAttr{
		Dir: "/", Env: append(os.Environ(), pr.Env...),
		Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", pr.Name, err)
	}
	pr.PID = pid
	pr.gone = make(chan struct{})
	s.byPID[pid] = pr
	return nil
}

func (s *Server) signal(name string, sig syscall.Signal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	pr := s.procs[name]
	if pr == nil || pr.PID == 0 {
		return fmt.Errorf("%s does not run", name)
	}
	return syscall.Kill(pr.PID, sig)
}

func (s *Server) stop(ctx context.Context, name string, sig syscall.Signal) error {
	s.mu.Lock()
	pr := s.procs[name]
	if pr == nil {
		s.mu.Unlock()
		return fmt.Errorf("%s was never started", name)
	}
	pr.stopped = true
	if pr.PID == 0 {
		s.mu.Unlock()
		return nil
	}
	gone := pr.gone
	err := syscall.Kill(pr.PID, sig)
	s.mu.Unlock()
	if err != nil {
		return err
	}
	select {
	case <-gone:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for %s to end: %w", name, ctx.Err())
	}
}

func (s *Server) status() map[string]Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]Status, len(s.procs))
	for n, p := range s.procs {
		out[n] = p.Status
	}
	return out
}

// reap waits for every child: those started here and those that a dead parent left.
func (s *Server) reap() {
	child := make(chan os.Signal, 1)
	signal.Notify(child, syscall.SIGCHLD)
	for range child {
		for {
			// Under the lock, so that a child is known before it can be reaped.
			s.mu.Lock()
			var ws syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
			if pid > 0 {
				s.ended(pid, ws)
			}
			s.mu.Unlock()
			if pid <= 0 && !errors.Is(err, syscall.EINTR) {
				break
			}
		}
	}
}

func (s *Server) ended(pid int, ws syscall.WaitStatus) {
	pr := s.byPID[pid]
	if pr == nil {
		return
	}
	delete(s.byPID, pid)
	pr.PID = 0
	pr.Exits++
	pr.Last = fmt.Sprintf("exit status %d", ws.ExitStatus())
	if ws.Signaled() {
		pr.Last = ws.Signal().String()
	}
	close(pr.gone)
	s.log.Info("ended", "process", pr.Name, "how", pr.Last)
	if pr.Restart && !pr.stopped {
		time.AfterFunc(restartPause, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if pr.stopped || pr.PID != 0 || s.procs[pr.Name] != pr {
				return
			}
			if err := s.launch(pr); err != nil {
				s.log.Error("restart", "process", pr.Name, "err", err)
			}
		})
	}
}
