package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	lp "vacate/lab/loadproto"
)

// paramsEnv is the environment variable with the parameters that came on the serial port. The
// load's process has them from process 1.
const paramsEnv = "VACATE_PARAMS"

// await waits for the parameters, if the kernel command line says so. The lab saves the guest
// meanwhile, and starts any number of VMs from that.
func await() error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil || !slices.Contains(strings.Fields(string(cmdline)), "vacate.wait") {
		return err
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	defer port.Close()
	if _, err := port.Write(lp.Append(nil, lp.Ready{})); err != nil {
		return err
	}
	lines := bufio.NewReader(port)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return fmt.Errorf("wait for the parameters: %w", err)
		}
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), lp.CommandBegin+" ")
		if !ok {
			continue // the newline before it
		}
		now, chance, params, err := parseBegin(rest)
		if err != nil {
			return fmt.Errorf("parameters: %w", err)
		}
		if err := renew(now, chance); err != nil {
			return err
		}
		return os.Setenv(paramsEnv, params)
	}
}

func parseBegin(s string) (now time.Time, chance uint64, params string, err error) {
	clock, s, _ := strings.Cut(s, " ")
	random, params, _ := strings.Cut(s, " ")
	ns, err := strconv.ParseInt(clock, 10, 64)
	if err == nil {
		chance, err = strconv.ParseUint(random, 10, 64)
	}
	return time.Unix(0, ns), chance, params, err
}

// renew sets the clock, which stood while the guest was in a file, and has the kernel's random
// numbers differ from those of other guests out of the same file.
func renew(now time.Time, chance uint64) error {
	t := unix.NsecToTimespec(now.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &t); err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(binary.NativeEndian.AppendUint64(nil, chance)); err != nil {
		return err
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.RNDRESEEDCRNG, 0); err != nil {
		return fmt.Errorf("renew the kernel's random numbers: %w", err)
	}
	return nil
}
