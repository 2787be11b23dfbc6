package evict_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"path/filepath"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/link"
	"vacate/internal/sys/process"
	"vacate/lab"
	"vacate/lab/labtest"
)

// emptyJournal has nothing, and takes everything.
type emptyJournal struct{}

func (emptyJournal) Note(evict.Mark, string) error { return nil }
func (emptyJournal) Keep(string, []byte) error     { return nil }
func (emptyJournal) Kept(string) ([]byte, error)   { return nil, fs.ErrNotExist }

// resumeGone resumes an eviction whose QEMU here has ended, and whose destination gives an answer.
func resumeGone(t *testing.T, s evict.Source, answer evict.Answer) (evict.Report, error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	sessions := link.NewListener(ln, link.ListenOptions{})
	defer sessions.Close()
	requests, wait := evict.Requests(t.Context(), sessions.Accept, func(_ string, err error) { t.Error(err) }, func(err error) { t.Error(err) })
	defer wait()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		r := <-requests
		r.Answer(answer, "as the test has it", false, nil)
	}()
	s.Eviction, s.VM, s.Journal, s.Connect = journal.NewID(), "web1", emptyJournal{}, link.Dialer{Addr: ln.Addr().String()}.Session
	report, err := s.Resume(labtest.Within(t, 10*time.Second), evict.MarkMayRun)
	<-answered
	return report, err
}

// A source whose QEMU has ended asks what became of the VM, too.
func TestResumeWithoutQEMU(t *testing.T) {
	s := evict.Source{QMP: filepath.Join(t.TempDir(), "none")}
	if report, err := resumeGone(t, s, evict.AnswerComplete); err != nil || report.Outcome != "completed" {
		t.Errorf("complete there: %+v, %v", report, err)
	}
	for _, answer := range []evict.Answer{evict.AnswerNeverRan, evict.AnswerLost} {
		if report, err := resumeGone(t, s, answer); !errors.Is(err, evict.ErrLost) || report.Outcome != "lost contact" {
			t.Errorf("%s there: %+v, %v", answer, report, err)
		}
	}
}

// A QEMU that was started since where the VM's was is none of the eviction's.
func TestResumeWithAnotherQEMU(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	vm := boot(t, l, lab.Spec{MemoryMiB: 192, Load: lab.Load{HotMiB: 16}})
	before, err := process.Find(vm.PID())
	if err != nil {
		t.Fatal(err)
	}
	before.StartTime--
	if report, err := resumeGone(t, evict.Source{QMP: vm.QMP, Process: before}, evict.AnswerComplete); err != nil || report.Outcome != "completed" {
		t.Errorf("%+v, %v", report, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if status, err := vm.Status(ctx); err != nil || status != "running" {
		t.Errorf("the other QEMU is %q, %v", status, err)
	}
}
