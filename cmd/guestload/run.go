package main

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	lp "vacate/lab/loadproto"
)

const reportEvery = 100 * time.Millisecond

// run is process 1. It returns only what it cannot go on with.
func run() error {
	if err := mountAll(); err != nil {
		return err
	}
	// The drivers may not be needed at all; what needs one will say so.
	modules := loadModules()
	port, err := openPort()
	if err != nil {
		return err
	}
	err = load(port, modules)
	port.Write(lp.Append(nil, lp.Fail{Text: err.Error()}))
	return err
}

type checker interface {
	check(*badSink) (lp.SetResult, error)
}

func load(port *os.File, modules error) error {
	if modules != nil {
		return modules
	}
	if err := netUp(); err != nil {
		return err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	p, err := parseParams(string(cmdline))
	if err != nil {
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
	// Reports must not wait for a worker to be preempted by the Go runtime;
	// the kernel is the better judge.
	runtime.GOMAXPROCS(p.workers + 2)

	bad := &badSink{words: make(chan lp.BadWord, reportedBad)}
	hot, err := newHotSet(p.seed, p.hot, p.workers, bad)
	if err != nil {
		return err
	}
	sets := []checker{hot}
	pages := p.hot + p.idle + p.other + p.cache + p.file
	if p.idle > 0 {
		s, err := newStill(lp.SetIdle, p.seed, p.idle)
		if err != nil {
			return err
		}
		sets = append(sets, s)
	}
	if p.other > 0 {
		o, err := startOther(p.seed, p.other)
		if err != nil {
			return err
		}
		sets = append(sets, o)
	}
	if p.cache > 0 {
		d, err := newDisk(p.seed, p.cache, bad)
		if err != nil {
			return err
		}
		sets = append(sets, d)
	}
	if p.file > 0 {
		f, err := newFile(p.seed, p.file)
		if err != nil {
			return err
		}
		sets = append(sets, f)
	}

	hello := lp.Hello{Version: lp.Version, Pages: uint64(pages), Workers: uint64(len(hot.workers))}
	if _, err := port.Write(lp.Append(nil, hello)); err != nil {
		return err
	}
	if p.work {
		hot.start()
	}
	return report(port, hot, sets, bad)
}

// report writes reports and obeys commands until something fails.
func report(port *os.File, hot *hotSet, sets []checker, bad *badSink) error {
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
			r = lp.Report{Seq: r.Seq + 1, Clock: monotonic(), Ops: ops, Bad: bad.pages.Load(), Touches: touches, Before: r.Touches}
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
			}
			// Anything else may be half a command, torn by an eviction: the
			// host asks again.
		}
		if _, err := port.Write(buf); err != nil {
			return fmt.Errorf("write report: %w", err)
		}
	}
}

func checkAll(b []byte, sets []checker, bad *badSink) ([]byte, error) {
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
