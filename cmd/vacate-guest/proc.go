package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"vacate/internal/guest/pageclass"
)

// task is what is known of a process of the guest, of all of its threads together.
type task struct {
	pageclass.Process
	rss     int  // pages
	unknown bool // the kernel does not say when it last ran
}

// clocks is what time it is on each CPU. The scheduler's clocks of two CPUs may be far apart,
// as they leave out the time that the host took.
type clocks map[int]time.Duration

// thread is a line of /proc/PID/stat, and /proc/PID/sched: its last run on its CPU's clock.
type thread struct {
	stat
	sched
}

// stat is the part of /proc/PID/stat (man 5 proc_pid_stat) that matters here.
type stat struct {
	name      string
	running   bool // or waiting for a CPU
	kernel    bool
	threads   int
	rss       int // pages
	processor int
}

func parseStat(b []byte) (s stat, err error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return s, errors.New("no name in stat")
	}
	f := bytes.Fields(b[end+1:]) // from the third
	if len(f) < 37 {
		return s, errors.New("too few fields in stat")
	}
	s.name = string(b[open+1 : end])
	s.running = string(f[0]) == "R"
	flags, err1 := strconv.ParseUint(string(f[9-3]), 10, 64)
	threads, err2 := strconv.Atoi(string(f[20-3]))
	rss, err3 := strconv.Atoi(string(f[24-3]))
	processor, err4 := strconv.Atoi(string(f[39-3]))
	s.kernel = flags&0x200000 != 0 // PF_KTHREAD
	s.threads, s.rss, s.processor = threads, rss, processor
	return s, errors.Join(err1, err2, err3, err4)
}

// sched is the part of /proc/PID/sched (kernel/sched/debug.c) that matters here.
type sched struct {
	ran time.Duration // when it last began to run or a tick found it running, on its CPU's clock
	cpu time.Duration // CPU time in all
}

func parseSched(b []byte) (s sched, err error) {
	if s.ran, err = schedTime(b, "se.exec_start"); err != nil {
		return s, err
	}
	s.cpu, err = schedTime(b, "se.sum_exec_runtime")
	return s, err
}

// schedTime reads "NAME   :   1234.567890", in milliseconds.
func schedTime(b []byte, name string) (time.Duration, error) {
	_, b, ok := bytes.Cut(b, []byte("\n"+name))
	if !ok {
		return 0, fmt.Errorf("no %s in sched", name)
	}
	b, _, _ = bytes.Cut(b, []byte("\n"))
	_, b, _ = bytes.Cut(b, []byte(":"))
	ms, err := strconv.ParseFloat(string(bytes.TrimSpace(b)), 64)
	if err != nil || !(ms >= 0 && ms < 1e12) {
		return 0, fmt.Errorf("bad %s in sched", name)
	}
	return time.Duration(ms * float64(time.Millisecond)), nil
}

// read reads a small file of /proc into the guest's buffer, which the next read overwrites.
// There are many: os.File would cost twice as many system calls.
func (g *guest) read(name string) ([]byte, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	n, err := unix.Read(fd, g.small)
	if err != nil {
		return nil, &os.PathError{Op: "read", Path: name, Err: err}
	}
	return g.small[:n], nil
}

// userPIDs lists the processes but this one and, where the kernel lists the children of its
// kthreadd (CONFIG_PROC_CHILDREN), but its own threads. Those are most of an idle guest's.
func (g *guest) userPIDs() ([]int, error) {
	all, err := pids(g.proc)
	if err != nil {
		return nil, err
	}
	leave := map[int]bool{os.Getpid(): true}
	if f, err := os.ReadFile(g.proc + "/2/task/2/children"); err == nil {
		for _, n := range bytes.Fields(f) {
			if pid, err := strconv.Atoi(string(n)); err == nil {
				leave[pid] = true
			}
		}
	}
	return slices.DeleteFunc(all, func(pid int) bool { return leave[pid] }), nil
}

// now reads the clocks of the CPUs by running on each for a moment: a thread that has just
// got to a CPU began to run now. CPUs that it may not run on, or has no time for, are left out.
func (g *guest) now(until time.Time) clocks {
	done := make(chan clocks)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and nobody inherits its CPU.
		runtime.LockOSThread()
		c := clocks{}
		var own unix.CPUSet
		if unix.SchedGetaffinity(0, &own) == nil {
			for cpu, left := 0, own.Count(); left > 0 && time.Now().Before(until); cpu++ {
				if !own.IsSet(cpu) {
					continue
				}
				left--
				var one unix.CPUSet
				one.Set(cpu)
				if unix.SchedSetaffinity(0, &one) != nil {
					continue
				}
				if s, err := g.sched(g.proc + "/thread-self"); err == nil {
					c[cpu] = s.ran
				}
			}
		}
		done <- c
	}()
	return <-done
}

// pids lists the numbers in a directory such as /proc.
func pids(dir string) ([]int, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	var list []int
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			list = append(list, pid)
		}
	}
	return list, err
}

