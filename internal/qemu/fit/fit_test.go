package fit

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func tree(t testing.TB, name string) Devices {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".qtree"))
	if err != nil {
		t.Fatal(err)
	}
	d, err := parseTree(string(b))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Check(); err != nil {
		t.Fatal(err)
	}
	return d
}

// A machine type has the same devices in all versions of QEMU that know it, in whatever order they
// are told.
func TestVersions(t *testing.T) {
	for _, machine := range []string{"pc-i440fx-7.2", "pc-q35-7.2"} {
		var all []Devices
		for _, version := range []string{"7.2", "10", "11"} {
			all = append(all, tree(t, machine+"-"+version))
		}
		for _, a := range all {
			for _, b := range all {
				says(t, a.Against(b), nil)
			}
		}
	}
	r := tree(t, "pc-i440fx-7.2-7.2").Against(tree(t, "pc-q35-7.2-7.2"))
	says(t, r, []string{"i440FX-pcihost", "q35-pcihost", "hpet-intcap"})
}

// Of devices that hang on one that is missing, nothing is said.
func TestWhatHangsOnIt(t *testing.T) {
	whole := tree(t, "pc-q35-7.2-7.2")
	less := whole
	less.List = slices.DeleteFunc(slices.Clone(whole.List),
		func(d Device) bool { return strings.Contains(whole.name(d), "addr 07.0") })
	says(t, whole.Against(less),
		[]string{
			`only the source has [pcie-root-port "rp1" (1b36:000c) at q35-pcihost/addr 07.0/port 0], only the destination []`})
}

func TestHeldDevices(t *testing.T) {
	d := Devices{List: []Device{{ID: "gpu"}, {Kind: 1}, {Kind: 2}, {ID: "m", Kind: 3},
		{ID: "n", Kind: 4}},
		Kinds: []Kind{{Type: "vfio-pci"}, {Type: "vfio-pci"}, {Type: "virtio-net-pci"},
			{Type: "virtio-mem-pci", Properties: []Property{{"x-early-migration", "true"}}},
			{Type: "virtio-mem-pci", Properties: []Property{{"x-early-migration", "false"}}}}}
	r := d.Held()
	if len(r) != 3 || r[0].Text != `vfio-pci "gpu" is hardware of this host, passed through` ||
		r[0].Remedy != "unplug it: `device_del gpu` in QEMU's monitor" ||
		r[1].Remedy != "shut the VM down and start it without this device" ||
		!strings.Contains(r[2].Text, `virtio-mem-pci "m" sends state`) {
		t.Errorf("%q", r)
	}
}

