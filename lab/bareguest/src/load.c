// The load of the bare guest. All of it runs at privilege level 3, which is native on every
// host. It does what lab/cmd/guestload does, and reports as package loadproto has it.
#include "load.h"

enum {
	WORDS = PAGE / 8,
	BINS = 160,
	SLOW_TOUCH = 200000, // nanoseconds
	MAX_BAD = 20,
	LINE = 8192,
	REPORT_EVERY = 100000000, // nanoseconds
	ALL_WORK = 0, SLOWLY = 1, NO_WORK = 2,
};

#define STEP 0x9e3779b97f4a7c15ul

// What the command line says; sizes in pages.
static u64 hot, idle, other, seed, wanted_cpus = 1;
static u32 zipf, scattered, pace, async_faults;

struct region regions[16]; // memory that may be used
u32 region_count;
u64 total, stride; // pages of all sets; distance in memory of one page from the next
u64 memory_end;
struct region spared;
static u32 *generations;
static const char *port; // of the agent, 0: none
static u64 ticks_per_ms;   // of the TSC
static u64 bounds[BINS];   // lower bounds of the bins of slow touches, in ticks of the TSC

struct bad { u64 set, page, word, want, got; };
static struct bad bads[MAX_BAD];
static u32 bads_seen, bads_told;
static volatile u64 bad_pages;
static const char *const set_names[] = {"hot", "idle", "other"};

struct worker {
	volatile u64 ops, sum, max, backwards;
	volatile u32 bins[BINS];
	u64 first, pages, random, tsc, clock;
	volatile u32 stopped;
} __attribute__((aligned(64)));
static struct worker workers[MAX_CPUS];
static volatile u32 go, stop;

u64 tsc(void)
{
	u32 a, d;
	asm volatile("lfence; rdtsc; lfence" : "=a"(a), "=d"(d)::"memory");
	return (u64)d << 32 | a;
}

// scale returns a * b / c, which must fit.
static u64 scale(u64 a, u64 b, u64 c)
{
	u64 high, low;
	asm("mul %3; div %4" : "=&a"(low), "=&d"(high) : "0"(a), "r"(b), "r"(c));
	return low;
}

u64 nanoseconds(u64 ticks) { return scale(ticks, 1000000, ticks_per_ms); }

// --- Pages, as in package loadproto ---

static u64 set_seed(u64 s, const char *set)
{
	while (*set)
		s = (s ^ (u8)*set++) * 0x100000001b3;
	return s;
}

static u64 base_of(u64 s, u64 page, u64 generation)
{
	u64 x = s ^ page * 0xd6e8feb86659fd93 ^ generation * 0xca5a826395121157;
	x ^= x >> 32;
	x *= 0xd6e8feb86659fd93;
	x ^= x >> 29;
	x *= 0xff51afd7ed558ccd;
	return x ^ x >> 32;
}

static void fill(volatile u64 *p, u64 base)
{
	for (u32 i = 0; i < WORDS; i += 8, base += 8 * STEP) {
		p[i] = base;
		p[i + 1] = base + STEP;
		p[i + 2] = base + 2 * STEP;
		p[i + 3] = base + 3 * STEP;
		p[i + 4] = base + 4 * STEP;
		p[i + 5] = base + 5 * STEP;
		p[i + 6] = base + 6 * STEP;
		p[i + 7] = base + 7 * STEP;
	}
}

static u32 good(volatile u64 *p, u64 base)
{
	u64 diff = 0;
	for (u32 i = 0; i < WORDS; i += 8, base += 8 * STEP) {
		diff |= p[i] ^ base;
		diff |= p[i + 1] ^ (base + STEP);
		diff |= p[i + 2] ^ (base + 2 * STEP);
		diff |= p[i + 3] ^ (base + 3 * STEP);
		diff |= p[i + 4] ^ (base + 4 * STEP);
		diff |= p[i + 5] ^ (base + 5 * STEP);
		diff |= p[i + 6] ^ (base + 6 * STEP);
		diff |= p[i + 7] ^ (base + 7 * STEP);
	}
	return diff == 0;
}