// cpuTimes is the CPU time of each process that has memory of its own, but this one.
func (g *guest) cpuTimes() (map[int]time.Duration, error) {
	list, err := g.userPIDs()
	if err != nil {
		return nil, err
	}
	times := map[int]time.Duration{}
	for _, pid := range list {
		dir := g.proc + "/" + strconv.Itoa(pid)
		st, err := g.stat(dir)
		if err != nil || st.kernel {
			continue
		}
		times[pid], _ = g.cpuTime(dir, st.threads)
	}
	return times, nil
}

// cpuTime sums the first number of schedstat, in nanoseconds, over the threads of a process.
func (g *guest) cpuTime(dir string, threads int) (sum time.Duration, err error) {
	dirs := []string{dir}
	if threads > 1 {
		tids, err := pids(dir + "/task")
		if err != nil {
			return 0, err
		}
		dirs = dirs[:0]
		for _, tid := range tids {
			dirs = append(dirs, dir+"/task/"+strconv.Itoa(tid))
		}
	}
	for _, d := range dirs {
		b, err := g.read(d + "/schedstat")
		if err != nil {
			return 0, err
		}
		b, _, _ = bytes.Cut(b, []byte(" "))
		ns, err := strconv.ParseInt(string(b), 10, 64)
		if err != nil {
			return 0, err
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}

func (g *guest) stat(dir string) (stat, error) {
	b, err := g.read(dir + "/stat")
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

func (g *guest) sched(dir string) (sched, error) {
	b, err := g.read(dir + "/sched")
	if err != nil {
		return sched{}, err
	}
	return parseSched(b)
}

// tasks lists the processes that have memory of their own, but this one, those first that
// matter most: on a CPU, most CPU time since before, most recently run.
func (g *guest) tasks(within time.Duration, before sample, until time.Time) ([]task, error) {
	all, err := g.userPIDs()
	if err != nil {
		return nil, err
	}
	now := g.now(until)
	type found struct {
		task
		threads []thread
	}
	var list []found
	for _, pid := range all {
		dir := g.proc + "/" + strconv.Itoa(pid)
		st, err := g.stat(dir)
		if err != nil || st.kernel {
			continue // or it has ended
		}
		f := found{task: task{rss: st.rss}}
		f.PID, f.Name, f.Recent = pid, st.name, -1
		f.threads = []thread{{stat: st}}
		if st.threads > 1 {
			tids, _ := pids(dir + "/task")
			f.threads = f.threads[:0]
			for _, tid := range tids {
				if st, err := g.stat(dir + "/task/" + strconv.Itoa(tid)); err == nil {
					f.threads = append(f.threads, thread{stat: st})
				}
				t := len(f.threads) - 1
				if t >= 0 {
					g.fill(dir+"/task/"+strconv.Itoa(tid), &f.threads[t], &f.task)
				}
			}
		} else {
			g.fill(dir, &f.threads[0], &f.task)
		}
		for _, t := range f.threads {
			now[t.processor] = max(now[t.processor], t.ran)
		}
		list = append(list, f)
	}
	tasks := make([]task, 0, len(list))
	for i := range list {
		t := &list[i].task
		t.LastRun = -1
		for _, th := range list[i].threads {
			t.CPUTime += th.cpu
			if ago := max(0, now[th.processor]-th.ran); t.LastRun < 0 || ago < t.LastRun {
				t.LastRun = ago
			}
			// Of those that may run, one that has begun within a tick is taken for running.
			t.OnCPU = t.OnCPU || th.running && now[th.processor]-th.ran <= 4*time.Millisecond
			t.Active = t.Active || th.running
		}
		t.LastRun = max(t.LastRun, 0)
		if old, ok := before.times[t.PID]; ok {
			t.Recent = max(0, t.CPUTime-old) // a thread may have ended since
		}
		if t.unknown && t.Recent == 0 {
			t.LastRun = time.Since(before.at) // at least
		}
		t.Active = t.Active || t.Recent > 0 && time.Since(before.at) <= within ||
			t.LastRun <= within
		tasks = append(tasks, *t)
	}
	slices.SortStableFunc(tasks, func(x, y task) int {
		return cmp.Or(-compareBool(x.OnCPU, y.OnCPU), -cmp.Compare(x.Recent, y.Recent),
			cmp.Compare(x.LastRun, y.LastRun))
	})
	return tasks, nil
}

func compareBool(x, y bool) int {
	switch {
	case x == y:
		return 0
	case x:
		return 1
	}
	return -1
}

// fill reads a thread's times. A kernel without /proc/PID/sched tells the CPU time only.
func (g *guest) fill(dir string, th *thread, t *task) {
	var err error
	if th.sched, err = g.sched(dir); err != nil {
		th.cpu, _ = g.cpuTime(dir, 1)
		t.unknown = true
	}
}

// sample is when CPU times were read, and what they were.
type sample struct {
	at    time.Time
	times map[int]time.Duration
}
