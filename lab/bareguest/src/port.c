// A port of a virtio-serial device on PCI, driven from privilege level 3: its registers are memory
// of the host, and only PCI's own two ports need the kernel.
#include "load.h"

enum {
	SLOTS = 8,
	QUEUES = 12, // those of ports 0 to 4, and the two of control
	CONTROL_IN = 2,
	CONTROL_OUT = 3,
	MESSAGE = 128,
	CHUNK = 512,
	WINDOW = 0xe0000000, // where nothing else is, with either machine
};

// Control messages.
enum { DEVICE_READY = 0, PORT_ADD = 1, PORT_READY = 3, PORT_OPEN = 6, PORT_NAME = 7 };

struct message {
	u32 port;
	u16 event, value;
	char name[MESSAGE - 8];
};

struct queue {
	struct { u64 at; u32 length; u16 flags, next; } slots[SLOTS];
	struct { volatile u16 flags, index, ring[SLOTS], event; } offered;
	struct { volatile u16 flags, index; struct { u32 slot, length; } ring[SLOTS]; u16 event; } used
		__attribute__((aligned(16)));
	volatile u16 *bell;
	u16 seen; // of used
} __attribute__((aligned(64)));

static struct queue queues[QUEUES];
static volatile u8 *common, *notify;
static u64 function; // its address on PCI
static const char *wanted;
static struct queue *in, *out; // of the port; 0 until it is found
static struct message heard[SLOTS], said[SLOTS];
static u8 chunks[SLOTS][CHUNK];
static u16 taken; // of the chunk that came first
static u64 calls; // interrupts that were looked into

static u32 config(u32 reg) { return call_kernel(CALL_PCI_READ, function | reg, 0); }
static void set_config(u32 reg, u32 v) { call_kernel(CALL_PCI_WRITE, function | reg, v); }

static void set8(u32 reg, u8 v) { *(common + reg) = v; }
static void set16(u32 reg, u16 v) { *(volatile u16 *)(common + reg) = v; }
static void set32(u32 reg, u32 v) { *(volatile u32 *)(common + reg) = v; }
static void set_address(u32 reg, volatile void *p)
{
	set32(reg, (u64)p);
	set32(reg + 4, (u64)p >> 32);
}

// offer gives a slot to the device.
static void offer(struct queue *q, u16 slot, const volatile void *p, u32 length, u16 flags)
{
	q->slots[slot].at = (u64)p;
	q->slots[slot].length = length;
	q->slots[slot].flags = flags;
	q->offered.ring[q->offered.index % SLOTS] = slot;
	asm volatile("mfence" ::: "memory");
	q->offered.index++;
	asm volatile("mfence" ::: "memory");
	*q->bell = q - queues;
}

static void say(u32 port, u16 event, u16 value)
{
	struct queue *q = &queues[CONTROL_OUT];
	u16 slot = q->offered.index % SLOTS;
	while ((u16)(q->offered.index - q->used.index) == SLOTS)
		asm volatile("pause");
	said[slot] = (struct message){.port = port, .event = event, .value = value};
	offer(q, slot, &said[slot], 8, 0);
}

// map finds the device's registers, and gives them an address.
static u32 map(void)
{
	u64 bars[6], entry = 0;
	u32 at, table = 0, multiplier = 0, found = 0;
	for (u32 i = 0; i < 6; i++) {
		u32 reg = 0x10 + 4 * i, kind = config(reg);
		bars[i] = WINDOW + i * 0x100000ul;
		if (kind & 1)
			continue;
		set_config(reg, bars[i]);
		if (kind & 4) {
			set_config(reg + 4, 0);
			i++;
		}
	}
	set_config(4, (config(4) & 0xffff) | 6); // memory, and access to ours
	for (at = config(0x34) & 0xfc; at; at = config(at) >> 8 & 0xfc) {
		u32 head = config(at);
		if ((head & 0xff) == 0x11) { // MSI-X
			entry = config(at + 4);
			table = at;
			continue;
		}
		if ((head & 0xff) != 9)
			continue;
		u32 bar = config(at + 4) & 0xff;
		if (bar >= 6)
			continue;
		volatile u8 *p = (volatile u8 *)(bars[bar] + config(at + 8));
		switch (head >> 24) {
		case 1:
			common = p;
			found |= 1;
			break;
		case 2:
			notify = p;
			multiplier = config(at + 16);
			found |= 2;
		}
	}
	if (found != 3 || !table || (entry & 7) >= 6)
		return 0;
	volatile u32 *v = (volatile u32 *)(bars[entry & 7] + (entry & ~7u));
	v[0] = 0xfee00000; // to the first CPU
	v[1] = 0;
	v[2] = VECTOR_PORT;
	v[3] = 0;
	set_config(table, config(table) | 1u << 31);
	return multiplier;
}

