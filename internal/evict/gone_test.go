package evict_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/link"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
	"vacate/lab"
	"vacate/lab/labtest"
)

// emptyJournal holds nothing, and accepts everything.
type emptyJournal struct{}

func (emptyJournal) Note(evict.Mark, string) error { return nil }
func (emptyJournal) Keep(string, []byte) error     { return nil }
func (emptyJournal) Kept(string) ([]byte, error)   { return nil, fs.ErrNotExist }

// answering is a destination that gives one answer, and a function that connects to it. stop
// reports whether the source said that it heard how the eviction ended.
func answering(t *testing.T, answer evict.Answer) (connect func(context.Context) (*link.Session,
	error), stop func() (heard bool)) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	sessions := link.NewListener(ln, link.ListenOptions{})
	requests, wait := evict.Requests(t.Context(), sessions.Accept,
		func(_ string, err error) { t.Error(err) }, func(err error) { t.Error(err) })
	answered, over := make(chan bool, 1), make(chan struct{})
	go func() {
		select {
		case r := <-requests:
			answered <- r.Answer(answer, "as the test has it", false, nil)
		case <-over:
			answered <- false
		}
	}()
	return link.Dialer{Addr: ln.Addr().String()}.Session, func() bool {
		close(over)
		heard := <-answered
		wait()
		sessions.Close()
		return heard
	}
}

// resumeGone resumes an eviction whose QEMU here has ended, and whose destination gives an answer.
// It reports whether the source said that it heard how the eviction ended.
func resumeGone(t *testing.T, s evict.Source,
	answer evict.Answer) (report evict.Report, heard bool, err error) {
	t.Helper()
	connect, stop := answering(t, answer)
	s.Eviction, s.VM, s.Connect = journal.NewID(), "web1", connect
	if s.Journal == nil {
		s.Journal = emptyJournal{}
	}
	report, err = s.Resume(labtest.Within(t, 10*time.Second), evict.MarkMayRun)
	return report, stop(), err
}

// A source whose QEMU has ended asks what became of the VM, too.
func TestResumeWithoutQEMU(t *testing.T) {
	s := evict.Source{QMP: filepath.Join(t.TempDir(), "none")}
	for answer, outcome := range map[evict.Answer]evict.State{evict.AnswerComplete: evict.Completed,
		evict.AnswerShutDown: evict.ShutDown} {
		if report, heard, err := resumeGone(t, s, answer); err != nil ||
			report.Outcome != string(outcome) || !heard {
			t.Errorf("%s there: %+v, %v; the destination knows that it was heard: %v", answer,
				report, err, heard)
		}
	}
	for _, answer := range []evict.Answer{evict.AnswerNeverRan, evict.AnswerLost} {
		if report, heard, err := resumeGone(t, s, answer); !errors.Is(err, evict.ErrLost) ||
			report.Outcome != "lost contact" || heard {
			t.Errorf("%s there: %+v, %v", answer, report, err)
		}
	}
}

// A QEMU that was started since, in place of the VM's, does not belong to the eviction.
func TestResumeWithAnotherQEMU(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	vm := boot(t, l, lab.Spec{MemoryMiB: 192, Load: lab.Load{HotMiB: 16}})
	before, err := process.Find(vm.PID())
	if err != nil {
		t.Fatal(err)
	}
	before.StartTime--
	if report, _, err := resumeGone(t, evict.Source{QMP: vm.QMP, Process: before},
		evict.AnswerComplete); err != nil || report.Outcome != "completed" {
		t.Errorf("%+v, %v", report, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if status, err := vm.Status(ctx); err != nil || status != "running" {
		t.Errorf("the other QEMU is %q, %v", status, err)
	}
}

// factsOf is a journal in which a source noted the process of the VM's QEMU, and the boot in which
// it ran; "" is the present boot.
func factsOf(t *testing.T, p process.Process, boot string) evict.Journal {
	t.Helper()
	if boot == "" {
		boot = process.BootID()
	}
	j := new(memoryJournal)
	facts := fmt.Sprintf(`{"process":{"PID":%d,"StartTime":%d,"Boot":%q},"ran":true}`, p.PID,
		p.StartTime, boot)
	if err := j.Keep("facts", []byte(facts)); err != nil {
		t.Fatal(err)
	}
	return j
}

// stoppedProcess stands for the QEMU of a frozen VM.
func stoppedProcess(t *testing.T) process.Process {
	t.Helper()
	cmd := exec.Command("/bin/sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	p, err := process.Find(cmd.Process.Pid)
	if err == nil {
		err = p.Stop(labtest.Within(t, 10*time.Second))
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The engine does not give up a copy that the destination still needs, or that an operator may not
// give up.
func TestDiscard(t *testing.T) {
	for answer, gone := range map[evict.Answer]bool{
		evict.AnswerRunning: false, evict.AnswerPaused: false, evict.AnswerComplete: false,
		evict.AnswerShutDown: false, evict.AnswerNeverRan: false,
		evict.AnswerLost: true, evict.AnswerUnknown: true,
	} {
		p := stoppedProcess(t)
		connect, stop := answering(t, answer)
		s := evict.Source{Eviction: journal.NewID(), VM: "web1",
			QMP: filepath.Join(t.TempDir(), "none"), Process: p, Journal: new(memoryJournal),
			Connect: connect}
		err := s.Decide(labtest.Within(t, 10*time.Second), evict.MarkMayRun, evict.Discard, "")
		stop()
		if gone != (err == nil) || !gone && !errors.Is(err, evict.ErrAnswers) || p.Alive() == gone {
			t.Errorf("the destination says %q: discard: %v; the copy lives: %v", answer, err,
				p.Alive())
		}
	}
}

// After a reboot, a process with the same number and start time is not the VM's QEMU.
func TestResumeAfterBoot(t *testing.T) {
	p := stoppedProcess(t)
	s := evict.Source{QMP: filepath.Join(t.TempDir(), "none"), Journal: factsOf(t, p, "another")}
	if report, _, err := resumeGone(t, s, evict.AnswerComplete); err != nil ||
		report.Outcome != "completed" {
		t.Errorf("%+v, %v", report, err)
	}
	if !p.Alive() {
		t.Error("a process that is not the VM's QEMU was ended")
	}
}

// If somebody let a QEMU with a frozen VM continue, the engine stops it again before anything else.
func TestStopAgain(t *testing.T) {
	monitor := runQEMU(t, "-S")
	q, err := qmp.Dial(labtest.Within(t, 10*time.Second), monitor)
	if err != nil {
		t.Fatal(err)
	}
	pid, _, err := q.Process(t.Context())
	q.Close()
	if err != nil {
		t.Fatal(err)
	}
	p, err := process.Find(pid)
	if err != nil {
		t.Fatal(err)
	}
	s := evict.Source{Eviction: journal.NewID(), VM: "web1", QMP: monitor,
		Journal: factsOf(t, p, ""),
		Connect: func(context.Context) (*link.Session, error) {
			return nil, errors.New("nobody is there")
		}}
	for what, do := range map[string]func() error{
		// there is no head
		"export": func() error {
			return s.Export(t.Context(), filepath.Join(t.TempDir(), "file"))
		},
		"resume here": func() error {
			return s.Decide(t.Context(), evict.MarkMayRun, evict.ResumeHere, "")
		},
	} {
		if err := p.Continue(); err != nil {
			t.Fatal(err)
		}
		if err := do(); err == nil {
			t.Errorf("%s: no error", what)
		}
		if stopped, err := p.Stopped(); err != nil || !stopped {
			t.Errorf("%s: QEMU is stopped: %v, %v", what, stopped, err)
		}
	}
}
