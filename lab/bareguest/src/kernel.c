// The kernel of the bare guest: interrupts, the other CPUs, and what user code may not do.
#include "guest.h"

enum {
	STACK_SIZE = 16384,
	TRAMPOLINE = 0x8000,
	TSS = 0x30,
	VECTOR_OPCODE = 6,
	VECTOR_PAGE_FAULT = 14,
	VECTOR_TICK = 32,
	VECTOR_READY = 33,
	CONSOLE = 0x3f8,
	REPORTS = 0x2f8,
	PCI_ADDRESS = 0xcf8,
	PCI_DATA = 0xcfc,
};

enum {
	MSR_CLOCK = 0x4b564d01,
	MSR_FAULT = 0x4b564d02,
	MSR_FAULT_VECTOR = 0x4b564d06,
	MSR_FAULT_ACK = 0x4b564d07,
};

struct frame {
	u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
	u64 vector, error, rip, cs, flags, rsp, ss;
};

extern u64 gdt[], gdt_end[];
extern u8 trampoline[], trampoline_end[], stubs[], kernel_stacks[];
void enter_user(u64 entry, u64 stack, u64 argument);

struct cpu cpus[MAX_CPUS];
volatile u64 port_interrupts;
static u8 user_stacks[MAX_CPUS][STACK_SIZE] __attribute__((aligned(16)));
static u32 tss[MAX_CPUS][26];
static u64 idt[64][2] __attribute__((aligned(16)));

static void out8(u16 port, u8 v) { asm volatile("outb %0, %1" ::"a"(v), "Nd"(port)); }
static void out16(u16 port, u16 v) { asm volatile("outw %0, %1" ::"a"(v), "Nd"(port)); }
static void out32(u16 port, u32 v) { asm volatile("outl %0, %1" ::"a"(v), "Nd"(port)); }
static u32 in32(u16 port)
{
	u32 v;
	asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}
static u8 in8(u16 port)
{
	u8 v;
	asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}

static void write_msr(u32 msr, u64 v)
{
	asm volatile("wrmsr" ::"c"(msr), "a"((u32)v), "d"((u32)(v >> 32)) : "memory");
}

static volatile u32 *apic(u32 reg) { return (volatile u32 *)(0xfee00000ul + reg); }

static void cpuid(u32 leaf, u32 *a, u32 *b, u32 *c, u32 *d)
{
	asm volatile("cpuid" : "=a"(*a), "=b"(*b), "=c"(*c), "=d"(*d) : "0"(leaf), "2"(0));
}

// kvm_features returns the bits of what KVM offers, 0 without it.
static u32 kvm_features(void)
{
	u32 a, b, c, d;
	cpuid(0x40000000, &a, &b, &c, &d);
	if (b != 0x4b4d564b || c != 0x564b4d56 || d != 0x4d) // "KVMKVMKVM"
		return 0;
	cpuid(0x40000001, &a, &b, &c, &d);
	return a;
}

static void serial_write(u16 port, const u8 *text, u64 length)
{
	while (length) {
		while (!(in8(port + 5) & 0x20))
			;
		u64 n = length < 16 ? length : 16; // the length of its queue
		length -= n;
		asm volatile("rep outsb" : "+S"(text), "+c"(n) : "d"(port) : "memory");
	}
}

static void serial_open(u16 port)
{
	out8(port + 1, 0);
	out8(port + 3, 0x80);
	out8(port, 1);
	out8(port + 1, 0);
	out8(port + 3, 3);
	out8(port + 2, 1);
	out8(port + 4, 3);
}

static void fail(struct frame *f)
{
	char line[] = "\nbareguest: vector 00 error 00000000 at 0000000000000000 address 0000000000000000\n";
	u64 cr2;
	asm volatile("mov %%cr2, %0" : "=r"(cr2));
	struct { u64 v; u32 at, digits; } parts[] = {{f->vector, 19, 2}, {f->error, 28, 8}, {f->rip, 40, 16}, {cr2, 65, 16}};
	for (u32 i = 0; i < 4; i++)
		for (u32 d = parts[i].digits; d--; parts[i].v >>= 4)
			line[parts[i].at + d] = "0123456789abcdef"[parts[i].v & 15];
	serial_write(CONSOLE, (u8 *)line, sizeof line - 1);
	for (;;)
		asm volatile("cli; hlt");
}

static void wait_for_interrupt(void) { asm volatile("sti; hlt; cli" ::: "memory"); }

// page_fault waits until the host has the page that it has not yet.
static void page_fault(struct cpu *c, struct frame *f)
{
	if (!(c->fault.absent & 1) || !(f->cs & 3))
		fail(f);
	u64 token;
	asm volatile("mov %%cr2, %0" : "=r"(token));
	c->fault.absent = 0;
	while (c->awaited != (u32)token && c->awaited != 0xffffffff)
		wait_for_interrupt();
	c->awaited = 0;
	c->faults++;
}

