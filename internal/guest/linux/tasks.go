package linux

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"vacate/internal/guest/pageclass"
	"vacate/internal/sys/units"
)

// taskLayout is where things are in the guest kernel's structures for tasks: task_struct
// and signal_struct (include/linux/sched.h, sched/signal.h), struct sched_entity, cfs_rq
// and rq (kernel/sched/sched.h), mm_struct (mm_types.h).
type taskLayout struct {
	size uint64 // bytes from a task's start on that hold all of the below
	comm, tasks, thread, tgid, pid, onCPU, stack, mm, signal,
	execStart, runtime, util, arrival, queue field
	threads, pastRuntime field // of signal_struct
	queueRQ              field // of cfs_rq
	clock, clockTask     field // of rq
	pgd                  field // of mm_struct
	stackSize            uint64
	initTask             uint64
}

// maxTask bounds how much of a task is read, in bytes; kernels have 3 to 10 KB.
const maxTask = 32 << 10

// learnTasks finds out how the guest's tasks look.
func (g *Guest) learnTasks() error {
	l := taskLayout{}
	var errs []error
	var ok bool
	if l.initTask, ok = g.symbol("init_task"); !ok {
		errs = append(errs, errors.New("no symbol init_task"))
	}
	need := func(to *field, size uint64, name string, paths ...string) {
		f, err := g.types.anyField(name, paths...)
		if err == nil && f.size != size && size != 0 {
			err = fmt.Errorf("%s of %s has %d bytes: want %d", paths[0], name, f.size, size)
		}
		if err == nil && f.offset+f.size > maxTask {
			err = fmt.Errorf("%s of %s is too far from its start", paths[0], name)
		}
		if err != nil {
			errs = append(errs, err)
		}
		*to = f
		if name == "task_struct" {
			l.size = max(l.size, f.offset+f.size)
		}
	}
	const task = "task_struct"
	need(&l.comm, 16, task, "comm")
	need(&l.tasks, 16, task, "tasks")
	need(&l.thread, 16, task, "thread_node")
	need(&l.tgid, 4, task, "tgid")
	need(&l.pid, 4, task, "pid")
	need(&l.onCPU, 0, task, "on_cpu") // an int, from 7.0 on a byte
	need(&l.stack, 8, task, "stack")
	need(&l.mm, 8, task, "mm")
	need(&l.signal, 8, task, "signal")
	need(&l.execStart, 8, task, "se.exec_start")
	need(&l.runtime, 8, task, "se.sum_exec_runtime")
	need(&l.util, 8, task, "se.avg.util_avg")
	need(&l.arrival, 8, task, "sched_info.last_arrival")
	need(&l.queue, 8, task, "se.cfs_rq")
	need(&l.threads, 16, "signal_struct", "thread_head")
	need(&l.pastRuntime, 8, "signal_struct", "sum_sched_runtime")
	need(&l.queueRQ, 8, "cfs_rq", "rq")
	need(&l.clock, 8, "rq", "clock")
	need(&l.clockTask, 8, "rq", "clock_task")
	need(&l.pgd, 8, "mm_struct", "pgd")
	if max(l.clock.offset, l.clockTask.offset)-min(l.clock.offset, l.clockTask.offset)+
		8 > maxClockSpan {
		errs = append(errs, errors.New("the clocks of rq are far apart"))
	}
	// THREAD_SIZE is in no structure, but x86-64 has stacks for interrupts as large as those
	// of tasks (arch/x86/include/asm/page_64_types.h).
	var err error
	if l.stackSize, err = g.types.size("irq_stack"); err == nil &&
		(l.stackSize%units.PageSize != 0 || l.stackSize > 1<<20) {
		err = fmt.Errorf("stacks of %d bytes", l.stackSize)
	}
	if err := errors.Join(append(errs, err)...); err != nil {
		return fmt.Errorf("its tasks cannot be read: %w", err)
	}
	g.census.layout = l
	return nil
}

// thread is a task of the guest.
type thread struct {
	stack uint64
	queue uint64 // its cfs_rq
	// ns of its CPU's clock_task: when its run time was last added up; 0 after a move to another
	// CPU
	execStart uint64
	arrival   uint64 // ns of its CPU's clock: when it was last given a CPU
	runtime   uint64 // ns
	util      uint64 // share of a CPU, of 1024, as it was when its run time was last added up
	process   int
	onCPU     bool
}

// process is a thread group. What is known of it is put together from its threads.
type process struct {
	pageclass.Process
	mm     uint64 // 0 for threads of the kernel
	signal uint64
	number int // as threads know it
}

// Limits of what is followed. A process is one of pageclass.Page.Owner.
const (
	maxProcesses = 1<<16 - 2
	maxThreads   = 1 << 18
)

