package fit

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"vacate/internal/qemu/qmp"
)

// CPUs is what a guest sees of its CPUs, and what QEMU says of how they came to be so. Which of its
// features a CPU has is not in the migration stream: after the move a guest sees those of the twin.
type CPUs struct {
	Arch  string `json:"arch"`  // the guest's: "x86_64"
	Accel string `json:"accel"` // "kvm" or "tcg"
	Model string `json:"model"` // QEMU's name for it: "max"
	// VCPUs are those that exist, by index.
	VCPUs []VCPU `json:"vcpus"`
	// Free are the places for more, sorted.
	Free []Place `json:"free"`
	// Features are the different sets of feature words among the vCPUs, mostly one.
	Features [][]Word `json:"features"`
	// Filtered are the features that were asked for, and that this host or QEMU does not have.
	Filtered []Word `json:"filtered"`
	// Properties are those of the first vCPU which the guest can see the effect of, sorted by name.
	// Which ones there are depends on QEMU's version.
	Properties []Property `json:"properties"`
}

// VCPU is a virtual CPU.
type VCPU struct {
	Index    int   `json:"index"`
	Place    Place `json:"place"`
	Features int   `json:"features"` // number of its set of feature words
}

// Place is where a CPU is in the topology.
type Place struct {
	Socket  int `json:"socket-id,omitempty"`
	Die     int `json:"die-id,omitempty"`
	Cluster int `json:"cluster-id,omitempty"`
	Module  int `json:"module-id,omitempty"`
	Core    int `json:"core-id,omitempty"`
	Thread  int `json:"thread-id,omitempty"`
}

func (p Place) String() string {
	s := fmt.Sprintf("socket %d", p.Socket)
	for _, x := range []struct {
		name  string
		n     int
		shown bool
	}{{"die", p.Die, p.Die != 0}, {"cluster", p.Cluster, p.Cluster != 0},
		{"module", p.Module, p.Module != 0}, {"core", p.Core, true}, {"thread", p.Thread, true}} {
		if x.shown {
			s += fmt.Sprintf(" %s %d", x.name, x.n)
		}
	}
	return s
}

func (p Place) compare(o Place) int {
	return cmp.Or(cmp.Compare(p.Socket, o.Socket), cmp.Compare(p.Die, o.Die),
		cmp.Compare(p.Cluster, o.Cluster),
		cmp.Compare(p.Module, o.Module), cmp.Compare(p.Core, o.Core),
		cmp.Compare(p.Thread, o.Thread))
}

// Word is a register of a CPUID leaf whose bits are features: "7.0 EBX", or "1 EDX" of a leaf
// without subleaves.
type Word struct {
	Leaf string `json:"leaf"`
	Bits uint32 `json:"bits"`
}

// Property is a property of a CPU or device.
type Property struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// What facts of CPUs hold at most.
const (
	maxCPUs       = 4096 // more than QEMU's x86 machines can have
	maxSets       = 64
	maxWords      = 256
	maxProperties = 512
)

// Check makes sure that facts of a peer are within bounds.
func (c CPUs) Check() error {
	if len(c.VCPUs)+len(c.Free) > maxCPUs || len(c.Features) > maxSets ||
		len(c.Filtered) > maxWords || len(c.Properties) > maxProperties {
		return fmt.Errorf("%w: CPUs", ErrFacts)
	}
	err := text(c.Arch, c.Accel, c.Model)
	for _, v := range c.VCPUs {
		if v.Features < 0 || v.Features >= len(c.Features) {
			err = cmp.Or(err, fmt.Errorf("%w: features of vCPU %d", ErrFacts, v.Index))
		}
	}
	for _, set := range append(slices.Clone(c.Features), c.Filtered) {
		if len(set) > maxWords {
			return fmt.Errorf("%w: %d feature words", ErrFacts, len(set))
		}
		for _, w := range set {
			err = cmp.Or(err, text(w.Leaf))
		}
	}
	for _, p := range c.Properties {
		err = cmp.Or(err, text(p.Name, p.Value))
	}
	return err
}