// page_at returns page n of all sets, hot ones first.
static volatile u64 *page_at(u64 n)
{
	n = n * stride % total;
	for (u32 i = 0; i < region_count; i++) {
		if (n < regions[i].pages)
			return (volatile u64 *)(regions[i].base + n * PAGE);
		n -= regions[i].pages;
	}
	return 0;
}

static u32 look(u32 set, u64 n, volatile u64 *p, u64 base)
{
	if (good(p, base))
		return 1;
	__atomic_fetch_add(&bad_pages, 1, __ATOMIC_RELAXED);
	for (u32 i = 0; i < WORDS; i++, base += STEP) {
		u64 got = p[i];
		if (got == base)
			continue;
		u32 k = __atomic_fetch_add(&bads_seen, 1, __ATOMIC_RELAXED);
		if (k < MAX_BAD)
			bads[k] = (struct bad){set, n, i, base, got};
		break;
	}
	return 0;
}

// --- Lines ---

static u8 text[LINE];
static u32 length;
static u32 crc_table[256];

static void put(u8 c)
{
	if (length < LINE)
		text[length++] = c;
}

static void put_text(const char *s)
{
	while (*s)
		put(*s++);
}

static void put_number(u64 n)
{
	u8 digits[16];
	u32 i = 0;
	do
		digits[i++] = "0123456789abcdefghijklmnopqrstuvwxyz"[n % 36];
	while (n /= 36);
	while (i)
		put(digits[--i]);
}

static void put_field(u64 n)
{
	put(' ');
	put_number(n);
}

// say ends a line with its checksum, and writes it.
static void say(void)
{
	u32 c = ~0u;
	for (u32 i = 0; i < length; i++)
		c = crc_table[(c ^ text[i]) & 255] ^ c >> 8;
	c = ~c;
	put_text(" *");
	for (int shift = 28; shift >= 0; shift -= 4)
		put("0123456789abcdef"[c >> shift & 15]);
	put('\n');
	call_kernel(CALL_WRITE, (u64)text, length);
	length = 0;
}

struct touches { u64 sum, max; u32 bins[BINS]; };

static void put_touches(struct touches *t)
{
	put(' ');
	if (!t->sum) {
		put('-');
		return;
	}
	put_number(t->sum);
	put(',');
	put_number(t->max);
	for (u32 i = 0; i < BINS; i++)
		if (t->bins[i]) {
			put(',');
			put_number(i);
			put(':');
			put_number(t->bins[i]);
		}
}

// --- Clocks ---

// read_clocks reads the CPU's TSC, and KVM's clock at the same moment; 0 if it has none.
static void read_clocks(struct cpu *c, u64 *ticks, u64 *ns)
{
	u32 version;
	*ticks = tsc();
	*ns = 0;
	if (!c->has_clock)
		return;
	do {
		version = c->clock.version;
		asm volatile("lfence" ::: "memory");
		*ticks = tsc();
		u64 delta = *ticks - c->clock.tsc;
		int shift = c->clock.shift;
		delta = shift < 0 ? delta >> -shift : delta << shift;
		*ns = c->clock.nanoseconds + (u64)((unsigned __int128)delta * c->clock.multiplier >> 32);
		asm volatile("lfence" ::: "memory");
	} while (version & 1 || version != c->clock.version);
}

// check_clocks counts jumps back. Each CPU looks at its own clocks.
static void check_clocks(u64 cpu)
{
	struct worker *w = &workers[cpu];
	u64 t, k;
	read_clocks(&cpus[cpu], &t, &k);
	if (t < w->tsc || k < w->clock)
		w->backwards++;
	w->tsc = t;
	w->clock = k;
}

// --- Work ---

static u64 random(struct worker *w)
{
	w->random ^= w->random << 13;
	w->random ^= w->random >> 7;
	w->random ^= w->random << 17;
	return w->random;
}

