// Command guestload is the whole user space of a lab guest: init, and a load. The load knows what
// every byte of its memory should be, and how long each first touch of a page took. It runs on
// Linux for x86-64 only.
//
// As process 1 it mounts what it needs, loads the modules in /modules, and starts
// the load in a process of its own. Parameters are on the kernel command line:
//
//	vacate.hot=200M     worked on all the time: pages picked at random, checked, rewritten
//	vacate.idle=200M    written once, checked at the end
//	vacate.other=50M    the same, in other processes, which wake every few seconds
//	vacate.others=4     how many other processes; default 1
//	vacate.cache=50M    read from /dev/vda through the page cache, if there is one
//	vacate.file=8M      a file in the root file system
//	vacate.access=zipf  hot pages are picked by Zipf's law; default uniform
//	vacate.place=mixed  free memory was used and is in pieces, which all take in turns
//	vacate.free=stale   free memory was used; default fresh
//	vacate.workers=2    threads working on the hot set; default one per CPU
//	vacate.mode=idle    no work at all on the hot set; default "work"
//	vacate.pace=slow    the workers rest most of the time; default full
//	vacate.seed=1       what page contents are derived from
//	vacate.port=NAME    waits for this virtio-serial port and links it in /dev/virtio-ports
//	vacate.addr=10.77.1.1/16  the network card's IPv4 address
//	vacate.run=/FILE,ARGUMENT,...  starts this program
//	vacate.serve=USER,/FILE,ARGUMENT,...  mounts the disk /dev/vdb (ext4), and starts this program
//	                    of it there, as a user by number
//
//	vacate.wait         process 1 loads no module, and waits for its parameters on the second
//	                    serial port; those on the command line do not count
//
// It takes no note of parameters without "vacate.": others' are not to have it.
//
// It reports and takes commands on the second serial port; package loadproto
// has the lines and page contents.
package main

import (
	"fmt"
	"os"
	"runtime/debug"
)

func main() {
	// No garbage to speak of, and a collection would touch pages at random.
	debug.SetGCPercent(-1)
	if len(os.Args) > 1 && os.Args[1] == otherArg {
		fmt.Fprintln(os.Stderr, "guestload: another process:", other(os.Args[2:]))
		os.Exit(1)
	}
	if len(os.Args) > 1 && os.Args[1] == loadArg {
		fmt.Fprintln(os.Stderr, "guestload: the load:", load())
		os.Exit(1)
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr,
			"guestload: runs as process 1 of a lab guest only; start guests with the lab")
		os.Exit(2)
	}
	fmt.Fprintln(os.Stderr, "guestload: process 1, cannot return:", run())
	select {} // the console has the reason; a kernel panic would only bury it
}