// Supported reports whether the engine can move VMs of q's architecture.
func Supported(ctx context.Context, q *qmp.Client) (Reasons, error) {
	var target struct {
		Arch string `json:"arch"`
	}
	if err := q.Run(ctx, "query-target", nil, &target); err != nil {
		return nil, err
	}
	return supported(target.Arch), nil
}

func supported(arch string) (r Reasons) {
	if arch != "x86_64" && arch != "i386" {
		r.add("move it by QEMU's own migration",
			"the VM's architecture is %s, and only x86 VMs can be evicted", arch)
	}
	return r
}

// CPUsOf asks a QEMU for its CPUs. The QEMU's VM may run.
func CPUsOf(ctx context.Context, q *qmp.Client) (CPUs, error) {
	c := CPUs{Accel: "tcg"}
	var cpus []struct {
		Index int    `json:"cpu-index"`
		Path  string `json:"qom-path"`
		Place Place  `json:"props"`
	}
	var slots []struct {
		Place Place  `json:"props"`
		Path  string `json:"qom-path"`
	}
	var kvm struct {
		Enabled bool `json:"enabled"`
	}
	var target struct {
		Arch string `json:"arch"`
	}
	ask := []func() error{
		func() error { return q.Run(ctx, "query-target", nil, &target) },
		func() error { return q.Run(ctx, "query-cpus-fast", nil, &cpus) },
		func() error { return optional(q.Run(ctx, "query-kvm", nil, &kvm)) },
		// A machine without such slots refuses.
		func() error { return optional(q.Run(ctx, "query-hotpluggable-cpus", nil, &slots)) },
	}
	if err := each(len(ask), func(i int) error { return ask[i]() }); err != nil {
		return c, err
	}
	c.Arch = target.Arch
	if err := supported(c.Arch).Err(); err != nil {
		return c, err
	}
	if kvm.Enabled {
		c.Accel = "kvm"
	}
	if len(cpus) == 0 || len(cpus)+len(slots) > maxCPUs {
		return c, fmt.Errorf("QEMU says that the VM has %d CPUs, and places for %d", len(cpus),
			len(slots))
	}
	for _, s := range slots {
		if s.Path == "" {
			c.Free = append(c.Free, s.Place)
		}
	}
	slices.SortFunc(c.Free, Place.compare)
	words := make([][]Word, len(cpus))
	get := func(path, property string, v any) error {
		return q.Run(ctx, "qom-get", map[string]any{"path": path, "property": property}, v)
	}
	first := cpus[0].Path
	properties := func(names []string) error {
		values := make([]json.RawMessage, len(names))
		err := each(len(names),
			func(i int) error { return optional(get(first, names[i], &values[i])) })
		for i, name := range names {
			if values[i] != nil {
				c.Properties = append(c.Properties, Property{name, string(values[i])})
			}
		}
		return err
	}
	var model string
	ask = []func() error{
		func() error { return properties(seen) },
		func() error { return get(first, "type", &model) },
		func() error {
			var list []rawWord
			err := get(first, "filtered-features", &list)
			c.Filtered = wordsOf(list)
			return err
		},
	}
	err := each(len(ask)+len(cpus), func(i int) error {
		if i < len(ask) {
			return ask[i]()
		}
		var list []rawWord
		err := get(cpus[i-len(ask)].Path, "feature-words", &list)
		words[i-len(ask)] = wordsOf(list)
		return err
	})
	if err != nil {
		return c, err
	}
	c.Model, _, _ = strings.Cut(strings.TrimSuffix(model, "-cpu"), "-x86_64")
	c.Model = strings.TrimSuffix(c.Model, "-i386")
	for i, cpu := range cpus {
		n := slices.IndexFunc(c.Features,
			func(set []Word) bool { return slices.Equal(set, words[i]) })
		if n < 0 {
			if n = len(c.Features); n == maxSets {
				return c, fmt.Errorf("QEMU says that the VM has CPUs of more than %d kinds",
					maxSets)
			}
			c.Features = append(c.Features, words[i])
		}
		c.VCPUs = append(c.VCPUs, VCPU{cpu.Index, cpu.Place, n})
	}
	slices.SortFunc(c.VCPUs, func(a, b VCPU) int { return cmp.Compare(a.Index, b.Index) })
	if also := c.also(); also != nil {
		names, err := propertiesOf(ctx, q, first)
		if err == nil {
			err = properties(slices.DeleteFunc(names,
				func(name string) bool { return !also(name) }))
		}
		if err != nil {
			return c, err
		}
	}
	slices.SortFunc(c.Properties,
		func(a, b Property) int { return strings.Compare(a.Name, b.Name) })
	return c, c.Check()
}

