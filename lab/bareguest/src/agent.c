// What the agent of a guest with Linux does (docs/agent.md): it tells the host what each page is
// used for. Package agent (internal/guest/agent) has the protocol.
#include "load.h"

enum {
	HEADER = 32,
	REQUEST = 56,
	PREPARE = 1,
	ASK = 2,
	DONE = 3,
	SURVEY = 4,
	REFUSAL = 5,
	FRESH = 1,
};

// What a page may be, as package pageclass has it: kind, class, flags, owner.
enum { UNKNOWN, USED, UNUSED, OTHERS, KERNEL, FREE, PALETTE };
static const u8 palette[PALETTE][4] = {
	[UNKNOWN] = {0, 0, 0, 0},
	[USED] = {16, 6, 1 | 16, 1},  // of the process that works: anonymous, mapped, accessed
	[UNUSED] = {16, 6, 16, 1},    // the same, not accessed
	[OTHERS] = {16, 9, 16, 2},    // of another process
	[KERNEL] = {7, 2, 0, 0},      // stacks of the kernel, and what else it needs all the time
	[FREE] = {1, 10, 0, 0},
};

extern u8 end_of_guest[];

static u32 castagnoli[256];
static u8 *used_for; // by page from the beginning of the regions on
static u8 *answer;
static u64 length;
static u8 request[1024];
static u64 have;
static u64 prepared; // when; 0: never
static u64 answered;

// agent_needs returns how many bytes it needs for a load of so many pages.
u64 agent_needs(u64 pages) { return 2 * pages + 6 * set_size(HOT) + 65536; }

static void put(u8 c) { answer[length++] = c; }

static void put_number(u64 n)
{
	for (; n >= 0x80; n >>= 7)
		put(n | 0x80);
	put(n);
}

static void put_difference(long n) { put_number((u64)n << 1 ^ (u64)(n >> 63)); }

static void put_text(const char *s)
{
	u64 n = 0;
	while (s[n])
		n++;
	put_number(n);
	while (*s)
		put(*s++);
}

static u32 checksum(const u8 *p, u64 n)
{
	u32 c = ~0u;
	while (n--)
		c = castagnoli[(c ^ *p++) & 255] ^ c >> 8;
	return ~c;
}

static void set32(u8 *p, u32 v)
{
	for (u32 i = 0; i < 4; i++, v >>= 8)
		p[i] = v;
}

static u32 get32(const u8 *p) { return p[0] | p[1] << 8 | p[2] << 16 | (u32)p[3] << 24; }

// send sends the answer, whose body is complete.
static void send(u32 type)
{
	for (u32 i = 0; i < HEADER; i++)
		answer[i] = i < 8 ? request[i] : 0;
	answer[8] = type;
	set32(answer + 12, length - HEADER);
	for (u32 i = 16; i < 24; i++)
		answer[i] = request[i]; // whose answer it is
	set32(answer + 24, checksum(answer + HEADER, length - HEADER));
	set32(answer + 28, checksum(answer, 28));
	port_write(answer, length);
	answered++;
}

static void put_costs(u64 since)
{
	u64 us = nanoseconds(tsc() - since) / 1000;
	put_number(us);
	put_number(us);
	put_number(prepared ? nanoseconds(tsc() - prepared) / 1000 + 1 : 0);
	put_number(prepared ? 1 : 0);
}

static void put_process(u64 pid, u32 on_cpu, const char *name)
{
	put_number(pid);
	put(on_cpu ? 7 : 4); // active, on a CPU; how much it used of late is known
	put_number(on_cpu ? 0 : 60000000); // since it ran
	put_number(0);
	put_number(on_cpu ? 100000 : 0); // of the last 100 ms
	put_text(name);
}

// Runs of pages that are alike are told at once.
static u64 run_of, run_pages;

static void end_run(void)
{
	if (run_pages == 1) {
		put_number(run_of << 1);
	} else if (run_pages) {
		put_number(run_of << 1 | 1);
		put_number(run_pages - 2);
	}
	run_pages = 0;
}

static void put_pages(u64 of, u64 pages)
{
	if (of != run_of)
		end_run();
	run_of = of;
	run_pages += pages;
}

