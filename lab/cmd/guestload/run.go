package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"vacate/lab/guestmodules"
	lp "vacate/lab/loadproto"
)

const reportEvery = 100 * time.Millisecond

// run is process 1. It returns only what it cannot go on with.
func run() error {
	if err := mountAll(); err != nil {
		return err
	}
	err := await()
	if err == nil {
		err = prepare()
	}
	if err == nil {
		// The load is a process like any other of a guest.
		cmd := exec.Command("/init", loadArg)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		err = fmt.Errorf("the load has ended: %v", cmd.Run())
	}
	port, portErr := openPort()
	if portErr != nil {
		return errors.Join(err, portErr)
	}
	port.Write(lp.Append(nil, lp.Fail{Text: err.Error()}))
	return err
}

// prepare has the guest ready for the load.
func prepare() error {
	if err := guestmodules.Load("/modules"); err != nil {
		return err
	}
	p, err := readParams()
	if err != nil {
		return err
	}
	if err := netUp(p.addr); err != nil {
		return err
	}
	if err := linkPorts(p.ports); err != nil {
		return err
	}
	for _, name := range p.run {
		if err := start(name); err != nil {
			return err
		}
	}
	if p.serve != nil {
		return p.serve.begin()
	}
	return nil
}

// loadArg is the first argument of the load's process.
const loadArg = "load"

// load is the main function of the load's process. It returns only what it
// cannot go on with.
func load() error {
	p, err := readParams()
	if err != nil {
		return err
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	err = work(port, p)
	port.Write(lp.Append(nil, lp.Fail{Text: err.Error()}))
	return err
}

func work(port *os.File, p params) error {
	// Reports must not wait for a worker to be preempted by the Go runtime;
	// the kernel is the better judge.
	runtime.GOMAXPROCS(p.workers + 2)

	bad := &badSink{words: make(chan lp.BadWord, reportedBad)}
	hot, sets, err := makeSets(p, bad)
	if err != nil {
		return err
	}
	switch {
	case p.scatter:
		err = scatter(sets, p.seed)
	case p.stale:
		err = errors.Join(spoil(), fill(sets))
	default:
		err = fill(sets)
	}
	if err != nil {
		return err
	}
	pages := 0
	for _, s := range sets {
		pages += s.size()
	}
	hello := lp.Hello{Version: lp.Version, Pages: uint64(pages), Workers: uint64(len(hot.workers))}
	if _, err := port.Write(lp.Append(nil, hello)); err != nil {
		return err
	}
	if p.work {
		hot.start(p.slow)
	}
	return report(port, hot, sets, bad)
}

// makeSets makes the sets, empty still; the hot one is the first of all.
func makeSets(p params, bad *badSink) (*hotSet, []set, error) {
	hot, err := newHotSet(p.seed, p.hot, p.workers, p.zipf, bad)
	if err != nil {
		return nil, nil, err
	}
	sets := []set{hot}
	if p.idle > 0 {
		s, err := newStill(lp.SetIdle, p.seed, 0, p.idle)
		if err != nil {
			return nil, nil, err
		}
		sets = append(sets, s)
	}
	for i := range p.others {
		first, end := p.other*i/p.others, p.other*(i+1)/p.others
		if end == first {
			continue
		}
		o, err := startOther(p.seed, first, end-first)
		if err != nil {
			return nil, nil, err
		}
		sets = append(sets, o)
	}
	if p.cache > 0 {
		d, err := newDisk(p.seed, p.cache)
		if err != nil {
			return nil, nil, err
		}
		sets = append(sets, d)
	}
	if p.file > 0 {
		f, err := newFile(p.seed, p.file)
		if err != nil {
			return nil, nil, err
		}
		sets = append(sets, f)
	}
	return hot, sets, nil
}

// report writes reports and obeys commands until something fails.
func report(port *os.File, hot *hotSet, sets []set, bad *badSink) error {
	commands := make(chan string)
	go func() {
		lines := bufio.NewScanner(port)
		lines.Buffer(nil, 256)
		for lines.Scan() {
			commands <- strings.TrimSpace(lines.Text())
		}
	}()
	tick := time.NewTicker(reportEvery)
	var (
		r   lp.Report
		buf []byte
	)
	for {
		buf = buf[:0]
		select {
		case w := <-bad.words:
			buf = lp.Append(buf, w)
		case <-tick.C:
			ops, touches := hot.report()
			r = lp.Report{Seq: r.Seq + 1, Clock: monotonic(), Ops: ops, Bad: bad.pages.Load(),
				Touches: touches, Before: r.Touches}
			buf = lp.Append(buf, r)
		case c := <-commands:
			switch c {
			case lp.CommandCheck:
				var err error
				if buf, err = checkAll(buf, sets, bad); err != nil {
					return err
				}
			case lp.CommandReboot:
				unix.Sync()
				return fmt.Errorf("reboot: %w", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART))
			case lp.CommandPowerOff:
				unix.Sync()
				return fmt.Errorf("power off: %w", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
			case lp.CommandPanic:
				if err := tellPanic(); err != nil {
					return fmt.Errorf("tell QEMU of a panic: %w", err)
				}
			}
			// Anything else may be half a command, torn by an eviction: the
			// host asks again.
		}
		if _, err := port.Write(buf); err != nil {
			return fmt.Errorf("write report: %w", err)
		}
	}
}

func outb(port uint16, value uint8)

// tellPanic says by QEMU's device pvpanic that the guest panicked: bit 0 of its port
// (docs/specs/pvpanic.txt). The guest's own driver does no more when a kernel panics.
func tellPanic() error {
	const port = 0x505
	runtime.LockOSThread() // the permission is the thread's
	defer runtime.UnlockOSThread()
	if err := unix.Ioperm(port, 1, 1); err != nil {
		return fmt.Errorf("ioperm: %w", err)
	}
	outb(port, 1)
	return unix.Ioperm(port, 1, 0)
}

func checkAll(b []byte, sets []set, bad *badSink) ([]byte, error) {
	var final lp.Final
	for _, s := range sets {
		r, err := s.check(bad)
		if err != nil {
			return b, err
		}
		final.Pages += r.Pages
		b = lp.Append(b, r)
	}
	final.Bad = bad.pages.Load()
	for {
		select {
		case w := <-bad.words:
			b = lp.Append(b, w)
			continue
		default:
		}
		return lp.Append(b, final), nil
	}
}