// port_open looks for the device and has it tell its ports; port_called follows that up. It
// returns 0 if there is no such device.
u32 port_open(const char *name)
{
	wanted = name;
	u32 multiplier, device;
	for (device = 0;; device++) {
		if (device == 32)
			return 0;
		function = device << 11;
		u32 id = config(0);
		if (id == 0x10031af4 || id == 0x10431af4)
			break;
	}
	if (!(multiplier = map()))
		return 0;
	set8(20, 0);
	while (*(common + 20))
		asm volatile("pause");
	set8(20, 1 | 2); // it is seen, and has a driver
	set32(8, 0);
	set32(12, 1 << 1); // several ports
	set32(8, 1);
	set32(12, 1); // virtio 1.0
	set8(20, 1 | 2 | 8);
	if (!(*(common + 20) & 8))
		return 0;
	set16(16, 0xffff); // no interrupt by changes of its configuration
	for (u32 i = 0; i < QUEUES; i++) {
		struct queue *q = &queues[i];
		set16(22, i);
		if (*(volatile u16 *)(common + 24) < SLOTS)
			return 0;
		set16(24, SLOTS);
		set16(26, 0);
		q->bell = (volatile u16 *)(notify + *(volatile u16 *)(common + 30) * multiplier);
		set_address(32, q->slots);
		set_address(40, &q->offered);
		set_address(48, &q->used);
		set16(28, 1);
	}
	set8(20, 1 | 2 | 8 | 4);
	for (u32 i = 0; i < SLOTS; i++)
		offer(&queues[CONTROL_IN], i, &heard[i], MESSAGE, 2);
	say(0, DEVICE_READY, 1);
	return 1;
}

static u32 is_wanted(const char *name)
{
	const char *w = wanted;
	while (*w && *w != ' ' && *w == *name)
		w++, name++;
	return (!*w || *w == ' ') && !*name;
}

static void hear(struct message *m, u32 length)
{
	((char *)m)[length < MESSAGE ? length : MESSAGE - 1] = 0;
	switch (m->event) {
	case PORT_ADD:
		say(m->port, PORT_READY, 1);
		break;
	case PORT_NAME:
		if (in || m->port > 4 || !is_wanted(m->name))
			break;
		in = &queues[m->port ? 2 + 2 * m->port : 0];
		out = in + 1;
		for (u32 i = 0; i < SLOTS; i++)
			offer(in, i, chunks[i], CHUNK, 2);
		say(m->port, PORT_OPEN, 1);
	}
}

// port_called reports whether the device has interrupted since it was asked last.
u32 port_called(void)
{
	u64 now = port_interrupts;
	if (now == calls)
		return 0;
	calls = now;
	struct queue *q = &queues[CONTROL_IN];
	for (; q->seen != q->used.index; q->seen++) {
		u32 slot = q->used.ring[q->seen % SLOTS].slot % SLOTS;
		hear(&heard[slot], q->used.ring[q->seen % SLOTS].length);
		offer(q, slot, &heard[slot], MESSAGE, 2);
	}
	return 1;
}

// port_read takes what came.
u64 port_read(u8 *to, u64 most)
{
	u64 n = 0;
	while (in && n < most && in->seen != in->used.index) {
		u32 slot = in->used.ring[in->seen % SLOTS].slot % SLOTS;
		u32 length = in->used.ring[in->seen % SLOTS].length;
		while (n < most && taken < length)
			to[n++] = chunks[slot][taken++];
		if (taken < length)
			break;
		taken = 0;
		in->seen++;
		offer(in, slot, chunks[slot], CHUNK, 2);
	}
	return n;
}

// port_write begins to write; what is written must stay as long as port_writes.
void port_write(const u8 *from, u64 length) { offer(out, out->offered.index % SLOTS, from, length, 0); }

u32 port_writes(void) { return out->offered.index != out->used.index; }