// Facts beyond all bounds are refused.
func TestCheck(t *testing.T) {
	long := strings.Repeat("x", maxText+1)
	for name, err := range map[string]error{
		"long model":       CPUs{Model: long}.Check(),
		"features of none": CPUs{VCPUs: []VCPU{{}}}.Check(),
		"negative":         CPUs{VCPUs: []VCPU{{Features: -1}}, Features: [][]Word{{}}}.Check(),
		"CPUs":             CPUs{Free: make([]Place, maxCPUs+1)}.Check(),
		"sets":             CPUs{Features: make([][]Word, maxSets+1)}.Check(),
		"words":            CPUs{Features: [][]Word{make([]Word, maxWords+1)}}.Check(),
		"leaf":             CPUs{Filtered: []Word{{Leaf: long}}}.Check(),
		"property":         CPUs{Properties: []Property{{"a", long}}}.Check(),
		"no such kind":     Devices{List: []Device{{}}}.Check(),
		"kinds":            Devices{Kinds: []Kind{{}}}.Check(),
		"place": Devices{List: []Device{{Place: strings.Repeat("x", maxPlace+1)}},
			Kinds: []Kind{{}}}.Check(),
		"type":    Devices{List: []Device{{}}, Kinds: []Kind{{Type: long}}}.Check(),
		"machine": Devices{Machine: make([]Property, maxProperties+1)}.Check(),
	} {
		if !errors.Is(err, ErrFacts) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := errors.Join(CPUs{}.Check(), Devices{}.Check()); err != nil {
		t.Error(err)
	}
}

func TestSupported(t *testing.T) {
	for _, arch := range []string{"x86_64", "i386"} {
		says(t, supported(arch), nil)
	}
	says(t, supported("aarch64"),
		[]string{
			"architecture is aarch64, and only x86 VMs can be evicted: move it by QEMU's own " +
				"migration"})
}

// What a twin could not be given is told apart from what it was not asked for; the registers that
// nested virtualisation brings count, as does the rate of a clock that was promised to be constant.
func TestFeatures(t *testing.T) {
	set := func(bits uint32) CPUs {
		return CPUs{Model: "host", Accel: "kvm", VCPUs: []VCPU{{}},
			Features: [][]Word{{{"7.0 EBX", bits}}}}
	}
	twin := set(1 << 8)
	twin.Filtered = []Word{{"7.0 EBX", 1 << 5}}
	says(t, set(1<<8|1<<5|1<<3).Against(twin),
		[]string{"has avx2, which the destination's host or QEMU under KVM cannot offer",
			"lacks bmi1,", "`-cpu host,…,bmi1=on`"})
	says(t, set(1<<8|1<<12).Against(set(1<<8)), []string{"lacks CPUID 7.0 EBX bit 12"})

	plain, nested := set(0).also(), CPUs{Features: [][]Word{{{"1 ECX", 1 << 5}}}}.also()
	for name, want := range map[string][2]bool{"family": {false, false}, "vmx-ept": {false, true},
		"avx2": {false, false}, "hv-time": {true, false}, "ucode-rev": {false, false},
		"thread-id": {false, false}, "tsc-frequency": {false, false}, "hv_time": {false, false},
		"realized": {false, false}} {
		if is := [2]bool{plain(name), nested(name)}; is != want {
			t.Errorf("%s is looked at: %v, want %v", name, is, want)
		}
	}
	if !(CPUs{Features: [][]Word{{{"80000007 EDX", 1 << 8}}}}).also()("tsc-frequency") {
		t.Error("the frequency of an invariant clock does not count")
	}
	if (CPUs{Accel: "tcg", Features: [][]Word{{{"1 ECX", 1}}}}).also() != nil {
		t.Error("of a plain CPU there is more to ask for")
	}
}

func TestReasons(t *testing.T) {
	var r Reasons
	if r.Err() != nil {
		t.Error(r.Err())
	}
	for range 20 {
		r.add("mend it", "it is broken")
	}
	if n := strings.Count(r.Err().Error(), "broken"); n != mostNamed ||
		!strings.HasSuffix(r.Err().Error(), "and 12 differences more") {
		t.Error(r.Err())
	}
	if err := r[:2].Err(); err.Error() != "it is broken; it is broken: mend it" {
		t.Error(err)
	}
}

// A tree of devices may be anything; what is made of it stays within bounds, and is alike to
// itself.
func FuzzTree(f *testing.F) {
	files, err := filepath.Glob("testdata/*.qtree")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b[:1500])) // of long ones the fuzzer makes little
		f.Add(string(b[len(b)/2:][:1500]))
	}
	f.Add("dev: a, id \"\"\n  dev: b, id \"\"\n bus: c\n  dev: b, id \"x\"\n")
	f.Fuzz(func(t *testing.T, s string) {
		d, err := parseTree(s)
		if err != nil {
			return
		}
		if err := d.Check(); err != nil && len(d.List) <= maxDevices &&
			!strings.Contains(err.Error(), "text") {
			t.Fatal(err)
		}
		if r := d.Against(d); r != nil {
			t.Fatal(r)
		}
		if _, err := json.Marshal(d); err != nil {
			t.Fatal(err)
		}
	})
}
