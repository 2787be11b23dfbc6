// What the kernel and the load of the bare guest have in common.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

enum { MAX_CPUS = 4, TICKS_PER_SECOND = 100, VECTOR_PORT = 34 };

// Calls of the kernel, see kernel.c.
enum {
	CALL_WRITE,   // (text, length): to the second serial port
	CALL_READ,    // (): a byte from there, or -1
	CALL_CONSOLE, // (text, length): to the first serial port
	CALL_APIC,    // (): nanoseconds that the APIC's timer counted down since the last CALL_APIC; before CALL_CPU only
	CALL_START,   // (): starts the other CPUs, which all run load_other
	CALL_CPU,     // (async page faults): begins ticks and clocks of this CPU
	CALL_REST,    // (): waits for an interrupt
	CALL_OUT,     // (port, value): writes 16 bits
	CALL_PCI_READ,  // (address): 32 bits of a device's configuration
	CALL_PCI_WRITE, // (address, value)
};

long call_kernel(u64 number, u64 a, u64 b);

// A clock that KVM keeps up to date.
struct kvmclock {
	volatile u32 version, pad;
	volatile u64 tsc, nanoseconds;
	volatile u32 multiplier;
	volatile signed char shift;
	volatile u8 flags, pad2[2];
};

// What KVM tells of async page faults.
struct async_fault {
	volatile u32 absent, ready;
	u8 pad[56];
};

struct cpu {
	struct async_fault fault __attribute__((aligned(64)));
	struct kvmclock clock __attribute__((aligned(64)));
	volatile u64 ticks;
	volatile u64 faults; // async page faults that this CPU waited out
	volatile u32 awaited; // the token that came last; 0: none
	u32 has_clock;
} __attribute__((aligned(256)));

extern struct cpu cpus[MAX_CPUS];
extern volatile u64 port_interrupts; // of the virtio device
extern u64 start_info;
extern u32 cpus_started;

void load_main(void);
void load_other(u64 cpu);