static void start_others(void)
{
	for (u32 i = 0; trampoline + i < trampoline_end; i++)
		((volatile u8 *)TRAMPOLINE)[i] = trampoline[i];
	*apic(0x300) = 0xc4500; // INIT to all others
	for (u32 i = 0; i < 10000; i++)
		asm volatile("" ::: "memory");
	*apic(0x300) = 0xc4600 | TRAMPOLINE >> 12;
}

static void start_cpu(struct cpu *c, u64 async)
{
	u32 features = kvm_features();
	if (features & 1 << 3) {
		write_msr(MSR_CLOCK, (u64)&c->clock | 1);
		c->has_clock = 1;
	}
	if (async && features & 1 << 4 && features & 1 << 14) {
		write_msr(MSR_FAULT_VECTOR, VECTOR_READY);
		write_msr(MSR_FAULT, (u64)&c->fault | 1 | 1 << 3);
	}
	*apic(0x3e0) = 0xb; // count nanoseconds
	*apic(0x320) = VECTOR_TICK | 1 << 17;
	*apic(0x380) = 1000000000 / TICKS_PER_SECOND;
}

static u64 apic_count(void)
{
	u32 left = *apic(0x390);
	*apic(0x3e0) = 0xb;
	*apic(0x320) = VECTOR_TICK | 1 << 16;
	*apic(0x380) = 0xffffffff;
	return 0xffffffff - left;
}

static long call(struct cpu *c, u64 number, u64 a, u64 b)
{
	switch (number) {
	case CALL_WRITE:
		serial_write(REPORTS, (u8 *)a, b);
		return 0;
	case CALL_READ:
		return in8(REPORTS + 5) & 1 ? in8(REPORTS) : -1;
	case CALL_CONSOLE:
		serial_write(CONSOLE, (u8 *)a, b);
		return 0;
	case CALL_APIC:
		return apic_count();
	case CALL_START:
		start_others();
		return 0;
	case CALL_CPU:
		start_cpu(c, a);
		return 0;
	case CALL_REST:
		wait_for_interrupt();
		return 0;
	case CALL_OUT:
		out16(a, b);
		return 0;
	case CALL_PCI_READ:
		out32(PCI_ADDRESS, 1u << 31 | a);
		return in32(PCI_DATA);
	case CALL_PCI_WRITE:
		out32(PCI_ADDRESS, 1u << 31 | a);
		out32(PCI_DATA, b);
		return 0;
	}
	return -1;
}

// this_cpu finds out by its stack which CPU it is.
static u32 this_cpu(void) { return ((u64)__builtin_frame_address(0) - (u64)kernel_stacks) / STACK_SIZE; }

void kernel(struct frame *f)
{
	struct cpu *c = &cpus[this_cpu()];
	switch (f->vector) {
	case VECTOR_TICK:
		c->ticks++;
		*apic(0xb0) = 0;
		return;
	case VECTOR_READY:
		c->awaited = c->fault.ready;
		c->fault.ready = 0;
		write_msr(MSR_FAULT_ACK, 1);
		*apic(0xb0) = 0;
		return;
	case VECTOR_PORT:
		port_interrupts++;
		*apic(0xb0) = 0;
		return;
	case VECTOR_PAGE_FAULT:
		page_fault(c, f);
		return;
	case VECTOR_OPCODE:
		if (f->cs & 3 && *(u16 *)f->rip == 0x0b0f) {
			f->rip += 2;
			f->rax = call(c, f->rax, f->rsi, f->rdx);
			return;
		}
	}
	fail(f);
}

// cpu_main is where every CPU comes to; cpu counts from 0.
void cpu_main(u64 cpu)
{
	if (cpu >= MAX_CPUS)
		return;
	if (cpu == 0) {
		for (u64 i = 0; i < 64; i++) {
			u64 at = (u64)stubs + 16 * i;
			idt[i][0] = (at & 0xffff) | 8 << 16 | 0x8e00ul << 32 | (at & 0xffff0000) << 32;
			idt[i][1] = at >> 32;
		}
		out8(0x21, 0xff); // no interrupts by the old controller
		out8(0xa1, 0xff);
		serial_open(CONSOLE);
		serial_open(REPORTS);
	}
	u64 stack = (u64)kernel_stacks + (cpu + 1) * STACK_SIZE, t = (u64)tss[cpu];
	tss[cpu][1] = stack;
	tss[cpu][25] = 104 << 16;
	gdt[TSS / 8 + 2 * cpu] = 103 | (t & 0xffffff) << 16 | 0x89ul << 40 | (t >> 24 & 0xff) << 56;
	gdt[TSS / 8 + 2 * cpu + 1] = t >> 32;
	struct { u16 limit; u64 base; } __attribute__((packed)) idtr = {sizeof idt - 1, (u64)idt};
	asm volatile("lidt %0" ::"m"(idtr));
	asm volatile("ltr %w0" ::"r"(TSS + 16 * (u32)cpu));
	*apic(0xf0) = 0x1ff;
	enter_user(cpu ? (u64)load_other : (u64)load_main, (u64)user_stacks[cpu] + STACK_SIZE - 8, cpu);
}
