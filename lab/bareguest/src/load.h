// What the parts of the load know of each other.
#include "guest.h"

enum { PAGE = 4096 };

// load.c

u64 tsc(void);
u64 nanoseconds(u64 ticks);

// Sets of pages.
enum { HOT, IDLE, OTHER, SETS };

struct region { u64 base, pages; };

// The memory for all sets, and the pages of all sets in it: page n is n * stride % total from the
// beginning of the regions on.
extern struct region regions[16];
extern u32 region_count;
extern u64 total, stride;
extern u64 memory_end;       // where the last region ends
extern struct region spared; // memory of the load's own that it uses all the time
u64 set_size(u32 set);
u32 works(void);

// port.c

u32 port_open(const char *name);
u32 port_called(void);
u64 port_read(u8 *to, u64 most);
void port_write(const u8 *from, u64 length);
u32 port_writes(void);

// agent.c

u64 agent_needs(u64 pages);
void agent_begin(u8 *memory, const char *port);
void agent_serve(void);
