// Package linux reads from outside what a Linux guest uses its memory for, with nothing installed
// in the guest. It learns what each page is, which pages are free, and which processes there are.
//
//	page-aligned note VMCOREINFO  →  release, KASLR, page tables, kallsyms, mem_section
//	kallsyms                      →  addresses of the kernel's variables
//	BTF                           →  what the kernel's structures look like
//
// The external truth is what Linux for x86-64 tells crash dump tools (VMCOREINFO,
// kernel/vmcore_info.c; before 6.9 kernel/crash_core.c) and BPF (BTF,
// Documentation/bpf/btf.rst). There is no table of kernel versions: sizes, offsets and
// constants come from these two, and a kernel in which one is missing is refused.
// Tried with Debian's 5.10, 6.1, 6.12, 7.2 and 7.3.
//
// Attach may be called while the guest runs; all that it finds is looked at again when the
// guest is stopped. All of the guest's memory is held to be hostile: every count, length and
// address is bounded, no list is followed without a limit.
package linux
