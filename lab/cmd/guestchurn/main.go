// Command guestchurn is the whole user space of a lab guest: init, and loads that allocate and free
// memory of every kind all the time. They know what every byte of it should be, and report every
// wrong one. It runs on Linux 5.10 and later, x86-64.
//
// As process 1 it mounts what it needs, loads the modules in /modules, and starts one
// process per load ("worker"). Package churnproto has what it reports and which commands
// it takes over its virtio-serial port:
//
//	quiet          stop all workers (SIGSTOP), and wait until they stand
//	go             let them run again
//	snapshot       quiet; read kpageflags, kpagecount, zoneinfo and pagemaps; have the VM
//	               paused at that very instruction (pvpanic); read kpageflags again; go
//	trace          have the kernel record what its page allocator does
//	check          verify everything there is at once, and tables that the kernel keeps
//	sync           nothing: the reply tells that all before it is done
//
// Its parameters are on the kernel command line: churn.seed=1, and churn.workers=anon,file
// for some of the workers instead of all. /dev/vda holds an empty ext4, /dev/vdb is used to
// swap; either may be missing.
package main

import (
	"fmt"
	"os"
	"strconv"
)

func main() {
	if len(os.Args) == 3 {
		index, err := strconv.Atoi(os.Args[2])
		if err == nil {
			err = work(os.Args[1], index)
		}
		fmt.Fprintf(os.Stderr, "guestchurn: worker %s: %v\n", os.Args[1], err)
		os.Exit(1)
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr,
			"guestchurn: runs as process 1 of a lab guest only; start guests with the lab")
		os.Exit(2)
	}
	fmt.Fprintln(os.Stderr, "guestchurn: process 1, cannot return:", run())
	select {} // the console has the reason; a kernel panic would only bury it
}
