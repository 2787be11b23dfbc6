package fit

import "strings"

// featureNames are the names of CPU features, as -cpu has them, from bit 0 on; "-" for those
// without a name. They were found by experiment: QEMU 11.1.3 was started with each of its CPU's
// properties, and feature-words and filtered-features showed which bits it stands for. Those of
// KVM's leaf are of Linux's Documentation/virt/kvm/x86/cpuid.rst. TestNames looks whether a QEMU
// agrees.
var featureNames = map[string]string{
	"1 ECX": `pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr
		pdcm - pcid dca sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx
		f16c rdrand hypervisor`,
	"1 EDX": `fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn
		clflush - ds acpi mmx fxsr sse sse2 ss ht tm ia64 pbe`,
	"6 EAX": `- - arat`,
	"7.0 EBX": `fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid
		rtm - zero-fcs-fds mpx - avx512f avx512dq rdseed adx smap avx512ifma pcommit
		clflushopt clwb intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl`,
	"7.0 ECX": `- avx512vbmi umip pku - waitpkg avx512vbmi2 cet-ss gfni vaes vpclmulqdq
		avx512vnni avx512bitalg - avx512-vpopcntdq - la57 - - - - - rdpid -
		bus-lock-detect cldemote - movdiri movdir64b - sgxlc pks`,
	"7.0 EDX": `- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - -
		- serialize - tsx-ldtrk - - - cet-ibt - amx-bf16 avx512-fp16 amx-tile amx-int8
		spec-ctrl stibp flush-l1d arch-capabilities core-capability ssbd`,
	"7.1 EAX": `sha512 sm3 sm4 - avx-vnni avx512-bf16 - cmpccxadd - - fzrm fsrs fsrc - - - -
		fred lkgs wrmsrns - amx-fp16 - avx-ifma - - lam - - - - movrs`,
	"7.1 ECX": `- - - - - msr-imm`,
	"7.1 EDX": `- - - - avx-vnni-int8 avx-ne-convert - - amx-complex - avx-vnni-int16 - - -
		prefetchiti - - - - avx10 - apxf`,
	"7.2 EDX":  `intel-psfd ipred-ctrl rrsba-ctrl ddpd-u bhi-ctrl mcdt-no`,
	"d.1 EAX":  `xsaveopt xsavec xgetbv1 xsaves xfd`,
	"12.0 EAX": `sgx1 sgx2 - - - - - - - - - sgx-edeccssa`,
	"12.0 EBX": `sgx-exinfo`,
	"12.1 EAX": `- sgx-debug sgx-mode64 - sgx-provisionkey sgx-tokenkey - sgx-kss - -
		sgx-aex-notify`,
	"14.0 ECX": `- - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - intel-pt-lip`,
	"1e.1 EAX": `amx-int8-alias amx-bf16-alias amx-complex-alias amx-fp16-alias amx-fp8 -
		amx-tf32 amx-avx512 amx-movrs`,
	"24.0 EBX": `- - - - - - - - - - - - - - - - avx10-128 avx10-256 avx10-512`,
	"24.1 ECX": `- - avx10-vnni-int`,
	"29.0 EBX": `apx-nci-ndd-nf`,
	"40000001 EAX": `kvmclock kvm-nopiodelay kvm-mmu kvmclock kvm-asyncpf kvm-steal-time kvm-pv-eoi
		kvm-pv-unhalt - kvm-pv-tlb-flush kvm-asyncpf-vmexit kvm-pv-ipi
		kvm-poll-control kvm-pv-sched-yield kvm-asyncpf-int kvm-msi-ext-dest-id - - -
		- - - - - kvmclock-stable-bit`,
	"40000001 EDX": `kvm-hint-dedicated`,
	"80000001 ECX": `lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch
		osvw ibs xop skinit wdt - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core
		perfctr-nb`,
	"80000001 EDX": `fpu - de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 -
		- nx - mmxext mmx fxsr fxsr-opt pdpe1gb rdtscp - lm 3dnowext 3dnow`,
	"80000007 EBX": `overflow-recov succor`,
	"80000007 EDX": `- - - - - - - - invtsc`,
	"80000008 EBX": `clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs amd-stibp -
		stibp-always-on - - - - - - amd-ssbd virt-ssbd amd-no-ssb - amd-psfd`,
	"8000000a EDX": `npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists - -
		pause-filter - pfthreshold avic - v-vmsave-vmload vgif gmet - - - - - - - vnmi
		- - svme-addr-chk`,
	"80000021 EAX": `no-nested-data-bp fs-gs-base-ns lfence-always-serializing - - verw-clear
		null-sel-clr-base - auto-ibrs - - - - - - - - - - - prefetchi - - - eraps - -
		sbpb ibpb-brtype srso-no srso-user-kernel-no`,
	"80000021 ECX": `- tsa-sq-no tsa-l1-no`,
	"80000022 EAX": `perfmon-v2`,
	"c0000001 EDX": `- - xstore xstore-en - - xcrypt xcrypt-en ace2 ace2-en phe phe-en pmm pmm-en`,
}

var nameTable = func() map[string][]string {
	t := map[string][]string{}
	for leaf, names := range featureNames {
		t[leaf] = strings.Fields(names)
	}
	return t
}()

// isFeature has the name of each feature.
var isFeature = func() map[string]bool {
	all := map[string]bool{}
	for _, names := range nameTable {
		for _, n := range names {
			all[n] = true
		}
	}
	return all
}()