// pick returns one of the worker's pages: each as likely, or by Zipf's law as lab/cmd/guestload has it.
static u64 pick(struct worker *w)
{
	u64 r = random(w);
	if (!zipf)
		return (unsigned __int128)r * w->pages >> 64;
	u32 bits = 64 - __builtin_clzl(w->pages);
	u64 rank;
	do {
		u32 b = (random(w) >> 32) * bits >> 32;
		rank = (1ul << b) + (random(w) & ((1ul << b) - 1));
	} while (rank > w->pages);
	return rank - 1;
}

static void touch(struct worker *w, u64 ticks)
{
	u32 low = 0, high = BINS;
	while (high - low > 1) {
		u32 mid = (low + high) / 2;
		if (bounds[mid] <= ticks)
			low = mid;
		else
			high = mid;
	}
	w->bins[low]++;
	w->sum += nanoseconds(ticks);
	u64 ns = nanoseconds(ticks);
	u64 max = w->max;
	while (ns > max && !__atomic_compare_exchange_n(&w->max, &max, ns, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
}

static void turn(struct worker *w)
{
	u64 n = w->first + pick(w);
	volatile u64 *p = page_at(n);
	u64 before = tsc();
	(void)p[0];
	u64 took = tsc() - before;
	if (took >= bounds[0])
		touch(w, took);
	u64 s = set_seed(seed, "hot");
	look(0, n, p, base_of(s, n, generations[n]));
	fill(p, base_of(s, n, ++generations[n]));
	w->ops++;
}

static void report(void);
static void obey(void);

static void work(u64 cpu)
{
	struct worker *w = &workers[cpu];
	u64 next = tsc();
	for (u32 i = 0;; i++) {
		if (stop && cpu) {
			w->stopped = 1;
			call_kernel(CALL_REST, 0, 0);
			check_clocks(cpu);
			continue;
		}
		if (!w->pages || pace == NO_WORK || stop || (pace == SLOWLY && i % 256 == 0))
			call_kernel(CALL_REST, 0, 0);
		if (w->pages && pace != NO_WORK && !stop)
			turn(w);
		if (port && cpu == 0 && port_called())
			agent_serve();
		if (i % 16 && pace != NO_WORK && !stop)
			continue;
		u64 now = tsc();
		if (now < next)
			continue;
		next = now + ticks_per_ms * (REPORT_EVERY / 1000000);
		check_clocks(cpu);
		if (cpu == 0) {
			report();
			obey();
		}
	}
}

// The worker of another CPU.
void load_other(u64 cpu)
{
	while (!go)
		asm volatile("pause");
	call_kernel(CALL_CPU, async_faults, 0);
	work(cpu);
}

// --- What the first CPU says and hears ---

static u64 start_of_work;

static void report(void)
{
	static struct touches now, before;
	static u64 sums[MAX_CPUS], seq;
	static u32 bins[MAX_CPUS][BINS];
	u64 ops = 0, backwards = 0, ticks = ~0ul, faults = 0;
	before = now;
	now.sum = now.max = 0;
	for (u32 i = 0; i < BINS; i++)
		now.bins[i] = 0;
	for (u32 k = 0; k < wanted_cpus; k++) {
		struct worker *w = &workers[k];
		ops += w->ops;
		backwards += w->backwards;
		faults += cpus[k].faults;
		if (cpus[k].ticks < ticks)
			ticks = cpus[k].ticks;
		for (u32 i = 0; i < BINS; i++) {
			u32 n = w->bins[i];
			now.bins[i] += n - bins[k][i];
			bins[k][i] = n;
		}
		u64 sum = w->sum, max = __atomic_exchange_n(&w->max, 0, __ATOMIC_RELAXED);
		now.sum += sum - sums[k];
		sums[k] = sum;
		if (max > now.max)
			now.max = max;
	}
	for (; bads_told < bads_seen && bads_told < MAX_BAD; bads_told++) {
		struct bad *b = &bads[bads_told];
		put_text("bad ");
		put_text(set_names[b->set]);
		put_field(b->page);
		put_field(b->word);
		put_field(b->want);
		put_field(b->got);
		say();
	}
	u64 t = nanoseconds(workers[0].tsc - start_of_work);
	put_text("clocks");
	put_field(t);
	put_field(workers[0].clock);
	put_field(ticks);
	put_field(backwards);
	put_field(faults);
	say();
	put('r');
	put_field(++seq);
	put_field(t);
	put_field(ops);
	put_field(bad_pages);
	put_touches(&now);
	put_touches(&before);
	say();
}

u64 set_size(u32 set) { return set == 0 ? hot : set == 1 ? idle : other; }

static void check(void)
{
	u64 n = 0;
	stop = 1;
	for (u32 k = 1; k < wanted_cpus; k++)
		while (!workers[k].stopped)
			asm volatile("pause");
	for (u32 set = 0; set < 3; set++) {
		u64 s = set_seed(seed, set_names[set]), bad = 0, size = set_size(set);
		for (u64 i = 0; i < size; i++, n++)
			bad += !look(set, i, page_at(n), base_of(s, i, set ? 0 : generations[i]));
		if (!size)
			continue;
		put_text("set ");
		put_text(set_names[set]);
		put_field(size);
		put_field(bad);
		say();
	}
	put_text("final");
	put_field(total);
	put_field(bad_pages);
	say();
}

u32 works(void) { return hot && pace != NO_WORK && !stop; }

static u32 is(const u8 *line, const char *word)
{
	while (*word && *line == (u8)*word)
		line++, word++;
	return *line == 0 && *word == 0;
}

static void obey(void)
{
	static u8 line[32];
	static u32 n;
	long c;
	while ((c = call_kernel(CALL_READ, 0, 0)) >= 0) {
		if (c != '\n') {
			if (n < sizeof line - 1)
				line[n++] = c;
			continue;
		}
		line[n] = 0;
		n = 0;
		if (is(line, "check"))
			check();
		else if (is(line, "poweroff"))
			call_kernel(CALL_OUT, 0x604, 0x2000); // where qboot puts the ACPI registers
		else if (is(line, "reboot"))
			call_kernel(CALL_OUT, 0xcf9, 0x0606);
	}
}

static void fail(const char *why)
{
	put_text("fail ");
	put_text(why);
	say();
	for (;;)
		call_kernel(CALL_REST, 0, 0);
}

// --- Beginning ---

struct start_info {
	u32 magic, version, flags, modules;
	u64 module_list, command_line, rsdp, map;
	u32 map_entries, reserved;
};

struct map_entry { u64 at, size; u32 type, reserved; };

// option returns what follows a name on the command line, or 0.
static const char *option(const char *line, const char *name)
{
	for (; *line; line++) {
		const char *a = line, *b = name;
		while (*b && *a == *b)
			a++, b++;
		if (!*b)
			return a;
	}
	return 0;
}

static u64 number(const char *line, const char *name, u64 otherwise)
{
	const char *s = option(line, name);
	if (!s)
		return otherwise;
	u64 n = 0;
	for (; *s >= '0' && *s <= '9'; s++)
		n = n * 10 + (*s - '0');
	return *s == 'M' ? n << 20 : n;
}

static u64 divisor(u64 a, u64 b)
{
	while (b) {
		u64 r = a % b;
		a = b;
		b = r;
	}
	return a;
}

static void read_command_line(const char *line)
{
	const char *s;
	hot = number(line, "vacate.hot=", 0) / PAGE;
	idle = number(line, "vacate.idle=", 0) / PAGE;
	other = number(line, "vacate.other=", 0) / PAGE;
	seed = number(line, "vacate.seed=", 0);
	wanted_cpus = number(line, "vacate.workers=", 1);
	async_faults = number(line, "vacate.async=", 0);
	zipf = (s = option(line, "vacate.access=")) && *s == 'z';
	scattered = (s = option(line, "vacate.place=")) && *s == 'm';
	port = option(line, "vacate.port=");
	if ((s = option(line, "vacate.mode=")) && *s == 'i')
		pace = NO_WORK;
	else if ((s = option(line, "vacate.pace=")) && *s == 's')
		pace = SLOWLY;
}

// find_memory takes all from 4 MiB on, in whole units of 2 MiB.
static void find_memory(struct start_info *info)
{
	struct map_entry *m = (struct map_entry *)info->map;
	u64 unit = 2 << 20, pages = 0;
	for (u32 i = 0; i < info->map_entries && region_count < 16; i++) {
		if (m[i].type != 1)
			continue;
		u64 from = (m[i].at + unit - 1) / unit * unit, to = (m[i].at + m[i].size) / unit * unit;
		if (from < 4 << 20)
			from = 4 << 20;
		if (to > 16ul << 30)
			to = 16ul << 30;
		if (from >= to)
			continue;
		regions[region_count++] = (struct region){from, (to - from) / PAGE};
		pages += (to - from) / PAGE;
	}
	u64 table = (hot * sizeof(u32) + unit - 1) / unit * unit / PAGE, own = table;
	if (port)
		own += (agent_needs(total) + unit - 1) / unit * unit / PAGE;
	if (!region_count || regions[0].pages < own || pages - own < total)
		fail("there is too little memory for the load");
	memory_end = regions[region_count - 1].base + regions[region_count - 1].pages * PAGE;
	generations = (u32 *)regions[0].base;
	spared = (struct region){regions[0].base, table};
	regions[0].base += own * PAGE;
	regions[0].pages -= own;
}

static void calibrate(void)
{
	call_kernel(CALL_APIC, 0, 0);
	u64 before = tsc(), ns = 0, ticks = 0;
	for (volatile u32 i = 0; i < 20000000; i++)
		if (i % 1000000 == 0 && tsc() - before > 50000000)
			break;
	ns = call_kernel(CALL_APIC, 0, 0);
	ticks = tsc() - before;
	ticks_per_ms = scale(ticks, 1000000, ns);
	u64 bound = SLOW_TOUCH * 1024ul;
	for (u32 i = 0; i < BINS; i++, bound += bound / 10)
		bounds[i] = scale(bound / 1024, ticks_per_ms, 1000000);
}

void load_main(void)
{
	struct start_info *info = (struct start_info *)start_info;
	for (u32 i = 0; i < 256; i++) {
		u32 c = i;
		for (u32 k = 0; k < 8; k++)
			c = c & 1 ? c >> 1 ^ 0xedb88320 : c >> 1;
		crc_table[i] = c;
	}
	read_command_line((const char *)info->command_line);
	if (wanted_cpus < 1 || wanted_cpus > MAX_CPUS)
		fail("there can be 1 to 4 workers, one for each CPU");
	total = hot + idle + other;
	if (!total)
		total = 1;
	stride = 1;
	if (scattered)
		for (stride = total / 2 + total / 8 + 1; divisor(stride, total) != 1; stride++)
			;
	find_memory(info);
	calibrate();
	u64 n = 0;
	for (u32 set = 0; set < 3; set++) {
		u64 s = set_seed(seed, set_names[set]), size = set_size(set);
		for (u64 i = 0; i < size; i++, n++)
			fill(page_at(n), base_of(s, i, 0));
	}
	for (u32 k = 0; k < wanted_cpus; k++) {
		workers[k].first = hot * k / wanted_cpus;
		workers[k].pages = hot * (k + 1) / wanted_cpus - workers[k].first;
		workers[k].random = base_of(seed, k, 1) | 1;
	}
	if (wanted_cpus > 1) {
		call_kernel(CALL_START, 0, 0);
		for (u64 since = tsc(); *(volatile u32 *)&cpus_started < wanted_cpus;)
			if (tsc() - since > ticks_per_ms * 5000)
				fail("the other CPUs did not start");
	}
	call_kernel(CALL_CPU, async_faults, 0);
	if (port)
		agent_begin((u8 *)(spared.base + spared.pages * PAGE), port);
	go = 1;
	put_text("hello");
	put_field(1);
	put_field(hot + idle + other);
	put_field(wanted_cpus);
	say();
	start_of_work = tsc();
	work(0);
}