// optional is err unless QEMU refused the command, or does not know it.
func optional(err error) error {
	var refusal *qmp.Error
	if errors.As(err, &refusal) {
		return nil
	}
	return err
}

// rawWord is QEMU's X86CPUFeatureWordInfo.
type rawWord struct {
	EAX      uint32  `json:"cpuid-input-eax"`
	ECX      *uint32 `json:"cpuid-input-ecx"`
	Register string  `json:"cpuid-register"`
	Features uint32  `json:"features"`
}

// wordsOf sorts feature words. It leaves out those without a feature: an older QEMU does not know
// all that a newer one has.
func wordsOf(list []rawWord) (words []Word) {
	for _, w := range list[:min(len(list), maxWords)] {
		if w.EAX == 0x80000001 && w.Register == "EDX" {
			w.Features &^= repeated
		}
		if w.Features == 0 {
			continue
		}
		leaf := fmt.Sprintf("%x", w.EAX)
		if w.ECX != nil {
			leaf += fmt.Sprintf(".%x", *w.ECX)
		}
		words = append(words, Word{leaf + " " + w.Register, w.Features})
	}
	// What programs use most is in leaf 7: messages that name a few name those.
	slices.SortFunc(words, func(a, b Word) int {
		x, y := strings.HasPrefix(a.Leaf, "7."), strings.HasPrefix(b.Leaf, "7.")
		if x != y {
			if x {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Leaf, b.Leaf)
	})
	return words
}

// repeated are the features in leaf 80000001 that leaf 1 tells already, on CPUs of AMD only.
const repeated = 0x0183f3ff

// propertiesOf lists the names of the properties of an object that are neither other objects nor
// lists.
func propertiesOf(ctx context.Context, q *qmp.Client, path string) (names []string, err error) {
	var list []struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
	if err = q.Run(ctx, "qom-list", map[string]any{"path": path}, &list); err != nil {
		return nil, err
	}
	for _, p := range list {
		switch {
		case p.Type == "bool", p.Type == "str", p.Type == "string", p.Type == "OnOffAuto",
			strings.HasPrefix(p.Type, "int"), strings.HasPrefix(p.Type, "uint"):
			names = append(names, p.Name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// seen are properties of a CPU whose effect a guest sees in CPUID or model-specific registers,
// besides those that feature words tell. Two are missing on purpose. ucode-rev, the microcode's
// revision, seldom agrees on two hosts, and guests look at it when they boot. The stream carries
// tsc-frequency, but see also.
var seen = strings.Fields(`avx10-version cpuid-0xb family fill-mtrr-mask guest-phys-bits host-cache-info hypervisor-vendor
	kvm l3-cache lbr-fmt legacy-cache legacy-multi-node level level-func7 lmce model model-id phys-bits pmu stepping tcg-cpuid
	vendor vmware-cpuid-freq x-amd-topoext-features-only x-arch-cap-always-on x-consistent-cache x-force-cpuid-0x1f
	x-l1-cache-per-thread x-vendor-cpuid-only x-vendor-cpuid-only-v2 xen-vapic xlevel xlevel2`)

// capabilities are features that bring registers whose bits are features, too, and have no feature
// words.
var capabilities = []string{"vmx", "arch-capabilities", "core-capability"}

// notCapabilities are what else a CPU's properties begin with.
var notCapabilities = []string{"x-", "hv-", "kvm", "min-", "host-", "hotplug", "realized", "start-",
	"full-", "check", "enforce", "migratable",
	"thread-id", "core-id", "module-id", "die-id", "socket-id", "node-id", "apic-id", "ucode-rev",
	"type"}

// also returns a function that reports whether another property of these CPUs must be compared, or
// nil if there is none.
func (c CPUs) also() func(name string) bool {
	invtsc, more, kvm := c.has("invtsc"), c.has(capabilities...), c.Accel == "kvm"
	if !invtsc && !more && !kvm {
		return nil
	}
	return func(name string) bool {
		switch {
		case strings.Contains(name, "_"), slices.Contains(seen, name):
			// another spelling, or known already
			return false
		case strings.HasPrefix(name, "hv-"):
			return kvm
		case name == "tsc-frequency":
			return invtsc // which promises the guest that it never changes
		}
		return more && !isFeature[name] &&
			!slices.ContainsFunc(notCapabilities,
				func(p string) bool { return strings.HasPrefix(name, p) })
	}
}

// has reports whether any CPU has any of the features.
func (c CPUs) has(features ...string) bool {
	return slices.ContainsFunc(c.Features, func(set []Word) bool {
		return slices.ContainsFunc(without(set, nil),
			func(n string) bool { return slices.Contains(features, n) })
	})
}

// namesOf names features.
func namesOf(leaf string, word uint32) (names []string) {
	for b := word; b != 0; b &= b - 1 {
		bit := bits.TrailingZeros32(b)
		if t := nameTable[leaf]; bit < len(t) && t[bit] != "-" {
			names = append(names, t[bit])
		} else {
			names = append(names, fmt.Sprintf("CPUID %s bit %d", leaf, bit))
		}
	}
	return names
}

// without returns the features of a that b does not have.
func without(a, b []Word) (names []string) {
	for _, w := range a {
		if i := slices.IndexFunc(b, func(x Word) bool { return x.Leaf == w.Leaf }); i >= 0 {
			w.Bits &^= b[i].Bits
		}
		for _, n := range namesOf(w.Leaf, w.Bits) {
			if !slices.Contains(names, n) { // some are told in two leaves
				names = append(names, n)
			}
		}
	}
	return names
}

// Against tells what of the twin's CPUs is not as it is at the source. A twin with more features is
// not equal either: its guest would see them appear, and could go back to no host without them.
func (c CPUs) Against(twin CPUs) (r Reasons) {
	const smp = "start the destination's QEMU with the source's -smp"
	switch {
	case c.Arch != twin.Arch:
		r.add("start the destination's QEMU from the source's program",
			"the source's QEMU is for %s, the destination's for %s", c.Arch, twin.Arch)
		return r
	case c.Accel != twin.Accel: // each makes CPUs of its own
		r.add(fmt.Sprintf("start the destination's QEMU with -accel %s", c.Accel),
			"the VM runs %s on the source, and would %s on the destination", accelName(c.Accel),
			accelName(twin.Accel))
		return r
	case len(c.VCPUs) != len(twin.VCPUs):
		r.add(smp, "the source has %d vCPUs, the destination %d", len(c.VCPUs), len(twin.VCPUs))
		return r
	}
	for i, v := range c.VCPUs {
		if t := twin.VCPUs[i]; v.Index != t.Index || v.Place != t.Place {
			r.add(smp,
				"the topology differs: vCPU %d is %v on the source, vCPU %d is %v on the "+
					"destination", v.Index, v.Place, t.Index, t.Place)
			break
		}
	}
	if len(c.Free) != len(twin.Free) {
		r.add(smp+" and maxcpus", "the source has places for %d vCPUs more, the destination for %d",
			len(c.Free), len(twin.Free))
	} else if !slices.Equal(c.Free, twin.Free) {
		r.add(smp+" and maxcpus", "the places for vCPUs that can be plugged differ")
	}
	return append(r, c.featuresAgainst(twin)...)
}

// featuresAgainst compares what CPUs of the same number and places can do.
func (c CPUs) featuresAgainst(twin CPUs) (r Reasons) {
	var lacks, more []string
	compared := map[[2]int]bool{}
	for i, v := range c.VCPUs {
		pair := [2]int{v.Features, twin.VCPUs[i].Features}
		if compared[pair] {
			continue
		}
		compared[pair] = true
		for _, n := range without(c.Features[pair[0]], twin.Features[pair[1]]) {
			if !slices.Contains(lacks, n) {
				lacks = append(lacks, n)
			}
		}
		for _, n := range without(twin.Features[pair[1]], c.Features[pair[0]]) {
			if !slices.Contains(more, n) {
				more = append(more, n)
			}
		}
	}
	// What the twin's QEMU was asked for in vain, no command line brings.
	var never []string
	filtered := without(twin.Filtered, nil)
	lacks = slices.DeleteFunc(lacks, func(n string) bool {
		if !slices.Contains(filtered, n) {
			return false
		}
		never = append(never, n)
		return true
	})
	if len(never) > 0 {
		r.add("choose a host and a QEMU that have them; or restart the VM with a CPU model that "+
			"both hosts have",
			"the guest's CPU has %s, which the destination's host or QEMU %s cannot offer",
			list(never), accelName(twin.Accel))
	}
	var set []string
	for _, n := range lacks {
		set = append(set, n+"=on")
	}
	for _, n := range more {
		set = append(set, n+"=off")
	}
	options := c.sameCPU(twin, set...)
	if len(lacks) > 0 {
		r.add(options, "the destination's CPU (%s) lacks %s, which the guest uses or may use (%s)",
			twin.Model, list(lacks), c.Model)
	}
	if len(more) > 0 {
		r.add(options,
			"the destination's CPU (%s) has %s, which the guest's (%s) does not have: the guest "+
				"would see its CPU change", twin.Model, list(more), c.Model)
	}
	if texts, set := differences(c.Properties, twin.Properties); len(texts) > 0 {
		r.add(c.sameCPU(twin, set...), "the CPUs differ: %s", list(texts))
	}
	return r
}

// differences tells which properties that both have are not equal, and how those of a are set.
func differences(a, b []Property) (texts, set []string) {
	for _, p := range a {
		if i := slices.IndexFunc(b, func(t Property) bool { return t.Name == p.Name }); i >= 0 &&
			b[i].Value != p.Value {
			texts = append(texts,
				fmt.Sprintf("%s is %s on the source, %s on the destination", p.Name, p.Value,
					b[i].Value))
			set = append(set, p.Name+"="+strings.Trim(p.Value, `"`))
		}
	}
	return texts, set
}

func accelName(accel string) string {
	if accel == "kvm" {
		return "under KVM"
	}
	return "under emulation"
}

// sameCPU says how to start a twin whose CPU is as c, for which such options have to be set.
func (c CPUs) sameCPU(twin CPUs, set ...string) string {
	options := strings.Join(set, ",")
	switch {
	case c.Model != twin.Model:
		return fmt.Sprintf("start the destination's QEMU with the source's -cpu (model %s)",
			c.Model)
	case strings.Contains(options, "CPUID ") || len(set) > 3*mostNamed:
		return "start the destination's QEMU with the source's -cpu, of a version and on a host " +
			"that make the same of it"
	}
	return fmt.Sprintf("start the destination's QEMU with `-cpu %s,…,%s`", c.Model, options)
}