// readTasks fills census.threads and census.processes by the list of all processes that
// begins at init_task, and the list of each one's threads. The idle tasks (process 0) are
// in census.threads only, that of the first CPU; the others are in no list. Lists that
// lead nowhere, in circles or on for ever end the part they are in.
func (g *Guest) readTasks(ctx context.Context) error {
	c := &g.census
	l := &c.layout
	c.threads, c.processes = c.threads[:0], c.processes[:0]
	clear(c.seen)
	if uint64(len(c.task)) < l.size {
		c.task = make([]byte, l.size)
	}
	t := c.task[:l.size]
	leader := l.initTask
	for {
		if err := g.read(t, leader); err != nil {
			c.doubt("the list of tasks breaks off: %v", err)
			return nil
		}
		c.seen[leader] = struct{}{}
		next := u64(t[l.tasks.offset:]) - l.tasks.offset
		owner := -1
		if leader != l.initTask {
			if len(c.processes) >= maxProcesses {
				c.doubt("more than %d processes", maxProcesses)
				return nil
			}
			owner = len(c.processes)
			name := t[l.comm.offset:][:l.comm.size]
			if i := bytes.IndexByte(name, 0); i >= 0 {
				name = name[:i]
			}
			p := process{signal: u64(t[l.signal.offset:]), number: owner}
			p.PID, p.Name = int(int32(u32(t[l.tgid.offset:]))), string(name)
			c.processes = append(c.processes, p)
		}
		signal := u64(t[l.signal.offset:])
		head := signal + l.threads.offset
		alone := u64(t[l.thread.offset:]) == head && u64(t[l.thread.offset+8:]) == head
		c.addThread(t, owner)
		if !alone && owner >= 0 {
			if err := g.readThreads(ctx, t, leader, head, owner); err != nil {
				return err
			}
		}
		switch _, again := c.seen[next]; {
		case next == l.initTask:
			return nil
		case again:
			c.doubt("the list of tasks runs in a circle")
			return nil
		case len(c.processes)%256 == 255:
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		leader = next
	}
}

// readThreads adds the threads of the process owner but for its leader, which was added. t
// is room for a task.
func (g *Guest) readThreads(ctx context.Context, t []byte, leader, head uint64, owner int) error {
	c := &g.census
	l := &c.layout
	pid := c.processes[owner].PID
	node, err := g.readU64(head)
	for met := false; err == nil && node != head; node = u64(t[l.thread.offset:]) {
		task := node - l.thread.offset
		_, again := c.seen[task]
		if task == leader {
			again, met = met, true
		}
		switch {
		case again:
			c.doubt("the threads of process %d run in a circle", pid)
			return nil
		case len(c.threads) >= maxThreads:
			c.doubt("more than %d threads", maxThreads)
			return nil
		case len(c.threads)%256 == 255 && ctx.Err() != nil:
			return ctx.Err()
		}
		c.seen[task] = struct{}{}
		if err = g.read(t, task); err != nil {
			break
		}
		if u64(t[l.signal.offset:]) != c.processes[owner].signal {
			c.doubt("process %d has a thread of another", pid)
			return nil
		}
		if task != leader {
			c.addThread(t, owner)
		}
	}
	if err != nil {
		c.doubt("the threads of process %d: %v", pid, err)
	}
	return nil
}

func (c *census) addThread(t []byte, owner int) {
	l := &c.layout
	c.threads = append(c.threads, thread{
		stack: u64(t[l.stack.offset:]), queue: u64(t[l.queue.offset:]),
		execStart: u64(t[l.execStart.offset:]),
		arrival:   u64(t[l.arrival.offset:]), runtime: u64(t[l.runtime.offset:]),
		util:    u64(t[l.util.offset:]),
		process: owner, onCPU: t[l.onCPU.offset] != 0, // 0 or 1, so the first byte tells
	})
	if owner >= 0 {
		// The first thread may be gone, and its address space with it, while others live.
		if mm := u64(t[l.mm.offset:]); mm != 0 && c.processes[owner].mm == 0 {
			c.processes[owner].mm = mm
		}
	}
}

// rankProcesses puts those that used the CPU most of late first, then those that ran last.
func (c *census) rankProcesses() {
	slices.SortStableFunc(c.processes, func(a, b process) int {
		return cmp.Or(cmp.Compare(b.Recent, a.Recent), cmp.Compare(a.LastRun, b.LastRun),
			cmp.Compare(a.PID, b.PID))
	})
	c.ranks = slices.Grow(c.ranks[:0], len(c.processes))[:len(c.processes)]
	for i := range c.processes {
		c.ranks[c.processes[i].number] = i
	}
}

// gather fills dst with size bytes each from the kernel's virtual addresses in at, all
// in one call. What cannot be read is zero: one wild pointer must not spoil the others.
func (g *Guest) gather(dst []byte, size uint64, at []uint64) error {
	c := &g.census
	list := c.ranges[:0]
	c.lost = c.lost[:0]
	for i, va := range at {
		mark := len(list)
		for left := size; left > 0; {
			addr, n, err := g.space.translate(va)
			n = min(n, left)
			if err != nil || va>>63 == 0 || inRAM(g.mem.Extents(), Range{addr, n}) < 0 {
				// Read the top page table in its place, which is there, and forget it.
				c.lost = append(c.lost, i)
				list = list[:mark]
				for left = size; left > 0; left -= n {
					n = min(left, units.PageSize)
					list = append(list, Range{g.space.root, n})
				}
				break
			}
			list = append(list, Range{addr, n})
			va, left = va+n, left-n
		}
	}
	c.ranges = list
	if err := g.mem.ReadRanges(dst[:size*uint64(len(at))], list); err != nil {
		return err
	}
	for _, i := range c.lost {
		clear(dst[uint64(i)*size:][:size])
	}
	return nil
}