static void put_all_pages(void)
{
	u64 at = 0, position = 0, end = ((u64)end_of_guest + PAGE - 1) / PAGE;
	put_number(memory_end / PAGE);
	put_pages(UNKNOWN, 0x100000 / PAGE);
	put_pages(KERNEL, end - 0x100000 / PAGE);
	at = end;
	for (u32 i = 0; i < region_count; i++) {
		u64 first = regions[i].base / PAGE;
		if (i == 0) {
			put_pages(FREE, spared.base / PAGE - at);
			put_pages(USED, spared.pages);
			at = spared.base / PAGE + spared.pages;
			put_pages(UNUSED, first - at); // the agent's own
			at = first;
		}
		put_pages(UNKNOWN, first - at);
		u64 k = 0;
		for (; k < regions[i].pages && position < total; k++)
			put_pages(used_for[position++], 1);
		put_pages(FREE, regions[i].pages - k);
		at = first + regions[i].pages;
	}
	end_run();
}

static u64 frame_at(u64 position)
{
	for (u32 i = 0; i < region_count; i++) {
		if (position < regions[i].pages)
			return regions[i].base / PAGE + position;
		position -= regions[i].pages;
	}
	return 0;
}

// put_sequence tells the hot pages as the load knows them, one behind the other.
static void put_sequence(void)
{
	u64 behind = 0, size = set_size(HOT);
	put_number(size);
	for (u64 n = 0, position = 0; n < size;) {
		u64 first = frame_at(position), pages = 0;
		do {
			pages++;
			n++;
			position = (position + stride) % total;
		} while (n < size && frame_at(position) == first + pages);
		put_difference(first - behind);
		put_number(pages);
		behind = first + pages;
	}
}

static void answer_request(u64 since)
{
	length = HEADER;
	if (request[8] == PREPARE) {
		prepared = tsc();
		put_costs(since);
		send(DONE);
		return;
	}
	put_costs(since);
	put(FRESH);
	put_number(2);
	put_process(1, works(), "hot");
	put_process(2, 0, "other");
	put_number(PALETTE);
	for (u32 i = 0; i < PALETTE; i++)
		for (u32 k = 0; k < 4; k++)
			put(palette[i][k]);
	put_all_pages();
	put_sequence();
	if (length - HEADER > get32(request + HEADER + 8)) {
		length = HEADER;
		for (const char *s = "the answer would be longer than the host reads"; *s; s++)
			put(*s);
		send(REFUSAL);
		return;
	}
	send(SURVEY);
}

// is_request reports whether a whole request is at the beginning.
static u32 is_request(void)
{
	static const u8 magic[8] = "vacateG\1";
	for (u32 i = 0; i < 8; i++)
		if (request[i] != magic[i])
			return 0;
	return get32(request + 28) == checksum(request, 28) && get32(request + 12) == REQUEST - HEADER &&
		(request[8] == PREPARE || request[8] == ASK) &&
		get32(request + 24) == checksum(request + HEADER, REQUEST - HEADER);
}

static void drop(u64 n)
{
	have -= n;
	for (u64 i = 0; i < have; i++)
		request[i] = request[i + n];
}

// agent_serve answers what came since.
void agent_serve(void)
{
	u64 since = tsc();
	for (;;) {
		have += port_read(request + have, sizeof request - have);
		if (have < REQUEST || (answered && port_writes()))
			return;
		if (is_request()) {
			answer_request(since);
			drop(REQUEST);
		} else {
			drop(1);
		}
	}
}

// agent_begin gets ready, with memory of its own, when the sets are in place.
void agent_begin(u8 *memory, const char *port)
{
	for (u32 i = 0; i < 256; i++) {
		u32 c = i;
		for (u32 k = 0; k < 8; k++)
			c = c & 1 ? c >> 1 ^ 0x82f63b78 : c >> 1;
		castagnoli[i] = c;
	}
	used_for = memory;
	answer = memory + total;
	u64 position = 0;
	for (u32 set = 0; set < SETS; set++)
		for (u64 i = 0; i < set_size(set); i++) {
			used_for[position] = set == HOT ? USED : set == IDLE ? UNUSED : OTHERS;
			position = (position + stride) % total;
		}
	port_open(port);
}
