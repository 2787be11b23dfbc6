package bench

import (
	"strings"
	"testing"
	"time"
)

// The threads of oneFetch. 700 is somebody else's.
const (
	testVCPU, testFaults, testReturn, testReader, testServer = 100, 101, 200, 201, 300
)

// oneFetch is what the kernel records of a fetch: the twin's vCPU 100 and fault thread 101, threads
// 200 and 201 of the destination's engine, and 300 of the source's, which starts meanwhile.
const oneFetch = `# tracer: nop
#
     vacate-lab-90      [000] ..... 10.000000: sched_process_fork: comm=vacate-lab pid=90 child_comm=vacate-lab child_pid=300
       CPU 0/KVM-100     [001] ..... 10.000100: kvm_try_async_get_page: gva = 0xa62d000, gfn = 0xa62d
       CPU 0/KVM-100     [001] d..2. 10.000105: sched_switch: prev_comm=CPU 0/KVM prev_pid=100 prev_prio=120 prev_state=S ==> next_comm=kworker/1:1 next_pid=9 next_prio=120
     kworker/1:1-9       [001] d..4. 10.000110: sched_wakeup: comm=mig/dst/fault pid=101 prio=120 target_cpu=001
     kworker/1:1-9       [001] d..2. 10.000112: sched_switch: prev_comm=kworker/1:1 prev_pid=9 prev_prio=120 prev_state=I ==> next_comm=some job next_pid=700 next_prio=120
        some job-700     [001] d..2. 10.000142: sched_switch: prev_comm=some job prev_pid=700 prev_prio=120 prev_state=R ==> next_comm=mig/dst/fault next_pid=101 next_prio=120
   mig/dst/fault-101     [001] ..... 10.000150: sys_sendmsg(fd: 0x16, msg: 0x7f6dfbdfe1e0, flags: 0x0)
   mig/dst/fault-101     [001] ..... 10.000152: sys_sendmsg -> 0x10
          vacate-200     [001] ..... 10.000170: sys_sendmsg(fd: 0x12, msg: 0x4a7f86f9a30, flags: 0x4000)
          vacate-200     [001] ..... 10.000175: sys_sendmsg -> 0x1c
          vacate-300     [000] ..... 10.000190: sys_recvfrom(fd: 0xe, ubuf: 0x33e6299780b0, size: 0x10, flags: 0x100, addr: 0x0, addr_len: 0x0)
          vacate-300     [000] ..... 10.000195: sys_recvfrom -> 0x10
          vacate-300     [000] ..... 10.000199: sys_process_vm_readv(pid: 0x1, lvec: 0x2, liovcnt: 0x1, rvec: 0x3, riovcnt: 0x1, flags: 0x0)
          vacate-300     [000] ..... 10.000205: sys_process_vm_readv -> 0x1000
          vacate-300     [000] ..... 10.000207: sys_sendmsg(fd: 0xe, msg: 0x1, flags: 0x4000)
          vacate-201     [001] ..... 10.000209: sys_recvfrom(fd: 0x11, ubuf: 0x1, size: 0xc, flags: 0x100, addr: 0x0, addr_len: 0x0)
          vacate-201     [001] ..... 10.000210: sys_recvfrom -> 0xc
          vacate-201     [001] ..... 10.000211: sys_recvfrom(fd: 0x12, ubuf: 0x1, size: 0xc, flags: 0x100, addr: 0x0, addr_len: 0x0)
          vacate-201     [001] ..... 10.000225: sys_recvfrom -> 0xc
          vacate-201     [001] ..... 10.000227: sys_recvfrom(fd: 0x12, ubuf: 0x1, size: 0x1012, flags: 0x100, addr: 0x0, addr_len: 0x0)
          vacate-201     [001] ..... 10.000229: sys_recvfrom -> 0x1012
          vacate-201     [001] ..... 10.000232: sys_ioctl(fd: 0x14, cmd: 0xc028aa03, arg: 0x4a7f89d9a48)
          vacate-201     [001] ..... 10.000242: sys_ioctl -> 0x0
          vacate-201     [001] d..2. 10.000250: sched_switch: prev_comm=vacate prev_pid=201 prev_prio=110 prev_state=S ==> next_comm=CPU 0/KVM next_pid=100 next_prio=120
       CPU 0/KVM-100     [001] ..... 10.000253: kvm_mmu_set_spte: gfn a62e spte 5e712ae67 (rwxu) level 1 at 3559eb168
       CPU 0/KVM-100     [001] ..... 10.000255: kvm_mmu_set_spte: gfn a62d spte 5e712ae67 (rwxu) level 1 at 3559eb168
`

func testFetches(t *testing.T, text string) []Fetch {
	t.Helper()
	events, err := parseTrace(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	found, err := fetches(events, parties{90: labItself, testVCPU: twinQEMU, testFaults: twinQEMU,
		testReturn: destinationEngine, testReader: destinationEngine}, [2]int{0, 1})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// The steps of a fetch add up to it, and what somebody else took of the core is told apart.
func TestFetches(t *testing.T) {
	found := testFetches(t, oneFetch)
	if len(found) != 1 {
		t.Fatalf("%d fetches: %+v", len(found), found)
	}
	f := found[0]
	want := []int{10, 32, 8, 20, 25, 4, 6, 20, 7, 10, 8, 5}
	if f.Took != 155*time.Microsecond || f.Others != 30*time.Microsecond ||
		len(f.Steps) != len(want) {
		t.Fatalf("%+v", f)
	}
	for i, s := range f.Steps {
		others := time.Duration(0)
		if i == 1 {
			others = 30 * time.Microsecond
		}
		if s.Took != time.Duration(want[i])*time.Microsecond || s.Others != others {
			t.Errorf("%s: %+v, want %d µs", FetchSteps[i].Name, s, want[i])
		}
	}
}

// A page that the source did not read for the request came with the push.
func TestFetchOfPushedPage(t *testing.T) {
	text := strings.ReplaceAll(oneFetch, "sys_process_vm_readv", "sys_writev")
	found := testFetches(t, text)
	if len(found) != 1 || found[0].Steps != nil || found[0].Took != 155*time.Microsecond {
		t.Fatalf("%+v", found)
	}
	var page strings.Builder
	FetchReport(&page, "Link 1Gbit", append(found, testFetches(t, oneFetch)...))
	for _, want := range []string{"the source answered 1, and the push was first for 1",
		"b    that thread waits for the core                           32        32         2",
		"     the whole fetch                                         155       155       125"} {
		if !strings.Contains(page.String(), want) {
			t.Errorf("the page lacks %q:\n%s", want, page.String())
		}
	}
}
